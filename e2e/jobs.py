"""The official openai SDK as a caller who comes back: background responses, files and batches, and what is left of them
after the process was killed."""

import http.server
import json
import tempfile
import threading

import openai
from client import check, wait_until
from openai.types.responses import Response
from up import item, running

TEXT = "Let mé see."
IN_TIME_S = 60


def response(status, text=None):
    """As a backend answers, made with the SDK's own type."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    answer = {
        "id": "resp_backend", "object": "response", "created_at": 1, "model": "text", "status": status,
        "output": [message] if text else [], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "usage": {
            "input_tokens": 30, "output_tokens": 5, "total_tokens": 35,
            "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }
    return Response.model_validate(answer).model_dump(mode="json", exclude_unset=True)


def events():
    """The same as events."""
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    told = [{"type": f"response.{kind}", "response": response("in_progress")} for kind in ("created", "in_progress")]
    told += [place | {"type": "response.output_text.delta", "delta": part} for part in ("Let ", "mé ", "see.")]
    told += [{"type": "response.completed", "response": response("completed", TEXT)}]
    for number, event in enumerate(told):
        yield f"event: {event['type']}\ndata: {json.dumps(event | {'sequence_number': number})}\n\n"


class Backend(http.server.BaseHTTPRequestHandler):
    """Answers `/v1/responses` by a script; the model's last word names the scene."""

    protocol_version = "HTTP/1.1"
    problems = []
    stopping = threading.Event()

    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/responses" or "background" in request:
            self.problems.append(f"{self.path}: {request}")
        scene = request["model"].rpartition("/")[2]
        if scene == "slow":
            return self.stopping.wait(300)
        if scene == "error":
            error = {"message": "no such thing", "type": "invalid_request_error", "code": None, "param": None}
            return self.answer(400, "application/json", json.dumps({"error": error}))
        if request.get("stream"):
            return self.answer(200, "text/event-stream", "".join(events()))
        return self.answer(200, "application/json", json.dumps(response("completed", TEXT)))

    def answer(self, status, kind, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Caller:
    """One client and what it has seen."""

    def __init__(self, url, model):
        self.url, self.model, self.done = f"{url}/v1", model, 0
        self.client = self.with_key("jobs")

    def with_key(self, key):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=IN_TIME_S)

    def is_so(self, condition, message):
        check(condition, message)
        self.done += 1

    def stands(self, retrieve, thing, status):
        def probe():
            found = retrieve(thing.id)
            return found if found.status == status else None

        return wait_until(f"{thing.id} is {status}", probe, IN_TIME_S, 0.05)

    def background(self):
        responses = self.client.responses
        queued = responses.create(model=f"{self.model}/text", input="hi", background=True)
        self.is_so(queued.status == "queued" and queued.background, f"accepted: {queued}")
        done = self.stands(responses.retrieve, queued, "completed")
        self.is_so(done.output_text == TEXT and done.usage.total_tokens == 35, f"answered: {done}")
        try:
            self.with_key("other").responses.retrieve(queued.id)
            self.is_so(False, "somebody else may read the response")
        except openai.NotFoundError:
            self.done += 1
        slow = responses.create(model=f"{self.model}/slow", input="hi", background=True)
        self.stands(responses.retrieve, slow, "in_progress")
        self.is_so(responses.cancel(slow.id).status == "cancelled", "a response can be cancelled")
        responses.delete(slow.id)
        wrong = responses.create(model=f"{self.model}/error", input="hi", background=True)
        failed = self.stands(responses.retrieve, wrong, "failed")
        self.is_so("no such thing" in failed.error.message, f"told what is wrong: {failed}")
        return queued

    def stream(self):
        responses = self.client.responses
        text, last, made = "", None, None
        with responses.create(model=f"{self.model}/text", input="hi", background=True, stream=True) as begun:
            for event in begun:
                made = event.response if event.type == "response.created" else made
                text += event.delta if event.type == "response.output_text.delta" else ""
                last = event.sequence_number
                if text:
                    break
        for event in responses.retrieve(made.id, stream=True, starting_after=last):
            self.is_so(event.sequence_number > last, f"{event.type} came twice")
            last = event.sequence_number
            text += event.delta if event.type == "response.output_text.delta" else ""
        self.is_so(text == TEXT, f"streamed in two parts: {text}")

    def foreground(self):
        """A stream that is no job, read again by its response's id."""
        responses = self.client.responses
        told = list(responses.create(model=f"{self.model}/text", input="hi", stream=True))
        made = next(event.response.id for event in told if event.type == "response.created")
        for last in (-1, 2, 5):
            after = {"starting_after": last} if last >= 0 else {}
            again = list(responses.retrieve(made, stream=True, **after))
            self.is_so(again == told[last + 1 :], f"read again after {last}: {again}")

    def batch(self):
        client = self.client
        scenes = ["text", "error", "text"]
        lines = [
            {
                "custom_id": f"line-{number}", "method": "POST", "url": "/v1/responses",
                "body": {"model": f"{self.model}/{scene}", "input": "hi"},
            }
            for number, scene in enumerate(scenes)
        ]
        content = "\n".join(json.dumps(line) for line in lines).encode()
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        self.is_so(file.bytes == len(content) and file.filename == "in.jsonl", f"uploaded: {file}")
        self.is_so(client.files.content(file.id).read() == content, "a file is read as it was written")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={"night": "1"}
        )
        done = self.stands(client.batches.retrieve, batch, "completed")
        counts = (done.request_counts.total, done.request_counts.completed, done.request_counts.failed)
        self.is_so(counts == (3, 2, 1) and done.metadata == {"night": "1"}, f"batch: {done}")
        output = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        self.is_so([line["custom_id"] for line in output] == ["line-0", "line-2"], f"output: {output}")
        answer = Response.model_validate(output[0]["response"]["body"])
        self.is_so(answer.output_text == TEXT, f"a line's answer: {answer}")
        error = json.loads(client.files.content(done.error_file_id).text)
        self.is_so(error["response"]["status_code"] == 400, f"a line's error: {error}")
        self.is_so([one.id for one in client.batches.list()] == [batch.id], "batches are listed")
        self.is_so(len(list(client.files.list())) == 3, "files are listed")
        bad = client.files.create(file=("bad.jsonl", b"nonsense\n"), purpose="batch")
        batch = client.batches.create(input_file_id=bad.id, endpoint="/v1/responses", completion_window="24h")
        failed = self.stands(client.batches.retrieve, batch, "failed")
        error = failed.errors.data[0]
        self.is_so((error.code, error.line) == ("invalid_json_line", 1), f"a mistake: {failed}")
        self.is_so(client.files.delete(bad.id).deleted, "a file can be deleted")
        return file


def leave(url, model):
    """Everything once. Returns how much was checked, and what is there now."""
    caller = Caller(url, model)
    queued, file = caller.background(), caller.batch()
    caller.stream()
    caller.foreground()
    waiting = caller.client.responses.create(model=f"{model}/slow", input="hi", background=True)
    return caller.done, (queued.id, file.id, waiting.id)


def come_back(url, model, left):
    """The process was killed meanwhile: what was accepted is there, and what was not done is done now."""
    answered, file, waiting = left
    caller = Caller(url, model)
    client = caller.client
    caller.is_so(client.responses.retrieve(answered).output_text == TEXT, "an answer outlives the process")
    caller.is_so(client.files.retrieve(file).id == file, "a file outlives the process")
    again = client.responses.retrieve(waiting)
    caller.is_so(again.status in ("queued", "in_progress"), f"a job outlives the process: {again}")
    client.responses.cancel(waiting)
    return caller.done


def prove():
    """Returns how much was checked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rule = {"name": "any", "match": {"models": ["scripted/*"]}, "backends": [{"name": "scripted"}], "retry": {"attempts": 1}, "resumable": "30s"}
    objects = [
        item("LLMBackend", "scripted", {"external": {"url": f"http://127.0.0.1:{server.server_port}/v1"}}),
        item("RoutingPolicy", "scripted", {"rules": [rule]}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = ("--store", f"file:{folder}/store.redb")
        with running(objects, *store) as (up, url):
            done, left = leave(url, "scripted")
            up.kill()
        with running(objects, *store) as (_, url):
            done += come_back(url, "scripted", left)
    Backend.stopping.set()
    check(not Backend.problems, "calls that no backend would take:\n" + "\n".join(Backend.problems[:5]))
    return done
