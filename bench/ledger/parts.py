"""What the runs share: an upstream that is asked for completions, a Redis, gateways that are started by folder."""

import asyncio
import json
import os
import shutil
import signal
import subprocess

from rig import free_port, wait_port


class Upstream:
    """Answers completions; what each takes is said by `answer(asked)`, as tokens of prompt and answer."""

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
                prompt, tokens = await self.answer(json.loads(await reader.readexactly(length)))
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
                usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
                body = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


class Process:
    """Something that is killed and started again."""

    def __init__(self, command, port, log):
        self.command, self.port, self.log = command, port, log
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def redis(folder, log):
    """One that writes what it acknowledges to its disk first."""
    port = free_port()
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    command = [program, "--port", str(port), "--dir", folder, "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    process = Process(command, port, log)
    wait_port(port)
    return process


def gateway(binary, folder, log, store):
    """A gateway of the objects in `folder`, with the Redis `store`."""
    listen, admin = free_port(), free_port()
    command = [binary, "--log", "error", "up", "-f", folder, "--no-scaling", "--store", f"redis://127.0.0.1:{store.port}"]
    command += ["--listen", f"127.0.0.1:{listen}", "--admin-listen", f"127.0.0.1:{admin}"]
    command += ["--scaler-listen", "127.0.0.1:0", "--scaler-admin-listen", "127.0.0.1:0"]
    process = Process(command, listen, log)
    process.admin = admin
    return process


def write_objects(folder, items):
    """`items`: kind, name, spec; a Secret's is its texts."""
    os.makedirs(folder)
    with open(os.path.join(folder, "objects.yaml"), "w", encoding="utf-8") as file:
        for kind, name, spec in items:
            own = {"apiVersion": "v1", "stringData": spec} if kind == "Secret" else {"apiVersion": "penstock.dev/v1alpha1", "spec": spec}
            # JSON is YAML.
            file.write(f"---\n{json.dumps({'kind': kind, 'metadata': {'name': name}, **own})}\n")


def mock(upstream):
    """One model of one backend."""
    rule = {"name": "mock", "match": {"models": ["mock"]}, "backends": [{"name": "mock"}], "retry": {"attempts": 1}}
    return [
        ("LLMBackend", "mock", {"external": {"url": f"http://127.0.0.1:{upstream}/v1"}}),
        ("RoutingPolicy", "default", {"rules": [rule]}),
    ]


async def read_answer(reader):
    """Reads an answer whole and returns its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    return int(head.split(b" ", 2)[1])
