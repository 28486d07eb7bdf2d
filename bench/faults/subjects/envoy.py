"""A plain Envoy as a careful operator sets it up for such backends: retries within a budget, priorities, outlier
detection, no limit on the length of a stream. It knows nothing of models: callers name the route in a header."""

import asyncio
import dataclasses
import json
import signal
import time
import urllib.request

import peers
from subjects.base import Subject

HEADER = "x-route"
MAX_BODY_BYTES = 32 << 20


def _duration(seconds):
    return f"{seconds:.3f}s"


def cluster(route):
    failover = route.mode == "failover"
    endpoints = []
    for number, (_, address) in enumerate(route.targets):
        host, port = address.rsplit(":", 1)
        endpoint = {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        endpoints.append({"priority": number if failover else 0, "lb_endpoints": [endpoint]})
    named = any(not address[0].isdigit() for _, address in route.targets)
    threshold = {
        "max_connections": 8192, "max_pending_requests": 8192,
        "max_requests": route.capacity * len(route.targets) if route.capacity else 8192,
        "retry_budget": {"budget_percent": {"value": 20}, "min_retry_concurrency": 3},
    }  # fmt: skip
    return {
        "name": route.name, "type": "STRICT_DNS" if named else "STATIC", "respect_dns_ttl": True,
        "connect_timeout": _duration(route.connect_s), "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [threshold, {**threshold, "priority": "HIGH"}]},
        "outlier_detection": {
            "consecutive_5xx": 5, "interval": "1s", "base_ejection_time": "5s", "max_ejection_time": "30s",
            "max_ejection_percent": 50, "split_external_local_origin_errors": False,
        },
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_assignment": {"cluster_name": route.name, "endpoints": endpoints},
    }  # fmt: skip


def retry_policy(route):
    policy = {
        "retry_on": "5xx,reset,connect-failure,refused-stream,retriable-status-codes",
        "retriable_status_codes": [429], "num_retries": route.attempts - 1,
        "per_try_idle_timeout": _duration(max(route.first_byte_s, route.idle_s)),
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            },
        }],
        "host_selection_retry_max_attempts": 5,
        "rate_limited_retry_back_off": {
            "reset_headers": [{"name": "Retry-After", "format": "SECONDS"}], "max_interval": "60s",
        },
    }  # fmt: skip
    if route.mode == "failover" and len(route.targets) > 1:
        kind = "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
        policy["retry_priority"] = {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {"@type": f"type.googleapis.com/{kind}", "update_frequency": 1},
        }
    return policy


def routes_of(routes):
    return [
        {
            "match": {"prefix": "/", "headers": [{"name": HEADER, "string_match": {"exact": route.name}}]},
            "route": {
                "cluster": route.name, "timeout": "0s", "idle_timeout": "60s", "retry_policy": retry_policy(route),
            },
        }
        for route in routes
    ]  # fmt: skip


def listener(port, routes):
    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress", "request_headers_timeout": "10s", "request_timeout": "30s",
        "stream_idle_timeout": "60s", "use_remote_address": True, "normalize_path": True,
        "common_http_protocol_options": {
            "idle_timeout": "120s", "headers_with_underscores_action": "REJECT_REQUEST", "max_headers_count": 100,
        },
        "http2_protocol_options": {
            "max_concurrent_streams": 100, "initial_stream_window_size": 65536,
            "initial_connection_window_size": 1048576,
        },
        "route_config": {"name": "all", "virtual_hosts": [
            {"name": "all", "domains": ["*"], "routes": routes_of(routes)},
        ]},
        "http_filters": [
            {"name": "envoy.filters.http.buffer", "typed_config": {
                "@type": f"{filters}.http.buffer.v3.Buffer", "max_request_bytes": MAX_BODY_BYTES,
            }},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{filters}.http.router.v3.Router"}},
        ],
    }  # fmt: skip
    return {
        "name": "ingress", "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "per_connection_buffer_limit_bytes": 1048576,
        "filter_chains": [{"filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager},
        ]}],
    }  # fmt: skip


class Envoy(Subject):
    name = "envoy"
    transport_only = True

    def version(self):
        return peers.ENVOY

    def _resources(self, routes):
        kind = "type.googleapis.com/envoy.config"
        cds = [{"@type": f"{kind}.cluster.v3.Cluster", **cluster(route)} for route in routes]
        lds = {"@type": f"{kind}.listener.v3.Listener", **listener(self.port, routes)}
        return json.dumps({"resources": cds}, indent=1), json.dumps({"resources": [lds]}, indent=1)

    def write_config(self, routes):
        cds, lds = self._resources(routes)
        paths = {"cds": self.write("cds.yaml", cds), "lds": self.write("lds.yaml", lds)}
        self.admin_port = self.spare_ports[0]
        address = {"socket_address": {"address": "127.0.0.1", "port_value": self.admin_port}}
        source = {
            name: {"resource_api_version": "V3", "path_config_source": {"path": path}} for name, path in paths.items()
        }
        self.config = self.write("envoy.yaml", json.dumps({
            "node": {"id": "faults", "cluster": "faults"}, "admin": {"address": address},
            "dynamic_resources": {"cds_config": source["cds"], "lds_config": source["lds"]},
        }, indent=1))  # fmt: skip

    def command(self):
        return [peers.envoy(), "-c", self.config, "--concurrency", "2", "--disable-hot-restart", "-l", "warning"]

    def headers(self, route):
        return ((HEADER, route.name),)

    def _admin(self, method, path):
        request = urllib.request.Request(f"http://127.0.0.1:{self.admin_port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read().decode()

    async def terminate(self):
        """SIGTERM ends an Envoy at once; one drains it first and ends it when its callers have left."""

        async def drain():
            await asyncio.to_thread(self._admin, "POST", "/drain_listeners?graceful&skip_exit")
            while self.is_running():
                stats = await asyncio.to_thread(self._admin, "GET", "/stats?filter=ingress.downstream_rq_active")
                if stats.strip().endswith(" 0"):
                    self.process.send_signal(signal.SIGTERM)
                    return
                await asyncio.sleep(0.2)

        self._draining = asyncio.create_task(drain())

    # Reloads: routes are followed by renames over their files.

    def text(self, routes, number):
        return self._resources([dataclasses.replace(route, idle_s=route.idle_s + number / 1000) for route in routes])[1]

    def change(self, routes, number):
        # The clusters of further routes would be 5,000 health tables: routes may share one.
        shared = [route for route in routes if not route.name.startswith("many-")]
        many = [route for route in routes if route.name.startswith("many-")]
        text = json.loads(self.text(shared, number))
        manager = text["resources"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        for route in many:
            entry = routes_of([route])[0]
            entry["route"]["cluster"] = shared[0].name
            manager["route_config"]["virtual_hosts"][0]["routes"].append(entry)
        manager["route_config"]["name"] = f"version-{number}"
        self.write("lds.yaml", json.dumps(text))

    def spoil(self, text):
        self.write("lds.yaml", text)

    async def applied(self, routes, number, limit_s=5.0):
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            dump = await asyncio.to_thread(self._admin, "GET", "/config_dump?mask=dynamic_listeners")
            if f"version-{number}" in dump:
                return True
            await asyncio.sleep(0.2)
        return False
