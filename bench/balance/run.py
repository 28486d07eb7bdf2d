"""Balancing strategies side by side: the same open-loop load through one gateway, a rule a strategy, over three
simulated engines. Windows alternate between strategies, so that a noisy machine is noisy for all.

Three pools: `one slow` (one engine takes five times as long for each step), `mixed sizes` (equal engines, prompts and
answers of very different lengths), `shared prefixes` (equal engines whose prefix caches hold a part of the prompts'
beginnings)."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from rig import end_on_sigterm, free_port, wait_port  # noqa: E402

PENSTOCK = os.environ["PENSTOCK_BIN"]
STRATEGIES = ["RoundRobin", "LeastRequests", "PowerOfTwo", "PeakEwma", "PrefixAffinity", "KvAware", "Adaptive"]
DEFAULT = "PeakEwma"
# What the default must not be worse than: strategies that, like it, know nothing of prompts.
OTHERS = ["RoundRobin", "LeastRequests", "PowerOfTwo"]
ROUNDS = int(os.environ.get("ROUNDS", "3"))
WINDOW = os.environ.get("WINDOW", "15s")
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


def objects(ports):
    """Three backends and a rule for each strategy, which is also the rule's model."""
    texts = []
    for number in range(len(ports)):
        texts.append(
            f"apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {{name: engine-{number}}}\n"
            f"spec: {{service: {{name: engine-{number}, port: 8000, model: chat}}}}\n"
        )
    backends = ", ".join(f"{{name: engine-{number}}}" for number in range(len(ports)))
    rules = [
        f"  - {{name: {name.lower()}, match: {{models: [{name}]}}, strategy: {name}, backends: [{backends}]}}\n"
        for name in STRATEGIES
    ]
    texts.append(
        "apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {name: strategies}\nspec:\n  rules:\n"
        + "".join(rules)
    )
    return "---\n".join(texts)


def window(url, folder, strategy, seed, flags):
    """One strategy's share of a round: (mean time to first token in ms, answers per second)."""
    path = os.path.join(folder, "summary.json")
    flags = {**flags, "model": strategy, "duration": WINDOW, "seed": seed, "progress": "0s", "json": path}
    command = [PENSTOCK, "load", "--url", url]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=300)
    with open(path, encoding="utf-8") as file:
        summary = json.load(file)
    if summary["errors"]:
        sys.exit(f"bench-balance: void: {strategy} had errors {summary['errors']}")
    return summary["ttft_ms"]["mean"], summary["ok"] / summary["elapsed_s"]


def measure(name, pool):
    """Median over the rounds of (mean time to first token, answers per second), by strategy."""
    ports = [free_port() for _ in pool["engines"]]
    listen = free_port()
    results = {strategy: [] for strategy in STRATEGIES}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "objects.yaml"), "w", encoding="utf-8") as file:
            file.write(objects(ports))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            for port, flags in zip(ports, pool["engines"]):
                command = [PENSTOCK, "engine", "--model", "chat", "--host", "127.0.0.1", "--port", str(port)]
                processes.append(subprocess.Popen([*command, "--log", "warn", *ENGINE, *flags], **quiet))
            command = [PENSTOCK, "--log", "warn", "up", "-f", folder, "--listen", f"127.0.0.1:{listen}"]
            for number, port in enumerate(ports):
                command += ["--service", f"default/engine-{number}:8000=127.0.0.1:{port}"]
            for flag in ("admin-listen", "scaler-listen", "scaler-admin-listen"):
                command += [f"--{flag}", "127.0.0.1:0"]
            processes.append(subprocess.Popen(command, **quiet))
            for port in (*ports, listen):
                wait_port(port)
            for number in range(ROUNDS):
                for strategy in STRATEGIES:
                    url = f"http://127.0.0.1:{listen}"
                    ttft, rps = window(url, folder, strategy, number + 1, pool["load"])
                    results[strategy].append((ttft, rps))
                    print(f"bench-balance: {name}: round {number + 1}: {strategy} {ttft:.0f} ms, {rps:.1f}/s", flush=True)
                    time.sleep(1)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
    return {
        strategy: tuple(statistics.median(column) for column in zip(*rows)) for strategy, rows in results.items()
    }


def main():
    end_on_sigterm()
    pools = {name: measure(name, pool) for name, pool in POOLS.items()}
    print(f"\n{'mean TTFT ms (answers/s)':<26}" + "".join(f"{strategy:>20}" for strategy in STRATEGIES))
    for name, results in pools.items():
        cells = "".join(f"{f'{ttft:.0f} ({rps:.1f})':>20}" for ttft, rps in results.values())
        print(f"{name:<26}{cells}")
    slow = pools["one slow"]
    others = {name: min(results[strategy][0] for strategy in OTHERS) for name, results in pools.items()}
    worst = max(results[DEFAULT][0] / others[name] for name, results in pools.items())
    print(f"proof: the default's mean TTFT is at most {worst:.2f} times the best of {', '.join(OTHERS)} on any pool")
    print(
        f"bench-balance: rr_ttft_ms={slow['RoundRobin'][0]:.0f} ours_ttft_ms={slow[DEFAULT][0]:.0f} "
        f"rr_rps={slow['RoundRobin'][1]:.1f} ours_rps={slow[DEFAULT][1]:.1f} "
        f"best_other_ttft_ms={others['one slow']:.0f}"
    )


if __name__ == "__main__":
    main()
