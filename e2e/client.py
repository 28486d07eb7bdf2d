"""What smoke and the stories share: the SDK, `penstock load`, waiting with a deadline."""

import os
import re
import subprocess
import time

import openai

PENSTOCK = os.environ["PENSTOCK_BIN"]


class Failed(Exception):
    """Something is not as it should be; the message says what was seen."""


def check(condition, message):
    """Like assert, but never compiled away."""
    if not condition:
        raise Failed(message)


def expect(told, expected, what):
    """Raises if they differ; returns 1, for those who count what was looked at."""
    check(told == expected, f"{what}: {told}, and not {expected}")
    return 1


def wait_until(what, probe, timeout_s, every_s=0.5):
    """Calls `probe` until it returns something true, and returns that."""
    deadline = time.monotonic() + timeout_s
    last = None
    while time.monotonic() < deadline:
        try:
            value = probe()
            if value:
                return value
            last = value
        except (Failed, openai.OpenAIError, OSError, subprocess.CalledProcessError) as error:
            last = error
        time.sleep(every_s)
    raise Failed(f"waited {timeout_s} s for: {what}; last seen: {last}")


def sdk(url, retries=0, timeout_s=60, key="none"):
    """The official client, without its own retries: ours must be enough."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=timeout_s)


def stream_chat(client, model, prompt, max_tokens=16):
    """One streamed chat; returns (text, finish reason, number of chunks with text, headers)."""
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, finish, pieces, usage = "", None, 0, None
    for chunk in raw.parse():
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                text += choice.delta.content
                pieces += 1
            finish = choice.finish_reason or finish
    check(usage is not None, "the stream carried no usage")
    return text, finish, pieces, raw.headers


def load_command(url, **flags):
    """The command line of `penstock load`."""
    command = [PENSTOCK, "load", "--url", url]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    return command


def parse_summary(line):
    """`name: a=1 b=2.5` as a dictionary of numbers."""
    return {key: float(value) for key, value in re.findall(r"(\w+)=([0-9.]+)", line)}


def load(url, timeout_s, quiet=True, **flags):
    """Runs `penstock load` to its end; returns its last line as a dictionary, errors by kind under "kinds"."""
    result = subprocess.run(
        load_command(url, **flags), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if not quiet:
        print(result.stdout, end="", flush=True)
    check(result.returncode == 0, f"penstock load failed: {result.stderr.strip()}")
    summary = parse_summary(result.stdout.strip().splitlines()[-1])
    summary["kinds"] = {kind: int(count) for kind, count in re.findall(r"^error (\w+): (\d+)", result.stdout, re.M)}
    return summary
