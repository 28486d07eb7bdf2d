"""S12, S13: the backend refuses the request itself."""

import judge
from case import case, route, verdicts


async def _refused(ctx, name, code, check):
    await ctx.fleet.alpha.behave({"status": 400, "code": code})
    found = []
    for stream in (True, False):
        answer = await ctx.hit(name, stream=stream)
        log = await ctx.fleet.log()
        probe = "streamed" if stream else "whole"
        ctx.keep(probe, answer)
        found.append(check(log, answer).of(probe))
    return verdicts(*found)


@case("S12", "400 context length", route("s12"), speaks_llm=True)
async def s12(ctx):
    """`beta` stands for a model with a longer context."""
    return await _refused(ctx, "s12", "context_length_exceeded", judge.context_length)


@case("S13", "400 content filter", route("s13"), speaks_llm=True)
async def s13(ctx):
    return await _refused(ctx, "s13", "content_policy_violation", judge.content_filter)
