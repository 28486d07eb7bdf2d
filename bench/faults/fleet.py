"""The upstream processes of one subject, and the orders they take."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = ("alpha", "beta", "gamma", "clean")


def free_ports(count, host="127.0.0.1"):
    """Ports that are free now and distinct."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]


class Upstream:
    """One process. Its log is the upstream's view: every request with its times, tokens and end."""

    def __init__(self, name, port, host="127.0.0.1"):
        self.name, self.port, self.host = name, port, host
        self.process = None
        self.frozen = False
        self.crashes = []
        self._lock = asyncio.Lock()

    @property
    def address(self):
        return f"{self.host}:{self.port}"

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, os.path.join(HERE, "upstream.py"), "--name", self.name, "--host", self.host,
            "--port", str(self.port), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 28,
        )  # fmt: skip
        await asyncio.wait_for(self.process.stdout.readline(), 30)

    async def order(self, do, **more):
        async with self._lock:
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            while line := await asyncio.wait_for(self.process.stdout.readline(), 30):
                reply = json.loads(line)
                if "crashed" not in reply:
                    return reply
                self.crashes.append(reply["crashed"])
        raise RuntimeError(f"upstream {self.name} has ended")

    async def behave(self, *plan, health=200, slots=None):
        await self.order("behave", plan=list(plan) or [{}], health=health, slots=slots)

    async def log(self, clear=False):
        return (await self.order("log", clear=clear))["log"]

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self):
        if self.frozen:
            self.process.send_signal(signal.SIGCONT)
        self.frozen = False

    async def crashed(self):
        """Waits until the process has crashed; returns the ids that did it."""
        async with self._lock:
            while line := await self.process.stdout.readline():
                self.crashes.append(json.loads(line).get("crashed"))
        await self.process.wait()
        return self.crashes

    async def stop(self):
        if self.process and self.process.returncode is None:
            self.thaw()
            self.process.kill()
            await self.process.wait()


class Fleet:
    """The upstreams of one subject; `clean` never misbehaves."""

    def __init__(self, ports, hosts=None):
        hosts = hosts or {}
        self.all = {
            name: Upstream(name, port, hosts.get(name, "127.0.0.1")) for name, port in zip(NAMES, ports, strict=False)
        }

    def __getattr__(self, name):
        try:
            return self.__dict__["all"][name]
        except KeyError:
            raise AttributeError(name) from None

    async def start(self):
        for upstream in self.all.values():
            await upstream.start()

    async def reset(self):
        """Everybody well, nothing written down."""
        for upstream in self.all.values():
            if upstream.process is None or upstream.process.returncode is not None:
                await upstream.start()
            upstream.thaw()
            upstream.crashes.clear()
            await upstream.order("hold")
            await upstream.behave({"tokens": 10} if upstream.name == "clean" else {})
            await upstream.log(clear=True)

    async def log(self, *names):
        """The requests that the named upstreams saw, or all but `clean`, by time."""
        names = names or ("alpha", "beta", "gamma")
        logs = [await self.all[name].log() for name in names]
        return sorted((record for log in logs for record in log), key=lambda record: record["t"])

    async def stop(self):
        for upstream in self.all.values():
            await upstream.stop()


@contextlib.contextmanager
def black_hole(port, host="127.0.0.1"):
    """A port whose SYNs go unanswered: nobody accepts, and the queue of connections is full."""
    listener = socket.socket()
    fillers = []
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((host, port))
            fillers.append(filler)
        yield
    finally:
        for filler in fillers:
            filler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            filler.close()
        listener.close()
