"""AWS Bedrock's Converse API: requests are checked by botocore's model of the service and signed once more with botocore's
own signer; answers and event streams are what botocore reads."""

import base64
import json
import struct
import zlib
from datetime import datetime, timezone
from urllib.parse import unquote, urlsplit

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import botocore.session
import botocore.validate

from wires import PICTURE, REFUSAL, SCHEMA, Wire, as_json, calls_of, scene_of

REGION = "eu-central-1"
ACCESS, SECRET, TOKEN = "AKIDEXAMPLE", "secret/with+signs=", "session=="
KEYS = botocore.credentials.Credentials(ACCESS, SECRET, TOKEN)
FILE = f"[default]\naws_access_key_id = {ACCESS}\naws_secret_access_key = {SECRET}\naws_session_token = {TOKEN}\n"
MODEL = botocore.session.get_session().get_service_model("bedrock-runtime")
MEMBERS = MODEL.operation_model("Converse").input_shape


class Bedrock(Wire):
    name = "bedrock"

    def external(self, url):
        return {"url": url, "protocol": "Bedrock", "region": REGION}, {"credentials": FILE}

    def answer(self, path, headers, body):
        target = urlsplit(path).path
        _, _, model, action = target.split("/")
        self.check(path, action in ("converse", "converse-stream"), "no such path")
        self.check_signature(path, headers, body)
        request = json.loads(body)
        report = botocore.validate.ParamValidator().validate(decoded(request) | {"modelId": unquote(model)}, MEMBERS)
        unknown = unknown_members(request, MEMBERS)
        self.check(path, not report.has_errors() and not unknown, f"{report.generate_report()} {unknown}")
        scene = scene_of(unquote(model))
        if scene == "error":
            return as_json(400, {"message": REFUSAL})
        self.check_context(path, body, request["inferenceConfig"].get("maxTokens"), scene)
        if action == "converse-stream":
            return 200, "application/vnd.amazon.eventstream", iter(events(scene))
        return as_json(200, whole(scene))

    def check_signature(self, path, headers, body):
        """The signature is the one that botocore makes of what was sent."""
        told = headers["authorization"] or ""
        names = told.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        url = f"http://{headers['host']}/{self.name}{path}"
        sent = {name: headers[name] for name in names if name != "host" and headers[name]}
        request = botocore.awsrequest.AWSRequest("POST", url, headers=sent, data=body)
        signer = botocore.auth.SigV4Auth(KEYS, "bedrock", REGION)
        request.context["timestamp"] = headers["x-amz-date"]
        signature = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
        self.check(path, told.endswith(f"Signature={signature}"), "the signature is wrong")
        self.check(path, {"host", "x-amz-date", "x-amz-security-token"} <= set(names), f"signed is only {names}")
        signed_at = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        age = abs((datetime.now(timezone.utc) - signed_at).total_seconds())
        self.check(path, age < 300, f"signed {age} s off")


def decoded(value):
    """botocore takes bytes where the wire has base64."""
    if isinstance(value, dict):
        return {key: base64.b64decode(inner) if key == "bytes" else decoded(inner) for key, inner in value.items()}
    return [decoded(inner) for inner in value] if isinstance(value, list) else value


def unknown_members(value, shape):
    """Members that the service's model does not have."""
    if shape.type_name == "structure" and not getattr(shape, "is_document_type", False) and isinstance(value, dict):
        unknown = [name for name in value if name not in shape.members]
        known = [name for name in value if name in shape.members]
        return unknown + [name for key in known for name in unknown_members(value[key], shape.members[key])]
    if shape.type_name == "list":
        return [name for item in value for name in unknown_members(item, shape.member)]
    return []


USAGE = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 35, "cacheReadInputTokens": 20, "cacheWriteInputTokens": 0}


def stop_reason(scene):
    return "tool_use" if calls_of(scene) else {"filtered": "guardrail_intervened"}.get(scene, "end_turn")


def whole(scene):
    content = [{"reasoningContent": {"reasoningText": {"text": "hm", "signature": "s"}}}, {"text": "Let mé see."}]
    calls = calls_of(scene)
    content += [{"toolUse": {"toolUseId": call, "name": "weather", "input": {"city": city}}} for call, city in calls]
    message = {"role": "assistant", "content": [] if scene == "filtered" else content}
    return {"output": {"message": message}, "stopReason": stop_reason(scene), "usage": USAGE, "metrics": {"latencyMs": 1}}


def events(scene):
    yield frame("messageStart", {"role": "assistant"})
    blocks = [(None, [{"reasoningContent": {"text": "hm"}}, {"reasoningContent": {"signature": "s"}}])]
    blocks += [(None, [{"text": "Let mé "}, {"text": "see."}])]
    for call, city in calls_of(scene):
        start = {"toolUse": {"toolUseId": call, "name": "weather"}}
        blocks += [(start, [{"toolUse": {"input": part}} for part in ("", '{"city":', f' "{city}"}}')])]
    for index, (start, deltas) in enumerate([] if scene == "filtered" else blocks):
        if start:
            yield frame("contentBlockStart", {"contentBlockIndex": index, "start": start})
        for delta in deltas:
            yield frame("contentBlockDelta", {"contentBlockIndex": index, "delta": delta, "p": "abcdefgh"})
        yield frame("contentBlockStop", {"contentBlockIndex": index})
    yield frame("messageStop", {"stopReason": stop_reason(scene)})
    yield frame("metadata", {"usage": USAGE, "metrics": {"latencyMs": 1}})


def frame(kind, payload):
    """A message of an AWS event stream."""
    texts = {":message-type": "event", ":event-type": kind, ":content-type": "application/json"}
    headers = b"".join(
        struct.pack("!B", len(name)) + name.encode() + b"\x07" + struct.pack("!H", len(text)) + text.encode()
        for name, text in texts.items()
    )
    data = json.dumps(payload).encode()
    prelude = struct.pack("!II", 16 + len(headers) + len(data), len(headers))
    signed = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + data
    return signed + struct.pack("!I", zlib.crc32(signed))


def ask(url, model, stream):
    """AWS's own SDK before the wire."""
    client = boto3.client(
        "bedrock-runtime",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=ACCESS,
        aws_secret_access_key=SECRET,
        aws_session_token=TOKEN,
        config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=20),
    )
    use = {"toolUseId": "call_0", "name": "weather", "input": {"city": "Bonn"}}
    picture = {"format": "png", "source": {"bytes": base64.b64decode(PICTURE)}}
    request = {
        "modelId": model,
        "system": [{"text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"text": "Weather in Bonn?"}]},
            {"role": "assistant", "content": [{"toolUse": use}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "call_0", "content": [{"text": "rain"}]}}]},
            {"role": "assistant", "content": [{"text": "Rain."}]},
            {"role": "user", "content": [{"text": "And here?"}, {"image": picture}]},
        ],
        "inferenceConfig": {"maxTokens": 64, "stopSequences": ["END"]},
        "toolConfig": {"tools": [{"toolSpec": {"name": "weather", "description": "Tells the weather", "inputSchema": {"json": SCHEMA}}}]},
    }
    if stream:
        content, end, usage = collect(client.converse_stream(**request)["stream"])
    else:
        answer = client.converse(**request)
        content, end, usage = answer["output"]["message"]["content"], answer["stopReason"], answer["usage"]
    uses = [block["toolUse"] for block in content if "toolUse" in block]
    thoughts = [block["reasoningContent"]["reasoningText"] for block in content if "reasoningContent" in block]
    return {
        "text": "".join(block.get("text", "") for block in content),
        "thought": "".join(thought.get("text", "") for thought in thoughts),
        "calls": [(use["toolUseId"], use["name"], use["input"]) for use in uses],
        "end": {"end_turn": "stop", "tool_use": "tool_calls"}.get(end, end),
        "usage": {
            "prompt": usage["inputTokens"] + usage["cacheReadInputTokens"],
            "cached": usage["cacheReadInputTokens"],
            "completion": usage["outputTokens"],
        },
    }


def collect(stream):
    """Content, reason to stop and usage of a stream."""
    content, inputs, end, usage = [], {}, None, None
    for event in stream:
        if "contentBlockStart" in event:
            start = event["contentBlockStart"]
            inputs[start["contentBlockIndex"]] = (start["start"]["toolUse"], [])
        elif "contentBlockDelta" in event:
            index, delta = event["contentBlockDelta"]["contentBlockIndex"], event["contentBlockDelta"]["delta"]
            if "toolUse" in delta:
                inputs[index][1].append(delta["toolUse"]["input"])
            elif "reasoningContent" in delta:
                content.append({"reasoningContent": {"reasoningText": delta["reasoningContent"]}})
            else:
                content.append(delta)
        end = event.get("messageStop", {}).get("stopReason", end)
        usage = event.get("metadata", {}).get("usage", usage)
    content += [{"toolUse": use | {"input": json.loads("".join(parts))}} for use, parts in inputs.values()]
    return content, end, usage
