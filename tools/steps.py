#!/usr/bin/env python3
"""Runs named steps one after the other, each within a budget, and ends with a table of durations.

usage: steps.py NAME BUDGET_SECONDS COMMAND [NAME BUDGET_SECONDS COMMAND ...]

A step that fails or takes longer than its budget stops the run with exit code 1. While a step is silent, a line every
10 seconds says that it is still going. The last line that the last step printed is printed again at the end.
"""

import os
import signal
import subprocess
import sys
import threading
import time

HEARTBEAT_S = 10


def run(name, budget_s, command):
    """Runs one step; returns (exit code, seconds, last line). Exit code 124: over budget."""
    start = time.monotonic()
    last = {"line": "", "at": start}
    process = subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    over_budget = threading.Event()

    def watch():
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if now - start > budget_s and not over_budget.is_set():
                over_budget.set()
                os.killpg(process.pid, signal.SIGTERM)
                threading.Timer(30, lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL)).start()
            if now - last["at"] > HEARTBEAT_S:
                last["at"] = now
                print(f"{name}: still going after {now - start:.0f} s", flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for line in process.stdout:
            last["at"] = time.monotonic()
            if line.strip():
                last["line"] = line.rstrip("\n")
            sys.stdout.write(line)
            sys.stdout.flush()
        code = process.wait()
    except (KeyboardInterrupt, SystemExit):
        # The step has a session of its own: nobody else tells it.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        raise
    return (124 if over_budget.is_set() else code), time.monotonic() - start, last["line"]


def main(arguments):
    if not arguments or len(arguments) % 3:
        sys.exit(__doc__)
    steps = [(arguments[i], int(arguments[i + 1]), arguments[i + 2]) for i in range(0, len(arguments), 3)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows, failed, last_line = [], False, ""
    for name, budget_s, command in steps:
        if failed:
            rows.append((name, "not run", "", budget_s))
            continue
        print(f"== {name}", flush=True)
        code, seconds, last_line = run(name, budget_s, command)
        result = {0: "ok", 124: "over budget"}.get(code, f"failed ({code})")
        failed = code != 0
        rows.append((name, result, f"{seconds:.0f}", budget_s))
    print(f"\n{'step':<16}{'result':<14}{'seconds':>8}{'budget':>8}")
    for name, result, seconds, budget_s in rows:
        print(f"{name:<16}{result:<14}{seconds:>8}{budget_s:>8}")
    print(last_line, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
