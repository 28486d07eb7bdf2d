"""The official SDKs of OpenAI and Anthropic as callers, before backends that speak OpenAI's API, Anthropic's, Azure's,
Gemini's, Bedrock's: streaming and not. The backends are scripts (`wires/`): their answers are read by the vendor's own SDK too, which asks
them without a gateway. All must tell the same: a text, a thought, a call of a tool, two of them whose arguments come in
turn, why it ended, how many tokens it took, of which a cache had some, and an error. Then jobs: see jobs.py."""

import http.server
import json
import sys
import threading

import anthropic
import jobs
import openai
from client import Failed, check
from up import item, running

from wires import COUNT, PICTURE, REFUSAL, SCHEMA, SHOWN, bedrock, calls_of, gemini, scene_of
from wires.azure import KEY as AZURE_KEY
from wires.azure import VERSION as AZURE_VERSION
from wires.azure import Azure
from wires.chat import Chat
from wires.messages import Messages

USAGE = {"prompt": 30, "cached": 20, "completion": 5}
WIRES = {wire.name: wire for wire in (Chat(), Messages(), Azure(), gemini.Gemini(), bedrock.Bedrock())}


class Backend(http.server.BaseHTTPRequestHandler):
    """All wires on one port: the first segment of the path names the wire."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        _, name, path = self.path.split("/", 2)
        status, kind, answer = WIRES[name].answer("/" + path, self.headers, body)
        self.send_response(status)
        self.send_header("content-type", kind)
        if isinstance(answer, bytes):
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        # Seven bytes at a time: what a network may do.
        whole = b"".join(answer)
        for start in range(0, len(whole), 7):
            piece = whole[start : start + 7]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


def ask_openai(url, model, stream):
    return ask_chat(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20), model, stream)


def ask_azure(url, model, stream):
    client = openai.AzureOpenAI(azure_endpoint=url, api_key=AZURE_KEY, api_version=AZURE_VERSION, max_retries=0, timeout=20)
    return ask_chat(client, model, stream)


def ask_chat(client, model, stream):
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
    shown = {"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": SHOWN}}
    result = [{"type": "text", "text": "rain"}, shown] if scene_of(model) == "shown" else "rain"
    messages = [
        {"role": "user", "content": "Weather in Bonn?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Bonn"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_0", "content": result}]},
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


def ask_count(url, model):
    """How many tokens a prompt has, in Anthropic's words."""
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20)
    tools = [{"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}]
    messages = [{"role": "user", "content": "Weather in Bonn?"}]
    return client.messages.count_tokens(model=model, system="Be brief.", messages=messages, tools=tools).input_tokens


# Scenes whose answers are read by all; in the last one the caller's tool has shown a picture, which chat completions
# cannot say.
SCENES = {"openai": ("text", "tool", "both"), "anthropic": ("text", "tool", "both", "shown")}
CALLERS = {"openai": (ask_openai, openai.BadRequestError), "anthropic": (ask_anthropic, anthropic.BadRequestError)}
# Wires whose streams have ids of their events, which must be nothing to either SDK.
KEPT = ("openai", "anthropic")
# Wires that count the tokens of a prompt.
COUNTING = ("openai", "anthropic")
# Which SDK is each wire's own, to ask it without a gateway.
VENDORS = {"openai": ask_openai, "anthropic": ask_anthropic, "azure": ask_azure, "gemini": gemini.ask, "bedrock": bedrock.ask}


def expected(scene):
    return {
        "text": "Let mé see.",
        "thought": "hm",
        "calls": [(call, "weather", {"city": city}) for call, city in calls_of(scene)],
        "end": "tool_calls" if calls_of(scene) else "stop",
        "usage": USAGE,
    }


def expect(what, told, scene):
    check(told == expected(scene), f"{what}, {scene}:\n  told     {told}\n  expected {expected(scene)}")


def ask_vendors(url):
    """Each wire before its vendor's own SDK, without a gateway: what the script speaks is what the vendor speaks."""
    done = 0
    for name, ask in VENDORS.items():
        for scene in SCENES.get(name, ("text", "tool", "both")):
            for stream in (False, True):
                expect(f"{name}'s own SDK, stream={stream}", ask(f"{url}/{name}", f"m-{scene}", stream), scene)
                done += 1
    check(ask_count(f"{url}/anthropic", "m-text") == COUNT, "Anthropic's own SDK was told another count")
    vectors = gemini.ask_vectors(f"{url}/gemini", "m-text")
    check(vectors == gemini.VECTORS, f"Gemini's own SDK was told {vectors}")
    return done + 2


def expect_error(url, ask, model, error):
    try:
        ask(url, model, False)
    except error as err:
        check(err.status_code == 400 and REFUSAL in str(err), f"{model}: {err}")
        return
    raise Failed(f"{model}: no error came")


def expect_filtered(url):
    """A prompt that the provider's filters block is a refusal to every caller."""
    for caller, expected_end in (("openai", "content_filter"), ("anthropic", "refusal")):
        for name in ("gemini", "bedrock"):
            for stream in (False, True):
                told = CALLERS[caller][0](url, f"{name}-filtered", stream)
                check(not told["text"] and told["end"] == expected_end, f"{caller}, {name}, stream={stream}: {told}")


def ask_gateway(url):
    """Each caller before each wire, through the gateway."""
    done = 0
    for caller, (ask, error) in CALLERS.items():
        for name in WIRES:
            for scene in SCENES[caller]:
                for stream in (False, True):
                    expect(f"{caller} SDK, {name} backend, stream={stream}", ask(url, f"{name}-{scene}", stream), scene)
                    done += 1
            expect_error(url, ask, f"{name}-error", error)
            done += 1
        expect_error(url, ask, "azure-filtered", error)
        done += 1
    expect_filtered(url)
    return done + 8 + expect_counts(url) + expect_vectors(url) + expect_models(url)


def expect_counts(url):
    """A prompt is counted by the wires that can, and by no other."""
    for name in WIRES:
        try:
            told = ask_count(url, f"{name}-text")
        except anthropic.BadRequestError as err:
            told = "refused" if "count_tokens" in str(err) else str(err)
        expected = COUNT if name in COUNTING else "refused"
        check(told == expected, f"{name} counts {told}, and not {expected}")
    return len(WIRES)


def expect_models(url):
    """One model is asked for by its name, which may have a slash, by both SDKs; another one is not there."""
    callers = (openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), anthropic.Anthropic(base_url=url, api_key="none", max_retries=0))
    for caller, missing in zip(callers, (openai.NotFoundError, anthropic.NotFoundError), strict=True):
        for name in ("gemini-text", "azure-org/text"):
            check(caller.models.retrieve(name).id == name, f"{caller}: {name} is another one")
        try:
            found = caller.models.retrieve("nobody/knows")
        except missing:
            continue
        raise Failed(f"a model that is not there: {found}")
    return 2


def expect_vectors(url):
    """Embeddings of Gemini's, in both forms that OpenAI's SDK reads: bytes, which is its default, and numbers."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    call = {"model": "gemini-text", "input": gemini.TEXTS, "dimensions": len(gemini.VECTORS[0])}
    for form in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(**call, **form)
        told = [one.embedding for one in answer.data]
        check(told == gemini.VECTORS and [one.index for one in answer.data] == [0, 1], f"{form}: {told}")
        check(answer.usage.prompt_tokens == 0, f"usage that nobody counted: {answer.usage}")
    return 2


def objects(url):
    """An LLMBackend for each wire and a rule for its models, as JSON, which is YAML."""
    for name, wire in WIRES.items():
        external, secret = wire.external(f"{url}/{name}")
        if secret:
            external["credential"] = {"secret": name, "key": next(iter(secret))}
            yield {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": secret}
        rule = {"name": "any", "match": {"models": [f"{name}-*"]}, "backends": [{"name": name}], "retry": {"attempts": 1}}
        if name in KEPT:
            rule["resumable"] = "30s"
        backend = {"external": external, "capabilities": wire.capabilities}
        yield item("LLMBackend", name, backend)
        yield item("RoutingPolicy", name, {"rules": [rule]})


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    upstream = f"http://127.0.0.1:{server.server_port}"
    done = ask_vendors(upstream)
    with running(objects(upstream)) as (_, url):
        done += ask_gateway(url)
    problems = [problem for wire in WIRES.values() for problem in wire.problems]
    check(not problems, "requests that the vendor would refuse:\n" + "\n".join(problems[:5]))
    done += jobs.prove()
    print(f"protocols: ok={done} failed=0")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"protocols: {failed}")
        sys.exit(1)
