"""500 requests at once with one key that has room for 10, on 1 and on 3 gateways with one Redis: Penstock with a hard
budget, and LiteLLM with a key's limit of requests. The upstream counts what it was asked for.

LiteLLM keeps keys and their budgets in a Postgres through an engine that its packages do not have, so its key comes from
its hook for own keys (`custom_auth`), with the limit of requests per minute that such a key may have."""

import asyncio
import json
import os
import shutil
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "proxy"), HERE]

import peers  # noqa: E402
from parts import Process, gateway, redis  # noqa: E402
from real import Counting, call, objects  # noqa: E402
from rig import end_on_sigterm, free_port, wait_port  # noqa: E402

AT_ONCE, ROOM = 500, 10
KEY = 0
HOOK = '''from litellm.proxy._types import UserAPIKeyAuth


async def user_api_key_auth(request, api_key):
    return UserAPIKeyAuth(api_key=api_key, user_id="caller", rpm_limit=%d)
'''


def penstock(binary):
    def start(folder, log, upstream, store, count):
        objects(os.path.join(folder, "objects"), upstream, [KEY], ROOM)
        return [gateway(binary, os.path.join(folder, "objects"), log, store) for _ in range(count)]

    return start


def litellm(folder, log, upstream, store, count):
    program = peers.litellm()
    with open(os.path.join(folder, "own_keys.py"), "w", encoding="utf-8") as file:
        file.write(HOOK % ROOM)
    shared = {"host": "127.0.0.1", "port": store.port}
    model = {"model": "openai/mock", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "mock", "litellm_params": model}],
        "router_settings": {"num_retries": 0, **{f"redis_{name}": value for name, value in shared.items()}},
        "litellm_settings": {"cache": True, "cache_params": {"type": "redis", **shared, "supported_call_types": []}},
        "general_settings": {"custom_auth": "own_keys.user_api_key_auth"},
    }
    path = os.path.join(folder, "litellm.yaml")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"}
    gateways = []
    for _ in range(count):
        port = free_port()
        command = ["env", *(f"{name}={value}" for name, value in environment.items()), program, "--config", path]
        command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        gateways.append(Process(command, port, log))
    return gateways


async def admitted(start, count):
    folder = tempfile.mkdtemp(prefix="penstock-race-")
    upstream, processes = Counting(), []
    try:
        await upstream.start()
        with open(os.path.join(folder, "log"), "wb") as log:
            store = redis(folder, log)
            processes.append(store)
            gateways = start(folder, log, upstream.port, store, count)
            processes += gateways
            for one in gateways:
                wait_port(one.port, 120)
            calls = (call(gateways[number % count].port, KEY, 60) for number in range(AT_ONCE))
            statuses = await asyncio.gather(*calls)
        answered = sum(status == 200 for status in statuses)
        refused = sum(status == 429 for status in statuses)
        if answered + refused < AT_ONCE:
            print(f"race: {AT_ONCE - answered - refused} of {AT_ONCE} were neither answered nor refused", file=sys.stderr)
        return sum(upstream.counts.values())
    finally:
        for process in reversed(processes):
            process.stop()
        upstream.server.close()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    end_on_sigterm()
    found = {}
    for name, start in (("penstock", penstock(sys.argv[1])), ("litellm", litellm)):
        for count in (1, 3):
            try:
                found[f"{name}_{count}"] = asyncio.run(admitted(start, count))
            except peers.Missing as missing:
                print(f"race: {missing}", file=sys.stderr)
                found[f"{name}_{count}"] = "-"
    told = " ".join(f"{name}={value}" for name, value in found.items())
    print(f"race: at_once={AT_ONCE} room={ROOM} {told}")
    sys.exit(any(found[f"penstock_{count}"] != ROOM for count in (1, 3)))


if __name__ == "__main__":
    main()
