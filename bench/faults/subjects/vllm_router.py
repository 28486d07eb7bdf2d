"""vllm-router: one pool of equal workers, round robin, with its retries, breakers and health checks."""

import math

import peers
from subjects.base import Subject


class VllmRouter(Subject):
    name = "vllm_router"
    several_routes = False

    def version(self):
        return peers.VLLM_ROUTER

    def write_config(self, routes):
        # One pool: the first route is the one under test.
        self.route = routes[0]

    def command(self):
        route = self.route
        workers = [f"http://{address}" for _, address in route.targets]
        admission = []
        if route.capacity:
            room = route.capacity * len(route.targets)
            admission = ["--max-concurrent-requests", str(room), "--queue-size", str(room), "--queue-timeout-secs", "1"]
        return [
            peers.vllm_router(), "--host", "127.0.0.1", "--port", str(self.port), "--worker-urls", *workers,
            "--policy", "round_robin", "--prometheus-host", "127.0.0.1", "--prometheus-port", str(self.spare_ports[0]),
            # The only limit of time that it has is that of a whole answer.
            "--request-timeout-secs", str(math.ceil(route.total_s)),
            "--retry-max-retries", "3", "--cb-failure-threshold", "5", "--cb-timeout-duration-secs", "5",
            "--health-check-interval-secs", "2", "--health-check-timeout-secs", "2",
            "--log-level", "warning", *admission,
        ]  # fmt: skip
