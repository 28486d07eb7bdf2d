"""The Portkey gateway. It has no configuration of its own: each request brings one in a header."""

import json
import os
import shutil

import peers
from subjects.base import Subject

# It listens on all addresses and cannot be told otherwise.
LOOPBACK = """
const { Server } = require('net');
const listen = Server.prototype.listen;
Server.prototype.listen = function (first, ...rest) {
  const told = rest.filter((x) => typeof x === 'function');
  if (typeof first === 'number') return listen.call(this, first, '127.0.0.1', ...told);
  if (first && typeof first === 'object') first.host = '127.0.0.1';
  return listen.call(this, first, ...rest);
};
"""
RETRY = {"attempts": 2, "on_status_codes": [429, 500, 502, 503, 504], "use_retry_after_header": True}


class Portkey(Subject):
    name = "portkey"

    def version(self):
        return peers.PORTKEY

    def write_config(self, routes):
        self.preload = self.write("loopback.cjs", LOOPBACK)

    def command(self):
        return [shutil.which("node"), "-r", self.preload, peers.portkey(), f"--port={self.port}", "--headless"]

    def environment(self):
        return {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": os.environ.get("TRUSTED_CUSTOM_HOSTS", "127.0.0.1")}

    def config_of(self, route):
        targets = [
            {
                "provider": "openai", "api_key": "none", "custom_host": f"http://{address}/v1",
                "override_params": {"model": f"{upstream}-model"}, "retry": RETRY,
                "request_timeout": round(route.first_byte_s * 1000),
            }
            for upstream, address in route.targets
        ]  # fmt: skip
        if len(targets) == 1:
            return targets[0]
        if route.mode == "failover":
            return {"strategy": {"mode": "fallback"}, "targets": targets}
        groups = [
            {"strategy": {"mode": "fallback"}, "targets": targets[number:] + targets[:number], "weight": 1}
            for number in range(len(targets))
        ]
        return {"strategy": {"mode": "loadbalance"}, "targets": groups}

    def headers(self, route):
        return (("x-portkey-config", json.dumps(self.config_of(route), separators=(",", ":"))),)
