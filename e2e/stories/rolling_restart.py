"""The gateways are replaced one after the other under 300 open streams: none is cut and nobody is refused."""

import subprocess
import threading

from client import check, load, load_command, parse_summary, sdk, wait_until
from cluster import policy, pool, rule

STREAMS = 300


def run(story):
    # Slow tokens: that many streams stay open for a minute and leave the machine's cores alone.
    story.apply(
        pool("chat", "--fault-slowdown=40", replicas=2),
        policy("default", rule("chat", "chat")),
    )
    story.wait_ready(("llmbackend", "chat"), ("routingpolicy", "default"))
    url = story.gateway_url()
    wait_until("the gateway's NodePort", lambda: sdk(url).models.list().data, 30)
    before = pods(story)
    check(len(before) >= 2, f"{len(before)} gateways are none to replace one after the other")

    common = {"model": "chat", "prompt_tokens": 50, "progress": "0s", "timeout": "240s", "arrivals": "constant"}
    streams = subprocess.Popen(
        load_command(url, rate=STREAMS // 6 + 1, duration="6s", output_tokens=200, **common),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Others come and go all the time, on new connections too.
    results = {}

    def come_and_go():
        results["others"] = load(url, 200, rate=3, duration="60s", output_tokens=2, **common)

    others = threading.Thread(target=come_and_go)
    others.start()
    try:
        threading.Event().wait(8)  # all streams have begun
        story.kubectl("rollout", "restart", "deployment/default-gateway")
        story.kubectl("rollout", "status", "deployment/default-gateway", "--timeout=120s", timeout_s=130)
        check(streams.poll() is None, "void: the streams ended before the gateways were replaced")
        lasting = [name for name in pods(story) if name in before]
        check(lasting, "void: the old gateways were gone before their streams ended")
        text = streams.communicate(timeout=240)[0]
    finally:
        streams.kill()
        others.join(220)
    summary = parse_summary(text.strip().splitlines()[-1])
    check(summary["ok"] >= STREAMS and summary["errors"] == 0, f"streams were cut or refused:\n{text}")
    check("others" in results, "the load of short requests did not end")
    check(results["others"]["errors"] == 0, f"requests failed: {results['others']['kinds']}")
    wait_until("the old gateways to go", lambda: not set(before) & set(pods(story)), 60)
    print(
        f"e2e: rolling_restart: {summary['ok']:.0f} streams on {len(before)} gateways, none cut;"
        f" {results['others']['ok']:.0f} requests beside them, none failed",
        flush=True,
    )


def pods(story):
    """Names of the gateways, those that are on their way out too."""
    return [pod["metadata"]["name"] for pod in story.list("pods", "-l", "penstock.dev/gateway=default")]
