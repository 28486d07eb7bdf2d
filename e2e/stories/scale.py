"""KEDA and its HPA take a pool from 1 to 3 and back by what users feel, cut no stream, and ignore CPU."""

import subprocess
import threading

from client import check, load, load_command, parse_summary, sdk, stream_chat, wait_until
from cluster import policy, pool, rule

# A slow engine: few tokens a second fill it, so that the load itself leaves the machine's cores alone.
SLOW = "--profile=qwen3-32b-rtxpro6000-tp2"
SMALL = [SLOW, "--max-num-seqs=8", "--num-gpu-blocks-override=256", "--max-model-len=2048", "--startup-delay=3s"]
SCALING = {"minReplicas": 1, "maxReplicas": 4, "scaleDownDelay": "15s"}
BURN_LIMITS = {"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"cpu": "100m", "memory": "256Mi"}}


def run(story):
    burner = pool("burner", *SMALL, "--busy-loop", scaling=SCALING, resources=BURN_LIMITS)
    story.apply(
        pool("chat", *SMALL, scaling=SCALING, drain="120s"),
        pool("drained", *SMALL, replicas=2, drain="180s"),
        pool("cut", *SMALL, replicas=2, drain="0s"),
        burner,
        policy("default", rule("chat", "chat"), rule("drained", "drained"), rule("cut", "cut"), rule("burner", "burner")),
    )
    backends = ["chat", "drained", "cut", "burner"]
    story.wait_ready(*[("llmbackend", name) for name in backends], ("routingpolicy", "default"), timeout_s=240)
    for name in ("chat", "burner"):
        story.wait_condition("llmbackend", name, "ScalingActive", timeout_s=180)
    twin(story)
    url = story.gateway_url()
    wait_until("the gateway's NodePort", lambda: sdk(url).models.list().data, 30)

    grow_and_shrink(story, url)
    drain_and_control(story, url)
    cpu_is_no_signal(story)


def twin(story):
    """The same burning engine as `burner`, under a plain CPU HPA."""
    deployment = story.get("deployment", "burner-pool")
    template = deployment["spec"]["template"]
    template["metadata"] = {"labels": {"app": "twin"}}
    story.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "twin"},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "twin"}}, "template": template},
        },
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "twin"},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "twin"},
                "minReplicas": 1,
                "maxReplicas": 3,
                "metrics": [
                    {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}
                ],
            },
        },
    )


def grow_and_shrink(story, url):
    """Load that delays the first token takes the pool to 3; its end takes it back to 1; no stream is cut on the way."""
    common = {"model": "chat", "prompt_tokens": "150:300", "progress": "0s", "timeout": "180s", "max_concurrency": 400}
    heavy = subprocess.Popen(
        load_command(url, rate="2:14", duration="100s", output_tokens="60:120", seed=1, **common),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Long answers all the time, so that streams are under way whenever a replica goes.
    long = subprocess.Popen(
        load_command(url, rate="0.2", duration="260s", output_tokens="300:500", seed=2, **common),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        most = story.wait_replicas("chat-pool", lambda number: number >= 3, 110)
        print(f"e2e: scale: {most} replicas under load", flush=True)
        summaries = [process.communicate(timeout=200)[0] for process in (heavy,)]
        story.wait_replicas("chat-pool", lambda number: number == 1, 200)
        print("e2e: scale: back to 1", flush=True)
        summaries.append(long.communicate(timeout=400)[0])
    finally:
        for process in (heavy, long):
            process.kill()
    for text in summaries:
        summary = parse_summary(text.strip().splitlines()[-1])
        check(summary["errors"] == 0, f"streams were cut or refused:\n{text}")


def drain_and_control(story, url):
    """Two pools of two lose a replica with streams under way: with drain none is cut, with drain 0 some are."""
    results = {}

    def stream(name):
        results[name] = load(
            url, 260, model=name, rate=4, duration="5s", prompt_tokens=50, output_tokens=1200, progress="0s", timeout="200s"
        )

    for name in ("drained", "cut"):
        thread = threading.Thread(target=stream, args=(name,))
        thread.start()
        wait_until(f"streams on both replicas of {name}", lambda: stream_chat(sdk(url), name, "x", 4), 20)
        threading.Event().wait(5)  # the last of the streams has begun
        story.kubectl("patch", "llmbackend", name, "--type=merge", "-p", '{"spec":{"pool":{"replicas":1}}}')
        thread.join(270)
        check(name in results, f"the load on {name} did not end")
    check(results["drained"]["errors"] == 0, f"drain cut streams: {results['drained']['kinds']}")
    check(results["cut"]["kinds"].get("cut", 0) > 0, f"void: with drain 0 no stream was cut: {results['cut']}")
    print(f"e2e: scale: drain cut 0 streams, drain 0 cut {results['cut']['kinds']['cut']}", flush=True)


def cpu_is_no_signal(story):
    """The twin has scaled out on CPU; ours, which burns as much, has not."""
    story.wait_replicas("twin", lambda number: number > 1, 240)
    ours = story.get("deployment", "burner-pool")["spec"]["replicas"]
    check(ours == 1, f"the burning pool has {ours} replicas with an empty queue")
