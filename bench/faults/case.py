"""What a case is, and what it is given: one subject with its upstreams, and callers."""

import asyncio
import time
from dataclasses import dataclass, field

import client
from judge import Verdict, kind, worst
from subjects.base import Route

CASES = {}


@dataclass(frozen=True)
class Case:
    id: str
    title: str
    routes: tuple
    run: object
    # Alone on the machine: load, or times that others would disturb.
    alone: bool = False
    # The process cannot be used for further cases; `ends`: nor for a look at its recovery.
    spoils: bool = False
    ends: bool = False
    # It is about what requests and answers say, not about bytes and connections.
    speaks_llm: bool = False
    # Subjects for which the case makes no sense, with the reason.
    unfit: dict = field(default_factory=dict)
    # The case starts the subject itself.
    starts: bool = False


def case(id_, title, *routes, **more):
    """Registers a case."""

    def register(run):
        CASES[id_] = Case(id_, title, routes, run, **more)
        return run

    return register


def route(name, *upstreams, **more):
    """A route by the names of its upstreams; addresses come with the subject."""
    return {"name": name, "upstreams": upstreams or ("alpha", "beta"), **more}


def pool(name, *upstreams, **more):
    return route(name, *(upstreams or ("alpha", "beta", "gamma")), mode="pool", **more)


def made(template, addresses):
    more = {key: value for key, value in template.items() if key not in ("name", "upstreams")}
    targets = tuple((name, addresses[name]) for name in template["upstreams"])
    return Route(template["name"], targets, **more)


class Context:
    """One run of one case at one subject."""

    def __init__(self, subject, fleet, addresses, hole_port):
        self.subject, self.fleet, self.addresses, self.hole_port = subject, fleet, addresses, hole_port
        self.routes = {}
        self.notes = {}
        self.clean = []
        self.clean_paused = False

    def note(self, **facts):
        """Evidence for the raw results."""
        self.notes.update(facts)

    def target(self, name):
        return self.subject.target(self.routes[name])

    async def call(self, name, **more):
        return await client.call(self.target(name), name, **more)

    async def calls(self, name, count, **more):
        return await asyncio.gather(*(self.call(name, **more) for _ in range(count)))

    async def hit(self, name, upstream="alpha", within_s=15.0, **more):
        """Calls until one has met `upstream`: pools do not say whom they ask first, and who failed lately may be left
        out for a while. Returns that one's answer."""
        deadline = time.monotonic() + within_s
        while True:
            answer = await self.call(name, **more)
            log = await self.fleet.log(upstream)
            if any(record["id"] == answer.id for record in log) or time.monotonic() > deadline:
                return answer
            await asyncio.sleep(0.2)

    async def open_loop(self, name, rps, seconds, sink=None, **more):
        """Calls at a constant rate, whether earlier ones have ended or not."""
        tasks = []
        started = time.monotonic()
        for number in range(int(rps * seconds)):
            await asyncio.sleep(max(0.0, started + number / rps - time.monotonic()))
            tasks.append(asyncio.create_task(self.call(name, **more)))
        answers = await asyncio.gather(*tasks)
        if sink is not None:
            sink.extend(answers)
        return answers

    def keep(self, probe, answer, text=None):
        """What a probe saw, for the raw results."""
        self.notes.setdefault("probes", []).append({
            "probe": probe, "kind": kind(answer, text), "status": answer.status, "wall_s": round(answer.wall_s, 3),
            "ttft_s": answer.ttft_s and round(answer.ttft_s, 3), "pieces": answer.pieces, "done": answer.done,
            "finish": answer.finish, "end": answer.end, "model": answer.model, "served_by": answer.served_by,
            "garbled": answer.garbled, "error": str(answer.error)[:300] if answer.error else None,
            "body": answer.body[-200:].decode(errors="replace") if kind(answer) != "whole" else None,
        })  # fmt: skip

    async def well(self, name, limit_s=10.0):
        """Waits until the route answers wholly again; how long that took, or None."""
        started = time.monotonic()
        while time.monotonic() - started < limit_s:
            answer = await self.call(name, limit_s=limit_s)
            if kind(answer) == "whole":
                return time.monotonic() - started
            await asyncio.sleep(0.3)
        self.keep("recovery", answer)
        return None

    def memory(self):
        """Follows the subject's memory: `async with ctx.memory() as m: …; m.grown_kib`."""
        return _Memory(self.subject)


class _Memory:
    def __init__(self, subject):
        self.subject = subject
        self.before = self.most = subject.rss_kib()

    async def __aenter__(self):
        self.task = asyncio.create_task(self._watch())
        return self

    async def _watch(self):
        while True:
            self.most = max(self.most, self.subject.rss_kib())
            await asyncio.sleep(0.1)

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.most = max(self.most, self.subject.rss_kib())

    @property
    def grown_kib(self):
        return self.most - self.before


def verdicts(*items):
    return worst(item for item in items if isinstance(item, Verdict))
