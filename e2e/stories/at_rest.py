"""Ten minutes of nothing: no write by Penstock's service accounts in the API server's audit log, Leases apart."""

import json
import os
import time

from client import check, wait_until
from cluster import ROOT, SYSTEM, Skipped, kubectl

AUDIT_LOG = "/var/log/kubernetes/audit.log"
WRITES = {"create", "update", "patch", "delete", "deletecollection"}
REST_S = int(os.environ.get("AT_REST_SECONDS", "600"))
SETTLE_S = 60
GONE_TIMEOUT_S = 900


def run(story):
    if not story.cluster.kind:
        raise Skipped("needs the API server's audit log: only a kind cluster has it at a known place")
    wait_until("namespaces of other stories to be gone", lambda: is_alone(story), GONE_TIMEOUT_S, every_s=5)
    story.kubectl("apply", "-f", os.path.join(ROOT, "examples/quickstart"))
    story.wait_ready(("llmbackend", "chat"), ("routingpolicy", "default"), ("semanticcache", "answers"))
    story.wait_condition("llmbackend", "chat", "ScalingActive", timeout_s=180)
    time.sleep(SETTLE_S)

    begin = time.time()
    print(f"e2e: at rest: watching for {REST_S} s", flush=True)
    while time.time() - begin < REST_S:
        time.sleep(min(30, REST_S))
        print(f"e2e: at rest: {time.time() - begin:.0f} s", flush=True)
    writes = [entry for entry in read(story) if is_our_write(entry, story.namespace)]
    ours = [entry for entry in writes if entry["requestReceivedTimestamp"] >= timestamp(begin)]
    check(len(writes) > len(ours), "void: the audit log does not even show the writes that made the children")
    for entry in ours[:10]:
        ref = entry.get("objectRef", {})
        print(f"e2e: at rest: {entry['verb']} {ref.get('resource')}/{ref.get('name')} by {entry['user']['username']}")
    print(f"proof: {len(ours)} writes in {REST_S} s at rest", flush=True)
    check(not ours, f"{len(ours)} writes at rest")


def is_alone(story):
    """Whether no other story's namespace is there: one that goes away is no rest."""
    names = kubectl("get", "namespaces", "-o", "name").split()
    return all(name == f"namespace/{story.namespace}" for name in names if name.startswith("namespace/e2e-"))


def is_our_write(entry, namespace):
    """A write by an account of Penstock's, Leases apart."""
    ours = entry["user"]["username"].startswith((f"system:serviceaccount:{SYSTEM}:", f"system:serviceaccount:{namespace}:"))
    return ours and entry["verb"] in WRITES and entry.get("objectRef", {}).get("resource") != "leases"


def timestamp(unix_s):
    """As the audit log writes it, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))


def read(story):
    """All entries of the audit log; a line that is being written is left out."""
    text = story.cluster.node_command("control-plane", "cat", AUDIT_LOG, timeout_s=120)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
