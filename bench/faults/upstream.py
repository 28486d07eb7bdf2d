"""A scripted upstream: an OpenAI-compatible server that misbehaves as it is told and writes down what it saw.

A process of its own, so that it can be frozen and can crash. Orders come as JSON lines on standard input, each is
answered by a line on standard output. A behaviour is a list of steps: the n-th attempt of a request, by the id in its
prompt, gets the n-th step, further ones the last. Fields of a step: see `script.Step`."""

import argparse
import asyncio
import json
import logging
import os
import re
import socket
import struct
import sys
import time

import answers
from script import Upstream

_LAST_WORD = re.compile(r"word(\d+) ?$")
_ID = re.compile(rb"\[id=([\w-]+)\]")
MAX_HEAD_BYTES = 1 << 20
# Larger requests are refused, as engines do, before they are read.
MAX_BODY_BYTES = 64 << 20


class Gone(Exception):
    """The peer closed the connection."""


class Connection(asyncio.Protocol):
    def __init__(self, upstream):
        self.upstream = upstream
        self.buffer = bytearray()
        self.task = None
        self.gone = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.record = None

    def connection_made(self, transport):
        self.transport = transport
        self.socket = transport.get_extra_info("socket")
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(65536)
        self.upstream.connections.add(self)
        self.upstream.accepted += 1

    def data_received(self, data):
        self.buffer += data
        self.next_request()

    def pause_writing(self):
        self.writable.clear()

    def resume_writing(self):
        self.writable.set()

    def eof_received(self):
        self.leave()
        return False

    def connection_lost(self, _exc):
        self.leave()
        self.upstream.connections.discard(self)

    def leave(self):
        if not self.gone.is_set():
            self.gone.set()
            self.writable.set()
            if self.record and self.record["end"] is None:
                self.record["gone"] = time.monotonic()

    def next_request(self):
        if self.task and not self.task.done():
            return
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > MAX_HEAD_BYTES:
                self.transport.abort()
            return
        head = bytes(self.buffer[:end])
        length = re.search(rb"(?im)^content-length:[ \t]*(\d+)", head)
        if int(length.group(1) if length else 0) > MAX_BODY_BYTES or len(self.buffer) > MAX_BODY_BYTES:
            return self.refuse_size(head)
        if re.search(rb"(?im)^transfer-encoding:.*chunked", head):
            body, size = _dechunk(self.buffer, end + 4)
        else:
            size = end + 4 + int(length.group(1) if length else 0)
            body = bytes(self.buffer[end + 4 : size]) if len(self.buffer) >= size else None
        if body is None:
            return
        del self.buffer[:size]
        self.task = asyncio.ensure_future(self.serve(head, body))

    def refuse_size(self, head):
        self.upstream.log.append(self.new_record("too-large", 1, head, b"", {}))
        self.record["size"] = MAX_BODY_BYTES
        self.buffer.clear()
        self.send_whole(413, answers.error(413))
        self.transport.close()

    async def serve(self, head, body):
        try:
            await self.answer(head, body)
        except Gone:
            if self.record:
                self.record["end"] = "peer_gone"
        finally:
            if self.record and self.record["end"] is not None:
                self.record["t_end"] = time.monotonic()
        if self.buffer and not self.gone.is_set():
            asyncio.get_running_loop().call_soon(self.next_request)

    async def answer(self, head, body):
        method, path, *_ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        upstream = self.upstream
        self.record = None
        if method == "GET" or not body:
            known = {"data": [{"id": "model", "object": "model"}], "object": "list", "model_path": "model"}
            status = upstream.health if path.startswith("/health") else 200
            return self.send_whole(status, json.dumps(known).encode())
        found = _ID.search(body)
        request_id = found.group(1).decode() if found else "unknown"
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        number, step = upstream.step(request_id)
        known = request if isinstance(request, dict) else {}
        upstream.log.append(self.new_record(request_id, number, head, body, known))
        if not known.get("messages"):
            return self.send_whole(400, answers.error(400))
        if step.crash_on and step.crash_on.encode() in body:
            sys.stdout.write(json.dumps({"crashed": request_id}) + "\n")
            sys.stdout.flush()
            os._exit(3)
        if upstream.slots:
            await self.until(upstream.slots.acquire())
            try:
                await self.play(step, request)
            finally:
                upstream.slots.release()
        else:
            await self.play(step, request)

    def new_record(self, request_id, number, head, body, request):
        self.record = {
            "upstream": self.upstream.name, "id": request_id, "n": number, "t": time.monotonic(),
            "model": request.get("model"), "size": len(body), "sent": 0, "tokens": 0, "end": None, "gone": None,
            "t_end": None, "prefill": _prefill(request) is not None, "head": head.decode("latin-1"),
        }  # fmt: skip
        return self.record

    async def play(self, step, request):
        name = self.upstream.name
        if step.before == "reset":
            return self.cut("rst")
        if step.before == "close":
            return self.cut("fin")
        if step.before == "silence":
            await self.sleep(3600)
        await self.sleep(step.delay * step.slow)
        if step.refuse_prefill and self.record["prefill"]:
            return self.send_whole(400, answers.error(400, "prefill_rejected"))
        if step.status != 200:
            extra = f"Retry-After: {step.retry_after}\r\n" if step.retry_after is not None else ""
            return self.send_whole(step.status, answers.error(step.status, step.code), extra)
        if request.get("stream"):
            return await self.stream(step, name, _said_already(request))
        return await self.send_json(step, name)

    async def send_json(self, step, name):
        await self.sleep((step.ttft + step.itl * step.tokens) * step.slow)
        body = answers.html(name)[0] if step.body == "html" else answers.whole(name, step.tokens)
        head = _head(200, f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n")
        half = len(body) // 2
        if step.stall_at is not None:
            await self.write(head + body[:half])
            await self.sleep(step.stall_s)
            if step.stall_then == "close":
                return self.cut("fin")
            return await self.finish(body[half:])
        if step.cut_at is not None and step.cut != "clean":
            await self.write(head + body[:half])
            return self.cut(step.cut)
        self.record["tokens"] = step.tokens
        return await self.finish(head + body)

    async def stream(self, step, name, index):
        framing = "Transfer-Encoding: chunked\r\n" if step.framing == "chunked" else "Connection: close\r\n"
        self.chunked = step.framing == "chunked"
        await self.write(_head(200, f"Content-Type: text/event-stream; charset=utf-8\r\n{framing}"))
        if step.early == "opening":
            await self.piece(answers.opening(name))
        elif step.early == "comment":
            await self.piece(b": waiting\n\n")
        await self.sleep(step.ttft * step.slow)
        if step.body:
            for part in answers.BODIES[step.body](name):
                await self.piece(part)
            return await self.end_stream()
        if step.early != "opening":
            await self.piece(answers.opening(name))
        first, until = index, None
        while until is None or time.monotonic() < until:
            if step.gate_s is None and index >= step.tokens:
                break
            if step.cut_at == index:
                if step.cut == "clean":
                    return await self.end_stream()
                return self.cut(step.cut)
            if step.stall_at == index:
                await self.sleep(step.stall_s)
                if step.stall_then == "close":
                    return self.cut("fin")
            if step.malformed_at == index:
                await self.piece(b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"gar\n\n')
            await self.piece(answers.piece(name, index, step.pad))
            index += 1
            self.record["tokens"] = index
            if step.gate_s is not None and until is None and self.upstream.released.is_set():
                until = time.monotonic() + step.gate_s * (hash(self.record["id"]) % 97) / 97
            await self.sleep(step.itl * step.slow)
        await self.piece(answers.closing(name, index - first, step.done))
        return await self.end_stream()

    async def until(self, awaitable):
        """Waits, but not beyond the peer's leaving."""
        task, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Gone
            return task.result()
        finally:
            gone.cancel()
            task.cancel()

    async def sleep(self, seconds):
        if self.gone.is_set():
            raise Gone
        if seconds > 0:
            try:
                await asyncio.wait_for(self.gone.wait(), seconds)
            except asyncio.TimeoutError:
                return
            raise Gone

    async def write(self, data):
        # Also lets the loop see that the peer has left.
        if len(data) > 32768:
            await asyncio.sleep(0)
        if self.gone.is_set() or self.transport.is_closing():
            raise Gone
        self.transport.write(data)
        if not self.writable.is_set():
            await self.writable.wait()
            if self.gone.is_set():
                raise Gone
        self.record["sent"] += len(data)

    async def piece(self, data):
        await self.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    async def end_stream(self):
        if self.chunked:
            return await self.finish(b"0\r\n\r\n")
        self.record["end"] = "done"
        return self.transport.close()

    async def finish(self, data):
        await self.write(data)
        self.record["end"] = "done"

    def send_whole(self, status, body, extra=""):
        head = _head(status, f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}")
        self.transport.write(head + body)
        if self.record:
            self.record["end"] = str(status)

    def cut(self, how):
        self.record["end"] = how
        if how == "half":
            self.transport.write_eof()
        elif how == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()


def _head(status, rest):
    return f"HTTP/1.1 {status} Scripted\r\n{rest}\r\n".encode()


def _prefill(request):
    """The assistant message at the end that is to be continued."""
    messages = request.get("messages") or [{}]
    last = messages[-1] if isinstance(messages[-1], dict) else {}
    return str(last.get("content") or "") if last.get("role") == "assistant" else None


def _said_already(request):
    """How many words of the answer the request brings along: an engine goes on behind them."""
    found = _LAST_WORD.search(_prefill(request) or "")
    return int(found.group(1)) + 1 if found else 0


def _dechunk(buffer, at):
    """(body, its end in `buffer`), or (None, 0) while more must come."""
    body = bytearray()
    while True:
        end = buffer.find(b"\r\n", at)
        if end < 0:
            return None, 0
        try:
            size = int(buffer[at:end].split(b";")[0], 16)
        except ValueError:
            return bytes(body), len(buffer)
        if len(buffer) < end + 2 + size + 2:
            return None, 0
        body += buffer[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
        if size == 0:
            return bytes(body), at


async def obey(upstream, server, reader):
    while line := await reader.readline():
        order = json.loads(line)
        reply = {"ok": True}
        match order.pop("do"):
            case "behave":
                upstream.behave(**order)
            case "log":
                reply = {"log": upstream.log, "accepted": upstream.accepted, "open": len(upstream.connections)}
                if order.get("clear"):
                    upstream.log, upstream.attempts = [], {}
            case "release":
                upstream.released.set()
            case "hold":
                upstream.released = asyncio.Event()
            case "drop":
                for connection in list(upstream.connections):
                    connection.transport.abort()
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
    server.close()


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    upstream = Upstream(args.name)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(upstream), args.host, args.port, backlog=4096)
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    sys.stdout.write(json.dumps({"listening": args.port}) + "\n")
    sys.stdout.flush()
    # Standard input ends with the harness, so that none is left behind.
    await obey(upstream, server, reader)


if __name__ == "__main__":
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    asyncio.run(main())
