"""The LiteLLM proxy, one worker, configured as its reliability page recommends: retries, fallbacks in order,
also for prompts that are too long or rejected, timeouts per deployment."""

import json

import peers
from subjects.base import Subject

KEY = "sk-faults"


class LiteLLM(Subject):
    name = "litellm"
    persistent = True

    def version(self):
        return peers.LITELLM

    def write_config(self, routes):
        models, fallbacks = [], []
        for route in routes:
            names = []
            for number, (upstream, address) in enumerate(route.targets):
                name = route.name if number == 0 or route.mode == "pool" else f"{route.name}--{upstream}"
                names.append(name)
                models.append({
                    "model_name": name,
                    "litellm_params": {
                        "model": f"openai/{upstream}-model", "api_base": f"http://{address}/v1", "api_key": "none",
                        "timeout": route.first_byte_s, "stream_timeout": route.first_byte_s,
                        "max_parallel_requests": route.capacity,
                    },
                })  # fmt: skip
            if route.mode == "failover" and len(names) > 1:
                fallbacks.append({route.name: names[1:]})
        config = {
            "model_list": models,
            "router_settings": {
                "num_retries": 2, "fallbacks": fallbacks, "context_window_fallbacks": fallbacks,
                "content_policy_fallbacks": fallbacks,
                "routing_strategy": "simple-shuffle", "cooldown_time": 5,
                # By default it repeats what the provider has refused.
                "retry_policy": {"BadRequestErrorRetries": 0, "ContentPolicyViolationErrorRetries": 0},
            },
            "litellm_settings": {"drop_params": True, "telemetry": False},
            "general_settings": {"master_key": KEY},
        }  # fmt: skip
        # JSON is YAML.
        self.config = self.write("litellm.yaml", json.dumps(config, indent=1))

    def environment(self):
        return {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"}

    def command(self):
        return [
            peers.litellm(), "--config", self.config, "--host", "127.0.0.1", "--port", str(self.port),
            "--num_workers", "1",
        ]  # fmt: skip

    def headers(self, route):
        return (("Authorization", f"Bearer {KEY}"),)
