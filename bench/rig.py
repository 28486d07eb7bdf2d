"""What the benchmarks share: an orderly end, free ports, waiting for a process to listen, and what processes cost."""

import os
import signal
import socket
import sys
import time

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Of a clock id that is made from a process id: time on a CPU (clock_getcpuclockid(3)).
CPUCLOCK_SCHED = 2


def end_on_sigterm():
    """As on Ctrl-C, `finally` blocks run, which stop the processes that were started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_port(port, limit_s=30):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"bench: nothing listens on port {port} after {limit_s} s")


def family(pid):
    """The process and its descendants."""
    found, queue = [], [pid]
    while queue:
        pid = queue.pop()
        found.append(pid)
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                    queue += [int(child) for child in file.read().split()]
        except OSError:
            pass
    return found


def cpu_s(pid):
    """CPU time, user and system, of the process, its descendants, and those of them that have ended."""
    total = 0.0
    for member in family(pid):
        try:
            # The process's own clock knows nanoseconds, its `stat` only hundredths of a second.
            total += time.clock_gettime(~member << 3 | CPUCLOCK_SCHED)
            with open(f"/proc/{member}/stat", encoding="ascii") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            total += (int(fields[13]) + int(fields[14])) * TICK_S
        except OSError:
            pass
    return total


def core_busy_s(core):
    """Time that any process ran on the core, without the kernel's interrupts."""
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"cpu{core} "):
                return sum(int(field) for field in line.split()[1:4]) * TICK_S
    return 0.0


def memory_kib(pid, field="VmRSS"):
    """Resident memory of the process and its descendants; with `VmHWM` the most that each ever had."""
    total = 0
    for member in family(pid):
        try:
            with open(f"/proc/{member}/status", encoding="ascii") as status:
                total += sum(int(line.split()[1]) for line in status if line.startswith(field + ":"))
        except OSError:
            pass
    return total
