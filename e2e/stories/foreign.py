"""A hand-written ScaledObject scales a Deployment that Penstock does not manage."""

import os

from client import load, sdk, stream_chat, wait_until
from cluster import SYSTEM


def run(story):
    labels = {"app": "legacy"}
    image = os.environ["PENSTOCK_IMAGE"]
    container = {
        "name": "engine",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["engine", "--model=legacy", "--max-num-seqs=4", "--num-gpu-blocks-override=256", "--max-model-len=2048"],
        "ports": [{"containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    story.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "legacy"},
            "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
        },
        {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": {"name": "legacy"},
            "spec": {
                "scaleTargetRef": {"name": "legacy"},
                "minReplicaCount": 1,
                "maxReplicaCount": 3,
                "pollingInterval": 5,
                "triggers": [
                    {
                        "type": "external",
                        "metadata": {
                            "scalerAddress": f"penstock-scaler.{SYSTEM}.svc.cluster.local:6000",
                            "selector": "app=legacy",
                            "port": "8000",
                            "ttftP90": "500ms",
                        },
                    }
                ],
            },
        },
    )
    wait_until("the HPA", lambda: story.list("hpa"), 60)
    story.wait_replicas("legacy", lambda number: number == 1, 60)
    url = story.expose("legacy", labels, 8000)
    wait_until("the engine's NodePort", lambda: stream_chat(sdk(url), "legacy", "Hello.", 8), 30)
    load(url, 150, model="legacy", rate="2:8", duration="60s", output_tokens="80:120", progress="0s", timeout="60s")
    number = story.wait_replicas("legacy", lambda number: number >= 2, 60)
    print(f"e2e: foreign: {number} replicas", flush=True)
