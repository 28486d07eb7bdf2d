"""Smoke test of the embedded default (`penstock up`): a streamed chat with the official SDK; a ramp that makes the
pool grow; idleness that makes it shrink; and the same ramp with scaling off, which must miss the target, or the run
proves nothing."""

import os
import re
import subprocess
import sys
import threading

from client import PENSTOCK, Failed, check, load, sdk, stream_chat, wait_until

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET_MS = 500  # ttftP90 of examples/quickstart
RAMP = {
    "model": "chat",
    "rate": "1:10",
    "duration": "60s",
    "prompt_tokens": "200:400",
    "output_tokens": "60:120",
    "progress": "0s",
    "timeout": "60s",
}
SCALE_IN_TIMEOUT_S = 150


class Up:
    """A running `penstock up`; follows its lines."""

    def __init__(self, *flags):
        ports = [flag for name in ("", "admin-", "scaler-", "scaler-admin-") for flag in (f"--{name}listen", "127.0.0.1:0")]
        command = [PENSTOCK, "up", "-f", os.path.join(ROOT, "examples/quickstart"), "--hpa-sync-period", "5s", *ports, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines, self.url, self.ready, self.replicas_max = [], None, set(), 0
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"^up: .*url=(\S+)", line):
                self.url = match[1]
            if match := re.search(r": (\S+) is ready", line):
                self.ready.add(match[1])
            if match := re.search(r": (\S+) (stops|has stopped|failed)", line):
                self.ready.discard(match[1])
            self.replicas_max = max(self.replicas_max, len(self.ready))

    def wait_ready(self):
        wait_until("penstock up to be ready", lambda: self.url or self.process.poll() is not None, 60, 0.1)
        check(self.url, "penstock up ended: " + "".join(self.lines[-5:]))

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failed("penstock up did not stop within 90 s of SIGTERM") from None
        check(self.process.returncode == 0, f"penstock up ended with {self.process.returncode}: {self.lines[-3:]}")


def chat(url):
    text, finish, pieces, headers = stream_chat(sdk(url), "chat", "Say something.", 16)
    check(text and finish in ("stop", "length"), f"finish_reason {finish}, text {text!r}")
    check(pieces > 1, f"the answer came in {pieces} piece")
    check(headers.get("x-penstock-engine") == "simulated", f"headers: {dict(headers)}")


def main():
    on, off = Up(), None
    try:
        on.wait_ready()
        chat(on.url)
        print(f"smoke: ramp with scaling against {on.url}", flush=True)
        with_scaling = load(on.url, 180, **RAMP)
        replicas_max = on.replicas_max
        off = Up("--no-scaling")
        off.wait_ready()
        print(f"smoke: the same ramp without scaling against {off.url}", flush=True)
        without = load(off.url, 180, **RAMP)
        wait_until("the idle pool to shrink to 1", lambda: len(on.ready) == 1, SCALE_IN_TIMEOUT_S)
        replicas_end = len(on.ready)
        chat(on.url)
    except Exception:
        sys.stdout.write("".join(on.lines[-40:]))
        raise
    finally:
        for up in (on, off):
            if up:
                up.stop()
    errors = int(with_scaling["errors"])
    check(errors == 0, f"errors by kind: {with_scaling['kinds']}")
    check(replicas_max >= 2, f"the pool never grew: {replicas_max} replica at most")
    check(
        without["ttft_p90_ms"] > TARGET_MS,
        f"void: without scaling the ramp met its target (p90 {without['ttft_p90_ms']} ms): it proves nothing",
    )
    check(
        with_scaling["ttft_p90_ms"] < without["ttft_p90_ms"],
        f"scaling did not help: p90 {with_scaling['ttft_p90_ms']} ms with, {without['ttft_p90_ms']} ms without",
    )
    print(
        f"smoke: chat=ok replicas_max={replicas_max} replicas_end={replicas_end} errors={errors} "
        f"ttft_p90_ms={with_scaling['ttft_p90_ms']:.0f} off_ttft_p90_ms={without['ttft_p90_ms']:.0f}"
    )


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"smoke: failed: {failure}")
