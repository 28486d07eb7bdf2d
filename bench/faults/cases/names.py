"""R33: backends by name: addresses that change, vanish or are dead, and a resolver that says nothing."""

import asyncio
import dataclasses
import time

import judge
import judge_load
import resolver
from case import case, route, verdicts
from fleet import Upstream, free_ports
from subjects.base import Unfit

NAME = "backend.faults.test"
RPS = 10


@case("R33", "DNS: moved, NXDOMAIN, a dead record, a frozen resolver", route("r33", "alpha"), starts=True,
      spoils=True, ends=True,
      unfit={"vllm_router": "workers are watched by its own health checks, one connection each"})  # fmt: skip
async def r33(ctx):
    """The backend's name leads to `alpha` at 127.0.1.1, then to `beta` at 127.0.1.2, on the same port."""
    # An address of its own for each subject, as they run side by side.
    dns_host = f"127.53.{ctx.number}.53"
    try:
        transport, dns = await resolver.serve(dns_host)
    except OSError as error:
        raise Unfit(f"port 53 of {dns_host}: {error}") from error
    port = free_ports(1)[0]
    hosts = {"alpha": Upstream("alpha", port, "127.0.1.1"), "beta": Upstream("beta", port, "127.0.1.2")}
    resolv = ctx.subject.write("resolv.conf", f"nameserver {dns_host}\noptions timeout:1 attempts:2\n")
    wrap = ("unshare", "--mount", "sh", "-c", f'mount --bind "{resolv}" /etc/resolv.conf && exec "$@"', "sh")
    ctx.routes["r33"] = named = dataclasses.replace(ctx.routes["r33"], targets=(("alpha", f"{NAME}:{port}"),))
    found = []
    try:
        for upstream in hosts.values():
            await upstream.start()
        dns.addresses[NAME] = [hosts["alpha"].host]
        await ctx.start_with([named], wrap)
        if await ctx.well("r33", 20.0) is None:
            raise Unfit("does not resolve names by /etc/resolv.conf")
        found.append(await _moved(ctx, dns, hosts))
        for mode, probe in (("nxdomain", "NXDOMAIN"), ("frozen", "resolver frozen")):
            dns.mode = mode
            # Pauses make the kept connections old, so that new ones are needed.
            answers = await ctx.open_loop("r33", RPS, 4)
            await asyncio.sleep(6.0)
            answers += await ctx.open_loop("r33", RPS, 4)
            dns.mode = "answer"
            ctx.note(**{f"{probe} lost": f"{sum(judge.kind(a) != 'whole' for a in answers)} of {len(answers)}"})
            found.append(_none_lost(answers).of(probe))
            await ctx.well("r33", 15.0)
        dns.addresses[NAME] = [hosts["alpha"].host, "127.0.1.9", hosts["beta"].host]
        await asyncio.sleep(6.0)
        answers = await ctx.open_loop("r33", RPS, 6)
        ctx.note(dead_record_lost=sum(judge.kind(a) != "whole" for a in answers), questions=dns.questions)
        found.append(_none_lost(answers).of("1 of 3 addresses dead"))
    finally:
        transport.close()
        for upstream in hosts.values():
            await upstream.stop()
    return verdicts(*found)


async def _moved(ctx, dns, hosts):
    dns.addresses[NAME] = [hosts["beta"].host]
    moved_at = time.monotonic()
    answers = await ctx.open_loop("r33", RPS, 10)
    old = [record["t"] - moved_at for record in await hosts["alpha"].log() if record["t"] > moved_at]
    new = [record["t"] - moved_at for record in await hosts["beta"].log() if record["t"] > moved_at]
    last_old, first_new = max(old, default=0.0), min(new, default=None)
    ctx.note(moved_last_old_s=round(last_old, 2), moved_first_new_s=first_new and round(first_new, 2))
    verdict = _none_lost(answers)
    if verdict.grade == "pass" and (first_new is None or last_old > resolver.TTL_S + 5.0):
        verdict = judge.Verdict("partial", f"the old address was still used {last_old:.0f} s after the move")
    return verdict.of("moved")


def _none_lost(answers):
    lost = judge_load.share_lost(answers)
    if not lost:
        return judge.PASS
    worst = judge.worst(judge.end_of(answer) for answer in answers if judge.kind(answer) != "whole")
    return judge.Verdict(worst.grade, f"{lost:.0%} lost: {worst.reason}")

