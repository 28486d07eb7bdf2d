"""Penstock, as `penstock up` runs it: the same gateway as in a cluster, with a folder of objects."""

import asyncio
import dataclasses
import os
import re
import subprocess
import time
import urllib.request

from subjects.base import Subject


# As the other subjects are set up: what is too long for one backend goes to the next.
REPEATED = "Connection, Timeout, RateLimit, ServerError, ContextLength"


def _ms(seconds):
    return f"{max(1, round(seconds * 1000))}ms"


def _backend(upstream, address):
    """The object's name: one for each address, shared by rules."""
    return f"{upstream}-{address.rsplit(':', 1)[1]}"


def _rule(route):
    names = [
        f"{{name: {_backend(*target)}, priority: {number if route.mode == 'failover' else 0}}}"
        for number, target in enumerate(route.targets)
    ]
    if route.together:
        names = [f"{{name: {route.name}}}"]
    more = "    strategy: RoundRobin\n" if route.together else ""
    if route.urgency:
        more += f"    urgency: {route.urgency}\n"
    limits = {"connect": route.connect_s, "firstToken": route.first_byte_s, "idle": route.idle_s}
    return (
        f"  - name: {route.name}\n    match: {{models: [{route.name}]}}\n    backends: [{', '.join(names)}]\n{more}"
        f"    retry: {{attempts: {route.attempts}, on: [{REPEATED}]}}\n"
        f"    timeouts: {{{', '.join(f'{name}: {_ms(seconds)}' for name, seconds in limits.items())}}}\n"
    )


def _object(name, spec):
    return f"apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def objects(routes):
    alone = dict.fromkeys(target for route in routes if not route.together for target in route.targets)
    texts = [
        _object(_backend(upstream, address), f'{{external: {{url: "http://{address}/v1", model: {upstream}-model}}}}')
        for upstream, address in alone
    ]
    together = [route.name for route in routes if route.together]
    texts += [_object(name, f"{{service: {{name: {name}, port: 80}}}}") for name in together]
    head = "apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\n"
    # A policy holds 64 rules.
    for start in range(0, len(routes), 64):
        rules = "".join(_rule(route) for route in routes[start : start + 64])
        texts.append(f"{head}metadata: {{name: faults-{start // 64}}}\nspec:\n  rules:\n{rules}")
    return "---\n".join(texts)


TOKENS = r'gen_ai_client_token_usage\w*_sum\{(?=[^}]*token_type="output")[^}]*backend="([^"]+)"[^}]*\} ([0-9.e+]+)'
OBJECTS = "objects/objects.yaml"


class Penstock(Subject):
    name = "penstock"

    def version(self):
        out = subprocess.run([os.environ["PENSTOCK_BIN"], "--version"], capture_output=True, text=True, check=False)
        return out.stdout.strip().removeprefix("penstock ") or "?"

    def knows(self, route):
        return True

    def write_config(self, routes):
        self.write(OBJECTS, objects(routes))
        self.services = [
            f"--service=default/{route.name}:80={address}"
            for route in routes if route.together for _, address in route.targets
        ]  # fmt: skip

    def command(self):
        self.admin_port = self.spare_ports[0]
        return [
            os.environ["PENSTOCK_BIN"], "up", "-f", os.path.join(self.folder, "objects"),
            "--listen", f"127.0.0.1:{self.port}", "--admin-listen", f"127.0.0.1:{self.admin_port}",
            "--scaler-listen", "127.0.0.1:0", "--scaler-admin-listen", "127.0.0.1:0", *self.services,
        ]  # fmt: skip

    def _admin(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=10) as response:
            return response.read().decode()

    async def tokens_by_backend(self):
        counts = {}
        for line in (await asyncio.to_thread(self._admin, "/metrics")).splitlines():
            found = re.match(TOKENS, line)
            if found:
                counts[found.group(1)] = counts.get(found.group(1), 0) + float(found.group(2))
        return counts

    # Reloads: the folder is followed.

    def text(self, routes, number):
        """The objects with something that tells this version from others."""
        return objects([dataclasses.replace(route, idle_s=round(route.idle_s + number / 1000, 3)) for route in routes])

    def change(self, routes, number):
        self.write(OBJECTS, self.text(routes, number))

    def spoil(self, text):
        """Writes in place, as editors and copies do: readers may see a half."""
        with open(os.path.join(self.folder, OBJECTS), "w", encoding="utf-8") as file:
            file.write(text)

    async def applied(self, routes, number, limit_s=5.0):
        """Whether this version is served within the limit."""
        wanted = f'"idleMs":{round((routes[0].idle_s + number / 1000) * 1000)}'
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if wanted in await asyncio.to_thread(self._admin, "/config"):
                return True
            await asyncio.sleep(0.2)
        return False
