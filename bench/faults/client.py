"""Raw HTTP/1.1 callers. They see what a network sees: every status, byte, reset and silence, with the time."""

import asyncio
import itertools
import json
import socket
import struct
import time
from dataclasses import dataclass, field

import sse

WORDS = 60
_ids = itertools.count(1)


def word(index):
    return f"word{index} "


def text_of(count):
    """What upstreams say: numbered words, so that loss and repetition show."""
    return "".join(word(index) for index in range(count))


@dataclass
class Answer:
    """What a caller saw of one call. Times are of the monotonic clock, which all processes of the machine share."""

    id: str
    stream: bool
    t_start: float
    t_head: float | None = None
    t_first: float | None = None
    t_end: float = 0.0
    status: int | None = None
    headers: dict = field(default_factory=dict)
    text: str = ""
    pieces: int = 0
    finish: str | None = None
    done: bool = False
    error: object = None
    model: str | None = None
    usage: dict | None = None
    served_by: str | None = None
    garbled: int = 0
    bad_utf8: int = 0
    comments: int = 0
    # complete: ended as HTTP says; cut: ended early; reset; timeout: the caller gave up; unreachable; left: by wish.
    end: str = "complete"
    body: bytes = b""
    size: int = 0

    @property
    def wall_s(self):
        return self.t_end - self.t_start

    @property
    def ttft_s(self):
        return None if self.t_first is None else self.t_first - self.t_start


class _Ended(Exception):
    def __init__(self, how):
        super().__init__(how)
        self.how = how


class _Wire:
    """Reads HTTP from a connection."""

    def __init__(self, reader):
        self.reader = reader

    async def _wait(self, awaitable):
        try:
            return await awaitable
        except asyncio.IncompleteReadError as error:
            raise _Ended("cut") from error
        except ConnectionError as error:
            raise _Ended("reset") from error

    async def head(self):
        raw = await self._wait(self.reader.readuntil(b"\r\n\r\n"))
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                headers[name.strip().lower()] = value.strip()
        return int(first.split(" ", 2)[1]), headers

    async def pieces(self, headers):
        """The body's pieces, as they come; raises `_Ended` where it ends early."""
        if "chunked" in headers.get("transfer-encoding", ""):
            while True:
                size = int((await self._wait(self.reader.readuntil(b"\r\n"))).split(b";")[0], 16)
                if size == 0:
                    await self._wait(self.reader.readuntil(b"\r\n"))
                    return
                while size:
                    piece = await self._wait(self.reader.read(min(size, 65536)))
                    if not piece:
                        raise _Ended("cut")
                    size -= len(piece)
                    yield piece
                await self._wait(self.reader.readexactly(2))
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left:
                piece = await self._wait(self.reader.read(min(left, 65536)))
                if not piece:
                    raise _Ended("cut")
                left -= len(piece)
                yield piece
        else:
            while piece := await self._wait(self.reader.read(65536)):
                yield piece


def new_id(prefix="q"):
    return f"{prefix}{next(_ids)}"


def body_of(model, request_id, stream, messages=None, **more):
    """A chat request whose id travels in the prompt, so that it survives any gateway."""
    messages = messages or [{"role": "user", "content": f"[id={request_id}] Count."}]
    body = {"model": model, "messages": messages, "max_tokens": 256, "stream": stream, **more}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def head_of(target, size, extra=()):
    lines = [
        f"POST {target.path} HTTP/1.1", f"Host: {target.host}:{target.port}", "Content-Type: application/json",
        f"Content-Length: {size}", "Accept: */*", *(f"{name}: {value}" for name, value in extra),
    ]  # fmt: skip
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass(frozen=True)
class Target:
    """Where a subject listens, and which headers its callers send."""

    port: int
    host: str = "127.0.0.1"
    path: str = "/v1/chat/completions"
    headers: tuple = ()


async def call(
    target, model, stream=True, limit_s=30.0, request_id=None, leave_after_s=None, leave_at_piece=None, extra=(),
    reset=True, connection=None, **more,
):  # fmt: skip
    """One call. `leave_after_s` (from the moment it is sent) and `leave_at_piece` make the caller hang up; with
    `connection` the call uses that keep-alive connection and leaves it open."""
    answer = Answer(request_id or new_id(), stream, time.monotonic())
    body = body_of(model, answer.id, stream, **more)
    writer = None

    async def exchange():
        nonlocal writer
        if connection:
            reader, writer = connection
        else:
            try:
                reader, writer = await asyncio.open_connection(target.host, target.port, limit=1 << 20)
            except OSError as error:
                raise _Ended("unreachable") from error
        # One segment: a gateway must not depend on it, but most callers send so.
        writer.write(head_of(target, len(body), (*target.headers, *extra)) + body)
        await _read(_Wire(reader), answer, leave_at_piece)

    wait_s = limit_s if leave_after_s is None else leave_after_s
    try:
        await asyncio.wait_for(exchange(), wait_s)
    except asyncio.TimeoutError:
        answer.end = "timeout" if leave_after_s is None else "left"
    except _Ended as ended:
        answer.end = ended.how
    except (ConnectionError, ValueError, asyncio.LimitOverrunError) as error:
        answer.end = "reset" if isinstance(error, ConnectionError) else "cut"
    answer.t_end = time.monotonic()
    if writer and (not connection or answer.end != "complete"):
        hang_up(writer, reset and answer.end == "left")
    return answer


def hang_up(writer, with_reset=False):
    if with_reset:
        sock = writer.get_extra_info("socket")
        if sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


async def _read(wire, answer, leave_at_piece):
    answer.status, answer.headers = await wire.head()
    answer.t_head = time.monotonic()
    parser = sse.Parser() if answer.headers.get("content-type", "").startswith("text/event-stream") else None
    kept = bytearray()
    try:
        async for piece in wire.pieces(answer.headers):
            answer.size += len(piece)
            if len(kept) < 1 << 20:
                kept += piece
            if parser:
                for data in parser.feed(piece):
                    _event(answer, data)
                if leave_at_piece and answer.pieces >= leave_at_piece:
                    raise _Ended("left")
    finally:
        answer.body = bytes(kept[:2000])
        if parser:
            answer.comments, answer.bad_utf8 = parser.comments, parser.bad_utf8
    if not parser:
        _whole(answer, bytes(kept))


def _event(answer, data):
    if data.strip() == "[DONE]":
        answer.done = True
        return
    try:
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError("not an object")
    except ValueError:
        answer.garbled += 1
        return
    if chunk.get("error"):
        answer.error = chunk["error"]
        return
    answer.model = chunk.get("model") or answer.model
    answer.usage = chunk.get("usage") or answer.usage
    answer.served_by = chunk.get("system_fingerprint") or answer.served_by
    for choice in chunk.get("choices") or []:
        content = (choice.get("delta") or {}).get("content")
        if content:
            answer.t_first = answer.t_first or time.monotonic()
            answer.text += content
            answer.pieces += 1
        answer.finish = choice.get("finish_reason") or answer.finish


def _whole(answer, body):
    try:
        value = json.loads(body)
    except ValueError:
        answer.garbled += bool(body)
        return
    if not isinstance(value, dict):
        return
    answer.error = value.get("error") or (value if answer.status >= 400 else None)
    answer.model, answer.usage = value.get("model"), value.get("usage")
    answer.served_by = value.get("system_fingerprint")
    for choice in value.get("choices") or []:
        answer.text += (choice.get("message") or {}).get("content") or ""
        answer.finish = choice.get("finish_reason") or answer.finish
    if answer.text:
        answer.t_first = time.monotonic()


async def send_raw(port, pieces, limit_s, host="127.0.0.1", half_close=False):
    """Sends bytes (an item may be a number: seconds to wait) and reads until the end. Returns (bytes, how, seconds)."""
    started = time.monotonic()
    received = bytearray()
    how = "timeout"

    async def exchange():
        nonlocal how
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)

        async def send():
            for piece in pieces:
                if isinstance(piece, (int, float)):
                    await asyncio.sleep(piece)
                else:
                    writer.write(piece)
                    await writer.drain()
            if half_close:
                writer.write_eof()

        sending = asyncio.create_task(send())
        try:
            while piece := await reader.read(65536):
                received.extend(piece)
            how = "closed"
        except ConnectionError:
            how = "reset"
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.transport.abort()

    try:
        await asyncio.wait_for(exchange(), limit_s)
    except asyncio.TimeoutError:
        pass
    except OSError:
        how = "unreachable"
    return bytes(received), how, time.monotonic() - started


def status_of(received):
    """The status of the first answer in raw bytes, or None."""
    if received.startswith(b"HTTP/1.") and len(received) > 12:
        return int(received[9:12])
    return None
