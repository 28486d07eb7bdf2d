"""R17: one connection, two opinions about where a request ends. The upstream must never see the hidden request, nor
what HTTP/2 carries in a header and HTTP/1.1 would read as something else."""

import asyncio
import re

import client
import h2
import judge
from case import case, route, verdicts


def _variants(target):
    """(probe, bytes). The hidden request is of the same form, with an id that says so."""
    visible = client.body_of("r17", "visible", False)
    hidden_body = client.body_of("r17", "hidden", False)
    hidden = client.head_of(target, len(hidden_body), target.headers) + hidden_body
    base = ["POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{target.port}", "Content-Type: application/json"]
    base += [f"{name}: {value}" for name, value in target.headers]
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(visible), visible)

    def raw(lines, body):
        return ("\r\n".join([*base, *lines]) + "\r\n\r\n").encode() + body

    length = len(visible)
    yield "CL and TE", raw([f"Content-Length: {length + len(hidden)}", "Transfer-Encoding: chunked"], chunked + hidden)
    yield "TE and CL", raw(["Transfer-Encoding: chunked", "Content-Length: 4"], chunked + hidden)
    yield "two lengths", raw([f"Content-Length: {length}", f"Content-Length: {length + len(hidden)}"], visible + hidden)
    yield "two lengths in one", raw([f"Content-Length: {length}, {length + len(hidden)}"], visible + hidden)
    yield "signed length", raw([f"Content-Length: +{length}"], visible + hidden)
    yield "TE twice", raw(["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], chunked + hidden)
    yield "TE unknown", raw(["Transfer-Encoding: xchunked", f"Content-Length: {length}"], visible + hidden)
    yield "TE with a space before the colon", raw(
        ["Transfer-Encoding : chunked", f"Content-Length: {length}"], visible + hidden
    )
    yield "TE with a tab", raw(["Transfer-Encoding:\tchunked", f"Content-Length: {length}"], chunked + hidden)
    yield "bad chunk size", raw(["Transfer-Encoding: chunked"], b"0x10\r\n" + visible + b"\r\n0\r\n\r\n" + hidden)
    yield "negative chunk size", raw(["Transfer-Encoding: chunked"], b"-1\r\n" + visible + b"\r\n0\r\n\r\n" + hidden)
    yield "huge chunk size", raw(
        ["Transfer-Encoding: chunked"], b"FFFFFFFFFFFFFFFFFFFF\r\n" + visible + b"\r\n0\r\n\r\n" + hidden
    )
    yield "chunk without its line end", raw(
        ["Transfer-Encoding: chunked"], b"%x\r\n%bXX0\r\n\r\n" % (length, visible) + hidden
    )
    yield "obs-fold", raw(["X-Fold: a\r\n Transfer-Encoding: chunked", f"Content-Length: {length}"], visible)
    yield "NUL in a header", raw(["X-Nul: a\0b", f"Content-Length: {length}"], visible)
    yield "header without a name", raw([": value", f"Content-Length: {length}"], visible)
    yield "CR in a header", raw([f"X-Cr: a\rTransfer-Encoding: chunked\r\nContent-Length: {length}"], visible)


@case("R17", "request smuggling", route("r17", "alpha"))
async def r17(ctx):
    target = ctx.target("r17")
    found = []
    for probe, data in _variants(target):
        before = len(await ctx.fleet.log())
        received, how, _ = await client.send_raw(target.port, [data], 2.5)
        await asyncio.sleep(0.05)
        seen = (await ctx.fleet.log())[before:]
        status = client.status_of(received)
        ctx.note(**{probe: f"{status} {how}, upstream saw {[record['id'] for record in seen]}"})
        found.append(judge.smuggled(status, how, seen).of(probe))
    return verdicts(*found, *await _over_h2(ctx, target))


# Of bodies, where ids tell what was seen.
NOTHING = r"(?!)"


def _h2_variants():
    """(probe, path, further pseudo-headers, header fields, body, what no head at the upstream may have). RFC 9113, 8.2
    and 8.3 call each of them malformed."""
    visible = client.body_of("r17", "visible", False)
    hidden_body = client.body_of("r17", "hidden", False)
    hidden = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(hidden_body)
    hidden += hidden_body
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(visible), visible)
    length, path = len(visible), b"/v1/chat/completions"

    def header(probe, name, value, never, body=visible):
        return f"h2 {probe}", path, (), ((name, value),), body, never

    yield header("transfer-encoding", b"transfer-encoding", b"chunked", r"^transfer-encoding:", chunked + hidden)
    yield header("length too small", b"content-length", b"%d" % length, NOTHING, visible + hidden)
    large = length + len(hidden)
    yield header("length too large", b"content-length", b"%d" % large, rf"^content-length: *{large}\b")
    for probe, end in (("CR LF", b"\r\n"), ("CR", b"\r"), ("LF", b"\n")):
        yield header(f"{probe} in a header", b"x-fold", b"a" + end + b"x-hidden: 1", r"x-hidden")
    whole = b"a\r\nContent-Length: 0\r\n\r\n" + hidden
    yield header("a request in a header", b"x-fold", whole, r"^x-fold:")
    yield header("NUL in a header", b"x-nul", b"a\0b", r"\0")
    yield header("connection: close", b"connection", b"close", r"^connection:.*close")
    yield header("connection: keep-alive", b"connection", b"keep-alive, x-hop", r"x-hop")
    yield header("keep-alive", b"keep-alive", b"timeout=77", r"^keep-alive:")
    yield header("upper-case name", b"X-Upper", b"1", r"^x-upper:")
    yield "h2 two paths", path, ((b":path", b"/v1/hidden"),), (), visible, r"/v1/hidden"
    yield "h2 space in the path", path + b" x", (), (), visible, r" x HTTP"
    yield "h2 head in the path", path + b" HTTP/1.1\r\nx-hidden: 1\r\nx-rest:", (), (), visible, r"x-hidden"


async def _over_h2(ctx, target):
    """Who does not speak HTTP/2 has nothing to translate."""
    good = client.body_of("r17", "h2-good", False)
    status, how = await _send_h2(target, b"/v1/chat/completions", (), (), good)
    ctx.note(h2=how)
    if how == "HTTP/1.1 only":
        return []
    if status != 200:
        return [judge.Verdict("fail", f"a good request over HTTP/2 is not answered ({status} {how})")]
    found = []
    for probe, path, pseudo, fields, body, never in _h2_variants():
        before = len(await ctx.fleet.log())
        status, how = await _send_h2(target, path, pseudo, fields, body)
        following = await ctx.call("r17", stream=False, limit_s=5.0)
        seen = [record for record in (await ctx.fleet.log())[before:] if record["id"] != following.id]
        ctx.note(**{probe: f"{status} {how}, upstream saw {[record['id'] for record in seen]}"})
        found.append(judge.smuggled_h2(status, how, seen, re.compile(never, re.I | re.M), following).of(probe))
    return found


async def _send_h2(target, path, pseudo, fields, body):
    """(status, how) of one request on a connection of its own."""
    connection = await h2.Connection().open(target.port)
    try:
        if not await connection.speaks_h2():
            return None, "HTTP/1.1 only"
        block = h2.request_headers(target.port, path, (*h2.fields_of(target), *fields), pseudo)
        connection.writer.write(
            h2.frame(h2.HEADERS, h2.END_HEADERS, 1, block) + h2.frame(h2.DATA, h2.END_STREAM, 1, body)
        )
        return await connection.outcome(1, 2.5)
    finally:
        await connection.close()
