"""What the benchmarks share: an orderly end, free ports, and waiting for a process to listen."""

import signal
import socket
import sys
import time


def end_on_sigterm():
    """As on Ctrl-C, `finally` blocks run, which stop the processes that were started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_port(port):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"bench: nothing listens on port {port} after 30 s")
