"""Measures the gateway and Envoy in turn on the same mock: CPU time per request of the proxy's process, and latency
that it adds to one client on one connection. The proxy has core 0 for itself, client and mock share the other one.
Rounds alternate, so that a noisy machine is noisy for both; the median round counts."""

import os
import re
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from rig import end_on_sigterm, free_port, wait_port  # noqa: E402

RELEASE, ENVOY = sys.argv[1:3]
ROUNDS, REQUESTS = 5, 4000
CORES = sorted(os.sched_getaffinity(0))
PROXY_CORE, CLIENT_CORE = CORES[0], CORES[-1]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

OBJECTS = """
apiVersion: penstock.dev/v1alpha1
kind: LLMBackend
metadata: {{name: mock}}
spec: {{external: {{url: "http://127.0.0.1:{port}/v1"}}}}
---
apiVersion: penstock.dev/v1alpha1
kind: RoutingPolicy
metadata: {{name: default}}
spec: {{rules: [{{name: mock, match: {{models: [mock]}}, backends: [{{name: mock}}]}}]}}
"""

ENVOY_CONFIG = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: mock}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: mock
    type: STATIC
    load_assignment:
      cluster_name: mock
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]
"""


def start(core, *command, env=None):
    return subprocess.Popen(
        ["taskset", "-c", str(core), *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **(env or {})},
    )  # fmt: skip


def cpu_s(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def measure(port, pid=None):
    """One round: (p50 µs, p99 µs, CPU µs per request)."""
    before = cpu_s(pid) if pid else 0
    command = ["taskset", "-c", str(CLIENT_CORE), f"{RELEASE}/penstock-bench-proxy", "client"]
    command += ["--connect", f"127.0.0.1:{port}", "--requests", str(REQUESTS), "--warm-up", "200"]
    line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    used = cpu_s(pid) - before if pid else 0
    p50, p99 = map(int, re.search(r"p50_us=(\d+) p99_us=(\d+)", line).groups())
    return p50, p99, used / (REQUESTS + 200) * 1e6


def main():
    end_on_sigterm()
    mock, ours, envoy = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/objects.yaml", "w", encoding="utf-8") as file:
            file.write(OBJECTS.format(port=mock))
        with open(f"{folder}/envoy.yaml", "w", encoding="utf-8") as file:
            file.write(ENVOY_CONFIG.format(listen=envoy, port=mock))
        processes = [
            start(CLIENT_CORE, f"{RELEASE}/penstock-bench-proxy", "mock", "--listen", f"127.0.0.1:{mock}"),
            start(
                PROXY_CORE, f"{RELEASE}/penstock", "--log=warn", "up", "-f", f"{folder}/objects.yaml",
                "--listen", f"127.0.0.1:{ours}", "--admin-listen", "127.0.0.1:0",
                "--scaler-listen", "127.0.0.1:0", "--scaler-admin-listen", "127.0.0.1:0",
                env={"TOKIO_WORKER_THREADS": "1"},
            ),
            start(PROXY_CORE, ENVOY, "-c", f"{folder}/envoy.yaml", "--concurrency", "1",
                  "--disable-hot-restart", "-l", "off"),
        ]  # fmt: skip
        try:
            for port in (mock, ours, envoy):
                wait_port(port)
            rounds = {"direct": [], "penstock": [], "envoy": []}
            for _ in range(ROUNDS):
                rounds["direct"].append(measure(mock))
                rounds["penstock"].append(measure(ours, processes[1].pid))
                rounds["envoy"].append(measure(envoy, processes[2].pid))
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
    median = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in rounds.items()}
    direct = median["direct"]
    print(f"{'':<10}{'p50 µs':>9}{'p99 µs':>9}{'CPU µs':>9}{'added p50':>11}{'added p99':>11}")
    for name, (p50, p99, cpu) in median.items():
        print(f"{name:<10}{p50:>9.0f}{p99:>9.0f}{cpu:>9.1f}{p50 - direct[0]:>11.0f}{p99 - direct[1]:>11.0f}")
    penstock, other = median["penstock"], median["envoy"]
    print(
        f"bench-proxy: us_per_request={penstock[2]:.1f} envoy_us={other[2]:.1f} ratio={penstock[2] / other[2]:.2f} "
        f"added_p99_us={penstock[1] - direct[1]:.0f}"
    )


if __name__ == "__main__":
    main()
