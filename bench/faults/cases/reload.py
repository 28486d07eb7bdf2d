"""R34: configuration that changes ten times a second under load, is wrong, is half-written, is large."""

import asyncio
import dataclasses
import time

import judge
from case import case, pool, verdicts

NO_FILES = "follows no files"


@case("R34", "reload 10/s, wrong and half-written files, 5,000 routes", pool("r34", "alpha", "beta"), unfit={
    "litellm": NO_FILES, "portkey": "each request brings its configuration", "vllm_router": NO_FILES,
})  # fmt: skip
async def r34(ctx):
    found = []
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta):
        await upstream.behave({"tokens": 60, "itl": 0.25})
    streams = [asyncio.create_task(ctx.call("r34", limit_s=60.0)) for _ in range(50)]
    await asyncio.sleep(1.0)
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta):
        await upstream.behave()
    routes = list(ctx.subject.routes.values())
    load = asyncio.create_task(ctx.open_loop("r34", 20, 16))

    started, number = time.monotonic(), 0
    while time.monotonic() - started < 5.0:
        number += 1
        ctx.subject.change(routes, number)
        await asyncio.sleep(0.1)
    ctx.note(reloads_written=number, applied=await ctx.subject.applied(routes, number))
    said = ctx.subject.log_size()
    ctx.subject.spoil("not: [valid")
    await asyncio.sleep(2.5)
    ctx.subject.spoil(ctx.subject.text(routes, number)[: -len(ctx.subject.text(routes, number)) // 3])
    await asyncio.sleep(2.5)
    reported = ctx.subject.words_since(said)
    ctx.subject.change(routes, number + 1)
    await asyncio.sleep(1.5)
    many = time.monotonic()
    template = routes[0]
    ctx.subject.change([*routes, *(dataclasses.replace(template, name=f"many-{n}") for n in range(5000))], number + 2)
    applied = await ctx.subject.applied(routes, number + 2, limit_s=30.0)
    ctx.note(many_routes_s=round(time.monotonic() - many, 2), many_routes_applied=applied)
    answers = await load
    ends = await asyncio.gather(*streams)
    cut = [answer for answer in ends if judge.kind(answer) != "whole"]
    lost = [answer for answer in answers if judge.kind(answer) != "whole"]
    ctx.note(streams_cut=len(cut), requests_lost=len(lost), requests=len(answers))
    if cut:
        found.append(judge.Verdict("fail", f"{len(cut)} of {len(ends)} streams were cut"))
    if lost:
        found.append(judge.worst(judge.end_of(answer) for answer in lost).of(f"{len(lost)} of {len(answers)}"))
    if not any(word in reported.lower() for word in ("problem", "cannot", "error", "invalid", "fail", "reject")):
        found.append(judge.Verdict("partial", "the wrong file is not reported"))
    if applied is False:
        found.append(judge.Verdict("partial", "5,000 routes are not applied within 30 s"))
    return verdicts(judge.PASS, *found)

