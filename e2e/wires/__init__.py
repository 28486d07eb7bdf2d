"""What the scripted backends share. A wire is one provider's API: it checks that each request is one that the vendor
would take, and answers it by a script. The model's last word names the scene."""

import json

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
# Another one, which a tool gives back.
SHOWN = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
REFUSAL = "no such thing"
# How many tokens a prompt has to those who count it.
COUNT = 21


class Wire:
    """One provider's API below `/{name}` of the server."""

    name = ""
    # `spec.capabilities` of an LLMBackend.
    capabilities = {}

    def __init__(self):
        self.problems = []

    def external(self, url):
        """`spec.external` of an LLMBackend, and the values of its Secret if it has one."""
        raise NotImplementedError

    def answer(self, path, headers, body):
        """Status, content type and either bytes or an iterator of them, for a request below the wire's name."""
        raise NotImplementedError

    def check(self, path, condition, message):
        if not condition:
            self.problems.append(f"{self.name} {path}: {message}")

    def check_context(self, path, body, limit, scene):
        """The instructions, the pictures and the tool arrived."""
        text = body.decode()
        shown = (SHOWN,) if scene == "shown" else ()
        for what in ("Be brief.", PICTURE, '"city"', "weather", *shown):
            self.check(path, what in text, f"{what!r} did not arrive")
        self.check(path, limit == 64, "the limit of 64 tokens did not arrive")


def calls_of(scene):
    """The calls of tools of a scene: id and argument of each."""
    return {"tool": [("call_1", "Ulm")], "both": [("call_1", "Ulm"), ("call_2", "Bonn")]}.get(scene, [])


def scene_of(model):
    return model.rpartition("-")[2]


def forced(value):
    """The SDKs' types have lazily checked lists: reading them is what checks."""
    if isinstance(value, dict):
        return {key: forced(inner) for key, inner in value.items()}
    if isinstance(value, (str, bytes, int, float, bool)) or value is None:
        return value
    return [forced(inner) for inner in value]


def as_json(status, value):
    return status, "application/json", json.dumps(value).encode()


def as_events(events):
    return 200, "text/event-stream", (event.encode() for event in events)
