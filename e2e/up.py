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
def running(objects, *flags, env=None, port=0, scaler_admin=0):
    """Yields the process, with what it `said` until it was ready, and the gateway's URL."""
    ports = {"listen": port, "admin-listen": 0, "scaler-listen": 0, "scaler-admin-listen": scaler_admin}
    ports = [flag for name, number in ports.items() for flag in (f"--{name}", f"127.0.0.1:{number}")]
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
            up.said = "".join(said)
            threading.Thread(target=up.stdout.read, daemon=True).start()
            yield up, url
        finally:
            if up.poll() is None:
                up.send_signal(signal.SIGTERM)
            up.wait(30)


def item(kind, name, spec):
    return {"apiVersion": "penstock.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
