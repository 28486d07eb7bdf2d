"""R08–R10: everything is down, everything is busy, and a request that ends whoever reads it."""

import asyncio
import time

import client
import judge
import judge_load
from case import case, pool, verdicts

RPS = 15
# What all say that answer 429.
RETRY_AFTER_S = 2


@case("R08", "all answer 503, then 429, then break off", pool("r08", "alpha", "beta"), alone=True, spoils=True)
async def r08(ctx):
    found = []
    both = (ctx.fleet.alpha, ctx.fleet.beta)
    await ctx.open_loop("r08", RPS, 2)
    phases = (
        ("503", 20, {"status": 503}, (503, 502, 429)),
        ("429", 6, {"status": 429, "retry_after": RETRY_AFTER_S}, (429, 503)),
        ("reset", 12, {"before": "reset"}, (503, 502, 504)),
    )
    for fault, seconds, step, statuses in phases:
        for upstream in both:
            await upstream.behave(step)
        started = time.monotonic()
        answers = await ctx.open_loop("r08", RPS, seconds)
        ended = time.monotonic()
        for upstream in both:
            await upstream.behave()
        after = await ctx.open_loop("r08", RPS, 7)
        log = await ctx.fleet.log()
        asked = [record for record in log if started <= record["t"] < ended]
        ctx.note(**{
            f"attempts_per_request_{fault}": round(len(asked) / len(answers), 3),
            f"statuses_{fault}": _counted(str(answer.status) for answer in answers),
            f"retry_after_{fault}": sum("retry-after" in answer.headers for answer in answers if answer.status),
            f"failed_after_{fault}": sum(judge.kind(answer) != "whole" for answer in after),
            f"last_failed_after_{fault}_s": max(
                (round(a.t_start - ended, 2) for a in after if judge.kind(a) != "whole"), default=None
            ),
        })  # fmt: skip
        found.append(judge_load.all_down(answers, log, started, ended, statuses).of(f"all {fault}"))
        if fault == "429":
            found.append(judge_load.retry_after_of_all(log, RETRY_AFTER_S, started, ended).of("Retry-After"))
        else:
            found.append(judge_load.says_when_to_come_back(answers).of(f"all {fault}"))
        found.append(judge_load.recovers(after, ended).of(f"after {fault}"))
        found.append(judge_load.no_herd(log, ended, ended + 7, RPS).of(f"after {fault}"))
    return verdicts(*found)


def _counted(values):
    counts = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


SLOTS, SERVICE_S, DEADLINE_S = 8, 0.25, 2.0
OVERLOAD, OVERLOAD_S = 3, 20.0
# A queue grows twice as fast as time: who comes after half a deadline is the first to wait for a whole one, and shows
# with 1.5 deadlines that this is overload. One deadline later nobody who came before is there.
FILLED_S = 2.5 * DEADLINE_S
# Of all requests; far less than the backends can.
URGENT_SHARE = 0.1


@case("R09", "three times what the backends can", pool("r09", "alpha", "beta", capacity=SLOTS),
      pool("r09-urgent", "alpha", "beta", capacity=SLOTS, urgency="High"), alone=True, spoils=True)  # fmt: skip
async def r09(ctx):
    """Each backend works on 8 requests at a time and queues the rest, as engines do; callers give up after 2 s. Where a
    subject knows urgencies, one in ten is of a high one; the dose is the same for all."""
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta):
        await upstream.behave({"ttft": SERVICE_S, "itl": 0.0, "tokens": 10}, slots=SLOTS)
    # What they can without a gateway, so that every subject gets the same dose.
    peak, until = [], time.monotonic() + 4.0

    async def caller(upstream):
        while time.monotonic() < until:
            peak.append(await client.call(client.Target(upstream.port), "direct"))

    both = (ctx.fleet.alpha, ctx.fleet.beta)
    await asyncio.gather(*(caller(upstream) for upstream in both for _ in range(SLOTS)))
    peak_rps = sum(judge.kind(answer) == "whole" for answer in peak) / 4.0
    shares = {"r09": 1.0 - URGENT_SHARE, "r09-urgent": URGENT_SHARE} if "r09-urgent" in ctx.routes else {"r09": 1.0}
    async with ctx.memory() as memory:
        by_route = await asyncio.gather(*(
            ctx.open_loop(name, OVERLOAD * peak_rps * share, OVERLOAD_S, limit_s=DEADLINE_S) for name, share in shares.items()
        ))  # fmt: skip
    started = min(answer.t_start for answers in by_route for answer in answers)
    by_route = [[answer for answer in answers if answer.t_start >= started + FILLED_S] for answers in by_route]
    answers = [answer for answers in by_route for answer in answers]
    urgent = by_route[1] if len(by_route) > 1 else None
    refused_ms = [answer.wall_s * 1000 for answer in answers if answer.status in (429, 503)]
    ctx.note(refused_ms={share: round(judge.percentile(refused_ms, share), 1) for share in (0.5, 0.9, 0.99)},
             urgent=urgent and _counted(judge.kind(answer) for answer in urgent))  # fmt: skip
    ctx.note(peak_rps=round(peak_rps, 1), kinds=_counted(judge.kind(answer) for answer in answers),
             statuses=_counted(str(answer.status) for answer in answers), grown_kib=memory.grown_kib)  # fmt: skip
    return verdicts(
        judge_load.overload(answers, OVERLOAD_S - FILLED_S, peak_rps, DEADLINE_S),
        judge_load.bounded(memory.grown_kib, 64 * 1024),
        judge.PASS if urgent is None else judge_load.urgent(urgent, DEADLINE_S),
    )


@case("R10", "a request that ends the process that reads it", pool("r10"))
async def r10(ctx):
    every = (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma)
    step = {"crash_on": "POISON", "ttft": 0.02, "itl": 0.005, "tokens": 10}
    for upstream in every:
        await upstream.behave(step)
    crashes = []

    async def supervise(upstream):
        """What a supervisor does: a new process after a second."""
        while True:
            await upstream.crashed()
            crashes.append(upstream.name)
            await asyncio.sleep(1.0)
            await upstream.start()
            await upstream.behave(step)

    async def others():
        answers.extend(await ctx.open_loop("r10", 10, 18))

    answers, per_send = [], []
    watching = [asyncio.create_task(supervise(upstream)) for upstream in every]
    background = asyncio.create_task(others())
    try:
        await asyncio.sleep(2.0)
        for _ in range(3):
            before = len(crashes)
            message = [{"role": "user", "content": "[id=poison] POISON"}]
            answer = await ctx.call("r10", messages=message, limit_s=15.0)
            ctx.keep("poison", answer)
            await asyncio.sleep(4.0)
            per_send.append(len(crashes) - before)
        await background
        await asyncio.sleep(1.5)
    finally:
        for task in (*watching, background):
            task.cancel()
        await asyncio.gather(*watching, background, return_exceptions=True)
    lost = [answer for answer in answers if judge.kind(answer) != "whole"]
    ctx.note(crashes_per_send=per_send, others=len(answers), others_lost=_counted(judge.end_of(a).reason for a in lost))
    return judge_load.poison(per_send, answers)
