"""HTTP/2 frames for callers that abuse them (RFC 9113, 6). Just enough to send; of what comes back, only how each
stream was answered is read."""

import asyncio
import re
import struct
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x9
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
PADDED, PRIORITY = 0x8, 0x20
INITIAL_WINDOW_SIZE = 0x4
# RFC 7541, A: the only statuses of the static table. B: the Huffman codes of digits.
_STATUSES = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}
_DIGITS = {f"{code:05b}": str(code) for code in range(3)} | {f"{code + 22:06b}": str(code) for code in range(3, 10)}


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(**values):
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", int(key[1:]), value) for key, value in values.items()))


def _string(text):
    """RFC 7541, 5.1 and 5.2: the length in a prefix of seven bits, then the text as it is."""
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    head, size = b"\x7f", size - 127
    while size >= 128:
        head, size = head + bytes([size % 128 + 128]), size // 128
    return head + bytes([size]) + text


def literal(name, value):
    """A header field without indexing and without Huffman coding."""
    return b"\x00" + _string(name) + _string(value)


def request_headers(port, path=b"/v1/chat/completions", extra=(), pseudo=()):
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"127.0.0.1:%d" % port),
        *pseudo, (b"content-type", b"application/json"), *extra,
    ]  # fmt: skip
    return b"".join(literal(name, value) for name, value in fields)


def fields_of(target):
    """The headers that callers of this target send besides."""
    return tuple((name.lower().encode(), value.encode()) for name, value in target.headers)


def status_of(block):
    """The status in the first header block of a connection, where no dynamic table is yet; None if it is not first."""
    at = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        # A new size of the table, of one byte or with further ones (RFC 7541, 5.1).
        more = block[at] & 0x1F == 0x1F
        at += 1
        while more and at < len(block):
            more = bool(block[at] & 0x80)
            at += 1
    if at >= len(block):
        return None
    if block[at] & 0x80:
        return _STATUSES.get(block[at] & 0x7F)
    # A literal whose name is one of the static table's `:status`, in each of the three forms.
    index = block[at] & (0x3F if block[at] & 0x40 else 0x0F)
    size = block[at + 1] & 0x7F if at + 1 < len(block) else 0
    text = block[at + 2 : at + 2 + size]
    if index not in _STATUSES or not text:
        return None
    digits = _unhuffed(text) if block[at + 1] & 0x80 else text.decode("latin-1")
    return int(digits) if re.fullmatch("[0-9]{3}", digits) else None


def _unhuffed(text):
    """Digits only."""
    bits, digits = "".join(f"{byte:08b}" for byte in text), ""
    while bits:
        size = next((size for size in (5, 6) if bits[:size] in _DIGITS), None)
        if size is None:
            break
        digits, bits = digits + _DIGITS[bits[:size]], bits[size:]
    return digits


class Connection:
    """One connection; what the server sends is read and sorted by a task."""

    def __init__(self):
        self.frames = {}
        # By stream.
        self.statuses = {}
        self.resets = {}
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
                    self._sort(kind, buffer[4], int.from_bytes(buffer[5:9], "big"), buffer[9 : 9 + size])
                    buffer = buffer[9 + size :]
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.closed.set()

    def _sort(self, kind, flags, stream, payload):
        if kind == SETTINGS:
            self.is_h2.set()
        elif kind == RST_STREAM:
            self.resets[stream] = int.from_bytes(payload, "big")
        elif kind == HEADERS and stream not in self.statuses:
            skipped = (1 if flags & PADDED else 0) + (5 if flags & PRIORITY else 0)
            self.statuses[stream] = status_of(payload[skipped:])

    async def outcome(self, stream, limit_s):
        """(status or None, how): how the server took the request on this stream: answered, reset, closed (with or
        without GOAWAY) or timeout."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if stream in self.statuses:
                return self.statuses[stream], "answered"
            if stream in self.resets:
                return None, "reset"
            if self.closed.is_set() or GOAWAY in self.frames:
                return None, "closed"
            await asyncio.sleep(0.01)
        return None, "timeout"

    async def speaks_h2(self, limit_s=1.0):
        """Whether the server has said so, with its first SETTINGS."""
        try:
            await asyncio.wait_for(self.is_h2.wait(), limit_s)
        except asyncio.TimeoutError:
            pass
        return self.is_h2.is_set()

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
