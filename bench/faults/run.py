"""Faults and abuse, the same for Penstock and other gateways, graded from what callers and upstreams saw.

CASE=S08,R06 and SUBJECTS=penstock,envoy narrow the run. RESUME=1 plays only those that could not be played in the last
run, whose results are in target/faults.json, and tells of both together."""

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import cases as _cases  # noqa: E402, F401
import peers  # noqa: E402
import report  # noqa: E402
from bench import Bench  # noqa: E402
from case import CASES  # noqa: E402
from subjects import SUBJECTS  # noqa: E402

OURS = "penstock"


def chosen(variable, known):
    wanted = [name for name in os.environ.get(variable, "").replace(",", " ").split() if name]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        sys.exit(f"faults: unknown {variable} {' '.join(unknown)}; known: {' '.join(known)}")
    return wanted or list(known)


def installed(names):
    """Those whose programs are here; the others with the reason."""
    missing = {}
    for name in names:
        if name != OURS:
            try:
                getattr(peers, name)()
            except peers.Missing as error:
                missing[name] = str(error)
                print(f"faults: {name} is left out: {error}", flush=True)
    return [name for name in names if name not in missing], missing


async def play(case, benches, cases):
    """One case at all subjects: side by side, or one after the other where they would disturb each other."""
    if case.alone:
        return {name: await bench.run(case, cases) for name, bench in benches.items()}
    results = await asyncio.gather(*(bench.run(case, cases) for bench in benches.values()))
    return dict(zip(benches, results))


def target():
    """Where results are kept."""
    return os.environ.get("FAULTS_OUT") or os.path.join(os.path.dirname(os.path.dirname(HERE)), "target")


def last_run():
    """What is known of the last run, where it is to be gone on with."""
    if not os.environ.get("RESUME"):
        return None
    with open(os.path.join(target(), "faults.json"), encoding="utf-8") as file:
        return json.load(file)


async def main(folder):
    names, missing = installed(chosen("SUBJECTS", SUBJECTS))
    order = sorted(CASES)
    order.sort(key=lambda name: name[0], reverse=True)
    cases = [CASES[name] for name in chosen("CASE", order)]
    before = last_run()
    all_cases = cases
    if before:
        cases = [case for case in cases if report.is_open(before["cases"].get(case.id, {}).get(OURS))]
    benches, results = {}, {}
    if OURS in names and not os.environ.get("PENSTOCK_BIN"):
        sys.exit("faults: PENSTOCK_BIN names no binary")
    started = time.monotonic()
    try:
        for number, name in enumerate(names):
            benches[name] = Bench(SUBJECTS[name], folder, number)
            await benches[name].fleet.start()
        for case in cases:
            results[case.id] = await play(case, benches, cases)
            report.line(case, results[case.id], OURS)
    finally:
        for bench in benches.values():
            await bench.close()
    facts = report.Facts(
        versions={name: bench.subject.version() for name, bench in benches.items()},
        clean={name: report.clean_pct(bench.clean) for name, bench in benches.items()},
        seconds=time.monotonic() - started, missing=missing, ours=OURS,
    )  # fmt: skip
    if before:
        results = {case.id: results.get(case.id) or before["cases"][case.id] for case in all_cases}
        facts = report.together(before, facts)
    return all_cases, results, facts


def run():
    """Returns the exit code. The processes that were started end however this ends."""
    # Lost connections are the subject here, not a disturbance.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(prefix="penstock-faults-") as folder:
        task = loop.create_task(main(folder))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        try:
            cases, results, facts = loop.run_until_complete(task)
        except asyncio.CancelledError:
            print("faults: told to end; what was started is stopped", file=sys.stderr)
            return 143
        finally:
            loop.close()
    os.makedirs(target(), exist_ok=True)
    with open(os.path.join(target(), "faults.json"), "w", encoding="utf-8") as file:
        json.dump(report.raw(results, facts), file, indent=1)
    with open(os.path.join(target(), "faults.md"), "w", encoding="utf-8") as file:
        file.write(report.markdown(cases, results, facts))
    line, code = report.last_line(results, facts)
    if missed := report.missed(results, facts.ours):
        print(f"faults: not as it has to be: {' '.join(missed)}", flush=True)
    print(line, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(run())
