"""Google's Gemini API, checked and made with google-genai's own types."""

import base64
import json
from urllib.parse import urlsplit

import pydantic
from google import genai
from google.genai import types

from wires import PICTURE, REFUSAL, SCHEMA, Wire, as_events, as_json, calls_of, scene_of

KEY = "gemini-key"
TEXTS = ["Weather in Bonn?", "Let mé see."]
# Numbers that a float of four bytes holds exactly.
VECTORS = [[1.0, -0.5, 0.25], [0.0, 3.0, -0.125]]
ACTIONS = {":generateContent": "", ":streamGenerateContent": "alt=sse", ":batchEmbedContents": ""}


class Request(pydantic.BaseModel):
    """A request's members, each of the SDK's own type, which refuses what the API does not know."""

    model_config = pydantic.ConfigDict(extra="forbid")

    contents: list[types.Content]
    systemInstruction: types.Content | None = None
    tools: list[types.Tool] | None = None
    toolConfig: types.ToolConfig | None = None
    generationConfig: types.GenerationConfig | None = None


class EmbedRequest(pydantic.BaseModel):
    """One text of a batch. No type of the SDK is one."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str
    content: types.Content
    outputDimensionality: int | None = None


class EmbedRequests(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    requests: list[EmbedRequest]


class Gemini(Wire):
    name = "gemini"

    def external(self, url):
        return {"url": f"{url}/v1beta", "protocol": "Gemini"}, {"key": KEY}

    def answer(self, path, headers, body):
        target = urlsplit(path)
        model, _, action = target.path.removeprefix("/v1beta/models/").partition(":")
        query = ACTIONS.get(f":{action}")
        self.check(path, target.path.startswith("/v1beta/models/") and target.query == query, "no such path")
        self.check(path, headers["x-goog-api-key"] == KEY, "the key did not arrive")
        self.check(path, "authorization" not in headers, "there is an Authorization")
        if action == "batchEmbedContents":
            return self.embed(path, model, body)
        try:
            request = Request.model_validate_json(body)
        except pydantic.ValidationError as err:
            self.check(path, False, err)
            return as_json(400, {"error": {"code": 400, "message": "wrong", "status": "INVALID_ARGUMENT"}})
        scene = scene_of(model)
        if scene == "error":
            return as_json(400, {"error": {"code": 400, "message": REFUSAL, "status": "INVALID_ARGUMENT"}})
        self.check_context(path, body, request.generationConfig and request.generationConfig.max_output_tokens, scene)
        self.check_turns(path, request.contents)
        if query:
            return as_events(events(scene))
        return as_json(200, whole(scene))

    def embed(self, path, model, body):
        try:
            requests = EmbedRequests.model_validate_json(body).requests
        except pydantic.ValidationError as err:
            self.check(path, False, err)
            return as_json(400, {"error": {"code": 400, "message": "wrong", "status": "INVALID_ARGUMENT"}})
        for request in requests:
            self.check(path, request.model == f"models/{model}", f"{request.model} is not the path's")
            self.check(path, request.outputDimensionality == len(VECTORS[0]), "the dimensions did not arrive")
        texts = [request.content.parts[0].text for request in requests]
        self.check(path, texts == TEXTS, f"the texts are {texts}")
        made = types.EmbedContentResponse(embeddings=[types.ContentEmbedding(values=values) for values in VECTORS])
        return as_json(200, json.loads(made.model_dump_json(by_alias=True, exclude_none=True)))

    def check_turns(self, path, contents):
        """Gemini wants the results of tools right behind their calls, by their names."""
        parts = [part for content in contents for part in content.parts]
        calls = [part.function_call for part in parts if part.function_call]
        results = [part.function_response for part in parts if part.function_response]
        told = [(one.id, one.name) for one in calls]
        self.check(path, told == [(one.id, one.name) for one in results], "calls and results differ")
        signed = all(part.thought_signature for part in parts if part.function_call)
        self.check(path, signed, "a call has no signature")


def answer(scene, parts, finish):
    candidate = {"index": 0, "content": {"role": "model", "parts": parts}} | ({"finishReason": finish} if finish else {})
    usage = {"promptTokenCount": 30, "cachedContentTokenCount": 20, "candidatesTokenCount": 3, "thoughtsTokenCount": 2}
    value = {"candidates": [candidate], "modelVersion": scene, "responseId": "r1", "usageMetadata": usage | {"totalTokenCount": 35}}
    if scene == "filtered":
        value = {"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": scene, "usageMetadata": {"promptTokenCount": 30}}
    made = types.GenerateContentResponse.model_validate(value)
    return json.loads(made.model_dump_json(by_alias=True, exclude_none=True))


def call(scene):
    """Of calls made together the first one is signed."""
    functions = [{"id": call, "name": "weather", "args": {"city": city}} for call, city in calls_of(scene)]
    signature = {"thoughtSignature": base64.b64encode(b"signed").decode()}
    return [{"functionCall": function} | ({} if number else signature) for number, function in enumerate(functions)]


def whole(scene):
    parts = [{"text": "hm", "thought": True}, {"text": "Let mé see."}, *call(scene)]
    return answer(scene, parts, "STOP")


def events(scene):
    turns = [[{"text": "hm", "thought": True}], [{"text": "Let mé "}], [{"text": "see."}, *call(scene)]]
    for parts in turns:
        yield f"data: {json.dumps(answer(scene, parts, None))}\r\n\r\n"
    yield f"data: {json.dumps(answer(scene, [{'text': ''}], 'STOP'))}\r\n\r\n"


def ask_vectors(url, model):
    """Google's own SDK before the wire."""
    options = types.HttpOptions(base_url=url, api_version="v1beta", timeout=20_000)
    client = genai.Client(api_key=KEY, http_options=options)
    config = types.EmbedContentConfig(output_dimensionality=len(VECTORS[0]))
    answer = client.models.embed_content(model=model, contents=TEXTS, config=config)
    return [one.values for one in answer.embeddings]


def ask(url, model, stream):
    """Google's own SDK before the wire."""
    options = types.HttpOptions(base_url=url, api_version="v1beta", timeout=20_000)
    client = genai.Client(api_key=KEY, http_options=options)
    signed = b"signed"
    earlier = types.FunctionCall(id="call_0", name="weather", args={"city": "Bonn"})
    result = types.FunctionResponse(id="call_0", name="weather", response={"output": "rain"})
    contents = [
        types.Content(role="user", parts=[types.Part(text="Weather in Bonn?")]),
        types.Content(role="model", parts=[types.Part(function_call=earlier, thought_signature=signed)]),
        types.Content(role="user", parts=[types.Part(function_response=result)]),
        types.Content(role="model", parts=[types.Part(text="Rain.")]),
        types.Content(
            role="user",
            parts=[
                types.Part(text="And here?"),
                types.Part(inline_data=types.Blob(mime_type="image/png", data=base64.b64decode(PICTURE))),
            ],
        ),
    ]
    tool = types.FunctionDeclaration(name="weather", description="Tells the weather", parameters_json_schema=SCHEMA)
    config = types.GenerateContentConfig(
        system_instruction="Be brief.",
        tools=[types.Tool(function_declarations=[tool])],
        max_output_tokens=64,
        stop_sequences=["END"],
    )
    if stream:
        answers = list(client.models.generate_content_stream(model=model, contents=contents, config=config))
    else:
        answers = [client.models.generate_content(model=model, contents=contents, config=config)]
    parts = [part for one in answers for part in one.candidates[0].content.parts]
    calls = [part.function_call for part in parts if part.function_call]
    usage = answers[-1].usage_metadata
    end = answers[-1].candidates[0].finish_reason.name
    return {
        "text": "".join(part.text for part in parts if part.text and not part.thought),
        "thought": "".join(part.text for part in parts if part.text and part.thought),
        "calls": [(one.id, one.name, one.args) for one in calls],
        "end": "tool_calls" if calls and end == "STOP" else end.lower(),
        "usage": {
            "prompt": usage.prompt_token_count,
            "cached": usage.cached_content_token_count,
            "completion": usage.candidates_token_count + usage.thoughts_token_count,
        },
    }
