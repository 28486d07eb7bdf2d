"""S01–S07, S16: a backend fails before its first token. Names and outcomes are failoverbench's; `alpha` is the first
choice, `beta` the fallback."""

import asyncio
import time

import judge
from case import case, route, verdicts

# What fails once fails for the first attempt of each request.
_ONCE_429 = ({"status": 429, "retry_after": 2}, {})


async def _both_ways(ctx, name, check):
    """The same for a streamed and a whole answer."""
    found = []
    for stream in (True, False):
        answer = await ctx.hit(name, stream=stream)
        log = await ctx.fleet.log()
        probe = f"{'streamed' if stream else 'whole'}{' alone' if name.endswith('-alone') else ''}"
        ctx.keep(probe, answer)
        found.append(check(log, answer).of(probe))
    return found


@case("S01", "429 with Retry-After: 2 once", route("s01"), route("s01-alone", "alpha"))
async def s01(ctx):
    await ctx.fleet.alpha.behave(*_ONCE_429)

    def check(log, answer):
        return verdicts(
            judge.end_of(answer),
            judge.retry_after_honoured(log, answer, "alpha", 1.8),
            judge.not_hammered(log, answer, "alpha", 1.5, 2),
        )

    found = await _both_ways(ctx, "s01", check)
    if "s01-alone" in ctx.routes:
        # A pause, so that the second route does not meet a limit that the first one was told of.
        await asyncio.sleep(2.2)
        found += await _both_ways(ctx, "s01-alone", check)
    return verdicts(*found)


@case("S02", "429 without Retry-After for good", route("s02"))
async def s02(ctx):
    await ctx.fleet.alpha.behave({"status": 429})

    def check(log, answer):
        return verdicts(judge.end_of(answer), judge.not_hammered(log, answer, "alpha"))

    return verdicts(*await _both_ways(ctx, "s02", check), *await _both_ways(ctx, "s02", check))


@case("S03", "500 once", route("s03"), route("s03-alone", "alpha"))
async def s03(ctx):
    await ctx.fleet.alpha.behave({"status": 500}, {})

    def check(_log, answer):
        return judge.end_of(answer)

    found = await _both_ways(ctx, "s03", check)
    if "s03-alone" in ctx.routes:
        found += await _both_ways(ctx, "s03-alone", check)
    return verdicts(*found)


@case("S04", "503 for good", route("s04"))
async def s04(ctx):
    await ctx.fleet.alpha.behave({"status": 503}, health=503)

    def check(log, answer):
        return verdicts(judge.end_of(answer), judge.not_hammered(log, answer, "alpha"))

    return verdicts(*await _both_ways(ctx, "s04", check), *await _both_ways(ctx, "s04", check))


@case("S05", "TCP reset before headers", route("s05"), route("s05-alone", "alpha"))
async def s05(ctx):
    await ctx.fleet.alpha.behave({"before": "reset"}, {})

    def check(_log, answer):
        return judge.end_of(answer)

    found = await _both_ways(ctx, "s05", check)
    if "s05-alone" in ctx.routes:
        found += await _both_ways(ctx, "s05-alone", check)
    return verdicts(*found)


@case("S06", "accepts and never answers", route("s06", first_byte_s=2.0, total_s=8.0))
async def s06(ctx):
    await ctx.fleet.alpha.behave({"before": "silence"})
    return verdicts(*await _both_ways(ctx, "s06", lambda log, answer: judge.silent_route(log, answer, 2.0)))


@case("S07", "first token late", route("s07", first_byte_s=2.0, idle_s=12.0, total_s=30.0))
async def s07(ctx):
    """The head comes at once, and in the second and third probe a comment or the opening role with it; the token
    comes 8 s later, where 2 s are allowed."""
    found = []
    for early in ("nothing", "comment", "opening"):
        await ctx.fleet.alpha.behave({"ttft": 8.0, "early": early})
        answer = await ctx.hit("s07")
        ctx.keep(early, answer)
        found.append(judge.within(answer, 6.0, judge.end_of(answer)).of(f"head and {early}"))
    return verdicts(*found)


@case("S16", "503, then the fallback: whose model, whose bill", route("s16"), speaks_llm=True, unfit={
    "vllm_router": "a pool of one model",
})  # fmt: skip
async def s16(ctx):
    await ctx.fleet.alpha.behave({"status": 503}, health=503)
    before = await ctx.subject.tokens_by_backend()

    found = []
    for stream in (True, False):
        answer = await ctx.hit("s16", stream=stream)
        after = await ctx.subject.tokens_by_backend()
        grown = {name: count - before.get(name, 0) for name, count in after.items()}
        ctx.keep("streamed" if stream else "whole", answer)
        verdict = judge.accounting(answer, grown)
        found.append(verdict.of("streamed" if stream else "whole"))
        ctx.note(tokens_by_backend=grown)
    log = await ctx.fleet.log()
    found.append(judge.not_hammered(log, answer, "alpha"))
    return verdicts(*found)


@case("S15", "down for 30 s, then well", route("s15"))
async def s15(ctx):
    """One request every 1.5 s; the first choice must be used again within 30 s of being well."""
    await ctx.fleet.alpha.behave({"status": 503}, health=503)
    answers, down_until = [], time.monotonic() + 30.0
    well = False
    tasks = []
    while time.monotonic() < down_until + 31.0:
        if not well and time.monotonic() >= down_until:
            await ctx.fleet.alpha.behave()
            well, down_until = True, time.monotonic()
        tasks.append(asyncio.create_task(ctx.call("s15")))
        await asyncio.sleep(1.5)
        if well and any(
            record["t"] >= down_until and record["end"] == "done" for record in await ctx.fleet.alpha.log()
        ):
            break
    answers = await asyncio.gather(*tasks)
    log = await ctx.fleet.log()
    asked = sum(record["upstream"] == "alpha" and record["t"] < down_until for record in log)
    ctx.note(requests=len(answers), attempts_while_down=asked)
    return judge.flapping(answers, log, down_until, 30.0)

