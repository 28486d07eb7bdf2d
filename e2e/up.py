"""`penstock up` with some objects, on free ports, for as long as a context lasts."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading

from client import PENSTOCK, check


@contextlib.contextmanager
def running(objects, *flags, env=None, port=0):
    """Yields the process and the gateway's URL."""
    ports = [flag for name in ("admin-", "scaler-", "scaler-admin-") for flag in (f"--{name}listen", "127.0.0.1:0")]
    ports += ["--listen", f"127.0.0.1:{port}"]
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "objects.yaml"), "w") as file:
            # JSON is YAML.
            file.write("\n---\n".join(json.dumps(item) for item in objects))
        command = [PENSTOCK, "up", "-f", folder, *ports, *flags]
        up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})})
        try:
            said = []
            url = None
            for line in up.stdout:
                said.append(line)
                if line.startswith("up: ready"):
                    url = line.split("url=")[1].strip()
                    break
            check(url, f"penstock up ended: {''.join(said[-5:])}")
            threading.Thread(target=up.stdout.read, daemon=True).start()
            yield up, url
        finally:
            if up.poll() is None:
                up.send_signal(signal.SIGTERM)
            up.wait(30)


def item(kind, name, spec):
    return {"apiVersion": "penstock.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
