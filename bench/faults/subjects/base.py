"""What every subject can do: start with routes, stop, and say what it costs."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass

import rig
from client import Target

START_LIMIT_S = 120
STOP_LIMIT_S = 15


@dataclass(frozen=True)
class Route:
    """A model that callers ask for, and who may answer. The limits are the same for every subject, as far as it has
    such a limit."""

    name: str
    # (name of the upstream, host:port), in the order of preference.
    targets: tuple
    # failover: the first that works; pool: all are equal.
    mode: str = "failover"
    connect_s: float = 1.0
    first_byte_s: float = 3.0
    idle_s: float = 3.0
    attempts: int = 3
    # What an upstream can carry at one time, for subjects that can be told.
    capacity: int | None = None
    # For subjects that have such a thing (see `Subject.knows`): the targets are endpoints of one backend, taken in
    # turn, so that only a comparison between them tells that one is worse; and these requests go before others.
    together: bool = False
    urgency: str | None = None
    # The longest a whole answer may take, for subjects that have no other limit.
    total_s: float = 30.0


class Unfit(Exception):
    """The subject has no such feature; the message says which."""


class Subject:
    name = ""
    # One process for all cases: it takes too long to start.
    persistent = False
    # Whether a second route beside the one under test can exist.
    several_routes = True
    # A proxy that knows nothing of models and tokens.
    transport_only = False

    def __init__(self, folder, port, spare_ports):
        self.folder, self.port, self.spare_ports = folder, port, spare_ports
        self.process = None
        self.log_path = os.path.join(folder, f"{self.name}.log")

    # For each subject to say.

    def version(self):
        raise NotImplementedError

    def command(self):
        raise NotImplementedError

    def environment(self):
        return {}

    def write_config(self, routes):
        raise NotImplementedError

    def knows(self, route):
        """Whether it can do what sets this route apart from a plain one; else it gets none."""
        return not route.together and route.urgency is None

    def headers(self, route):
        """What callers of this route send besides the request itself."""
        return ()

    # The same for all.

    def target(self, route):
        return Target(self.port, headers=tuple(self.headers(route)))

    async def start(self, routes, wrap=()):
        """Starts with these routes. `wrap` is put before the command."""
        self.routes = {route.name: route for route in routes}
        self.write_config(list(routes))
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*wrap, *self.command()], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                env={**os.environ, **self.environment()}, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_LIMIT_S
        while not await self.is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not start: {self.last_words()}")
            await asyncio.sleep(0.05)

    async def is_up(self):
        with socket.socket() as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def last_words(self, size=600):
        try:
            with open(self.log_path, "rb") as file:
                return file.read()[-size:].decode(errors="replace")
        except OSError:
            return ""

    def log_size(self):
        return os.path.getsize(self.log_path)

    def words_since(self, size):
        with open(self.log_path, "rb") as file:
            file.seek(size)
            return file.read().decode(errors="replace")

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    async def terminate(self):
        """Asks it to end when it is done, as its documentation says one should."""
        self.process.send_signal(signal.SIGTERM)

    async def stop(self):
        if not self.is_running():
            return
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + STOP_LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            # A second one ends those that wait for their callers.
            self._signal_all(signal.SIGTERM)
            await asyncio.sleep(0.2)
        self._signal_all(signal.SIGKILL)
        self.process.wait()

    def kill(self):
        """Ends it at once, with everything it holds."""
        self._signal_all(signal.SIGKILL)
        self.process.wait()

    def _signal_all(self, number):
        """To the process group that `start` made, which holds its children."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def pids(self):
        """The process and its children."""
        return rig.family(self.process.pid)

    def rss_kib(self):
        return rig.memory_kib(self.process.pid)

    def cpu_s(self):
        return rig.cpu_s(self.process.pid)

    def descriptors(self):
        total = 0
        for pid in self.pids():
            try:
                total += len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                pass
        return total

    async def tokens_by_backend(self):
        """The subject's own count of answered tokens by backend, where it has one."""
        return {}

    def write(self, name, text):
        """A file of the configuration; replaced whole, never half-written."""
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".new", path)
        return path
