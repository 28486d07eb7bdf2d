"""Penstock beside other proxies and gateways, on one machine in one run. One process of one subject at a time has a
core for itself; the callers and the mock, an upstream, share another. Repetitions alternate between the subjects, each
time from another one on, so that a noisy machine is noisy for all; medians count.

QUICK=1 takes two short repetitions of the subjects that a change is compared with. SUBJECTS=a,b,… and REPETITIONS=n
choose; what is not whole ends in a line of another name."""

import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import peers  # noqa: E402
import report  # noqa: E402
from measure import Bench, cores, raise_descriptor_limit  # noqa: E402
from rig import end_on_sigterm  # noqa: E402
from subjects import SUBJECTS  # noqa: E402

FEWEST_REPETITIONS = 4
QUICK_SUBJECTS = ["relay", "penstock", "all_on", "envoy", "nginx"]
QUICK_SCALE = 0.5


def chosen():
    """(names, repetitions, scale of windows, whether the result may stand for all)."""
    quick = os.environ.get("QUICK") == "1"
    text = os.environ.get("SUBJECTS")
    names = text.split(",") if text else QUICK_SUBJECTS if quick else list(SUBJECTS)
    unknown = [name for name in names if name not in SUBJECTS]
    if unknown:
        sys.exit(f"bench-proxy: no such subject: {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    repetitions = int(os.environ.get("REPETITIONS", "2" if quick else FEWEST_REPETITIONS))
    whole = set(names) == set(SUBJECTS) and repetitions >= FEWEST_REPETITIONS and not quick
    return names, repetitions, QUICK_SCALE if quick else 1.0, whole


def versions(names):
    """Also installs what is missing, before anything is measured."""
    found = {}
    for name in names:
        try:
            SUBJECTS[name].install()
            found[name] = SUBJECTS[name].version()
        except peers.Missing as error:
            sys.exit(f"bench-proxy: {name}: {error}")
    return found


def main():
    end_on_sigterm()
    release = sys.argv[1]
    names, repetitions, scale, whole = chosen()
    raise_descriptor_limit()
    subjects = [SUBJECTS[name] for name in names]
    found = versions(names)
    started, load = time.monotonic(), os.getloadavg()[0]
    if load > 1:
        print(f"bench-proxy: others use this machine (load {load:.1f}): figures will be worse than they should be")
    places = cores()
    # What runs here shall not disturb the subject; those that are started say themselves where they run.
    os.sched_setaffinity(0, {places[1]})
    with Bench(release, places, scale) as bench:
        for number in range(repetitions):
            first = number * 3 % len(subjects)
            turn = subjects[first:] + subjects[:first]
            bench.direct()
            for subject in turn:
                bench.subject(subject)
                text = f"bench-proxy: repetition {number + 1} of {repetitions}: {subject.name}"
                us = bench.samples[subject.name]["us"]
                print(f"{text}: {us[-1]:.1f} µs/request" if us else text, flush=True)
            for subject in turn:
                if not subject.heavy:
                    bench.held(subject)
            print(f"bench-proxy: {time.monotonic() - started:.0f} s", flush=True)
    machine = {"cores": os.cpu_count(), "load_before": load, "seconds": round(time.monotonic() - started)}
    result = report.Report(bench, subjects, found)
    lines, summary = result.tables(), result.summary(whole)
    print("\n" + "\n".join(lines))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    raw = {
        "commit": commit.stdout.strip(), "machine": machine, "repetitions": repetitions, "scale": scale,
        "versions": found, "samples": bench.samples, "targets": result.targets, "voids": bench.voids,
        "windows": bench.raw,
    }  # fmt: skip
    path = os.path.join("target", "bench-proxy.json")
    os.makedirs("target", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(raw, file, indent=1)
    print(f"raw results: {path}")
    if result.missing:
        sys.exit(f"bench-proxy: no valid window for {', '.join(result.missing)}")
    print(summary)
    if whole and result.failed:
        sys.exit(f"bench-proxy: missed: {'; '.join(result.failed)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
