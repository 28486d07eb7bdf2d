"""Callers that send a byte now and then, in a process of their own: so many connections, and clocks that nothing else
holds up."""

import asyncio
import json
import selectors
import socket
import sys
import time

BYTE_EVERY_S = 10.0
WATCHED_S = 36.0


async def run(port, counts, head, body):
    """How `counts["heads"]` callers fare who are slow within `head`, and `counts["bodies"]` who are slow in `body`: for
    each when it was closed, or None, and what the first of them was told."""
    asked = {"port": port, **counts, "head": head.decode("latin-1"), "body": body.decode("latin-1")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        told, _ = await process.communicate(json.dumps(asked).encode())
    finally:
        if process.returncode is None:
            process.kill()
    return json.loads(told)


class Slow:
    def __init__(self, port, first, rest):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setblocking(False)
        self.socket.send(first)
        self.began = time.monotonic()
        self.rest, self.sent_at, self.closed_after = rest, 0.0, None
        self.received = b""

    def read(self):
        """Whether the connection has ended."""
        try:
            piece = self.socket.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            piece = b""
        self.received += piece
        if not piece:
            self.closed_after = time.monotonic() - self.began
        return not piece

    def write(self):
        now = time.monotonic() - self.began
        if self.closed_after is not None or now - self.sent_at < BYTE_EVERY_S:
            return
        self.sent_at = now
        try:
            self.socket.send(self.rest[:1])
            self.rest = self.rest[1:]
        except OSError:
            # What ended it is read.
            pass


def main():
    asked = json.load(sys.stdin)
    head, body = asked["head"].encode("latin-1"), asked["body"].encode("latin-1")
    groups = {
        "heads": [Slow(asked["port"], head[:20], head[20:]) for _ in range(asked["heads"])],
        "bodies": [Slow(asked["port"], head + body[:5], body[5:]) for _ in range(asked["bodies"])],
    }
    everyone = [slow for group in groups.values() for slow in group]
    selector = selectors.DefaultSelector()
    for slow in everyone:
        selector.register(slow.socket, selectors.EVENT_READ, slow)
    ends, open_still = time.monotonic() + WATCHED_S, len(everyone)
    while time.monotonic() < ends and open_still:
        for key, _ in selector.select(0.2):
            if key.data.read():
                selector.unregister(key.fileobj)
                open_still -= 1
        for slow in everyone:
            slow.write()
    told = {
        name: {
            "closed_after_s": [slow.closed_after for slow in group],
            "answer": group[0].received[:60].decode("latin-1"),
        }
        for name, group in groups.items()
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
