"""One subject on its bench: its process, its upstreams, and the run of one case against it."""

import asyncio
import os
import time
import traceback

import client
import judge
from case import Context, made, route, verdicts
from fleet import NAMES, Fleet, free_ports
from subjects.base import Unfit

CLEAN = route("clean", "clean", first_byte_s=10.0, idle_s=10.0)
# Enough of ours to tell 99.9 %; as much of the peers' as the slowest of them carries beside a case.
CLEAN_RPS = {"penstock": 10}
PEERS_CLEAN_RPS = 2
CASE_LIMIT_S = 240
BROKE = "the case broke"


def _lost(answers):
    """How many clean calls were sent, and how those that were lost have ended."""
    ends = {}
    for answer in answers:
        if judge.kind(answer) != "whole":
            key = f"{judge.kind(answer)} {answer.status} {_said(answer)}"
            ends[key] = ends.get(key, 0) + 1
    return {"sent": len(answers), "lost": sum(ends.values()), "ends": ends}


def _said(answer):
    return str(answer.error.get("code")) if isinstance(answer.error, dict) else answer.end


class Bench:
    def __init__(self, kind, folder, number):
        folder = os.path.join(folder, kind.name)
        os.makedirs(folder, exist_ok=True)
        ports = free_ports(len(NAMES) + 5)
        self.fleet = Fleet(ports)
        self.number = number
        self.subject = kind(folder, ports[-1], ports[-4:-1])
        self.hole_port = ports[-5]
        self.addresses = {name: upstream.address for name, upstream in self.fleet.all.items()}
        self.addresses["hole"] = f"127.0.0.1:{self.hole_port}"
        self.clean = []

    async def close(self):
        if self.subject.is_running():
            await self.subject.stop()
        await self.fleet.stop()

    def _routes(self, case):
        routes = [made(template, self.addresses) for template in case.routes]
        routes = [route for route in routes if self.subject.knows(route)]
        return routes if self.subject.several_routes else routes[:1]

    async def _start(self, routes, cases, wrap=()):
        if self.subject.persistent and not wrap:
            if self.subject.is_running():
                return
            routes = [route for case in cases for route in self._routes(case)]
        if self.subject.is_running():
            await self.subject.stop()
        clean = [made(CLEAN, self.addresses)] if self.subject.several_routes else []
        await self.subject.start([*routes, *clean], wrap)

    async def run(self, case, cases):
        """Plays one case; returns its result as plain data."""
        started = time.monotonic()
        name = self.subject.name
        unfit = case.unfit.get(name)
        if self.subject.transport_only and case.speaks_llm:
            unfit = "no LLM gateway: only transport is graded"
        if unfit:
            return {"grade": "none", "reason": unfit, "unfit": True, "notes": {}, "seconds": 0.0}
        context = Context(self.subject, self.fleet, self.addresses, self.hole_port)
        context.number = self.number
        context.routes = {route.name: route for route in self._routes(case)}
        context.start_with = lambda routes, wrap=(): self._start(routes, cases, wrap)
        try:
            playing = asyncio.create_task(self._play(case, cases, context))
            try:
                await asyncio.wait({playing}, timeout=CASE_LIMIT_S)
                late = not playing.done()
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
            if late:
                verdict = judge.Verdict("fail", f"the case did not end within {CASE_LIMIT_S} s")
            else:
                verdict = playing.result()
        except Unfit as unfit:
            verdict = judge.Verdict("none", str(unfit))
        except Exception as error:  # noqa: BLE001 - one broken case must not end the run
            traceback.print_exc()
            # The harness is at fault, not the subject: no grade, and the run says so.
            verdict = judge.Verdict("none", f"{BROKE}: {type(error).__name__}: {error}")
        finally:
            await self._clear(case)
        self.clean += context.clean
        return {
            "grade": verdict.grade, "reason": verdict.reason, "notes": context.notes,
            "seconds": round(time.monotonic() - started, 1),
            "clean": _lost(context.clean),
        }  # fmt: skip

    async def _play(self, case, cases, context):
        await self.fleet.reset()
        if not case.starts:
            await self._start(list(context.routes.values()), cases)
            before = await self._baseline(context)
            if before.grade != "pass" and self.subject.persistent:
                # What an earlier case has left behind is not this one's result.
                await self.subject.stop()
                await self._start(list(context.routes.values()), cases)
                before = await self._baseline(context)
            if before.grade != "pass":
                return judge.Verdict("fail", f"before the fault: {before.reason}")
        await self.fleet.reset()
        traffic = asyncio.create_task(self._traffic(context, case))
        try:
            verdict = await case.run(context)
            await self.fleet.reset()
            if case.ends:
                return verdict
            return verdicts(verdict, await self._recovery(context))
        finally:
            context.clean_paused = True
            traffic.cancel()
            answers = (await asyncio.gather(traffic, return_exceptions=True))[0]
            context.clean += answers if isinstance(answers, list) else []

    async def _baseline(self, context):
        found = [judge.PASS]
        for name in context.routes:
            if "hole" in dict(context.routes[name].targets):
                continue
            if await context.well(name, 15.0) is None:
                return judge.Verdict("fail", f"{name} is not answered")
            for stream in (True, False, True):
                found.append(judge.end_of(await context.call(name, stream=stream)))
        return judge.worst(found)

    async def _recovery(self, context):
        found = [judge.PASS]
        for name in context.routes:
            if not self.subject.is_running():
                return judge.Verdict("fail", "the process has ended")
            took_s = await context.well(name, 15.0)
            if took_s is None:
                found.append(judge.Verdict("fail", f"{name} is not answered 15 s after the fault"))
            elif took_s > 10.0:
                found.append(judge.Verdict("partial", f"{name} is answered only {took_s:.0f} s after the fault"))
        return judge.worst(found)

    async def _traffic(self, context, case):
        """Clean traffic beside the fault, from before it until after it, at a backend that is well."""
        if not self.subject.several_routes:
            return []
        tasks, started, number = [], time.monotonic(), 0
        rps = CLEAN_RPS.get(self.subject.name, PEERS_CLEAN_RPS)
        try:
            while not context.clean_paused:
                if self.subject.is_running() and "clean" in self.subject.routes and not case.starts:
                    target = self.subject.target(self.subject.routes["clean"])
                    call = client.call(target, "clean", stream=number % 2 == 0, limit_s=10.0)
                    tasks.append(asyncio.create_task(call))
                number += 1
                await asyncio.sleep(max(0.0, started + number / rps - time.monotonic()))
        except asyncio.CancelledError:
            pass
        return await asyncio.gather(*tasks)

    async def _clear(self, case):
        """Whatever happened: upstreams well, and no process that the case has spoiled."""
        for upstream in self.fleet.all.values():
            upstream.thaw()
        if self.subject.is_running() and (case.spoils or not self.subject.persistent):
            await self.subject.stop()
