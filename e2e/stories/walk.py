"""From three YAML files to a streamed answer through the gateway's Service."""

import os

from client import check, sdk, stream_chat, wait_until
from cluster import ROOT


def run(story):
    files = os.path.join(ROOT, "examples/quickstart")
    story.kubectl("apply", "-f", files)
    story.wait_ready(("llmbackend", "chat"), ("routingpolicy", "default"), ("semanticcache", "answers"))

    client = sdk(story.gateway_url())
    wait_until("the gateway's NodePort", lambda: client.models.list().data, 30)
    check([model.id for model in client.models.list()] == ["chat"], "/v1/models does not list exactly `chat`")
    text, finish, pieces, headers = stream_chat(client, "chat", "Hello from the walk story.", 16)
    check(text and finish in ("stop", "length") and pieces > 1, f"{pieces} pieces, finish_reason {finish}")
    check(headers.get("x-penstock-engine") == "simulated", f"headers: {dict(headers)}")
    again, _, _, headers = stream_chat(client, "chat", "Hello from the walk story.", 16)
    check(again == text, "the same request got another answer")
    # Two gateway replicas have a cache each: at most one of the first two looks misses.
    hits = [headers.get("x-penstock-cache")]
    for _ in range(4):
        hits.append(stream_chat(client, "chat", "Hello from the walk story.", 16)[3].get("x-penstock-cache"))
    check("hit" in hits, f"no answer came from the cache: {hits}")

    # Deleting the objects takes everything away that was made for them.
    story.kubectl("delete", "-f", files, "--timeout=60s")

    def children():
        found = story.kubectl("get", "deployments,scaledobjects,pdb,configmaps,secrets,roles,serviceaccounts", "-o", "name")
        return [line for line in found.split() if "chat-pool" in line or "default-gateway" in line or "default-" in line]

    wait_until("children to go", lambda: not children() or None, 90)
