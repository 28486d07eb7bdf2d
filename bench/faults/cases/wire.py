"""R06, R07: bytes on the wire: cuts of each kind at each place, and event streams of each shape."""

import asyncio

import judge
import judge_load
from answers import BODIES, WIDE
from case import case, route, verdicts
from client import WORDS, word

GOOD = {
    "crlf": None, "lone_cr": None, "no_space": None, "comments": None, "many_in_one": None,
    "split_code_points": "".join(word(index) + WIDE for index in range(WORDS)),
    "large_event": word(0) + "x" * (256 << 10),
}  # fmt: skip


@case("R06", "RST, FIN and half-close before, in and at the end of a stream", route("r06"))
async def r06(ctx):
    found = []
    for how in ("rst", "fin", "half"):
        await ctx.fleet.alpha.behave({"cut_at": 0, "cut": how})
        answer = await ctx.hit("r06")
        ctx.keep(f"{how} before the first token", answer)
        found.append(judge.end_of(answer).of(f"{how} before the first token"))
    for at in (1, 40, WORDS - 1):
        for how in ("rst", "fin", "half", "clean"):
            if how == "clean" and ctx.subject.transport_only:
                continue
            await ctx.fleet.alpha.behave({"cut_at": at, "cut": how})
            answer = await ctx.hit("r06")
            ctx.keep(f"{how} at token {at}", answer)
            found.append(judge.cut_stream(answer).of(f"{how} at token {at}"))
    others = {} if ctx.subject.transport_only else {
        "no length, fin at token 40": {"cut_at": 40, "cut": "fin", "framing": "close"},
        "finish_reason abort": {"body": "aborted"},
        "an error event in the middle": {"body": "error_in_middle"},
    }
    for probe, step in others.items():
        await ctx.fleet.alpha.behave(step)
        answer = await ctx.hit("r06")
        ctx.keep(probe, answer)
        found.append(judge.cut_stream(answer).of(probe))
    for how in ("rst", "fin", "half"):
        await ctx.fleet.alpha.behave({"cut_at": 1, "cut": how})
        answer = await ctx.hit("r06", stream=False)
        ctx.keep(f"{how} in a whole answer", answer)
        found.append(judge.end_of(answer).of(f"{how} in a whole answer"))
    return verdicts(*found)


@case("R07", "event streams of every shape", route("r07", total_s=20.0))
async def r07(ctx):
    found = []
    for shape, text in GOOD.items():
        await ctx.fleet.alpha.behave({"body": shape})
        answer = await ctx.hit("r07")
        ctx.keep(shape, answer, text)
        verdict = judge.end_of(answer, text)
        if verdict.grade == "pass" and (answer.garbled or answer.bad_utf8):
            verdict = judge.Verdict("fail", "good bytes arrive damaged")
        # Nothing but the whole will do for what is well-formed.
        found.append((judge.Verdict("fail", verdict.reason) if verdict.grade == "safe" else verdict).of(shape))
    for shape in () if ctx.subject.transport_only else ("error_after_empty", "empty", "html"):
        await ctx.fleet.alpha.behave({"body": shape})
        answer = await ctx.hit("r07", stream=shape != "html")
        ctx.keep(shape, answer)
        found.append(judge.end_of(answer).of(shape))
    if not ctx.subject.transport_only:
        await ctx.fleet.alpha.behave({"body": "bad_utf8"})
        answer = await ctx.hit("r07")
        ctx.keep("bad_utf8", answer)
        found.append(judge.malformed(answer, is_damaged=True).of("bad UTF-8"))
    found += await _endless(ctx)
    return verdicts(*found)


# Each stream may keep so much of an event, and the process so much besides: what an allocator takes for the first large
# buffers and does not give back at once. Of ours the first eight streams took 8 to 11 MiB, later ones
# 0 to 10 (debug build, 2026-11-22).
ENDLESS, STREAM_KIB, ONCE_KIB = 8, 1024, 6 * 1024


async def _endless(ctx):
    """Streams at once whose event does not end."""
    found = []
    for shape in ("huge_event", "endless_event", "endless_line"):
        await ctx.fleet.alpha.behave({"body": shape})
        await ctx.fleet.beta.behave({"body": shape})
        async with ctx.memory() as memory:
            answers = await ctx.calls("r07", ENDLESS, limit_s=20.0)
        ctx.keep(shape, answers[0])
        ctx.note(**{f"{shape}_grown_kib": memory.grown_kib, f"{shape}_passed": max(a.size for a in answers)})
        found.append(judge_load.bounded(memory.grown_kib, ENDLESS * STREAM_KIB + ONCE_KIB).of(shape))
        for answer in answers:
            seen = judge.kind(answer)
            if shape == "huge_event" and answer.finish == "stop":
                # Large, but well-formed: to carry it is as good as to refuse it.
                continue
            verdict = judge.cut_stream(answer)
            if seen in ("cut", "hang", "truncated", "wrong") and answer.size > 16 << 20:
                verdict = judge.Verdict("partial", f"{answer.size >> 20} MiB of it were passed on")
            found.append(verdict.of(shape))
        await asyncio.sleep(0.2)
    await ctx.fleet.beta.behave()
    return found


assert set(GOOD) <= set(BODIES)
