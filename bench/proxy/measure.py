"""What is asked of each subject, and what it cost. A window with any failed or short answer is void: it is named, and
none of its figures counts."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

from rig import core_busy_s, cpu_s, free_port, memory_kib, wait_port
from subjects import NotStarted, Running

# With an answer within this, a throughput counts as one that can be used.
LIMIT_P99_MS = 5
SIZES = {"1": 1024, "32": 32 << 10, "256": 256 << 10}
STREAMS = 4000
# Open while they are held: the last one begins before the first one ends, with time to look at memory.
HELD = {"ramp_ms": 1500, "deltas": 7, "gap_ms": 1000}
# How callers come to them. Thousands of handshakes take the callers' core seconds.
TRANSPORTS = {
    "plain": HELD,
    "tls": HELD | {"ramp_ms": 5000, "gap_ms": 2500, "tls": True},
    "h2": HELD | {"h2": True},
}
# The figure that comes of each.
STREAM_KIB = {"plain": "stream_kib", "tls": "tls_stream_kib", "h2": "h2_stream_kib"}
SETTLE_S = 4

LIGHT = {
    "base": {"connections": 64, "window_ms": 1500},
    "ladder": (16, 256),
    "ladder_ms": 800,
    "alone_ms": 1000,
    # The slowest in a hundred of a window are few, and any other work of the machine is among them.
    "alone_windows": 4,
    "half": {"connections": 64, "window_ms": 1000},
    "size_ms": 800,
    "size_connections": {"1": 64, "32": 64, "256": 16},
    # Deltas come as from an engine with this many sequences and a step of 20 ms.
    "paced": {"streams": 400, "ramp_ms": 200, "deltas": 80, "gap_ms": 20},
    "warm_up_ms": 200,
}
# What adds milliseconds to a call needs longer windows for as many answers, and cannot carry as much.
HEAVY = {
    "base": {"connections": 64, "window_ms": 3000},
    "ladder": (4,),
    "ladder_ms": 1500,
    "alone_ms": 1500,
    "alone_windows": 1,
    "half": {"connections": 64, "window_ms": 2000},
    "size_ms": 1500,
    "size_connections": {"1": 16, "32": 8, "256": 4},
    "paced": {"streams": 10, "ramp_ms": 20, "deltas": 60, "gap_ms": 20},
    "warm_up_ms": 500,
}
BURST_DELTAS = 16
FIRST = "first calls"
ALONE_DELTAS = 4
FIRST_STREAMS = {"streams": 4, "ramp_ms": 20, "deltas": ALONE_DELTAS, "gap_ms": 20}


def cores():
    """(the subject's, the callers', the mock's)."""
    if not shutil.which("taskset"):
        sys.exit("bench-proxy: taskset is missing: install the package util-linux")
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        sys.exit("bench-proxy: at least two cores are needed: one for the subject, one for callers and mock")
    return usable[-1], usable[0], usable[1] if len(usable) > 2 else usable[0]


def raise_descriptor_limit():
    needed = 2 * STREAMS + 500
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        sys.exit(f"bench-proxy: {STREAMS} streams need {needed} open files, `ulimit -Hn` allows {hard}")
    wanted = max(needed, 20000)
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class Meter:
    """What a subject and all others use of the subject's core, from here on."""

    def __init__(self, running, core):
        self.pid, self.core = running.pid if running else None, core
        self.started, self.cpu_before, self.core_before = time.monotonic(), self._cpu(), core_busy_s(core)

    def _cpu(self):
        return cpu_s(self.pid) if self.pid else 0.0

    def read(self):
        """(CPU seconds of the subject, its share of the time, the share of all others)."""
        used, busy, wall = self._cpu() - self.cpu_before, core_busy_s(self.core) - self.core_before, time.monotonic()
        wall -= self.started
        return used, used / wall, max(0.0, busy - used) / wall


class Bench:
    """The mock and the callers on one core, and what was measured: samples by subject and figure."""

    def __init__(self, release, cores, scale=1.0):
        self.release, self.scale = release, scale
        self.subject_core, self.rig_core, self.mock_core = cores
        self.samples = defaultdict(lambda: defaultdict(list))
        self.voids = []
        self.windows = 0
        self.others = []
        self.raw = []
        self.rig = os.path.join(release, "penstock-bench-proxy")
        self.mock_port = free_port()
        self.mock = None
        self.certificates = None

    def __enter__(self):
        self.certificates = tempfile.mkdtemp(prefix="penstock-bench-certificates-")
        command = [self.rig, "mock", "--listen", f"127.0.0.1:{self.mock_port}"]
        try:
            subprocess.run([self.rig, "certificate", "--folder", self.certificates], check=True, timeout=30)
            self.mock = subprocess.Popen(["taskset", "-c", str(self.mock_core), *command])
            wait_port(self.mock_port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.mock:
            self.mock.terminate()
            self.mock.wait(30)
        shutil.rmtree(self.certificates, ignore_errors=True)

    def add(self, name, **figures):
        for figure, value in figures.items():
            if value is not None:
                self.samples[name][figure].append(value)

    def void(self, name, window, reason):
        self.voids.append({"subject": name, "window": window, "reason": reason})
        print(f"bench-proxy: void: {name}: {window}: {reason}", flush=True)

    def command(self, kind, port, headers, options):
        command = ["taskset", "-c", str(self.rig_core), self.rig, kind, "--connect", f"127.0.0.1:{port}"]
        for header in headers:
            command += ["--header", header]
        for option, value in options.items():
            flag = "--" + option.replace("_", "-")
            if value is True:
                command.append(flag)
            elif value not in (None, False):
                command += [flag, str(value)]
        return command

    def judge(self, name, window, text, running, meter):
        """The figures of a window, or None if it is void."""
        self.windows += 1
        used, busy, others = meter.read()
        self.others.append(others)
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        result = lines[-1] if lines else {"failures": {"the caller broke": 1}}
        result |= {"subject": name, "window": window, "others": others}
        self.raw.append(result)
        if result["failures"] or not result["in_window"] and window != FIRST:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in result["failures"].items())
            self.void(name, window, reasons or "no answer ended in it")
            return None
        result["rps"] = result["in_window"] / result["window_s"]
        if running:
            result["cpu_us"] = used / result["answers"] * 1e6
            result["busy"] = busy
        return result

    def window(self, name, running, window, *, window_ms, **options):
        """One run of `load`: against the subject, or without one straight against the mock."""
        port, headers = (running.port, running.headers) if running else (self.mock_port, ())
        options["window_ms"] = max(50, round(window_ms * self.scale))
        meter = Meter(running, self.subject_core)
        done = subprocess.run(
            self.command("load", port, headers, options), stdout=subprocess.PIPE, text=True, check=False, timeout=180
        )
        return self.judge(name, window, done.stdout, running, meter)

    def hold(self, name, running, window, **options):
        """One run of `hold`: (figures or None, most resident memory while all streams were open)."""
        meter, held, opened = Meter(running, self.subject_core), 0, {}
        if options.get("tls"):
            options["ca"] = os.path.join(self.certificates, "ca.crt")
        command = self.command("hold", running.stream_port, running.headers, {"stream": True, **options})
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
            try:
                opened = json.loads(caller.stdout.readline() or "{}")
                for _ in range(5):
                    held = max(held, memory_kib(running.pid))
                    time.sleep(0.1)
                text = caller.stdout.read()
            except BaseException:
                caller.kill()
                raise
        result = self.judge(name, window, text, running, meter)
        return result, held, opened.get("open", 0)

    # What is measured.

    def direct(self):
        """The rig by itself, under the same loads as a light subject."""
        self.loads("direct", None, LIGHT)

    def subject(self, subject):
        """One life of a subject: all loads, then memory."""
        plan = HEAVY if subject.heavy else LIGHT
        try:
            with Running(subject, self) as running:
                idle = self.idle(subject.name, running, plan)
                self.loads(subject.name, running, plan)
                peak = memory_kib(running.pid, "VmHWM")
                time.sleep(SETTLE_S * self.scale)
                self.add(subject.name, load_kib=peak, load_growth=memory_kib(running.pid) / idle)
        except NotStarted as error:
            self.void(subject.name, "start", str(error))

    def idle(self, name, running, plan):
        """Resident memory after a few calls of each kind, so that what is set up once is there."""
        some = {"connections": 4, "deltas": ALONE_DELTAS}
        some |= {"window_ms": plan["warm_up_ms"], "warm_up_ms": plan["warm_up_ms"]}
        for stream in (False, True):
            self.window(name, running, FIRST, stream=stream, **some)
        transport = running.place.transport
        if transport != "plain":
            self.hold(name, running, FIRST, **TRANSPORTS[transport] | FIRST_STREAMS)
        time.sleep(0.3)
        kib = memory_kib(running.pid)
        if transport == "plain":
            self.add(name, idle_kib=kib)
        return kib

    def loads(self, name, running, plan):
        warm = {"warm_up_ms": plan["warm_up_ms"]}
        base = self.window(name, running, "1 KB, 64 connections", **plan["base"], **warm)
        if base:
            self.add(name, us=base.get("cpu_us"), rps=base["rps"], busy=base.get("busy"))
            self.add(name, p50=base["p50_us"], p99=base["p99_us"])
        alone = {"connections": 1, "window_ms": plan["alone_ms"]}
        for _ in range(plan["alone_windows"]):
            one = self.window(name, running, "1 KB, 1 connection", **alone, **warm)
            if one:
                self.add(name, alone_p50=one["p50_us"], alone_p99=one["p99_us"], alone_us=one.get("cpu_us"))
        self.maximum(name, running, plan, [base, one], warm)
        self.sizes(name, running, plan, warm)
        if running:
            self.paced(name, running, plan)
        first = self.window(
            name, running, "first token", connections=1, window_ms=plan["alone_ms"], stream=True,
            deltas=ALONE_DELTAS, split=True, **warm,
        )  # fmt: skip
        if first:
            self.add(name, first_p50=first["first_p50_us"], first_p99=first["first_p99_us"])

    def maximum(self, name, running, plan, known, warm):
        """The most answers a second, any and with a bearable p99; then half of that, beside the rig at the same."""
        tried = [result for result in known if result]
        for connections in plan["ladder"]:
            window = f"1 KB, {connections} connections"
            result = self.window(name, running, window, connections=connections, window_ms=plan["ladder_ms"], **warm)
            tried += [result] if result else []
        if not tried:
            return
        most = max(tried, key=lambda result: result["rps"])
        bearable = [result for result in tried if result["p99_us"] <= LIMIT_P99_MS * 1000]
        best = max(bearable, key=lambda result: result["rps"], default=None)
        self.add(name, most_rps=most["rps"], max_rps=best["rps"] if best else 0.0)
        self.add(name, max_busy=(best or most).get("busy"))
        if not running:
            return
        rate = round((best or most)["rps"] / 2)
        through = self.window(name, running, "half of the maximum", rate=rate, **plan["half"], **warm)
        direct = self.window("direct", None, f"half of the maximum of {name}", rate=rate, **plan["half"], **warm)
        if through and direct:
            self.add(
                name, half_rate=rate, half_p50=through["p50_us"] - direct["p50_us"],
                half_p99=through["p99_us"] - direct["p99_us"],
            )  # fmt: skip

    def sizes(self, name, running, plan, warm):
        for size, bytes_ in SIZES.items():
            for kind, stream in (("whole", False), ("stream", True)):
                if size == "1" and not stream:
                    continue
                result = self.window(
                    name, running, f"{size} KB, {kind}", connections=plan["size_connections"][size],
                    window_ms=plan["size_ms"], body_bytes=bytes_, stream=stream, deltas=BURST_DELTAS, **warm,
                )  # fmt: skip
                if result:
                    self.add(name, **{f"{kind}_{size}_us": result.get("cpu_us"), f"{kind}_{size}_rps": result["rps"]})

    def paced(self, name, running, plan):
        result, _, _ = self.hold(name, running, "paced deltas", **plan["paced"])
        us = self.samples[name]["us"]
        if result and us:
            # What the requests themselves cost is taken off.
            total = result["cpu_us"] * result["answers"] - us[-1] * result["answers"]
            self.add(name, delta_us=total / result["deltas"])

    def held(self, subject):
        """Other lives of a subject, one for each transport: thousands of paced streams at a time."""
        for transport in ("plain", *subject.transports):
            try:
                with Running(subject, self, transport) as running:
                    self.streams(subject.name, running, transport)
            except NotStarted as error:
                self.void(subject.name, "start", str(error))

    def streams(self, name, running, transport):
        idle = self.idle(name, running, LIGHT)
        window = f"{STREAMS} streams, {transport}"
        result, kib, opened = self.hold(name, running, window, streams=STREAMS, **TRANSPORTS[transport])
        if result and opened < STREAMS:
            self.void(name, window, f"only {opened} were open at one time")
        elif result:
            self.add(name, **{STREAM_KIB[transport]: (kib - idle) / STREAMS})
            if transport == "plain":
                time.sleep(SETTLE_S * self.scale)
                self.add(name, held_kib=kib, held_growth=memory_kib(running.pid) / idle)
