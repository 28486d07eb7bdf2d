"""Who is measured: how each is started, with a configuration from `config/`, and what can be asked of it."""

import getpass
import grp
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import peers  # noqa: E402
from nginx import nginx, version  # noqa: E402
from rig import free_port  # noqa: E402

START_LIMIT_S = 120
STOP_LIMIT_S = 10
ALL_ON_RULES = 100
ALL_ON_KEYS = 100
# Of the organisation, each team and each key: hard, and never reached.
BUDGETS = [
    ("organisation", "Budget", "MicroUsd", "calendar: Month"),
    ("teams", "Team", "Tokens", "rolling: 1h"),
    ("keys", "Key", "Requests", "rolling: 1m"),
]


@dataclass
class Place:
    """Where one process of a subject lives."""

    folder: str
    listen: int
    # For those that speak TLS, or HTTP/2 in the clear, on a port of its own.
    tls: int
    h2: int
    admin: int
    upstream: int
    release: str
    # Folder with tls.crt and tls.key.
    certificates: str
    # How its streams will come: plain, tls or h2.
    transport: str


@dataclass(frozen=True)
class Subject:
    name: str
    what: str
    # Place → (command, environment).
    command: object
    # Adds milliseconds: fewer connections, longer windows, no thousands of streams.
    heavy: bool = False
    # How streams may come besides plain HTTP/1.1, and to which port of its place.
    transports: dict = field(default_factory=dict)
    headers: object = lambda place: ()
    # Installs it where that is needed; peers.Missing where that cannot be.
    install: object = lambda: None
    version: object = lambda: ""


def config(place, name):
    """A file of `config/` with its places filled in."""
    with open(os.path.join(HERE, "config", name), encoding="utf-8") as file:
        text = file.read()
    values = {
        "LISTEN": place.listen, "TLS": place.tls, "H2": place.h2, "ADMIN": place.admin, "UPSTREAM": place.upstream,
        "FOLDER": place.folder, "CERTIFICATES": place.certificates,
        "USER": getpass.getuser(), "GROUP": grp.getgrgid(os.getgid()).gr_name,
    }  # fmt: skip
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    path = os.path.join(place.folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def penstock(place, log="warn"):
    objects = os.path.join(place.folder, "objects")
    os.makedirs(objects, exist_ok=True)
    if not os.listdir(objects):
        shutil.move(config(place, "penstock.yaml"), objects)
    command = [os.path.join(place.release, "penstock"), "--log", log, "--log-format", "json", "up", "-f", objects]
    command += ["--listen", f"127.0.0.1:{place.listen}", "--no-scaling"]
    for flag in ("admin-listen", "scaler-listen", "scaler-admin-listen"):
        command += [f"--{flag}", "127.0.0.1:0"]
    if place.transport == "tls":
        command += ["--tls-dir", place.certificates, "--tls-listen", f"127.0.0.1:{place.tls}"]
    return command, {"TOKIO_WORKER_THREADS": "1"}


def penstock_all_on(place):
    """Rules are looked through before the one that fits: prefixes, the longest first, all with the same beginning."""
    objects = os.path.join(place.folder, "objects")
    os.makedirs(objects)
    texts = [
        backend(place),
        "apiVersion: penstock.dev/v1alpha1\nkind: SemanticCache\nmetadata: {name: answers}\n"
        "spec: {exact: {ttl: 5m, maxSizeMib: 16}}\n",
    ]
    rules = [
        f"  - {{name: rule-{number}, match: {{models: ['mock-{number:03}-*']}}, backends: [{{name: mock}}], "
        "cache: {name: answers}}\n"
        for number in range(ALL_ON_RULES - 1)
    ]
    rules.append("  - {name: mock, match: {models: ['mo*']}, backends: [{name: mock}], cache: {name: answers}}\n")
    for number in range(0, len(rules), 50):
        texts.append(
            f"apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {{name: rules-{number}}}\n"
            "spec:\n  rules:\n" + "".join(rules[number : number + 50])
        )
    texts += keys(ALL_ON_KEYS)
    texts += budgets(BUDGETS)
    with open(os.path.join(objects, "objects.yaml"), "w", encoding="utf-8") as file:
        file.write("---\n".join(texts))
    command, environment = penstock(place, log="warn,access=info")
    return [*command, "--store", f"file:{place.folder}/store.redb"], environment


def backend(place):
    """The mock, with a price."""
    return (
        "apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {name: mock}\n"
        f'spec: {{external: {{url: "http://127.0.0.1:{place.upstream}/v1"}}, '
        "price: {perMillionTokens: {inputMicroUsd: 1000000, outputMicroUsd: 3000000}}}\n"
    )


def keys(count):
    """Callers and their keys."""
    texts = []
    for number in range(count):
        texts.append(
            f"apiVersion: penstock.dev/v1alpha1\nkind: VirtualKey\nmetadata: {{name: caller-{number}}}\n"
            f"spec: {{team: team-{number % 10}, models: ['mo*']}}\n"
        )
        texts.append(
            f"apiVersion: v1\nkind: Secret\nmetadata: {{name: caller-{number}-key}}\n"
            f"stringData: {{key: {key_of(number)}}}\n"
        )
    return texts


def budgets(rows, most=1000000000000):
    """Hard ones, from rows like those of BUDGETS."""
    return [
        "apiVersion: penstock.dev/v1alpha1\nkind: TokenBudget\nmetadata: {name: %s}\n"
        "spec: {per: %s, limits: [{name: limit, unit: %s, max: %d, window: {%s}}]}\n" % (*row[:3], most, row[3])
        for row in rows
    ]


def key_of(number):
    """As long as one that an operator makes."""
    return f"sk-penstock-{number:048x}"


def relay(place):
    command = [os.path.join(place.release, "penstock-bench-proxy"), "relay"]
    return [*command, "--listen", f"127.0.0.1:{place.listen}", "--to", f"127.0.0.1:{place.upstream}"], {}


def envoy(place, name):
    return [peers.envoy(), "-c", config(place, name), "--concurrency", "1", "--disable-hot-restart", "-l", "off"], {}


def plain_nginx(place):
    path = config(place, "nginx.conf")
    return [nginx(), "-p", place.folder, "-e", os.path.join(place.folder, "error.log"), "-c", path], {}


def router(binary, *more):
    def command(place):
        line = [binary(), *more, "--host", "127.0.0.1", "--port", str(place.listen)]
        line += ["--worker-urls", f"http://127.0.0.1:{place.upstream}", "--policy", "round_robin"]
        line += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(place.admin), "--log-level", "error"]
        return [*line, "--max-concurrent-requests", "20000", "--disable-retries"], {}

    return command


def litellm(place):
    line = [peers.litellm(), "--config", config(place, "litellm.yaml"), "--host", "127.0.0.1"]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"}
    return [*line, "--port", str(place.listen), "--num_workers", "1"], environment


def portkey(place):
    line = [shutil.which("node"), "-r", config(place, "portkey-loopback.js"), peers.portkey()]
    environment = {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1"}
    return [*line, f"--port={place.listen}", "--headless"], environment


def portkey_headers(place):
    return ("x-portkey-provider: openai", f"x-portkey-custom-host: http://127.0.0.1:{place.upstream}/v1")


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("relay", "copies bytes, reads none: the floor", relay),
        Subject("penstock", "one rule, one backend, its metrics (they cannot be turned off), no access log", penstock,
                transports={"tls": "tls", "h2": "listen"}),
        Subject("all_on", f"penstock: {ALL_ON_RULES} rules, {ALL_ON_KEYS} keys, exact cache (all misses, all stored), "
                f"access log, metrics, {len(BUDGETS)} hard budgets", penstock_all_on,
                # All callers send an Authorization of their own, which is no key here.
                headers=lambda place: (f"x-penstock-key: {key_of(7)}",)),
        Subject("envoy", "no access log, no statistics", lambda place: envoy(place, "envoy-bare.yaml"),
                transports={"h2": "listen"}, install=peers.envoy, version=lambda: peers.ENVOY),
        Subject("envoy_on", "Envoy with access log and statistics", lambda place: envoy(place, "envoy.yaml"),
                install=peers.envoy, version=lambda: peers.ENVOY),
        Subject("nginx", "no access log", plain_nginx, transports={"tls": "tls", "h2": "h2"},
                install=nginx, version=lambda: version(nginx())),
        Subject("vllm_router", "round robin", router(peers.vllm_router),
                install=peers.vllm_router, version=lambda: peers.VLLM_ROUTER),
        Subject("sglang_router", "round robin", router(peers.sglang_router, "launch"),
                install=peers.sglang_router, version=lambda: peers.SGLANG_ROUTER),
        Subject("litellm", "one worker, no keys", litellm, heavy=True,
                install=peers.litellm, version=lambda: peers.LITELLM),
        Subject("portkey", "configured by headers", portkey, heavy=True, headers=portkey_headers,
                install=peers.portkey, version=lambda: peers.PORTKEY),
    )
}  # fmt: skip


class NotStarted(Exception):
    """The message is the end of what it said."""


class Running:
    """One process of a subject, from its start to its end, on a core of its own."""

    def __init__(self, subject, bench, transport="plain"):
        self.subject, self.core = subject, bench.subject_core
        self.folder = tempfile.mkdtemp(prefix=f"penstock-bench-{subject.name}-")
        self.place = Place(
            self.folder, free_port(), free_port(), free_port(), free_port(), bench.mock_port, bench.release,
            bench.certificates, transport,
        )  # fmt: skip
        self.headers = subject.headers(self.place)
        self.process = None

    def __enter__(self):
        try:
            command, environment = self.subject.command(self.place)
            with open(os.path.join(self.folder, "out.log"), "wb") as log:
                # A group of its own, so that what it starts can be stopped with it.
                self.process = subprocess.Popen(
                    ["taskset", "-c", str(self.core), *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    cwd=self.folder, env={**os.environ, **environment}, process_group=0,
                )  # fmt: skip
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def port(self):
        return self.place.listen

    @property
    def stream_port(self):
        """Where streams of its transport go."""
        return getattr(self.place, self.subject.transports.get(self.place.transport, "listen"))

    @property
    def pid(self):
        return self.process.pid

    def _wait(self):
        """Until a call is answered: some listen long before they know their backends."""
        body = b'{"model":"mock","max_tokens":1,"messages":[{"role":"user","content":"x"}]}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += "".join(f"{header}\r\n" for header in ("authorization: Bearer sk-bench", *self.headers))
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 2) as probe:
                    probe.settimeout(20)
                    probe.sendall(head.encode() + b"\r\n" + body)
                    if probe.recv(64).startswith(b"HTTP/1.1 200"):
                        return
            except OSError:
                pass
            time.sleep(0.1)
        with open(os.path.join(self.folder, "out.log"), encoding="utf-8", errors="replace") as log:
            raise NotStarted(f"{self.subject.name} does not answer: {log.read()[-400:].strip()}")

    def _signal(self, number):
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def __exit__(self, *_):
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                pass
            self._signal(signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
