"""The cluster under test: kubectl and helm with deadlines, and what every story needs of Penstock in it."""

import json
import os
import secrets
import subprocess

from client import Failed, check, wait_until

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SYSTEM = "penstock-system"


class Skipped(Exception):
    """The story cannot run on this cluster; the message says what it needs."""


def command(*words, stdin=None, timeout_s=120, ok=True):
    """Runs a program; returns its output, or raises Failed with what it said."""
    result = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    if ok and result.returncode != 0:
        raise Failed(f"{' '.join(words[:6])}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout if ok else result


def kubectl(*words, **options):
    """kubectl with the run's kubeconfig."""
    return command("kubectl", *words, **options)


class Cluster:
    """One cluster for all stories."""

    def __init__(self):
        self.kind = os.environ.get("PENSTOCK_KIND")
        self.store = os.environ.get("PENSTOCK_STORE", "")
        repository, _, tag = os.environ["PENSTOCK_IMAGE"].rpartition(":")
        self.image = {"repository": repository, "tag": tag}

    def install(self):
        """`helm install` of the chart; an install that is there is upgraded."""
        policy = "Never" if self.kind else "IfNotPresent"
        command(
            "helm", "upgrade", "--install", "penstock", os.path.join(ROOT, "charts/penstock"),
            "--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "3m",
            "--set", f"image.repository={self.image['repository']}",
            "--set-string", f"image.tag={self.image['tag']}",
            "--set", f"image.pullPolicy={policy}",
            "--set", f"gateway.store.url={self.store}",
            timeout_s=240,
        )  # fmt: skip
        # Helm leaves CRDs alone once they are there: a changed one is applied by hand.
        kubectl("apply", "--server-side", "--force-conflicts", "-f", os.path.join(ROOT, "charts/penstock/crds"))

    def story(self, name):
        """A fresh namespace, restricted, for one story."""
        namespace = f"e2e-{name.replace('_', '-')}-{secrets.token_hex(2)}"
        manifest = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
        kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        return Story(self, namespace)

    def clean(self, namespace):
        """Starts to take a story's namespace away. Its name does not come again, so nobody waits for it: a namespace
        with pods takes half of their grace period to go, however soon the pods end."""
        kubectl("delete", "namespace", namespace, "--wait=false", ok=False)

    def describe(self, namespace):
        """Prints what a person would look at after a failure."""
        for words in (
            ["get", "penstock,pods,deployments,scaledobjects,hpa,services", "-o", "wide"],
            ["get", "penstock", "-o", "jsonpath={range .items[*]}{.kind}/{.metadata.name}: {.status.conditions}{\"\\n\"}{end}"],
            ["get", "events", "--sort-by=.lastTimestamp"],
        ):
            result = kubectl("-n", namespace, *words, ok=False)
            print("\n".join((result.stdout + result.stderr).splitlines()[-40:]), flush=True)
        for deployment in ("penstock-operator", "penstock-scaler"):
            result = kubectl("-n", SYSTEM, "logs", f"deployment/{deployment}", "--tail=25", ok=False)
            print(f"-- {deployment}\n{result.stdout}{result.stderr}", flush=True)

    def node_command(self, node, *words, timeout_s=60, ok=True):
        """Runs a program inside a kind node."""
        if not self.kind:
            raise Skipped("needs to stop parts of a node: only a kind cluster lets it")
        return command("docker", "exec", f"{self.kind}-{node}", *words, timeout_s=timeout_s, ok=ok)


class Story:
    """What one story does to its namespace."""

    def __init__(self, cluster, namespace):
        self.cluster, self.namespace = cluster, namespace

    def kubectl(self, *words, **options):
        """kubectl in the story's namespace."""
        return kubectl("-n", self.namespace, *words, **options)

    def get(self, kind, name):
        """One object."""
        return json.loads(self.kubectl("get", kind, name, "-o", "json"))

    def list(self, kind, *words):
        """Objects of one kind."""
        return json.loads(self.kubectl("get", kind, *words, "-o", "json"))["items"]

    def apply(self, *objects):
        """Applies objects given as dictionaries."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        return self.kubectl("apply", "-f", "-", stdin=text)

    def refused(self, obj):
        """Applies an object that the API server must refuse; returns what it said."""
        result = self.kubectl("apply", "-f", "-", stdin=json.dumps(obj), ok=False)
        check(result.returncode != 0, f"the API server accepted {obj['kind']} {obj['metadata']['name']}")
        return result.stderr

    def condition(self, kind, name, condition):
        """One condition of an object, {} while it is absent or of an older generation."""
        obj = self.get(kind, name)
        for found in obj.get("status", {}).get("conditions", []):
            if found["type"] == condition and found.get("observedGeneration") == obj["metadata"]["generation"]:
                return found
        return {}

    def wait_condition(self, kind, name, condition, status="True", timeout_s=120):
        """Waits for a condition; returns it."""

        def probe():
            found = self.condition(kind, name, condition)
            if found.get("status") == status:
                return found
            raise Failed(f"{kind} {name} {condition}: {found.get('status')} {found.get('reason')}: {found.get('message')}")

        return wait_until(f"{kind} {name} {condition}={status}", probe, timeout_s)

    def wait_ready(self, *objects, timeout_s=150):
        """Waits until each (kind, name) is Ready."""
        for kind, name in objects:
            self.wait_condition(kind, name, "Ready", timeout_s=timeout_s)

    def replicas(self, deployment):
        """Ready replicas, not counting those that are terminating."""
        return self.get("deployment", deployment).get("status", {}).get("readyReplicas", 0)

    def wait_replicas(self, deployment, wanted, timeout_s):
        """Waits until `wanted(number of ready replicas)`; returns the number."""

        def probe():
            number = self.replicas(deployment)
            if wanted(number):
                return max(number, 0.1)
            raise Failed(f"{deployment} has {number} ready replicas")

        return wait_until(f"replicas of {deployment}", probe, timeout_s, every_s=1)

    def expose(self, service, selector, target_port):
        """A NodePort next to a Service, reachable from this machine; returns its base URL."""
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": f"e2e-{service}"},
                "spec": {
                    "type": "NodePort",
                    "selector": selector,
                    "ports": [{"port": 80, "targetPort": target_port}],
                },
            }
        )
        port = self.get("service", f"e2e-{service}")["spec"]["ports"][0]["nodePort"]
        # The worker's address: the control plane's API server is stopped in one story.
        nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
        workers = [n for n in nodes if "node-role.kubernetes.io/control-plane" not in n["metadata"]["labels"]]
        addresses = (workers or nodes)[0]["status"]["addresses"]
        address = next(a["address"] for a in addresses if a["type"] == "InternalIP")
        return f"http://{address}:{port}"

    def gateway_url(self, gateway="default"):
        """Base URL of a gateway."""
        return self.expose(f"{gateway}-gateway", {"penstock.dev/gateway": gateway}, 8080)


def backend(name, **spec):
    """An LLMBackend."""
    return {"apiVersion": "penstock.dev/v1alpha1", "kind": "LLMBackend", "metadata": {"name": name}, "spec": spec}


def pool(name, *args, **more):
    """An LLMBackend with a small simulated pool that starts fast."""
    resources = {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}}
    spec = {"model": "simulated/model", "engine": "Simulated", "args": list(args), "resources": resources, "drain": "60s"}
    return backend(name, pool={**spec, **more})


def policy(name, *rules, gateway="default"):
    """A RoutingPolicy."""
    return {
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": "RoutingPolicy",
        "metadata": {"name": name},
        "spec": {"gateway": gateway, "rules": list(rules)},
    }


def rule(name, *backends, models=None, **more):
    """A rule; a backend is a name, or a dictionary."""
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in backends]
    return {"name": name, "match": {"models": models or [name]}, "backends": entries, **more}
