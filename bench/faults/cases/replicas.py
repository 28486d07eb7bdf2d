"""R01: one of two replicas is killed under load and comes back."""

import asyncio
import itertools
import os
import time

import client
import judge
import judge_load
from case import case, pool
from fleet import free_ports

RPS, BEFORE_S, DOWN_S, AFTER_S = 200, 4.0, 2.0, 5.0


@case("R01", "kill -9 of one of two replicas at 200 calls/s", pool("r01", idle_s=10.0), alone=True, unfit={
    "litellm": "200 calls a second are more than it carries here",
})  # fmt: skip
async def r01(ctx):
    """Callers take turns at the replicas; a call that reaches nobody goes to the other one, once. The case's own replica
    is the one that is killed, so that clean traffic goes on at the first one."""
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma):
        await upstream.behave({"tokens": 10, "itl": 0.02})
    ports = free_ports(4)
    folder = os.path.join(ctx.subject.folder, "second")
    os.makedirs(folder, exist_ok=True)
    second = type(ctx.subject)(folder, ports[0], ports[1:])
    route = ctx.routes["r01"]
    await second.start([route])
    replicas = (ctx.target("r01"), second.target(route))
    turns = itertools.count()
    calls, tasks = [], []

    async def one():
        turn = next(turns) % 2
        attempts = [(turn, await client.call(replicas[turn], "r01", limit_s=15.0))]
        if attempts[0][1].end == "unreachable":
            attempts.append((1 - turn, await client.call(replicas[1 - turn], "r01", limit_s=15.0)))
        calls.append(attempts)

    async def load():
        started = time.monotonic()
        for number in range(int(RPS * (BEFORE_S + DOWN_S + AFTER_S))):
            await asyncio.sleep(max(0.0, started + number / RPS - time.monotonic()))
            tasks.append(asyncio.create_task(one()))

    async def back():
        """Seconds until the replica answers wholly."""
        started = time.monotonic()
        await second.start([route])
        while time.monotonic() - started < 15.0:
            if judge.kind(await client.call(replicas[1], "r01", limit_s=5.0)) == "whole":
                return time.monotonic() - started
            await asyncio.sleep(0.02)
        return None

    loading = asyncio.create_task(load())
    try:
        await asyncio.sleep(BEFORE_S)
        killed_at = time.monotonic()
        second.kill()
        dead_at = time.monotonic()
        await asyncio.sleep(DOWN_S)
        back_s = await back()
        back_at = time.monotonic()
        await loading
        await asyncio.gather(*tasks)
    finally:
        for task in (loading, *tasks):
            task.cancel()
        await asyncio.gather(loading, *tasks, return_exceptions=True)
        await second.stop()
    again = sum(len(attempts) > 1 for attempts in calls)
    ctx.note(calls=len(calls), sent_again=again, back_s=back_s and round(back_s, 2))
    return judge_load.killed(calls, 1, killed_at, dead_at, back_s, back_at)
