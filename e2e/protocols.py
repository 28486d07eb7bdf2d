"""The official SDKs of OpenAI and Anthropic as callers, before backends of either protocol: four combinations, streaming
and not. The backends are scripts whose answers are made with the SDKs' own types, and which check with those types that
each request is one that the vendor's API would take. Each combination must tell the same: a text, a thought, a call of a
tool, why it ended, how many tokens it took, and an error."""

import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading

import anthropic
import openai
import pydantic
from anthropic.types import message_create_params
from client import PENSTOCK, Failed, check
from openai.types.chat import ChatCompletion, ChatCompletionChunk, completion_create_params

USAGE = {"prompt": 30, "cached": 20, "completion": 5}
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OBJECTS = """
apiVersion: penstock.dev/v1alpha1
kind: LLMBackend
metadata: {{name: {name}}}
spec:
  external: {{url: "http://127.0.0.1:{port}/v1", protocol: {protocol}}}
---
apiVersion: penstock.dev/v1alpha1
kind: RoutingPolicy
metadata: {{name: {name}}}
spec:
  rules:
  - name: any
    match: {{models: ["{name}/*"]}}
    backends: [{{name: {name}}}]
    retry: {{attempts: 1}}
---
"""


def forced(value):
    """The SDKs' types have lazily checked lists: reading them is what checks."""
    if isinstance(value, dict):
        return {key: forced(inner) for key, inner in value.items()}
    if isinstance(value, (str, bytes, int, float, bool)) or value is None:
        return value
    return [forced(inner) for inner in value]


def strict(typed_dict):
    """A member that the vendor's API does not know is an error."""
    typed_dict.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return typed_dict


CHAT_REQUEST = pydantic.TypeAdapter(
    strict(completion_create_params.CompletionCreateParamsStreaming)
    | strict(completion_create_params.CompletionCreateParamsNonStreaming)
)
MESSAGE_REQUEST = pydantic.TypeAdapter(
    strict(message_create_params.MessageCreateParamsStreaming)
    | strict(message_create_params.MessageCreateParamsNonStreaming)
)


class Backend(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    problems = []

    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        chat = self.path == "/v1/chat/completions"
        try:
            forced((CHAT_REQUEST if chat else MESSAGE_REQUEST).validate_python(request))
        except pydantic.ValidationError as err:
            self.problems.append(f"{self.path}: {err}")
        scene = request["model"].rpartition("/")[2]
        if scene == "error":
            body = {"error": {"message": "no such thing", "type": "invalid_request_error", "code": None, "param": None}}
            return self.whole(400, body if chat else {"type": "error", "error": {"type": "invalid_request_error", "message": "no such thing"}})
        self.check_context(request, chat)
        events = (chat_events if chat else message_events)(scene)
        if request.get("stream"):
            return self.stream(events)
        return self.whole(200, (chat_whole if chat else message_whole)(scene))

    def check_context(self, request, chat):
        """The instructions, the picture and the tool arrived."""
        text = json.dumps(request)
        for what in ("Be brief.", PICTURE, '"city"', "weather"):
            if what not in text:
                self.problems.append(f"{self.path}: {what!r} did not arrive")
        limit = request.get("max_completion_tokens") if chat else request.get("max_tokens")
        if limit != 64:
            self.problems.append(f"{self.path}: the limit of 64 tokens did not arrive")

    def whole(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, events):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        # Seven bytes at a time: what a network may do.
        text = "".join(events).encode()
        for start in range(0, len(text), 7):
            piece = text[start : start + 7]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


def chat_usage():
    return {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35, "prompt_tokens_details": {"cached_tokens": 20}}


def chat_whole(scene):
    message = {"role": "assistant", "content": "Let mé see.", "reasoning_content": "hm"}
    if scene == "tool":
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if scene == "tool" else "stop", "logprobs": None}
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": scene, "choices": [choice], "usage": chat_usage()}
    return ChatCompletion.model_validate(answer).model_dump(mode="json")


def chat_events(scene):
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "Let mé "}, {"content": "see."}]
    if scene == "tool":
        call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        deltas += [{"tool_calls": [call]}]
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"city":', ' "Ulm"}')]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if scene == "tool" else "stop"}]}]
    chunks += [{"choices": [], "usage": chat_usage()}]
    for chunk in chunks:
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": scene} | chunk
        yield "data: " + ChatCompletionChunk.model_validate(chunk).model_dump_json(exclude_unset=True) + "\n\n"
    yield "data: [DONE]\n\n"


def message_whole(scene):
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Let mé see.", "citations": None}]
    if scene == "tool":
        content += [{"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Ulm"}}]
    answer = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": scene, "content": content,
        "stop_reason": "tool_use" if scene == "tool" else "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 0, "output_tokens": 5},
    }  # fmt: skip
    return anthropic.types.Message.model_validate(answer).model_dump(mode="json", exclude_unset=True)


def message_events(scene):
    whole = message_whole(scene)
    adapter = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)
    start = whole | {"content": [], "stop_reason": None, "usage": whole["usage"] | {"output_tokens": 1}}
    events = [{"type": "message_start", "message": start}]
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
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in ("", '{"city":', ' "Ulm"}')]
        events += [{"type": "content_block_start", "index": index, "content_block": empty}]
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events += [{"type": "content_block_stop", "index": index}]
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    events += [{"type": "message_delta", "delta": end, "usage": {"output_tokens": 5}}, {"type": "message_stop"}]
    for event in events:
        if event["type"] != "message_delta":
            adapter.validate_python(event)
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        if event["type"] == "message_start":
            yield 'event: ping\ndata: {"type": "ping"}\n\n'


def ask_openai(url, model, stream):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    tools = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather", "parameters": SCHEMA}}]
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
    earlier = [
        {"role": "user", "content": "Weather in Bonn?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}]},
        {"role": "tool", "tool_call_id": "call_0", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}, *earlier, {"role": "user", "content": [{"type": "text", "text": "And here?"}, picture]}]
    common = {"model": model, "messages": messages, "tools": tools, "tool_choice": "auto", "max_completion_tokens": 64, "stop": ["END"]}
    if not stream:
        answer = client.chat.completions.create(**common)
        choice, usage = answer.choices[0], answer.usage
        calls = [(call.id, call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
        thought = choice.message.model_extra.get("reasoning_content")
        text, end = choice.message.content, choice.finish_reason
    else:
        text, thought, end, usage, calls = "", "", None, None, {}
        for chunk in client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                thought += choice.delta.model_extra.get("reasoning_content") or ""
                end = choice.finish_reason or end
                for call in choice.delta.tool_calls or []:
                    known = calls.setdefault(call.index, [call.id, call.function.name, ""])
                    known[2] += call.function.arguments or ""
        calls = [(call_id, name, json.loads(arguments)) for call_id, name, arguments in calls.values()]
    told = {"prompt": usage.prompt_tokens, "cached": usage.prompt_tokens_details.cached_tokens, "completion": usage.completion_tokens}
    return {"text": text, "thought": thought, "calls": calls, "end": end, "usage": told}


def ask_anthropic(url, model, stream):
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20)
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
    messages = [
        {"role": "user", "content": "Weather in Bonn?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Bonn"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_0", "content": "rain"}]},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, picture]},
    ]
    tools = [{"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}]
    common = {"model": model, "system": "Be brief.", "messages": messages, "tools": tools, "tool_choice": {"type": "auto"}, "max_tokens": 64, "stop_sequences": ["END"]}
    if stream:
        with client.messages.stream(**common) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**common)
    of_kind = lambda kind: [block for block in answer.content if block.type == kind]
    usage = answer.usage
    prompt = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return {
        "text": "".join(block.text for block in of_kind("text")),
        "thought": "".join(block.thinking for block in of_kind("thinking")),
        "calls": [(block.id, block.name, block.input) for block in of_kind("tool_use")],
        "end": {"end_turn": "stop", "tool_use": "tool_calls"}.get(answer.stop_reason, answer.stop_reason),
        "usage": {"prompt": prompt, "cached": usage.cache_read_input_tokens, "completion": usage.output_tokens},
    }


def expect_error(url, ask, model, error):
    try:
        ask(url, model, False)
    except error as err:
        check(err.status_code == 400 and "no such thing" in str(err), f"{model}: {err}")
        return
    raise Failed(f"{model}: no error came")


def compare(url):
    done = 0
    callers = {"openai": (ask_openai, openai.BadRequestError), "anthropic": (ask_anthropic, anthropic.BadRequestError)}
    for caller, (ask, error) in callers.items():
        for backend in ("openai", "anthropic"):
            for scene in ("text", "tool"):
                expected = {
                    "text": "Let mé see.",
                    "thought": "hm",
                    "calls": [("call_1", "weather", {"city": "Ulm"})] if scene == "tool" else [],
                    "end": "tool_calls" if scene == "tool" else "stop",
                    "usage": USAGE,
                }
                for stream in (False, True):
                    told = ask(url, f"{backend}/{scene}", stream)
                    what = f"{caller} SDK, {backend} backend, {scene}, stream={stream}"
                    check(told == expected, f"{what}:\n  told     {told}\n  expected {expected}")
                    done += 1
            expect_error(url, ask, f"{backend}/error", error)
            done += 1
    check(not Backend.problems, "requests that the vendor would refuse:\n" + "\n".join(Backend.problems[:5]))
    return done


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "objects.yaml"), "w") as objects:
            for name, protocol in (("openai", "OpenAI"), ("anthropic", "Anthropic")):
                objects.write(OBJECTS.format(name=name, protocol=protocol, port=server.server_port))
        ports = [flag for name in ("", "admin-", "scaler-", "scaler-admin-") for flag in (f"--{name}listen", "127.0.0.1:0")]
        up = subprocess.Popen([PENSTOCK, "up", "-f", folder, *ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            url = next((line.split("url=")[1].strip() for line in up.stdout if line.startswith("up: ready")), None)
            check(url, "penstock up ended")
            threading.Thread(target=up.stdout.read, daemon=True).start()
            done = compare(url)
        finally:
            up.terminate()
            up.wait(30)
    print(f"protocols: ok={done} failed=0")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"protocols: {failed}")
        sys.exit(1)
