"""OpenAI's chat completions, checked and made with the openai SDK's own types."""

import json

import pydantic
from openai.types.chat import ChatCompletion, ChatCompletionChunk, completion_create_params

from wires import COUNT, REFUSAL, Wire, as_events, as_json, calls_of, forced, scene_of


def strict(typed_dict):
    """A member that the vendor's API does not know is an error."""
    typed_dict.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return typed_dict


CHAT_REQUEST = pydantic.TypeAdapter(
    strict(completion_create_params.CompletionCreateParamsStreaming)
    | strict(completion_create_params.CompletionCreateParamsNonStreaming)
)

TOKENIZE_MEMBERS = {"model", "messages", "tools", "add_generation_prompt"}


class Chat(Wire):
    name = "openai"
    capabilities = {"tokenize": True}

    def external(self, url):
        return {"url": f"{url}/v1", "protocol": "OpenAI"}, {}

    def answer(self, path, headers, body):
        if path == "/tokenize":
            return self.tokenize(path, body)
        self.check(path, path == "/v1/chat/completions", "no such path")
        return self.complete(path, body)

    def tokenize(self, path, body):
        """As vLLM has it beside OpenAI's API: no vendor's SDK knows it."""
        request = json.loads(body)
        members = set(request)
        self.check(path, members <= TOKENIZE_MEMBERS and request["add_generation_prompt"] is True, f"members {members}")
        try:
            completion = {"model": request["model"], "messages": request["messages"], "tools": request["tools"]}
            forced(CHAT_REQUEST.validate_python(completion))
        except (KeyError, pydantic.ValidationError) as err:
            self.check(path, False, err)
        return as_json(200, {"count": COUNT, "max_model_len": 64, "tokens": list(range(COUNT)), "token_strs": None})

    def complete(self, path, body):
        request = json.loads(body)
        try:
            forced(CHAT_REQUEST.validate_python(request))
        except pydantic.ValidationError as err:
            self.check(path, False, err)
        scene = scene_of(request["model"])
        if scene == "error":
            error = {"message": REFUSAL, "type": "invalid_request_error", "code": None, "param": None}
            return as_json(400, {"error": error})
        self.check_context(path, body, request.get("max_completion_tokens"), scene)
        return as_events(self.events(scene)) if request.get("stream") else as_json(200, self.whole(scene))

    def whole(self, scene):
        return chat_whole(scene)

    def events(self, scene):
        return chat_events(scene)


def chat_usage():
    return {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35, "prompt_tokens_details": {"cached_tokens": 20}}


def chat_whole(scene):
    message = {"role": "assistant", "content": "Let mé see.", "reasoning_content": "hm"}
    calls = [
        {"id": call, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for call, city in calls_of(scene)
    ]
    message |= {"tool_calls": calls} if calls else {}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop", "logprobs": None}
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": scene, "choices": [choice], "usage": chat_usage()}
    return ChatCompletion.model_validate(answer).model_dump(mode="json")


def chat_events(scene):
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "Let mé "}, {"content": "see."}]
    calls = calls_of(scene)
    heads = [{"id": call, "type": "function", "function": {"name": "weather", "arguments": ""}} for call, _ in calls]
    starts = [{"function": {"arguments": '{"city":'}} for _ in calls]
    ends = [{"function": {"arguments": f' "{city}"}}'}} for _, city in calls]
    # Parts of several calls come in turn.
    for parts in (heads, starts, ends):
        deltas += [{"tool_calls": [{"index": index} | part]} for index, part in enumerate(parts)]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]}]
    chunks += [{"choices": [], "usage": chat_usage()}]
    for chunk in chunks:
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": scene} | chunk
        yield "data: " + ChatCompletionChunk.model_validate(chunk).model_dump_json(exclude_unset=True) + "\n\n"
    yield "data: [DONE]\n\n"
