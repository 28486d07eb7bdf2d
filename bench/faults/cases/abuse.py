"""R15, R16: callers that ask too much: headers, bodies, nesting; and abuse of HTTP/2."""

import asyncio
import gzip
import json
import time

import client
import h2
import judge
import judge_load
from case import case, route, verdicts

# What a gateway must bound itself: an upstream that happens to refuse it is no protection.
BOUNDED_HERE = ("100,000 levels",)


def _post(target, body, *extra, length=None):
    return client.head_of(target, len(body) if length is None else length, (*target.headers, *extra)) + body


def _refused(status, how, took_s, allowed, received=b""):
    """A refusal that names the caller's mistake, soon."""
    if how == "timeout" and status is None:
        return judge.Verdict("fail", f"no answer in {took_s:.0f} s")
    if status in allowed:
        return judge.PASS
    if status is None:
        return judge.Verdict("safe", f"connection {how} without a status after {took_s:.1f} s")
    if status >= 500:
        return judge.Verdict("partial", f"the caller's mistake is answered {status}")
    return judge.Verdict("partial", f"accepted with {status}" if status < 300 else f"status {status}")


@case("R15", "oversized heads, bodies, nesting, numbers", route("r15", "alpha", total_s=20.0))
async def r15(ctx):
    target = ctx.target("r15")
    chat = json.loads(client.body_of("r15", "limits", False))
    normal = json.dumps(chat).encode()
    zeros = gzip.compress(b"\0" * (64 << 20), 9)
    big = 100 << 20
    deep = normal[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    probes = {
        "a header of 100 KB": ([_post(target, normal, ("X-Big", "x" * 100_000))], (400, 431)),
        "10,000 headers": ([_post(target, normal, *((f"X-{n}", "1") for n in range(10_000)))], (400, 431)),
        "a path of 100 KB": ([b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"], (400, 404, 414, 431)),
        "100 MB announced and sent": (
            [_post(target, b"", length=big), *(b" " * (1 << 20) for _ in range(100))], (413,),
        ),
        "100 MB in chunks": (
            [client.head_of(target, 0, target.headers).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
             *(b"100000\r\n" + b" " * (1 << 20) + b"\r\n" for _ in range(100)), b"0\r\n\r\n"], (413,),
        ),
        "gzip bomb": ([_post(target, zeros, ("Content-Encoding", "gzip"))], (400, 413, 415)),
        "100,000 levels": ([_post(target, deep)], (400, 413, 422)),
        "not JSON": ([_post(target, b"{" + normal)], (400, 422)),
        "an array": ([_post(target, b"[1]")], (400, 422)),
        "empty body": ([_post(target, b"")], (400, 411, 422)),
        "two models": ([_post(target, b'{"model": "nobody", ' + normal[1:])], (200, 400, 404, 422)),
        "huge numbers": (
            [_post(target, json.dumps({**chat, "n": 10**9, "max_tokens": 10**18, "temperature": 1e308}).encode())],
            (200, 400, 422),
        ),
        "bad UTF-8": ([_post(target, normal.replace(b"Count", b"C\xff\xfe"))], (200, 400, 422)),
    }  # fmt: skip
    found = []
    for probe, (pieces, allowed) in probes.items():
        sent_before = len(await ctx.fleet.log())
        async with ctx.memory() as memory:
            received, how, took_s = await _until_answered(target.port, pieces)
        status = client.status_of(received)
        verdict = _refused(status, how, took_s, allowed, received)
        if probe in BOUNDED_HERE and verdict.grade == "pass" and await _reached(ctx, sent_before):
            verdict = judge.Verdict("partial", "left to the upstream to refuse")
        ctx.note(**{probe: f"{status} {how} {took_s:.2f} s, {memory.grown_kib} KiB"})
        found += [verdict.of(probe), judge_load.bounded(memory.grown_kib, 64 * 1024).of(probe)]
    if not ctx.subject.is_running():
        found.append(judge.Verdict("fail", "the process has ended"))
    seen = [record for record in await ctx.fleet.log() if record["size"] > 50 << 20]
    if seen:
        found.append(judge.Verdict("partial", "a body of 100 MB reached the upstream"))
    return verdicts(*found)


async def _reached(ctx, before):
    return len(await ctx.fleet.log()) > before


async def _until_answered(port, pieces, limit_s=20.0):
    """Sends all of it, or as much as is taken; stops at the first answer."""
    started = time.monotonic()
    received, how = bytearray(), "timeout"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b"", "unreachable", 0.0

    async def send():
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    sending = asyncio.create_task(send())
    try:
        while b"\r\n\r\n" not in received:
            piece = await asyncio.wait_for(reader.read(65536), limit_s - (time.monotonic() - started))
            if not piece:
                how = "closed"
                break
            received += piece
        else:
            how = "answered"
    except asyncio.TimeoutError:
        pass
    except ConnectionError:
        how = "reset"
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.transport.abort()
    return bytes(received), how, time.monotonic() - started


@case("R16", "abuse of HTTP/2", route("r16"))
async def r16(ctx):
    port = ctx.target("r16").port
    connection = await h2.Connection().open(port)
    speaks = await connection.speaks_h2()
    refused = await connection.is_closed(2.0) if not speaks else True
    first = connection.first[:40].decode("latin-1")
    await connection.close()
    ctx.note(h2=speaks, first_bytes=first)
    if not speaks:
        if refused or first.startswith("HTTP/1.1 4") or first.startswith("HTTP/1.1 505"):
            return judge.Verdict("pass", "HTTP/1.1 only: an HTTP/2 preface is refused")
        return judge.Verdict("partial", "HTTP/1.1 only, but an HTTP/2 preface is left waiting")
    found = []
    fields = h2.request_headers(port, extra=h2.fields_of(ctx.target("r16")))
    for probe, pieces, first in (
        ("rapid reset", _rapid_reset(fields), None),
        ("CONTINUATION flood", _continuation(fields), None),
        ("PING flood", [h2.frame(h2.PING, payload=b"12345678") * 64] * 1000, None),
        ("SETTINGS flood", [h2.settings() * 64] * 1000, None),
        ("window 0", [_window_zero(fields)], h2.settings(**{f"_{h2.INITIAL_WINDOW_SIZE}": 0})),
    ):
        found.append((await _abuse(ctx, port, probe, pieces, first)).of(probe))
    return verdicts(*found)


def _rapid_reset(fields):
    for number in range(5000):
        stream = 2 * number + 1
        yield h2.frame(h2.HEADERS, h2.END_HEADERS, stream, fields) + h2.frame(
            h2.RST_STREAM, 0, stream, (8).to_bytes(4, "big")
        )


def _continuation(fields):
    yield h2.frame(h2.HEADERS, 0, 1, fields)
    piece = h2.literal(b"x-more", b"y" * 100) * 100
    for _ in range(5000):
        yield h2.frame(h2.CONTINUATION, 0, 1, piece)


def _window_zero(fields):
    body = client.body_of("r16", "window", True)
    return b"".join(
        h2.frame(h2.HEADERS, h2.END_HEADERS, stream, fields) + h2.frame(h2.DATA, h2.END_STREAM, stream, body)
        for stream in range(1, 201, 2)
    )


async def _abuse(ctx, port, probe, pieces, first):
    connection = await h2.Connection().open(port, first)
    cpu, started = ctx.subject.cpu_s(), time.monotonic()
    async with ctx.memory() as memory:
        others = asyncio.create_task(ctx.open_loop("r16", 10, 3))
        sent = await connection.flood(pieces, 3.0)
        answers = await others
    seconds = time.monotonic() - started
    closed = connection.closed.is_set()
    cores = (ctx.subject.cpu_s() - cpu) / seconds
    await connection.close()
    ctx.note(**{probe: f"sent {sent}, closed {closed}, {cores:.2f} cores, {memory.grown_kib} KiB"})
    lost = judge_load.share_lost(answers)
    if lost > 0.05:
        return judge.Verdict("fail", f"{lost:.0%} of the others' requests were lost")
    if cores > 1.0:
        return judge.Verdict("partial", f"{cores:.1f} cores busy")
    return judge_load.bounded(memory.grown_kib, 64 * 1024)
