"""HTTP/2 frames for callers that abuse them (RFC 9113, 6). Just enough to send; what comes back is only sorted."""

import asyncio
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x9
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
INITIAL_WINDOW_SIZE = 0x4


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(**values):
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", int(key[1:]), value) for key, value in values.items()))


def _string(text):
    return bytes([len(text)]) + text


def literal(name, value):
    """A header field without indexing and without Huffman coding; name and value below 127 bytes."""
    return b"\x00" + _string(name) + _string(value)


def request_headers(port, path=b"/v1/chat/completions", extra=()):
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"127.0.0.1:%d" % port),
        (b"content-type", b"application/json"), *extra,
    ]  # fmt: skip
    return b"".join(literal(name, value) for name, value in fields)


class Connection:
    """One connection; what the server sends is read and sorted by a task."""

    def __init__(self):
        self.frames = {}
        self.closed = asyncio.Event()
        self.is_h2 = asyncio.Event()
        self.first = b""

    async def open(self, port, first=None):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        self.writer.write(PREFACE + (settings() if first is None else first))
        self.task = asyncio.create_task(self._read())
        return self

    async def _read(self):
        buffer = b""
        try:
            while piece := await self.reader.read(65536):
                self.first = (self.first + piece)[:200]
                buffer += piece
                while len(buffer) >= 9 and not self.first.startswith(b"HTTP/1"):
                    size = int.from_bytes(buffer[:3], "big")
                    if len(buffer) < 9 + size:
                        break
                    kind = buffer[3]
                    self.frames[kind] = self.frames.get(kind, 0) + 1
                    if kind == SETTINGS:
                        self.is_h2.set()
                    buffer = buffer[9 + size :]
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.closed.set()

    async def flood(self, pieces, limit_s):
        """Sends until the server closes or the limit; returns how many pieces were taken."""
        sent = 0

        async def send():
            nonlocal sent
            for piece in pieces:
                if self.closed.is_set():
                    return
                self.writer.write(piece)
                await self.writer.drain()
                sent += 1

        try:
            await asyncio.wait_for(send(), limit_s)
        except (asyncio.TimeoutError, ConnectionError):
            pass
        return sent

    async def is_closed(self, limit_s):
        try:
            await asyncio.wait_for(self.closed.wait(), limit_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self):
        self.writer.transport.abort()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
