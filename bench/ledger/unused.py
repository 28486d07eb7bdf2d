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

from race import redis  # noqa: E402
from real import Process  # noqa: E402
from rig import end_on_sigterm, free_port, wait_port  # noqa: E402

REPLICAS = (1, 4, 8)
WINDOW_S, WINDOWS = 60, 2
MAX_TOKENS, PROMPT = 100, 20
# Some 40 requests a second of 40 tokens each: twice what there is.
CAP, CALLERS, PACE_S = 48_000, 24, 0.4


class Upstream:
    """Answers with 1 to 39 tokens, and counts them by the time."""

    def __init__(self, rng):
        self.rng, self.taken = rng, []

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
                asked = json.loads(await reader.readexactly(length))
                await asyncio.sleep(self.rng.uniform(0.05, 0.3))
                tokens = min(self.rng.randint(1, 39), asked["max_tokens"])
                self.taken.append((time.monotonic(), PROMPT + tokens))
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
                usage = {"prompt_tokens": PROMPT, "completion_tokens": tokens, "total_tokens": PROMPT + tokens}
                answer = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def most(self, since):
        """The most tokens in any window, and the share of the budget that was taken in the mean."""
        taken = [(at, tokens) for at, tokens in self.taken if at >= since]
        sums = []
        for number, (at, _) in enumerate(taken):
            if at - since >= WINDOW_S:
                sums.append(sum(tokens for then, tokens in taken[: number + 1] if then > at - WINDOW_S))
        return max(sums), sum(sums) / len(sums) / CAP


def objects(folder, upstream):
    os.makedirs(folder)
    kinds = {
        "LLMBackend": ("mock", {"external": {"url": f"http://127.0.0.1:{upstream}/v1"}}),
        "RoutingPolicy": ("default", {"rules": [{"name": "mock", "match": {"models": ["mock"]}, "backends": [{"name": "mock"}]}]}),
        "TokenBudget": ("all", {"limits": [{"name": "limit", "unit": "Tokens", "max": CAP, "window": {"rolling": f"{WINDOW_S}s"}}]}),
    }
    with open(os.path.join(folder, "objects.yaml"), "w", encoding="utf-8") as file:
        for kind, (name, spec) in kinds.items():
            item = {"apiVersion": "penstock.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
            file.write(f"---\n{json.dumps(item)}\n")


async def caller(port, ends):
    # As many bytes as its tokens: the reservation counts a token for each byte that may be one.
    body = json.dumps({"model": "mock", "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": "x"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.monotonic() < ends:
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            await asyncio.sleep(random.uniform(0.5, 1.5) * PACE_S)
    finally:
        writer.close()


async def unused(binary, count):
    folder = tempfile.mkdtemp(prefix="penstock-unused-")
    upstream, processes = Upstream(random.Random(count)), []
    try:
        await upstream.start()
        objects(os.path.join(folder, "objects"), upstream.port)
        with open(os.path.join(folder, "log"), "wb") as log:
            store = redis(folder, log)
            processes.append(store)
            for _ in range(count):
                listen = free_port()
                command = [binary, "--log", "error", "up", "-f", os.path.join(folder, "objects"), "--no-scaling"]
                command += ["--listen", f"127.0.0.1:{listen}", "--store", f"redis://127.0.0.1:{store.port}"]
                for name in ("admin", "scaler", "scaler-admin"):
                    command += [f"--{name}-listen", "127.0.0.1:0"]
                processes.append(Process(command, listen, log))
            for gateway in processes[1:]:
                wait_port(gateway.port)
            begun = time.monotonic()
            ends = begun + WINDOW_S * (WINDOWS + 1)
            ports = [gateway.port for gateway in processes[1:]]
            await asyncio.gather(*(caller(ports[number % count], ends) for number in range(CALLERS)))
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
