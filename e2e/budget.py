"""A budget of a month through two gateways that share a Redis, whose clock comes to the month's end meanwhile: spent to the
limit through both with OpenAI's SDK, refused by both until the month is over, and there is all of it again."""

import contextlib
import datetime
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import openai
from backend import Backend, free_port, serving
from client import Failed, check, expect, sdk, wait_until
from up import item, running

LIMIT = 20
# Where the clock begins, and how long it is from there to the end of November in Berlin.
BEGIN, LEFT_S = int(datetime.datetime(2026, 11, 30, 22, 59, 15, tzinfo=datetime.UTC).timestamp()), 45
REDIS = shutil.which("valkey-server") or shutil.which("redis-server")
HERE = os.path.dirname(os.path.abspath(__file__))


@contextlib.contextmanager
def store(folder):
    """A Redis that syncs what it acknowledges, and whose clock begins near the end of the month."""
    port, clock_of_its_own = free_port(), os.path.join(folder, "clock.so")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", clock_of_its_own, os.path.join(HERE, "clock.c")], check=True)
    ahead = {"LD_PRELOAD": clock_of_its_own, "CLOCK_AHEAD_S": str(BEGIN - int(time.time()))}
    command = [REDIS, "--port", str(port), "--dir", folder, "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    process = subprocess.Popen(command, env={**os.environ, **ahead}, stdout=subprocess.DEVNULL)
    try:
        wait_until("Redis", lambda: clock(port), 20, 0.1)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def clock(port):
    """The time of that Redis, Unix s."""
    with socket.create_connection(("127.0.0.1", port), 5) as conversation:
        conversation.sendall(b"TIME\r\n")
        # *2 $10 <seconds> $6 <microseconds>
        return int(conversation.recv(100).split()[2])


def objects(upstream):
    limit = {"name": "monthly", "unit": "Requests", "max": LIMIT, "window": {"calendar": "Month", "timeZone": "Europe/Berlin"}}
    rule = {"name": "any", "match": {"models": ["chat"]}, "backends": [{"name": "backend"}]}
    return [
        item("LLMBackend", "backend", {"external": {"url": f"{upstream}/v1"}}),
        item("RoutingPolicy", "default", {"rules": [rule]}),
        item("TokenBudget", "all", {"limits": [limit]}),
    ]


def refusal(url):
    """The answer with which a call is refused; None if it is answered."""
    try:
        sdk(url).chat.completions.create(model="chat", messages=[{"role": "user", "content": "Hello."}], max_tokens=8)
    except openai.RateLimitError as error:
        return error.response
    return None


def refused_for_long(url):
    told = refusal(url)
    check(told is not None, "a call is answered beyond the month's limit")
    return told if int(told.headers["retry-after"]) > 5 else None


def spend(urls):
    """How many calls are answered, of twice as many as may be, in turn through each gateway."""
    return sum(refusal(urls[number % len(urls)]) is None for number in range(2 * LIMIT))


def prove(port, urls):
    begun = clock(port)
    ends = begun - begun % 3600 + 3600
    check(ends - begun <= LEFT_S, f"the month is over before the gateways are ready: {begun}")
    done = expect(spend(urls), LIMIT, "calls that were answered in November")
    for url in urls:
        # As long as what the last calls took is not told, others may come soon.
        told = wait_until("a refusal for the rest of the month", lambda: refused_for_long(url), 10, 0.2)
        wait_s, left_s = int(told.headers["retry-after"]), ends - clock(port)
        check(abs(wait_s - left_s) <= 2, f"Retry-After: {wait_s}, and the month has {left_s} s")
        wanted = {"limit": str(LIMIT), "remaining": "0"}
        told = {name: told.headers[f"x-ratelimit-{name}-requests"] for name in wanted}
        done += expect(told, wanted, "headers of a refusal")
    check(clock(port) < ends - 3, f"too late to say that it was refused until the end: {clock(port)}")
    while clock(port) < ends - 1:
        check(refusal(urls[0]) is not None, "a call is answered before the month is over")
        time.sleep(0.5)
    wait_until("December", lambda: clock(port) > ends, LEFT_S, 0.2)
    done += expect(spend(urls), LIMIT, "calls that were answered in December")
    return done + expect(len(Backend.seen), 2 * LIMIT, "calls that the backend has seen")


def main():
    if not REDIS:
        return print("budget: skipped: there is no redis-server")
    with tempfile.TemporaryDirectory() as folder, serving() as upstream, store(folder) as port:
        flags = ("--store", f"redis://127.0.0.1:{port}")
        with running(objects(upstream), *flags) as (_, one), running(objects(upstream), *flags) as (_, other):
            done = prove(port, (one, other))
    print(f"budget: ok={done} failed=0")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"budget: {failed}")
        sys.exit(1)
