"""What a hard budget of tokens leaves unused because room is reserved for the longest answer, and because gateways hold
leases: callers want twice as much as the budget has, on 1, 4 and 8 gateways with one Redis. Answers take a fifth of
what they may. In a rolling window, of which the share that was taken is measured once it is full."""

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "proxy"), HERE]

from parts import Upstream, gateway, mock, read_answer, redis, write_objects  # noqa: E402
from rig import end_on_sigterm, wait_port  # noqa: E402

REPLICAS = (1, 4, 8)
WINDOW_S, WINDOWS = 60, 2
MAX_TOKENS, PROMPT = 100, 20
# Some 40 requests a second of 40 tokens each: twice what there is.
CAP, CALLERS, PACE_S = 48_000, 24, 0.4


class Taking(Upstream):
    """Answers with 1 to 39 tokens, and keeps when."""

    def __init__(self, rng):
        self.rng, self.taken = rng, []

    async def answer(self, asked):
        await asyncio.sleep(self.rng.uniform(0.05, 0.3))
        tokens = min(self.rng.randint(1, 39), asked["max_tokens"])
        self.taken.append((time.monotonic(), PROMPT + tokens))
        return PROMPT, tokens

    def most(self, since):
        """The most tokens in any window, and the share of the budget that was taken in the mean."""
        taken = [(at, tokens) for at, tokens in self.taken if at >= since]
        sums = []
        for number, (at, _) in enumerate(taken):
            if at - since >= WINDOW_S:
                sums.append(sum(tokens for then, tokens in taken[: number + 1] if then > at - WINDOW_S))
        return max(sums), sum(sums) / len(sums) / CAP


def objects(folder, upstream):
    limit = {"name": "limit", "unit": "Tokens", "max": CAP, "window": {"rolling": f"{WINDOW_S}s"}}
    write_objects(folder, [*mock(upstream), ("TokenBudget", "all", {"limits": [limit]})])


async def caller(port, ends):
    body = json.dumps({"model": "mock", "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": "x"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.monotonic() < ends:
            writer.write(head.encode() + body)
            await read_answer(reader)
            await asyncio.sleep(random.uniform(0.5, 1.5) * PACE_S)
    finally:
        writer.close()


async def unused(binary, count):
    folder = tempfile.mkdtemp(prefix="penstock-unused-")
    upstream, processes = Taking(random.Random(count)), []
    try:
        await upstream.start()
        objects(os.path.join(folder, "objects"), upstream.port)
        with open(os.path.join(folder, "log"), "wb") as log:
            store = redis(folder, log)
            processes.append(store)
            gateways = [gateway(binary, os.path.join(folder, "objects"), log, store) for _ in range(count)]
            processes += gateways
            for one in gateways:
                wait_port(one.port)
            begun = time.monotonic()
            ends = begun + WINDOW_S * (WINDOWS + 1)
            await asyncio.gather(*(caller(gateways[number % count].port, ends) for number in range(CALLERS)))
        # The first window is not full.
        return upstream.most(begun + WINDOW_S)
    finally:
        for process in reversed(processes):
            process.stop()
        upstream.server.close()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    end_on_sigterm()
    figures, is_over = [], False
    for count in REPLICAS:
        most, share = asyncio.run(unused(sys.argv[1], count))
        is_over |= most > CAP
        figures.append(f"unused_pct_{count}={100 * (1 - share):.1f} most_{count}={most}")
    print(f"unused: cap={CAP} {' '.join(figures)}")
    sys.exit(is_over)


if __name__ == "__main__":
    main()
