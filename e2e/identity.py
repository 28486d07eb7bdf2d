"""Callers with tokens of a real OpenID provider: OpenAI's SDK shows one as its API key. The provider makes new keys when it
starts anew, as it would when it changes them."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import openai

from backend import Backend, free_port, serving
from client import Failed, check, expect, sdk, wait_until
from up import item, running

PROVIDER = os.environ["OPENID_PROVIDER"]
# The example's application, and a person who uses it.
CLIENT, SECRET, CALLBACK = "web", "secret", "http://localhost:9999/auth/callback"
PERSON = {"username": "test-user@localhost", "password": "verysecure"}
# Between two reads of a provider's keys.
COOLDOWN_S = 10.0


@contextlib.contextmanager
def provider(port):
    process = subprocess.Popen([PROVIDER], env={**os.environ, "PORT": str(port)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until("the provider", lambda: token(port), 30, 0.1)
        yield
    finally:
        process.terminate()
        process.wait(10)


class Stay(urllib.request.HTTPRedirectHandler):
    """Says where it is sent, and does not go."""

    def redirect_request(self, *_):
        return None


def sent_to(url, form=None):
    opener = urllib.request.build_opener(Stay)
    try:
        with opener.open(url, form and urllib.parse.urlencode(form).encode(), timeout=5) as answer:
            raise Failed(f"{url}: {answer.status} {answer.read(300)}")
    except urllib.error.HTTPError as error:
        check(error.code in (302, 303), f"{url}: {error.code} {error.read(300)}")
        return urllib.parse.urljoin(url, error.headers["location"])
    except OSError as error:
        raise Failed(f"{url}: {error}") from error


def token(port):
    """The ID token of a person who logs in (OpenID Connect Core 1.0, 3.1), as `kubectl` and the like send it."""
    base = f"http://localhost:{port}"
    with urllib.request.urlopen(f"{base}/.well-known/openid-configuration", timeout=5) as answer:
        known = json.load(answer)
    query = {"client_id": CLIENT, "redirect_uri": CALLBACK, "response_type": "code", "scope": "openid email", "state": "s"}
    login = sent_to(f"{known['authorization_endpoint']}?{urllib.parse.urlencode(query)}")
    number = urllib.parse.parse_qs(urllib.parse.urlparse(login).query)["authRequestID"][0]
    callback = sent_to(f"{base}/login/username", {"id": number, **PERSON})
    code = urllib.parse.parse_qs(urllib.parse.urlparse(sent_to(callback)).query)["code"][0]
    form = urllib.parse.urlencode({"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK}).encode()
    basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
    request = urllib.request.Request(known["token_endpoint"], form, {"authorization": f"Basic {basic}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)["id_token"]


def claims(text):
    part = text.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def objects(upstream, port):
    jwt = {"issuer": f"http://localhost:{port}/", "audiences": [CLIENT], "jwks": {"refresh": "1h"}}
    access = [{"models": ["small-*"]}, {"scopes": ["llm.all"]}]
    match = {"models": ["*"], "team": "search", "user": "id1"}
    rule = {"name": "search", "match": match, "backends": [{"name": "backend"}]}
    return [
        item("LLMBackend", "backend", {"external": {"url": f"{upstream}/v1"}}),
        item("RoutingPolicy", "default", {"rules": [rule]}),
        item("IdentityProvider", "login", {"jwt": jwt, "team": {"value": "search"}, "access": access}),
    ]


def refusal(url, key, model="small-1"):
    """The status and code with which a call is refused; None if it is answered."""
    try:
        sdk(url, key=key).chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello."}])
    except openai.APIStatusError as error:
        return error.status_code, error.code
    return None


def prove(url, port):
    with provider(port):
        good = token(port)
        check(claims(good)["iss"] == f"http://localhost:{port}/", f"the provider's claims: {claims(good)}")
        done = expect(refusal(url, good), None, "a token")
        model, headers = Backend.seen[-1]
        sent = {name.lower() for name in headers}
        done += expect((model, "authorization" in sent), ("small-1", False), "what went upstream")
        done += expect(refusal(url, good, "large"), (403, "model_not_allowed"), "a model that it is not for")
        head, payload, signature = good.split(".")
        forged = {**claims(good), "sub": "somebody"}
        forged = base64.urlsafe_b64encode(json.dumps(forged).encode()).rstrip(b"=").decode()
        done += expect(refusal(url, f"{head}.{forged}.{signature}"), (401, "token_invalid"), "a token with other claims")
        done += expect(refusal(url, "none"), (401, "key_unknown"), "no token")
        read_at = time.monotonic()
    time.sleep(max(0.0, read_at + COOLDOWN_S + 1.0 - time.monotonic()))
    with provider(port):
        done += expect(refusal(url, token(port)), None, "a token under a new key, at once")
        done += expect(refusal(url, good), (401, "token_invalid"), "a token under a key that is gone")
    return done + expect(refusal(url, "none"), (401, "key_unknown"), "the gateway without its provider")


def main():
    port = free_port()
    with serving() as upstream, running(objects(upstream, port)) as (_, url):
        done = prove(url, port)
    print(f"identity: ok={done} failed=0")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"identity: {failed}")
        sys.exit(1)
