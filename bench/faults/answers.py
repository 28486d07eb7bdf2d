"""What a scripted upstream says: the bytes of answers, good ones and bad ones."""

import json

from client import WORDS, word


def chunk(name, delta, finish=None, **more):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": f"{name}-model",
        "system_fingerprint": name, "choices": [choice], **more,
    }  # fmt: skip


def event(value, end="\n", space=" "):
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return f"data:{space}{text}{end}{end}".encode()


def usage(tokens):
    return {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}


def opening(name):
    return event(chunk(name, {"role": "assistant", "content": ""}))


def piece(name, index, pad=0):
    more = {"pad": "x" * pad} if pad else {}
    return event(chunk(name, {"content": word(index)}, **more))


def closing(name, tokens, done=True, with_usage=True):
    last = event(chunk(name, {}, "stop"))
    if with_usage:
        last += event({**chunk(name, {}), "choices": [], "usage": usage(tokens)})
    return last + (event("[DONE]") if done else b"")


def whole(name, tokens):
    message = {"role": "assistant", "content": "".join(word(index) for index in range(tokens))}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": f"{name}-model",
        "system_fingerprint": name, "choices": [choice], "usage": usage(tokens),
    }).encode()  # fmt: skip


def error(status, code=None):
    messages = {
        "context_length_exceeded": "This model's maximum context length is 8192 tokens.",
        "content_policy_violation": "The prompt was rejected by the content filter of this provider.",
        "prefill_rejected": "This model does not accept an assistant message at the end.",
    }
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    body = {"message": messages.get(code, f"upstream says {status}"), "type": kind, "param": None, "code": code}
    return json.dumps({"error": body}).encode()


# Two bytes, three bytes, four bytes in UTF-8.
WIDE = "é漢😀"


def _body(name, transform=lambda data: data, end="\n", space=" ", before=b"", content=word):
    out = [before + opening(name)]
    for index in range(WORDS):
        out.append(transform(event(chunk(name, {"content": content(index)}), end, space)))
    out.append(closing(name, WORDS))
    return out


def crlf(name):
    return [part.replace(b"\n", b"\r\n") for part in _body(name)]


def lone_cr(name):
    return [part.replace(b"\n", b"\r") for part in _body(name)]


def no_space(name):
    return [part.replace(b"data: ", b"data:") for part in _body(name)]


def comments(name):
    return _body(name, transform=lambda data: b": keep-alive\n\n" + data, before=b":\n\n: hello\n\n")


def split_code_points(name):
    """Every piece on the wire is one byte of the events that carry wide characters."""
    parts = _body(name, content=lambda index: word(index) + WIDE)
    head, tail = parts[:5], parts[5:]
    return [head[0], *(bytes([byte]) for part in head[1:] for byte in part), *tail]


def many_in_one(name):
    return [b"".join(_body(name))]


def bad_utf8(name):
    parts = _body(name)
    parts.insert(10, b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xfe\xc3("}}]}\n\n')
    return parts


def error_after_empty(name):
    """Status 200, an event with no choices, then the error as an event, then a clean end."""
    failure = event({"error": {"message": "the model fell over", "type": "server_error", "code": 500}})
    return [event({**chunk(name, {}), "choices": []}), failure, event("[DONE]")]


def error_in_middle(name):
    failure = event({"error": {"message": "the model fell over", "type": "server_error", "code": 500}})
    return [opening(name), *(piece(name, index) for index in range(20)), failure, event("[DONE]")]


def aborted(name):
    """What an engine says that is told to stop: status 200, `finish_reason: abort`, `[DONE]`."""
    parts = [opening(name), *(piece(name, index) for index in range(20))]
    return [*parts, event(chunk(name, {}, "abort")), event("[DONE]")]


def huge_event(name, size=8 << 20):
    parts = [opening(name), piece(name, 0)]
    big = event(chunk(name, {"content": "x" * size}))
    parts += [big[at : at + 65536] for at in range(0, len(big), 65536)]
    return [*parts, closing(name, 2)]


def large_event(name):
    """256 KiB in one event: what embedded tool arguments and log probabilities really reach."""
    return huge_event(name, 256 << 10)


# Enough to tell who keeps it all; a gigabyte would only cost time.
ENDLESS_BYTES = 64 << 20


def endless_event(name):
    """Data lines without the blank line that would end the event, for as long as somebody takes them."""
    yield opening(name) + piece(name, 0)
    line = b"data: " + b"x" * 65529 + b"\n"
    for _ in range(ENDLESS_BYTES // len(line)):
        yield line


def endless_line(name):
    yield opening(name) + piece(name, 0)
    yield b"data: "
    block = b"x" * 65536
    for _ in range(ENDLESS_BYTES // len(block)):
        yield block


def html(_name):
    return [b"<html><body>502 Bad Gateway</body></html>"]


def empty(_name):
    return []


BODIES = {
    body.__name__: body
    for body in (
        crlf, lone_cr, no_space, comments, split_code_points, many_in_one, bad_utf8, error_after_empty,
        error_in_middle, aborted, huge_event, large_event, endless_event, endless_line, html, empty,
    )
}  # fmt: skip
