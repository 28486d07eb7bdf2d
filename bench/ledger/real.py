"""Real runs of a hard budget: three gateways and a Redis, of which one is killed with SIGKILL in each run, while callers ask
for far more than the budget has. The upstream counts what it was asked for.

Each run has a key of its own, and with it a limit of its own. RUNS (default 1000), SEED. Results of runs that are over
are kept in target/ledger-real.json, and a run that was broken off goes on there."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "proxy")]

from parts import Upstream, gateway, mock, redis, write_objects  # noqa: E402
from rig import end_on_sigterm, wait_port  # noqa: E402
from subjects import key_of  # noqa: E402

GATEWAYS, CALLERS, CAP = 3, 12, 30
RUN_S, ANSWER_S = 1.6, 0.03
# A lease that nobody renews is over after 15 s.
REST_S = 20
BATCH = 50
PATH = os.path.join("target", "ledger-real.json")


class Counting(Upstream):
    """Counts calls by the user that they name."""

    def __init__(self):
        self.counts = {}

    async def answer(self, asked):
        # LiteLLM leaves it out.
        user = asked.get("user", "")
        self.counts[user] = self.counts.get(user, 0) + 1
        await asyncio.sleep(random.uniform(0, ANSWER_S))
        return 5, 1


def objects(folder, upstream, numbers, cap=CAP):
    items = mock(upstream)
    limit = {"name": "limit", "unit": "Requests", "max": cap, "window": {"calendar": "Month"}}
    items.append(("TokenBudget", "keys", {"per": "Key", "limits": [limit]}))
    for number in numbers:
        items.append(("VirtualKey", f"caller-{number}", {"team": "a"}))
        items.append(("Secret", f"caller-{number}-key", {"key": key_of(number)}))
    write_objects(folder, items)


async def call(port, number, limit_s=10):
    """The status, or None if the gateway is not there."""
    body = b'{"model":"mock","max_tokens":1,"user":"%d","messages":[{"role":"user","content":"x"}]}' % number
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key_of(number)}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer = None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 2)
        writer.write(head.encode() + body)
        status = (await asyncio.wait_for(reader.readline(), limit_s)).split(b" ")
        return int(status[1]) if len(status) > 1 else None
    except (OSError, asyncio.TimeoutError, ConnectionError):
        return None
    finally:
        if writer:
            writer.close()


async def one(number, gateways, store, rng):
    """A run: returns how many were answered, and what was killed."""
    ends = time.monotonic() + RUN_S
    statuses = []

    async def caller():
        while time.monotonic() < ends:
            statuses.append(await call(rng.choice(gateways).port, number))

    async def trouble():
        await asyncio.sleep(rng.uniform(0.05, RUN_S * 0.7))
        victim = store if rng.random() < 0.4 else rng.choice(gateways)
        victim.kill()
        await asyncio.sleep(rng.uniform(0, 0.2))
        victim.start()
        return "redis" if victim is store else "gateway"

    *_, killed = await asyncio.gather(*(caller() for _ in range(CALLERS)), trouble())
    return sum(status == 200 for status in statuses), killed


async def standings(gateways, numbers):
    """What the record says of each key, once its leases are over: one more request each makes a gateway look."""
    more = {}
    for number in numbers:
        status = None
        for _ in range(100):
            status = await call(gateways[0].port, number)
            if status in (200, 429):
                break
            await asyncio.sleep(0.1)
        more[number] = status
    reader, writer = await asyncio.open_connection("127.0.0.1", gateways[0].admin)
    writer.write(b"GET /budgets HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    data = json.loads(answer.split(b"\r\n\r\n", 1)[1])["data"]
    return more, {int(row["of"].rsplit("-", 1)[1]): row for row in data if row["limit"] == "limit"}


async def batch(binary, numbers, rng):
    folder = tempfile.mkdtemp(prefix="penstock-ledger-")
    upstream, processes = Counting(), []
    try:
        await upstream.start()
        objects(os.path.join(folder, "objects"), upstream.port, numbers)
        with open(os.path.join(folder, "log"), "wb") as log:
            store = redis(folder, log)
            processes.append(store)
            gateways = [gateway(binary, os.path.join(folder, "objects"), log, store) for _ in range(GATEWAYS)]
            processes += gateways
            for one_of_them in gateways:
                wait_port(one_of_them.port)
            results = {}
            for number in numbers:
                answered, killed = await one(number, gateways, store, rng)
                results[number] = {"answered": answered, "killed": killed}
            await asyncio.sleep(REST_S)
            truth = dict(upstream.counts)
            more, records = await standings(gateways, numbers)
            for number, result in results.items():
                took, record = truth.get(str(number), 0), records.get(number)
                if record is None or more[number] not in (200, 429):
                    sys.exit(f"ledger: run {number}: no gateway tells how its limit stands ({more[number]})")
                spent = record["spent"]
                result |= {"took": took, "spent": spent, "estimated": record["estimated"], "more": more[number]}
            return results
    finally:
        for process in reversed(processes):
            process.stop()
        upstream.server.close()
        shutil.rmtree(folder, ignore_errors=True)


def wrong(row):
    """What is wrong of a run. The last request of all, whose cost may not be told yet, is not looked at."""
    kinds = {
        "over": row["took"] > CAP,
        "lost": row["spent"] < row["took"],
        "double": row["spent"] > row["took"] + row["estimated"],
        "lockout": row["more"] == 429 and row["spent"] + 1 < CAP,
    }
    return [kind for kind, is_so in kinds.items() if is_so]


def summary(results):
    rows = results.values()
    over = sum(max(0, row["took"] - CAP) for row in rows)
    wrongs = [wrong(row) for row in rows]
    lost, double, lockout = (sum(kind in of_one for of_one in wrongs) for kind in ("lost", "double", "lockout"))
    orphaned = 100 * sum(row["estimated"] for row in rows) / (CAP * len(results))
    unused = 100 * sum(max(0, CAP - row["took"]) for row in rows) / (CAP * len(results))
    return {
        "real": len(results), "overspend_beyond_bound": over, "bound_pct": 2, "lost": lost, "double": double,
        "lockout": lockout, "orphan_charged_pct": round(orphaned, 1), "underuse_pct": round(unused, 1),
    }  # fmt: skip


def line(figures):
    return "ledger: " + " ".join(f"{name}={value}" for name, value in figures.items())


def together(simulated, real):
    """Simulated and real runs in one line. The simulated ones fail on the first that is wrong, so theirs are zeros."""
    figures = dict(part.split("=") for part in simulated.split()[1:])
    counts = ("overspend_beyond_bound", "lost", "double", "lockout")
    return {"sim": figures["sim"], **real, **{name: real[name] + int(figures[name]) for name in counts}}


def main():
    end_on_sigterm()
    binary, runs, seed = sys.argv[1], int(os.environ.get("RUNS", "1000")), int(os.environ.get("SEED", "1"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    kept = {}
    if os.path.exists(PATH):
        with open(PATH, encoding="utf-8") as file:
            kept = json.load(file)
    if kept.get("commit") != commit or kept.get("seed") != seed:
        kept = {"commit": commit, "seed": seed, "results": {}}
    results = {int(number): row for number, row in kept["results"].items()}
    while len(results) < runs:
        first = len(results)
        numbers = range(first, min(first + BATCH, runs))
        results |= asyncio.run(batch(binary, numbers, random.Random(seed * 1_000_003 + first)))
        kept["results"] = results
        os.makedirs("target", exist_ok=True)
        with open(PATH, "w", encoding="utf-8") as file:
            json.dump(kept, file)
        print(line(summary(results)), flush=True)
    last = {number: row for number, row in results.items() if number < runs}
    deaths = sum(row["killed"] == "gateway" for row in last.values())
    print(f"ledger: {deaths} deaths of gateways, {len(last) - deaths} of the store")
    simulated = os.environ.get("SIMULATED")
    print(line(together(simulated, summary(last)) if simulated else summary(last)))
    failed = [number for number, row in last.items() if wrong(row)]
    sys.exit(f"ledger: failed in runs {failed[:20]}" if failed else 0)


if __name__ == "__main__":
    main()
