"""R17: one connection, two opinions about where a request ends. The upstream must never see the hidden request."""

import asyncio
import json

import client
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
        hidden = [record for record in seen if record["id"] == "hidden"]
        status = client.status_of(received)
        ctx.note(**{probe: f"{status} {how}, upstream saw {[record['id'] for record in seen]}"})
        found.append(_judge(status, how, seen, hidden).of(probe))
    return verdicts(*found)


def _judge(status, how, seen, hidden):
    if hidden:
        return judge.Verdict("fail", "the upstream saw the hidden request")
    if len(seen) > 1:
        return judge.Verdict("fail", f"the upstream saw {len(seen)} requests")
    damaged = [record for record in seen if record["id"] != "visible"]
    if damaged:
        return judge.Verdict("fail", f"the upstream saw another request: {json.dumps(damaged[0]['head'][:80])}")
    if status is not None and 400 <= status < 500 or status == 501:
        return judge.PASS
    if status is None and how in ("closed", "reset"):
        return judge.Verdict("safe", "closed without a status")
    if status is None:
        return judge.Verdict("partial", "left waiting")
    if status >= 500:
        return judge.Verdict("partial", f"answered {status}")
    return judge.Verdict("safe", f"answered {status}; the upstream saw one request, in one reading")
