"""A real vLLM (on CPU) behind a Service and as a pool: it answers, the scaler hears it, and its pool drains it."""

import json
import os
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import openai

from client import Failed, check, sdk, wait_until
from cluster import ROOT, SYSTEM, Skipped, backend, kubectl, policy, rule

# Small enough for 2 GB: 129 blocks of 32 tokens are one context of 4096 and the spare block that vLLM wants.
SMALL = ["--dtype=bfloat16", "--max-model-len=4096", "--block-size=32", "--num-gpu-blocks-override=129"]
ENGINE = [*SMALL, "--max-num-seqs=16", "--enforce-eager"]
MODEL = "/models/tiny"
RESOURCES = {"requests": {"cpu": "250m", "memory": "2Gi"}, "limits": {"memory": "4Gi"}}
LONG = 1500  # tokens: 20 s on an idle core, several times that beside a starting engine
START_S = 600
END_S = 280
PRE_STOP_S = 5  # what the operator gives endpoints to forget a pod before it is told to stop


def run(story):
    if not story.cluster.kind:
        raise Skipped("needs an image of vLLM for CPUs on a node: only on the kind cluster it is put there")
    if os.geteuid() != 0:
        raise Skipped("needs root to make the image of vLLM for CPUs")
    image = install()
    figures = [behind_a_service(story, image), as_a_pool(story, image)]
    print(f"proof: {'; '.join(figures)}", flush=True)


def install():
    """Has the image made and put on the worker; returns its name."""
    with subprocess.Popen([os.path.join(ROOT, "e2e/vllm/install")], stdout=subprocess.PIPE, text=True) as process:
        line = ""
        for line in process.stdout:
            print(line, end="", flush=True)
    check(process.returncode == 0 and " image=" in line, "e2e/vllm/install failed")
    return line.split(" image=")[1].split()[0]


def behind_a_service(story, image):
    """An ordinary Deployment and Service. Without Penstock's drain its stream is cut: so a cut would be seen."""
    start = time.monotonic()
    story.apply(
        *plain(image),
        backend("plain", service={"name": "plain", "port": 80, "model": "tiny"}),
        policy("plain", rule("plain", "plain")),
    )
    story.wait_replicas("plain", lambda number: number == 1, START_S)
    story.wait_ready(("llmbackend", "plain"), ("routingpolicy", "plain"))
    ready_s = time.monotonic() - start
    client = sdk(story.gateway_url())
    wait_until("the gateway's NodePort", lambda: client.models.list().data, 30)
    first_ms = answers(story, client, "plain")
    pod = story.list("pods", "-l", "app=plain")[0]["metadata"]["name"]
    path = f"/api/v1/namespaces/{story.namespace}/pods/{pod}:8000/proxy/version"
    version = json.loads(kubectl("get", "--raw", path))["version"]

    def remove():
        story.kubectl("scale", "deployment/plain", "--replicas=0")

    cut, _ = removed_meanwhile(client, "plain", remove)
    check(not cut.whole, "void: the Deployment without drain ended its stream whole")
    print(f"e2e: real engine: without drain: {cut}", flush=True)
    return f"vLLM {version} behind a Service: ready in {ready_s:.0f} s, first chunk {first_ms:.0f} ms"


def plain(image):
    """What somebody has who runs vLLM without Penstock."""
    labels = {"app": "plain"}
    container = {
        "name": "vllm",
        "image": image,
        "imagePullPolicy": "Never",
        "args": [MODEL, "--served-model-name=tiny", *ENGINE],
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "USER", "value": "vllm"}],
        "ports": [{"containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 2, "timeoutSeconds": 5},
        "resources": RESOURCES,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "plain"},
            "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "plain"},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]},
        },
    ]


def as_a_pool(story, image):
    """A pool that KEDA scales; its one replica is deleted under a stream."""
    start = time.monotonic()
    # The limit is far above what a busy machine does to the first token: the pool stays at one replica.
    scaling = {"minReplicas": 1, "maxReplicas": 2, "ttftP90": "30s"}
    pool = {"model": MODEL, "image": image, "args": ENGINE, "scaling": scaling, "resources": RESOURCES, "drain": "5m"}
    story.apply(backend("pooled", pool=pool), policy("pooled", rule("pooled", "pooled")))
    story.wait_ready(("llmbackend", "pooled"), ("routingpolicy", "pooled"), timeout_s=START_S)
    ready_s = time.monotonic() - start
    story.wait_condition("llmbackend", "pooled", "ScalingActive", timeout_s=180)
    client = sdk(story.gateway_url())
    first_ms = answers(story, client, "pooled")
    pods = story.list("pods", "-l", "penstock.dev/backend=pooled")
    check(len(pods) == 1, f"the pool has {len(pods)} pods")
    name = pods[0]["metadata"]["name"]

    def remove():
        heard_by_scalers(story)
        story.kubectl("delete", "pod", name, "--wait=false")

    answer, after_s = removed_meanwhile(client, "pooled", remove)
    ended = time.monotonic()
    check(answer.whole, f"the stream did not end whole: {answer}")
    check(after_s > PRE_STOP_S + 1, f"void: the stream ended after {after_s:.1f} s, before the engine was told to stop")
    story.kubectl("wait", "--for=delete", f"pod/{name}", "--timeout=60s")
    gone_s = time.monotonic() - ended
    return (
        f"as a pool: ready in {ready_s:.0f} s, first chunk {first_ms:.0f} ms, every scaler heard its page; removed under"
        f" a stream: whole with {answer.tokens} tokens, {after_s:.0f} s later, pod gone {gone_s:.0f} s after that"
    )


def heard_by_scalers(story):
    """Waits until each scaler's decision rests on this engine's own page, with the stream on it."""
    scalers = json.loads(kubectl("-n", SYSTEM, "get", "pods", "-l", "app.kubernetes.io/component=scaler", "-o", "json"))
    names = [pod["metadata"]["name"] for pod in scalers["items"]]
    check(names, "no scaler was found")

    def heard():
        for name in names:
            path = f"/api/v1/namespaces/{SYSTEM}/pods/{name}:9090/proxy/decisions"
            entries = json.loads(kubectl("get", "--raw", path))
            found = [entry for entry in entries if entry["scaledObject"] == f"{story.namespace}/pooled-pool"]
            inputs = found[0]["decision"]["reasons"]["inputs"] if found and found[0]["decision"] else {}
            if not (inputs.get("fresh") == 1 and inputs["kvUse"] and inputs["running"] >= 0.5):
                raise Failed(f"{name}: {inputs}")
        return True

    wait_until("the scalers to hear the engine", heard, 40, every_s=0.3)


@dataclass
class Answer:
    """What came of one streamed chat."""

    first_s: float = 0.0
    chunks: int = 0
    finish: str | None = None
    tokens: int = 0
    wanted: int = 0
    backend: str | None = None
    error: str | None = None

    @property
    def whole(self):
        """Every token that was asked for, and a proper end."""
        return self.error is None and self.finish == "length" and self.tokens == self.wanted


def chat(client, model, max_tokens, begun=None):
    """One streamed chat that never stops early. Random weights write little that is text: chunks and usage count."""
    answer, start = Answer(wanted=max_tokens), time.monotonic()
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": "How does the water turn the wheel?"}],
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        answer.backend = raw.headers.get("x-penstock-backend")
        for chunk in raw.parse():
            answer.first_s = answer.first_s or time.monotonic() - start
            answer.chunks += 1
            if begun and answer.chunks == 20:
                begun.set()
            answer.tokens = chunk.usage.completion_tokens if chunk.usage else answer.tokens
            for choice in chunk.choices:
                answer.finish = choice.finish_reason or answer.finish
    except openai.OpenAIError as error:
        answer.error = str(error)
    return answer


def answers(story, client, model):
    """Five short streams, all whole; returns the median time to the first chunk, ms."""
    found = [chat(client, model, 16) for _ in range(5)]
    for answer in found:
        check(answer.whole and answer.chunks > 5, f"{model}: {answer}")
        check(answer.backend == f"{story.namespace}/{model}", f"answered by {answer.backend}")
    return statistics.median(answer.first_s for answer in found) * 1000


def removed_meanwhile(client, model, remove):
    """Calls `remove` with a long stream under way; returns its answer and how many seconds after the call it ended."""
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(chat, client, model, LONG, begun)
        check(begun.wait(60), "the long stream did not begin")
        remove()
        removed = time.monotonic()
        answer = stream.result(timeout=END_S)
    return answer, time.monotonic() - removed
