"""Without operator, then without API server, then with killed gateways too: requests are answered all the same."""

import time

from client import check, sdk, stream_chat, wait_until
from cluster import SYSTEM, Skipped, kubectl, policy, pool, rule

MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
PARKED = "/etc/kubernetes/kube-apiserver.yaml.parked"
PROGRAMMED_WITHIN_S = 30


def run(story):
    if not story.cluster.kind:
        raise Skipped("needs to stop the API server: only a kind cluster lets it")
    story.apply(pool("chat", replicas=1), policy("default", rule("chat", "chat")))
    story.wait_ready(("llmbackend", "chat"), ("routingpolicy", "default"))
    url = story.gateway_url()
    wait_until("the gateway's NodePort", lambda: sdk(url).models.list().data, 30)
    answers(url, "everything there")

    operator("0")
    try:
        answers(url, "operator at 0")
    finally:
        operator("1")
    kubectl("-n", SYSTEM, "rollout", "status", "deployment/penstock-operator", "--timeout=60s")

    without_api_server(story, url)

    # A change made at once is programmed within 30 s, by an operator and gateways that must find the server again.
    start = time.monotonic()
    changed = policy("default", rule("chat", "chat", models=["chat", "chat-after"]))
    wait_until("the change to be taken", lambda: story.apply(changed), PROGRAMMED_WITHIN_S)
    story.wait_condition("routingpolicy", "default", "Programmed", timeout_s=PROGRAMMED_WITHIN_S)
    took = time.monotonic() - start
    check(took <= PROGRAMMED_WITHIN_S, f"Programmed {took:.1f} s after the API server was back")
    check(stream_chat(sdk(url), "chat-after", "New rule?", 8)[0], "the new rule does not answer")
    print(f"e2e: absence: Programmed {took:.1f} s after the API server was back", flush=True)


def operator(replicas):
    """Scales the operator."""
    kubectl("-n", SYSTEM, "scale", "deployment/penstock-operator", f"--replicas={replicas}")


def without_api_server(story, url):
    """The API server stops; then every gateway is killed; then the API server comes back."""
    node = story.cluster.node_command
    # The kubelet would take half a minute to see that the manifest is gone.
    node("control-plane", "sh", "-c", f"mv {MANIFEST} {PARKED} && pkill -KILL -x kube-apiserver")
    try:
        wait_until("the API server to stop", lambda: not api_server_is_ready(), 90)
        answers(url, "API server stopped")
        killed = kill_gateways(node)
        check(killed > 0, "no gateway process was found on the nodes")
        # The kubelet restarts the container; until then the Service has nobody. That is the killed connection's time.
        wait_until("a killed gateway to answer again", lambda: stream_chat(sdk(url, timeout_s=5), "chat", "Back?", 8)[0], 60)
        answers(url, "gateway restarted without API server")
    finally:
        node("control-plane", "mv", PARKED, MANIFEST)
    back = time.monotonic()
    wait_until("the API server to be back", api_server_is_ready, 120)
    print(f"e2e: absence: API server back after {time.monotonic() - back:.0f} s", flush=True)


def api_server_is_ready():
    """Whether the API server answers."""
    return kubectl("get", "--raw", "/readyz", "--request-timeout=2s", ok=False).returncode == 0


def kill_gateways(node):
    """SIGKILL to every gateway process on both nodes; returns how many there were."""
    count = 0
    for name in ("control-plane", "worker"):
        # In one step: gateways of other stories may be ending just now.
        killed = node(name, "pkill", "-KILL", "-c", "-f", "^/penstock gateway", ok=False)
        count += int(killed.stdout or 0)
    return count


def answers(url, when):
    """Twenty requests in a row, none fails."""
    for number in range(20):
        text = stream_chat(sdk(url), "chat", f"{when} {number}", 4)[0]
        check(text, f"{when}: request {number} got no text")
