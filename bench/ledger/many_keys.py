"""Keys by the hundred thousand in the store of two gateways: how quickly they are made, what the first request with one
costs and the next ones, how soon one that is taken back is refused elsewhere, and what they take of memory.

KEYS (default 100000)."""

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from parts import Upstream, gateway, mock, redis, write_objects  # noqa: E402
from rig import end_on_sigterm, memory_kib, wait_port  # noqa: E402

COUNT = int(os.environ.get("KEYS", "100000"))
MAKERS = 64
# Requests one after the other, each with a key that the gateway has not seen, and with one that it knows.
FIRSTS, NEXTS, REVOKED = 1000, 1000, 20
TOKEN = "token-of-those-who-manage-keys"
WAIT_S = 30


class Quick(Upstream):
    async def answer(self, asked):
        return 5, 1


class Line:
    """A connection that is kept."""

    def __init__(self, port):
        self.port = port

    async def open(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def ask(self, method, path, bearer, body=b""):
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {bearer}\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = 0
        if b"content-length:" in head:
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        return int(head.split(b" ", 2)[1]), await self.reader.readexactly(length)

    async def manage(self, method, path, body=None):
        data = b"" if body is None else json.dumps(body).encode()
        status, answer = await self.ask(method, path, TOKEN, data)
        if status >= 300:
            raise SystemExit(f"many-keys: {method} {path}: {status} {answer.decode()}")
        return answer

    async def chat(self, key):
        body = b'{"model":"mock","max_tokens":1,"messages":[{"role":"user","content":"x"}]}'
        status, _ = await self.ask("POST", "/v1/chat/completions", key, body)
        return status


async def make(port, keys, numbers):
    line = await Line(port).open()
    for number in numbers:
        made = await line.manage("POST", "/keys", {"name": f"caller-{number}", "team": f"team-{number % 100}"})
        keys[number] = json.loads(made)["key"]
    line.writer.close()


async def timed(line, keys):
    """Milliseconds of each request."""
    took = []
    for key in keys:
        begun = time.monotonic()
        status = await line.chat(key)
        took.append((time.monotonic() - begun) * 1000)
        if status != 200:
            raise SystemExit(f"many-keys: a key that was made is answered {status}")
    return took


async def revoked_ms(office, line, number, key):
    """From the order's end at one gateway to the first refusal at the other one."""
    if await line.chat(key) != 200:
        raise SystemExit("many-keys: a key is refused before it is taken back")
    await office.manage("DELETE", f"/keys/caller-{number}")
    begun = time.monotonic()
    while await line.chat(key) != 401:
        if time.monotonic() - begun > WAIT_S:
            raise SystemExit("many-keys: a key that was taken back is good still")
        await asyncio.sleep(0.005)
    return (time.monotonic() - begun) * 1000


def p99(values):
    return statistics.quantiles(values, n=100)[98]


async def measure(one, other, store):
    office = await Line(one.admin).open()
    # The token is among the credentials, which arrive soon after the port is open.
    for _ in range(WAIT_S * 10):
        if (await office.ask("GET", "/keys", TOKEN))[0] == 200:
            break
        await asyncio.sleep(0.1)
    before = memory_kib(store.process.pid)
    keys, begun = {}, time.monotonic()
    await asyncio.gather(*(make(one.admin, keys, range(part, COUNT, MAKERS)) for part in range(MAKERS)))
    made_per_s = COUNT / (time.monotonic() - begun)
    kib = (memory_kib(store.process.pid) - before) / COUNT
    # Not before: a gateway closes a connection on which nothing comes.
    line = await Line(other.port).open()
    firsts = await timed(line, [keys[number] for number in range(FIRSTS)])
    nexts = await timed(line, [keys[0]] * NEXTS)
    late = [await revoked_ms(office, line, number, keys[number]) for number in range(REVOKED)]
    page = json.loads(await office.manage("GET", "/keys?limit=1000"))
    if len(page["data"]) != min(1000, COUNT - REVOKED):
        raise SystemExit(f"many-keys: a page of the list has {len(page['data'])} keys")
    print(
        f"many-keys: keys={COUNT} made_per_s={made_per_s:.0f} redis_kib_per_key={kib:.2f} first_p50_ms={statistics.median(firsts):.2f} "
        f"first_p99_ms={p99(firsts):.2f} next_p50_ms={statistics.median(nexts):.2f} next_p99_ms={p99(nexts):.2f} "
        f"revoked_max_ms={max(late):.0f}"
    )
    return max(late) <= 1000


async def run(binary):
    folder = tempfile.mkdtemp(prefix="penstock-many-keys-")
    upstream, processes = Quick(), []
    try:
        await upstream.start()
        objects = os.path.join(folder, "objects")
        write_objects(objects, [*mock(upstream.port), ("Secret", "default-admin", {"token": TOKEN}), ("Secret", "default-pepper", {"pepper": "p" * 64})])
        with open(os.path.join(folder, "log"), "wb") as log:
            store = redis(folder, log)
            processes.append(store)
            gateways = [gateway(binary, objects, log, store) for _ in range(2)]
            processes += gateways
            for one in gateways:
                wait_port(one.port)
                wait_port(one.admin)
            return await measure(*gateways, store)
    finally:
        for process in reversed(processes):
            process.stop()
        upstream.server.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(0 if asyncio.run(run(sys.argv[1])) else 1)
