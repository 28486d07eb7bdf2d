"""Engines' own counts of tokens beside the gateway's: nothing is missing while all callers come through the gateway, also those
who leave before the end; and the share that is missing when somebody asks the engine itself."""

import re
import subprocess
import sys
import urllib.request

from backend import free_port
from client import Failed, check, load_command, wait_until
from up import item, running

# Longer than the window over which the scaler compares.
WINDOW_S, MARGIN_S = 600, 45
BYPASS_S = 150
RATE = 3
ALARM = 0.05


def objects():
    pool = {
        "model": "hf://Qwen/Qwen3-32B",
        "engine": "Simulated",
        "args": ["--profile=qwen3-32b-rtxpro6000-tp2", "--max-num-seqs=64", "--num-gpu-blocks-override=4096", "--max-model-len=4096"],
        "scaling": {"minReplicas": 1, "maxReplicas": 2, "kvCacheUtilizationPercent": 75, "ttftP90": "2s"},
    }
    rule = {"name": "chat", "match": {"models": ["chat"]}, "backends": [{"name": "chat"}]}
    return [item("LLMBackend", "chat", {"pool": pool}), item("RoutingPolicy", "default", {"rules": [rule]})]


def callers(url, seconds, **flags):
    command = load_command(url, model="chat", rate=RATE, duration=f"{seconds}s", progress="0s", **flags)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def uncounted(port):
    """The gauge's two shares by kind; empty while too little is known."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {kind: float(share) for kind, share in re.findall(r'^penstock_scaler_uncounted_tokens_ratio\{.*kind="(\w+)".*\} (\S+)$', text, re.M)}


def prove(engine, url, port):
    through = [callers(url, WINDOW_S + MARGIN_S + BYPASS_S), callers(url, WINDOW_S + MARGIN_S + BYPASS_S, timeout="700ms")]
    try:
        honest = wait_until("the scaler has looked for as long as its window is", lambda: len(uncounted(port)) == 2 and uncounted(port), WINDOW_S + MARGIN_S, 2)
        print(f"reconciliation: all through the gateway: {honest}", flush=True)
        check(all(abs(share) <= ALARM for share in honest.values()), f"nobody went round the gateway: {honest}")
        through.append(callers(engine, BYPASS_S))
        found = wait_until("what goes round the gateway shows", lambda: min(uncounted(port).values()) > ALARM and uncounted(port), BYPASS_S, 2)
        print(f"reconciliation: with one who goes round it: {found}", flush=True)
    finally:
        for process in through:
            process.terminate()
            process.wait(30)
    return honest, found


def main():
    port = free_port()
    with running(objects(), scaler_admin=port) as (up, url):
        engine = re.search(r"is ready on (\S+)", up.said)[1]
        honest, found = prove(f"http://{engine}", url, port)
    shares = [f"{name}_{kind}={share:.3f}" for name, told in (("honest", honest), ("bypassed", found)) for kind, share in sorted(told.items())]
    print(f"reconciliation: {' '.join(shares)}")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"reconciliation: {failed}")
        sys.exit(1)
