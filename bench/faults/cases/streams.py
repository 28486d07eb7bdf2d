"""S08–S11, S14: a stream goes wrong after its first token."""

import time

import judge
from case import case, route, verdicts


@case("S08", "cut at 40 of 60 tokens", route("s08"))
async def s08(ctx):
    found = []
    for how in ("fin", "rst"):
        await ctx.fleet.alpha.behave({"cut_at": 40, "cut": how})
        answer = await ctx.hit("s08")
        ctx.keep(how, answer)
        found.append(judge.end_of(answer).of(how))
    answer = await ctx.hit("s08", stream=False)
    ctx.keep("whole answer cut in its body", answer)
    found.append(judge.end_of(answer).of("whole answer cut in its body"))
    return verdicts(*found)


@case("S09", "stalls at token 20", route("s09", idle_s=45.0, total_s=90.0),
      route("s09-limit", idle_s=3.0, total_s=60.0))  # fmt: skip
async def s09(ctx):
    """A stall of 30 s within the limit must pass whole; one of 9 s, where 3 s are allowed, must end in time."""
    await ctx.fleet.alpha.behave({"stall_at": 20, "stall_s": 30.0, "stall_then": "resume"})
    within = await ctx.hit("s09", limit_s=60.0)
    ctx.keep("within", within)
    found = [judge.end_of(within).of("stall within the limit")]
    # Who has one route has one limit.
    if "s09-limit" in ctx.routes:
        await ctx.fleet.alpha.behave({"stall_at": 20, "stall_s": 9.0, "stall_then": "close"})
        beyond = await ctx.hit("s09-limit")
        ctx.keep("beyond", beyond)
        found.append(judge.stalled(beyond, 6.0).of("stall beyond the limit"))
    return verdicts(*found)


@case("S10", "the tenth event is unreadable", route("s10"), speaks_llm=True)
async def s10(ctx):
    await ctx.fleet.alpha.behave({"malformed_at": 9})
    answer = await ctx.hit("s10")
    ctx.keep("malformed", answer)
    return judge.malformed(answer)


@case("S11", "no [DONE]", route("s11"), speaks_llm=True)
async def s11(ctx):
    await ctx.fleet.alpha.behave({"done": False})
    answer = await ctx.hit("s11")
    ctx.keep("no done", answer)
    ends = [record["t_end"] for record in await ctx.fleet.log() if record["id"] == answer.id and record["t_end"]]
    return judge.no_done(answer, max(ends, default=time.monotonic()))


@case("S14", "cut at 40 tokens, and the fallback refuses prefill", route("s14"))
async def s14(ctx):
    await ctx.fleet.alpha.behave({"cut_at": 40, "cut": "fin"})
    await ctx.fleet.beta.behave({"refuse_prefill": True})
    answer = await ctx.hit("s14")
    ctx.keep("cut", answer)
    return judge.prefill(answer)
