"""OpenAI's API as Azure has it: deployments in the path, `api-key`, a first chunk that tells of the filters alone."""

import json
from urllib.parse import parse_qs, urlsplit

from openai.types.chat import ChatCompletionChunk

from wires import as_json, scene_of
from wires.chat import Chat, chat_events, chat_whole

VERSION = "2024-10-21"
KEY = "azure-key"
CALM = {"hate": {"filtered": False, "severity": "safe"}}


class Azure(Chat):
    name = "azure"
    capabilities = {}

    def external(self, url):
        return {"url": url, "protocol": "AzureOpenAI", "apiVersion": VERSION}, {"key": KEY}

    def answer(self, path, headers, body):
        target = urlsplit(path)
        request = json.loads(body)
        self.check(path, headers["api-key"] == KEY, "the key did not arrive")
        self.check(path, "authorization" not in headers, "there is an Authorization")
        self.check(path, parse_qs(target.query) == {"api-version": [VERSION]}, "not the version")
        deployment = f"/openai/deployments/{request['model']}/chat/completions"
        self.check(path, target.path == deployment, f"not {deployment}")
        if scene_of(request["model"]) == "filtered":
            return as_json(400, FILTERED)
        return super().complete(path, body)

    def whole(self, scene):
        answer = chat_whole(scene)
        answer["prompt_filter_results"] = [{"prompt_index": 0, "content_filter_results": CALM}]
        answer["choices"][0]["content_filter_results"] = CALM
        return answer

    def events(self, scene):
        first = {"choices": [], "created": 0, "id": "", "model": "", "object": "chat.completion.chunk"}
        first["prompt_filter_results"] = [{"prompt_index": 0, "content_filter_results": CALM}]
        yield "data: " + ChatCompletionChunk.model_validate(first).model_dump_json(exclude_unset=True) + "\n\n"
        yield from chat_events(scene)


FILTERED = {
    "error": {
        "message": "The response was filtered: no such thing.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {
            "code": "ResponsibleAIPolicyViolation",
            "content_filter_result": {"hate": {"filtered": True, "severity": "high"}},
        },
    }
}
