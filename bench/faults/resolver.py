"""A DNS server of our own on a loopback address: answers A questions from a table, with NXDOMAIN, or not at all."""

import asyncio
import struct

TTL_S = 1
NXDOMAIN = 3


class Resolver(asyncio.DatagramProtocol):
    def __init__(self):
        self.addresses = {}
        self.mode = "answer"
        self.questions = 0

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, peer):
        self.questions += 1
        if self.mode == "frozen":
            return
        reply = self.reply(data)
        if reply:
            self.transport.sendto(reply, peer)

    def reply(self, data):
        """By RFC 1035, 4.1: header, the question as it came, answers that point to its name."""
        labels, at = [], 12
        while at < len(data) and data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode("ascii", "replace").lower())
            at += 1 + data[at]
        question = data[12 : at + 5]
        if len(question) < 5:
            return None
        kind = struct.unpack(">H", data[at + 1 : at + 3])[0]
        found = self.addresses.get(".".join(labels)) if self.mode == "answer" else None
        code = 0 if found else NXDOMAIN
        answers = [
            b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, TTL_S, 4) + bytes(int(part) for part in address.split("."))
            for address in (found or [] if kind == 1 else [])
        ]
        flags = 0x8580 | code
        return data[:2] + struct.pack(">HHHHH", flags, 1, len(answers), 0, 0) + question + b"".join(answers)


async def serve(host, port=53):
    """Raises OSError where the port cannot be had, as without root."""
    loop = asyncio.get_running_loop()
    transport, resolver = await loop.create_datagram_endpoint(Resolver, local_addr=(host, port))
    return transport, resolver
