"""Balancing strategies side by side: the same open-loop requests through a real gateway over three simulated engines.

Three pools: `one slow` (one engine takes five times as long for each step), `mixed sizes` (equal engines, prompts and
answers of very different lengths), `shared prefixes` (equal engines whose prefix caches hold a part of the prompts'
beginnings). A window is one strategy's load on one pool, with a gateway and engines of its own, so that nobody finds
what another one has learned or cached; it begins with requests that only warm up. In a round every strategy gets the
same requests. A few windows run at a time; strategies take turns at the places in that order.

The run fails where the default is worse than another strategy beyond what chance explains: see judge.py. Answers per
second are those of a window until its last answer, so that who leaves some callers waiting has fewer.

ROUNDS=n and LANES=n (windows at a time) change how much is measured."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import judge  # noqa: E402
from rig import end_on_sigterm, free_port, wait_port  # noqa: E402

PENSTOCK = os.environ["PENSTOCK_BIN"]
DEFAULT = "default"
# Those that need no prices, regions, keys or sessions, which are not what these pools differ in.
STRATEGIES = [
    "RoundRobin", "LeastRequests", "PowerOfTwo", DEFAULT, "Latency", "PrefixAffinity", "KvAware", "Adaptive",
]  # fmt: skip
ROUNDS = int(os.environ.get("ROUNDS", "5"))
# A window takes a third of a core, of a debug build.
LANES = int(os.environ.get("LANES", str((os.cpu_count() or 1) + 1)))
WARM_UP_S, WINDOW_S = 4, 10
ENGINE = ["--num-gpu-blocks-override", "4096", "--max-num-seqs", "64", "--max-num-batched-tokens", "2048"]
POOLS = {
    "one slow": {
        "engines": [[], [], ["--fault-slowdown", "5"]],
        "load": {"rate": 24, "prompt_tokens": "200:600", "output_tokens": "60:120"},
    },
    "mixed sizes": {
        "engines": [[], [], []],
        "load": {"rate": 22, "prompt_tokens": "50:6000", "output_tokens": "8:256"},
    },
    "shared prefixes": {
        "engines": [[], [], []],
        "load": {
            "rate": 22, "prompt_tokens": "2500:3500", "output_tokens": "16:96",
            "shared_prefix_tokens": 2400, "shared_prefixes": 40,
        },
    },
}  # fmt: skip
# Name and whether more of it is better.
FIGURES = (("mean TTFT", False), ("answers/s", True))
COMPARISONS = len(FIGURES) * len(POOLS) * (len(STRATEGIES) - 1)
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

_given, _lock = set(), threading.Lock()


def ports(count):
    """Free ones that no other window of this run has."""
    found = []
    with _lock:
        while len(found) < count:
            port = free_port()
            if port not in _given:
                _given.add(port)
                found.append(port)
    return found


def objects(count, strategy):
    """Backends and a rule over all of them, without a strategy for the default."""
    names = [f"engine-{number}" for number in range(count)]
    texts = [
        f"apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {{name: {name}}}\n"
        f"spec: {{service: {{name: {name}, port: 8000, model: chat}}}}\n"
        for name in names
    ]
    chosen = "" if strategy == DEFAULT else f"strategy: {strategy}, "
    backends = ", ".join(f"{{name: {name}}}" for name in names)
    texts.append(
        "apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {name: balance}\nspec:\n  rules:\n"
        f"  - {{name: chat, match: {{models: [chat]}}, {chosen}backends: [{backends}]}}\n"
    )
    return "---\n".join(texts)


@contextlib.contextmanager
def gateway(pool, strategy, folder):
    """A gateway before engines of its own; its URL."""
    engines, [listen] = ports(len(pool["engines"])), ports(1)
    with open(os.path.join(folder, "objects.yaml"), "w", encoding="utf-8") as file:
        file.write(objects(len(engines), strategy))
    processes = []
    try:
        for port, flags in zip(engines, pool["engines"]):
            command = [PENSTOCK, "--log", "warn", "engine", "--model", "chat", "--host", "127.0.0.1"]
            processes.append(subprocess.Popen([*command, "--port", str(port), *ENGINE, *flags], **QUIET))
        command = [PENSTOCK, "--log", "warn", "up", "-f", folder, "--listen", f"127.0.0.1:{listen}"]
        for number, port in enumerate(engines):
            command += ["--service", f"default/engine-{number}:8000=127.0.0.1:{port}"]
        for flag in ("admin-listen", "scaler-listen", "scaler-admin-listen"):
            command += [f"--{flag}", "127.0.0.1:0"]
        processes.append(subprocess.Popen(command, **QUIET))
        for port in (*engines, listen):
            wait_port(port)
        yield f"http://127.0.0.1:{listen}"
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def load(url, flags):
    command = [PENSTOCK, "load", "--url", url, "--model", "chat", "--progress", "0s"]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    return subprocess.Popen(command, **QUIET)


def window(pool, strategy, seed):
    """The figures of one strategy in one round."""
    with tempfile.TemporaryDirectory() as folder, gateway(pool, strategy, folder) as url:
        path = os.path.join(folder, "summary.json")
        warm_up = load(url, {**pool["load"], "duration": f"{WARM_UP_S}s", "seed": seed + 1000})
        # What it began ends beside the first ones that count.
        time.sleep(WARM_UP_S)
        measured = load(url, {**pool["load"], "duration": f"{WINDOW_S}s", "seed": seed, "json": path})
        for process in (warm_up, measured):
            if process.wait(300):
                sys.exit(f"bench-balance: void: {strategy}: the load ended with {process.returncode}")
        with open(path, encoding="utf-8") as file:
            summary = json.load(file)
    if summary["errors"]:
        sys.exit(f"bench-balance: void: {strategy} had errors {summary['errors']}")
    return summary["ttft_ms"]["mean"], summary["ok"] / summary["elapsed_s"]


def measure():
    """{pool: {figure: {strategy: a value for each round}}}"""
    results = {pool: {figure: {name: [] for name in STRATEGIES} for figure, _ in FIGURES} for pool in POOLS}
    executor = concurrent.futures.ThreadPoolExecutor(LANES)
    try:
        pending = []
        for number, (name, pool) in itertools.product(range(ROUNDS), POOLS.items()):
            first = number * 3 % len(STRATEGIES)
            for strategy in STRATEGIES[first:] + STRATEGIES[:first]:
                pending.append((number, name, strategy, executor.submit(window, pool, strategy, number + 1)))
        for number, name, strategy, future in pending:
            values = future.result()
            for (figure, _), value in zip(FIGURES, values):
                results[name][figure][strategy].append(value)
            shown = f"{values[0]:.0f} ms, {values[1]:.1f}/s"
            print(f"bench-balance: round {number + 1}: {name}: {strategy} {shown}", flush=True)
    finally:
        executor.shutdown(cancel_futures=True)
    return results


def report(results):
    """Prints what came out; returns whether the default is worse than another strategy somewhere."""
    mean = {
        pool: {figure: {name: statistics.geometric_mean(values) for name, values in by.items()} for figure, by in all_.items()}
        for pool, all_ in results.items()
    }  # fmt: skip
    print(f"\n{'mean TTFT ms (answers/s)':<26}" + "".join(f"{name:>16}" for name in STRATEGIES))
    for pool, by in mean.items():
        cells = [f"{by['mean TTFT'][name]:.0f} ({by['answers/s'][name]:.1f})" for name in STRATEGIES]
        print(f"{pool:<26}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"\nthe default's figure as a multiple of others', {ROUNDS} rounds; intervals hold together with 95 %:")
    worse, worst = [], None
    for pool, (figure, more_is_better) in itertools.product(POOLS, FIGURES):
        for compared in judge.compare(pool, figure, results[pool][figure], DEFAULT, COMPARISONS):
            is_worse = compared.is_worse(more_is_better)
            print(f"  {compared}{' WORSE' if is_worse else ''}")
            worse += [compared] if is_worse else []
            if not more_is_better and (worst is None or compared.ratio > worst.ratio):
                worst = compared
    ttft, rps = (mean["one slow"][figure] for figure, _ in FIGURES)
    print(
        f"proof: the default is worse than another strategy beyond noise in {len(worse)} of {COMPARISONS} comparisons; "
        f"its least favourable mean TTFT: {worst}"
    )
    print(
        f"bench-balance: rr_ttft_ms={ttft['RoundRobin']:.0f} ours_ttft_ms={ttft[DEFAULT]:.0f} "
        f"rr_rps={rps['RoundRobin']:.1f} ours_rps={rps[DEFAULT]:.1f} "
        f"best_other_ttft_ms={min(value for name, value in ttft.items() if name != DEFAULT):.0f}"
    )
    return bool(worse)


def main():
    end_on_sigterm()
    sys.exit(report(measure()))


if __name__ == "__main__":
    main()
