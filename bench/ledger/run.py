"""What keys and hard budgets cost a request, and what tokens do, beside the same gateway without, in one run; and what the
store of budgets does to the slowest: one a millisecond away, for keys that are known, keys that are new, keys near their
limit; and one that does not answer any more."""

import os
import signal
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "proxy")]

from measure import Bench, cores, raise_descriptor_limit  # noqa: E402
from rig import end_on_sigterm, free_port, wait_port  # noqa: E402
from subjects import BUDGETS, Running, Subject, backend, budgets, key_of, keys, penstock  # noqa: E402
from tokens import Issuer  # noqa: E402

REPETITIONS = 5
KEYS = 400
# Of the store, there and back.
AWAY_S = 0.001
# Requests that say how slow the slowest of a hundred is, of those that ask the store.
ASKED = 300
ALONE = {"connections": 1, "window_ms": 2000, "warm_up_ms": 300}
BASE = {"connections": 64, "window_ms": 2000, "warm_up_ms": 300}


POLICY = (
    "apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {name: default}\n"
    "spec: {rules: [{name: mock, match: {models: [mock]}, backends: [{name: mock}]}]}\n"
)


class Delayed:
    """A relay to the store that holds every piece for half of the way."""

    def __init__(self, to):
        self.to, self.port = to, free_port()
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                return
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one, other):
        try:
            while piece := one.recv(65536):
                time.sleep(AWAY_S / 2)
                other.sendall(piece)
        except OSError:
            pass
        for end in (one, other):
            end.close()


class Store:
    """A Redis that writes what it acknowledges to its disk first."""

    def __enter__(self):
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if not program:
            sys.exit("bench-ledger: no redis-server: apt-get install redis-server")
        self.folder, self.port = tempfile.mkdtemp(prefix="penstock-bench-store-"), free_port()
        options = ["--port", str(self.port), "--dir", self.folder, "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen([program, *options, "--save", ""], stdout=subprocess.DEVNULL)
        wait_port(self.port)
        self.away = Delayed(self.port)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(10)
        self.away.listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def knowing(*texts):
    """The bench's gateway with more objects."""

    def command(place):
        objects = os.path.join(place.folder, "objects")
        os.makedirs(objects)
        with open(os.path.join(objects, "objects.yaml"), "w", encoding="utf-8") as file:
            file.write("---\n".join([backend(place), POLICY, *texts]))
        return penstock(place)

    return command


def budgeted(store, rows, most):
    """The same with keys and budgets."""

    def command(place):
        line, environment = knowing(*keys(KEYS), *budgets(rows, most))(place)
        return [*line, "--store", f"redis://127.0.0.1:{store.away.port}"], environment

    return command


def by_key(number):
    return f"x-penstock-key: {key_of(number)}"


def by_token(token):
    return f"authorization: Bearer {token}"


def ask(port, who, tokens=16):
    """Seconds until a caller has its answer, and the answer's status, on a connection of its own."""
    body = b'{"model":"mock","max_tokens":%d,"messages":[{"role":"user","content":"x"}]}' % tokens
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"connection: close\r\n{who}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", port), 5) as caller:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.monotonic()
        caller.sendall(head + body)
        answer = caller.recv(65536)
        took = time.monotonic() - started
        while caller.recv(65536):
            pass
    return took, int(answer.split(b" ", 2)[1])


def single(port, callers, wanted, what):
    """Percentiles of single calls, µs."""
    took = []
    for who in callers:
        seconds, status = ask(port, who)
        if status not in wanted:
            sys.exit(f"bench-ledger: {what}: status {status}")
        took.append(seconds)
    return [share * 1e6 for share in statistics.quantiles(took, n=100)]


def slowest(port, numbers, wanted, what):
    return single(port, map(by_key, numbers), wanted, what)[98]


def plain(bench, subject, figures):
    with Running(subject, bench) as running:
        bench.window(subject.name, running, "warm", **BASE | {"window_ms": 300})
        for name, window in (("us", BASE), ("alone", ALONE)):
            result = bench.window(subject.name, running, name, **window)
            if result:
                figures[name].append((result["cpu_us"] if name == "us" else result["p99_us"], result["rps"]))


def main():
    end_on_sigterm()
    raise_descriptor_limit()
    places = cores()
    os.sched_setaffinity(0, {places[1]})
    found = {name: {"us": [], "alone": []} for name in ("bare", "kept", "token")}
    with Bench(sys.argv[1], places) as bench, Store() as store:
        header = lambda place: (by_key(7),)  # noqa: E731
        issuer = Issuer(store.folder)
        known = by_token(issuer.token(0))
        bare = Subject("bare", "no keys, no budgets", penstock)
        kept = Subject("kept", "keys, three hard budgets", budgeted(store, BUDGETS, 10**12), headers=header)
        token = Subject("token", "callers with tokens", knowing(issuer.provider()), headers=lambda place: (known,))
        for number in range(REPETITIONS):
            for subject in (bare, kept, token) if number % 2 else (token, kept, bare):
                plain(bench, subject, found[subject.name])
            us = ", ".join(f"{name} {kind['us'][-1][0]:.1f}" for name, kind in found.items())
            print(f"bench-ledger: repetition {number + 1} of {REPETITIONS}: µs/request: {us}", flush=True)
        with Running(token, bench) as running:
            fresh = single(running.port, [by_token(issuer.token(number)) for number in range(1, ASKED + 1)], {200}, "a new token")
            again = single(running.port, [known] * ASKED, {200}, "a known token")
        with Running(kept, bench) as running:
            # Key 7 is in use already; each other one is new.
            hot = slowest(running.port, [7] * ASKED, {200}, "a known key")
            cold = slowest(running.port, range(8, 8 + ASKED), {200}, "a new key")
        # Of so little nothing lies idle: every request asks.
        near = Subject("near", "near its limit", budgeted(store, [("few", "Key", "Requests", "rolling: 1h")], 40), headers=header)
        with Running(near, bench) as running:
            numbers = [number for number in range(8, 8 + 10) for _ in range(30)]
            near_cap = slowest(running.port, numbers, {200}, "a key near its limit")
        frozen = Subject("frozen", "a store that does not answer", budgeted(store, BUDGETS, 10**12), headers=header)
        with Running(frozen, bench) as running:
            store.process.send_signal(signal.SIGSTOP)
            opened = time.monotonic() + 12
            # Until the leases of the first are not good any more, and its gateway knows that nobody answers.
            while time.monotonic() < opened:
                ask(running.port, by_key(100))
            stuck = [ask(running.port, by_key(101 + number))[0] * 1e3 for number in range(200)]
            store.process.send_signal(signal.SIGCONT)
    median = lambda name, figure, at=0: statistics.median(row[at] for row in found[name][figure])  # noqa: E731
    added, shown = median("kept", "us") - median("bare", "us"), median("token", "us") - median("bare", "us")
    # Three limits a request.
    per_core = median("kept", "us", 1) * len(BUDGETS)
    alone = median("kept", "alone") - median("bare", "alone")
    print(
        f"bench-ledger: tokens: us_added={shown:.1f} for one that is known; single calls: p50 {again[49]:.0f} µs and p99 {again[98]:.0f} "
        f"with it, p50 {fresh[49]:.0f} and p99 {fresh[98]:.0f} with a new one each"
    )
    print(f"bench-ledger: one connection: p99 {median('bare', 'alone'):.0f} µs without, {median('kept', 'alone'):.0f} with")
    print(f"bench-ledger: single calls, store {AWAY_S * 1e3:.0f} ms away: p99 {hot:.0f} µs with a known key")
    print(
        f"bench-ledger: us_added={added:.1f} per_core={per_core:.0f} hot_p99_us={alone:.0f} cold_key_p99_us={cold - hot:.0f} "
        f"near_cap_p99_us={near_cap - hot:.0f} frozen_p99_ms={statistics.quantiles(stuck, n=100)[98]:.1f}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
