"""R03, R04: one of three equal backends is frozen, or ten times slower than the others."""

import time

import judge_load
from case import case, pool, verdicts

RPS = 20


@case("R03", "one of three frozen (SIGSTOP)", pool("r03", first_byte_s=3.0, total_s=10.0), alone=True)
async def r03(ctx):
    step = {"ttft": 0.03, "itl": 0.005, "tokens": 10}
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma):
        await upstream.behave(step)
    before = await ctx.open_loop("r03", RPS, 4)
    frozen_at = time.monotonic()
    ctx.fleet.beta.freeze()
    try:
        during = await ctx.open_loop("r03", RPS, 12)
    finally:
        thawed_at = time.monotonic()
        ctx.fleet.beta.thaw()
    after = await ctx.open_loop("r03", RPS, 15)
    log = await ctx.fleet.log()
    known = {answer.id for answer in after}
    log = [record for record in log if record["id"] in known]
    later = [answer for answer in during if answer.t_start >= frozen_at + judge_load.LEFT_WITHIN_S]
    slow = sorted(round(answer.wall_s, 2) for answer in during if answer.wall_s > 1.0)
    ctx.note(
        slow_walls_s=slow, beta_after_thaw=sum(record["upstream"] == "beta" for record in log),
        p99_ms=[round(judge_load.first_p99_s(answers) * 1000, 1) for answers in (before, later, after)],
        last_slow_s=max((a.t_start - frozen_at for a in during if a.wall_s > 1.0), default=None),
    )  # fmt: skip
    return judge_load.frozen(before, during, after, log, frozen_at, thawed_at)


@case("R04", "one of three ten times slower", pool("r04", first_byte_s=10.0, idle_s=10.0),
      pool("r04-together", first_byte_s=10.0, idle_s=10.0, together=True), alone=True)  # fmt: skip
async def r04(ctx):
    """Three backends; and three endpoints of one backend that are taken in turn, where a subject knows such."""
    return verdicts(*[(await _one_slower(ctx, name)).of(name) for name in ctx.routes])


async def _one_slower(ctx, name):
    step = {"ttft": 0.05, "itl": 0.005, "tokens": 10}
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma):
        await upstream.behave(step)
    await ctx.open_loop(name, RPS, 4)
    slowed_at = time.monotonic()
    await ctx.fleet.beta.behave({**step, "slow": 10.0})
    answers = await ctx.open_loop(name, RPS, 20)
    until = slowed_at + 20.0
    log = await ctx.fleet.log()
    late = [record for record in log if record["t"] >= slowed_at + 10.0]
    ctx.note(**{f"{name}_late_by_upstream": {
        name: sum(record["upstream"] == name for record in late) for name in ("alpha", "beta", "gamma")
    }})  # fmt: skip
    return judge_load.gray(answers, log, slowed_at, until)
