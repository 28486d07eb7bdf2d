"""The first backend answers 429, then is killed: every request is answered by the next one."""

from client import check, load, sdk, stream_chat, wait_until
from cluster import policy, pool, rule


def run(story):
    story.apply(
        pool("first", "--fault-status=429"),
        pool("second"),
        policy("default", rule("chat", {"name": "first", "priority": 0}, {"name": "second", "priority": 1})),
    )
    story.wait_ready(("llmbackend", "first"), ("llmbackend", "second"), ("routingpolicy", "default"))
    url = story.gateway_url()
    wait_until("the gateway's NodePort", lambda: sdk(url).models.list().data, 30)

    def answered_by_second(phase):
        summary = load(url, 90, model="chat", rate=8, duration="10s", prompt_tokens=50, output_tokens=20, progress="0s")
        check(summary["errors"] == 0, f"{phase}: {summary['kinds']}")
        headers = stream_chat(sdk(url), "chat", phase, 8)[3]
        backend = headers.get("x-penstock-backend")
        check(backend == f"{story.namespace}/second", f"{phase}: answered by {backend}")

    answered_by_second("first answers 429")
    # Killed, not drained: the container dies under the requests, and again whenever it comes back.
    story.kubectl("delete", "pods", "-l", "penstock.dev/backend=first", "--grace-period=0", "--force", "--wait=false")
    answered_by_second("first is killed")
