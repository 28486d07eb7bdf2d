"""Anthropic's Messages, checked and made with the anthropic SDK's own types."""

import json

import anthropic
import pydantic
from anthropic.types import message_count_tokens_params, message_create_params

from wires import COUNT, REFUSAL, SHOWN, Wire, as_events, as_json, calls_of, forced, scene_of
from wires.chat import strict

MESSAGE_REQUEST = pydantic.TypeAdapter(
    strict(message_create_params.MessageCreateParamsStreaming)
    | strict(message_create_params.MessageCreateParamsNonStreaming)
)
COUNT_REQUEST = pydantic.TypeAdapter(strict(message_count_tokens_params.MessageCountTokensParams))


class Messages(Wire):
    name = "anthropic"

    def external(self, url):
        return {"url": f"{url}/v1", "protocol": "Anthropic"}, {}

    def answer(self, path, headers, body):
        request = json.loads(body)
        if path == "/v1/messages/count_tokens":
            return self.count(path, request)
        self.check(path, path == "/v1/messages", "no such path")
        try:
            forced(MESSAGE_REQUEST.validate_python(request))
        except pydantic.ValidationError as err:
            self.check(path, False, err)
        scene = scene_of(request["model"])
        if scene == "error":
            return as_json(400, {"type": "error", "error": {"type": "invalid_request_error", "message": REFUSAL}})
        self.check_context(path, body, request.get("max_tokens"), scene)
        self.check_shown(path, request["messages"], scene)
        return as_events(message_events(scene)) if request.get("stream") else as_json(200, message_whole(scene))

    def check_shown(self, path, messages, scene):
        """What a tool shows stays in its result."""
        blocks = [block for message in messages if isinstance(message["content"], list) for block in message["content"]]
        results = [block for block in blocks if block["type"] == "tool_result"]
        self.check(path, scene != "shown" or SHOWN in json.dumps(results), "the result has no picture")

    def count(self, path, request):
        try:
            forced(COUNT_REQUEST.validate_python(request))
        except pydantic.ValidationError as err:
            self.check(path, False, err)
        counted = anthropic.types.MessageTokensCount(input_tokens=COUNT)
        return as_json(200, counted.model_dump(mode="json"))


def message_whole(scene):
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Let mé see.", "citations": None}]
    calls = calls_of(scene)
    content += [{"type": "tool_use", "id": call, "name": "weather", "input": {"city": city}} for call, city in calls]
    answer = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": scene, "content": content,
        "stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 0, "output_tokens": 5},
    }  # fmt: skip
    return anthropic.types.Message.model_validate(answer).model_dump(mode="json", exclude_unset=True)


def message_events(scene):
    whole = message_whole(scene)
    adapter = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)
    start = whole | {"content": [], "stop_reason": None, "usage": whole["usage"] | {"output_tokens": 1}}
    events = [{"type": "message_start", "message": start}]
    turns = []
    for index, block in enumerate(whole["content"]):
        kind = block["type"]
        if kind == "thinking":
            empty = block | {"thinking": "", "signature": ""}
            deltas = [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "s"}]
        elif kind == "text":
            empty = block | {"text": ""}
            deltas = [{"type": "text_delta", "text": text} for text in ("Let mé ", "see.")]
        else:
            empty = block | {"input": {}}
            parts = ("", '{"city":', f' "{block["input"]["city"]}"}}')
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in parts]
        turn = [{"type": "content_block_start", "index": index, "content_block": empty}]
        turn += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        turn += [{"type": "content_block_stop", "index": index}]
        if kind == "tool_use":
            turns.append(turn)
        else:
            events += turn
    # Parts of several calls come in turn.
    events += [event for together in zip(*turns) for event in together]
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    events += [{"type": "message_delta", "delta": end, "usage": {"output_tokens": 5}}, {"type": "message_stop"}]
    for event in events:
        if event["type"] != "message_delta":
            adapter.validate_python(event)
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        if event["type"] == "message_start":
            yield 'event: ping\ndata: {"type": "ping"}\n\n'
