"""R02, R12–R14, R18: many callers at a time: streams to be carried to their ends, slow heads, slow readers, departures,
streams that say little."""

import asyncio
import os
import socket
import time

import client
import judge
import judge_load
import slow_callers
from case import case, pool, route, verdicts

STREAMS = int(os.environ.get("STREAMS", "500"))


@case("R02", "SIGTERM with 500 open streams", pool("r02", idle_s=30.0, total_s=120.0), alone=True, spoils=True,
      ends=True)  # fmt: skip
async def r02(ctx):
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma):
        await upstream.behave({"gate_s": 8.0, "itl": 2.0})
    target = ctx.target("r02")
    tasks = []
    for _ in range(STREAMS):
        tasks.append(asyncio.create_task(client.call(target, "r02", limit_s=90.0)))
        await asyncio.sleep(0.01)
    deadline = time.monotonic() + 40.0
    while time.monotonic() < deadline:
        if sum(record["tokens"] > 0 for record in await ctx.fleet.log()) >= STREAMS:
            break
        await asyncio.sleep(0.5)
    idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", target.port)
    ctx.clean_paused = True
    told_at = time.monotonic()
    await ctx.subject.terminate()
    await asyncio.sleep(1.0)
    late = await client.call(target, "r02", limit_s=2.0, leave_after_s=2.0)
    ctx.keep("a new connection 1 s after", late)
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma):
        await upstream.order("release")
    answers = await asyncio.gather(*tasks)
    last_end = max(answer.t_end for answer in answers)
    ended_at = None
    while time.monotonic() < last_end + 15.0:
        if not ctx.subject.is_running():
            ended_at = time.monotonic()
            break
        await asyncio.sleep(0.05)
    try:
        closed = await asyncio.wait_for(idle_reader.read(1), 0.5) == b""
    except (asyncio.TimeoutError, ConnectionError) as error:
        closed = isinstance(error, ConnectionError)
    idle_writer.close()
    ctx.note(
        streams=len(answers), whole=sum(judge_load.is_counted_whole(answer) for answer in answers),
        last_stream_s=round(last_end - told_at, 2), ended_s=ended_at and round(ended_at - told_at, 2),
    )  # fmt: skip
    return judge_load.drain(answers, ended_at, last_end, closed)


HEADS, BODIES = 5000, 200


@case("R12", "slow heads and slow bodies", route("r12"))
async def r12(ctx):
    """5,000 callers send a byte of their head every 10 s, 200 a byte of their body; others go on meanwhile."""
    target = ctx.target("r12")
    body = client.body_of("r12", "slow", False)
    head = client.head_of(target, len(body), target.headers)
    others = asyncio.create_task(ctx.open_loop("r12", 10, 36))
    seen = await slow_callers.run(target.port, {"heads": HEADS, "bodies": BODIES}, head, body)
    answers = await others
    for name, group in seen.items():
        after = [seconds for seconds in group["closed_after_s"] if seconds is not None]
        ctx.note(**{
            f"{name}_open": len(group["closed_after_s"]) - len(after),
            f"{name}_closed_s": [round(min(after, default=0), 1), round(max(after, default=0), 1)],
            f"{name}_answer": group["answer"],
        })  # fmt: skip
    ctx.note(others_lost=judge_load.share_lost(answers))
    return verdicts(
        judge_load.slow_heads(seen["heads"]["closed_after_s"], 10.0, answers).of("heads"),
        judge_load.slow_heads(seen["bodies"]["closed_after_s"], 30.0, answers).of("bodies"),
    )


READERS, READER_BYTES = 200, 10 << 20


@case("R13", "200 callers that do not read 10 MB each", route("r13", "alpha", idle_s=120.0, total_s=300.0), spoils=True)
async def r13(ctx):
    pad = READER_BYTES // 60
    await ctx.fleet.alpha.behave({"pad": pad, "itl": 0.0})
    target = ctx.target("r13")
    window_s = 75.0
    sockets = []
    async with ctx.memory() as memory:
        started = time.monotonic()
        for _ in range(READERS):
            body = client.body_of("r13", client.new_id("slow"), True)
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", target.port))
            sock.sendall(client.head_of(target, len(body), target.headers) + body)
            sockets.append(sock)
            await asyncio.sleep(0.005)
        await asyncio.sleep(12.0)
        held_kib = memory.grown_kib
        while True:
            # Each stream has the window from its own beginning, however long it took to open them all.
            log = [record for record in await ctx.fleet.alpha.log() if record["id"].startswith("slow")]
            latest = max((record["t"] for record in log), default=started)
            if time.monotonic() > latest + window_s or time.monotonic() > started + 2 * window_s:
                break
            if len(log) >= READERS and all(record["end"] or record["gone"] for record in log):
                break
            await asyncio.sleep(1.0)
    log = [record for record in await ctx.fleet.alpha.log() if record["id"].startswith("slow")]
    for sock in sockets:
        client_abort(sock)
    sent_whole = sum(record["end"] == "done" for record in log)
    held_s = [(record["gone"] or record["t_end"]) - record["t"] for record in log if record["gone"] or record["t_end"]]
    ended = sum(seconds <= window_s for seconds in held_s)
    ctx.note(longest_held_s=round(max(held_s, default=0.0), 1))
    ctx.note(
        kib_per_stream=round(held_kib / READERS), reached=len(log), upstreams_not_paused=sent_whole, ended=ended,
        sent_mib=sum(record["sent"] for record in log) >> 20, waited_s=round(time.monotonic() - started, 1),
    )  # fmt: skip
    return judge_load.slow_readers(READERS, held_kib, sent_whole, ended, window_s)


def client_abort(sock):
    import struct

    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


DEPARTURES = int(os.environ.get("DEPARTURES", "1000"))


@case("R14", "1,000 callers leave, half of them before the first token", route("r14", "alpha", first_byte_s=10.0),
      alone=True, spoils=True)  # fmt: skip
async def r14(ctx):
    descriptors = ctx.subject.descriptors()
    answers = []

    async def leave(step, count, callers, **how):
        await ctx.fleet.alpha.behave(step)
        todo = iter(range(count))

        async def caller():
            for number in todo:
                answers.append(await ctx.call("r14", reset=number % 2 == 0, **how))

        await asyncio.gather(*(caller() for _ in range(callers)))

    await leave({"itl": 0.02, "tokens": 600}, DEPARTURES // 2, 10, leave_at_piece=3)
    await leave({"ttft": 8.0}, DEPARTURES // 4, 10, leave_after_s=0.25)
    await leave({"delay": 8.0}, DEPARTURES // 4, 10, leave_after_s=0.25)
    await asyncio.sleep(1.0)
    log = {record["id"]: record for record in await ctx.fleet.alpha.log()}
    left = [answer for answer in answers if answer.end == "left"]
    pairs = [(answer.t_end, log[answer.id]["gone"]) for answer in left if answer.id in log]
    delays = [gone - at for at, gone in pairs if gone is not None]
    await asyncio.sleep(1.0)
    grown = ctx.subject.descriptors() - descriptors
    ctx.note(
        left=len(left), reached_upstream=len(pairs), aborted=len(delays), descriptors_grown=grown,
        p50_ms=round(judge.percentile(delays, 0.5) * 1000, 1), p999_ms=round(judge.percentile(delays, 0.999) * 1000, 1),
    )  # fmt: skip
    growth = judge.Verdict("partial", f"{grown} descriptors more than before") if grown > 50 else judge.PASS
    return verdicts(judge_load.departures(pairs), growth)


# Fewer at those whose CPU as many would take whole.
IDLE_STREAMS = {"litellm": 200, "portkey": 500}
MOST_IDLE_STREAMS, OPENED_PER_S, IDLE_TOKENS = 2000, 200, 60
# Of a debug build. bench-proxy measures a released one.
IDLE_KIB, IDLE_CORES = 48, 0.5


@case("R18", "thousands of streams at a token a second", pool("r18", idle_s=30.0, total_s=150.0), alone=True, spoils=True)
async def r18(ctx):
    """Each lasts a minute; memory and CPU are those while all are open."""
    count = IDLE_STREAMS.get(ctx.subject.name, MOST_IDLE_STREAMS)
    for upstream in (ctx.fleet.alpha, ctx.fleet.beta, ctx.fleet.gamma):
        await upstream.behave({"tokens": IDLE_TOKENS, "itl": 1.0})
    ctx.clean_paused = True
    async with ctx.memory() as memory:
        tasks, started = [], time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, started + number / OPENED_PER_S - time.monotonic()))
            tasks.append(asyncio.create_task(ctx.call("r18", limit_s=120.0)))
        await asyncio.sleep(5.0)
        before_s, at = ctx.subject.cpu_s(), time.monotonic()
        # Until the first ones end.
        await asyncio.sleep(max(5.0, started + IDLE_TOKENS - 2.0 - at))
        cores = (ctx.subject.cpu_s() - before_s) / (time.monotonic() - at)
        opened = sum(record["tokens"] > 0 and record["end"] is None for record in await ctx.fleet.log())
        answers = await asyncio.gather(*tasks)
    ctx.note(streams=count, open_together=opened, grown_kib=memory.grown_kib, cores=round(cores, 3))
    if opened < count:
        return judge.Verdict("fail", f"only {opened} of {count} streams were open together")
    return judge_load.held_streams(answers, memory.grown_kib, cores, IDLE_KIB, IDLE_CORES)
