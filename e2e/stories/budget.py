"""Two budgets and a key: spent to the limit through two gateways, and not beyond; a key in their store."""

import concurrent.futures
import time

import openai

from client import PENSTOCK, check, sdk, wait_until
from cluster import Skipped, command, policy, pool, rule

REQUESTS, WINDOW_S = 20, 12
TOKEN = "token-of-those-who-manage-keys"


def run(story):
    if not story.cluster.store:
        raise Skipped("PENSTOCK_STORE names no Redis that gateways can reach")
    story.apply(
        pool("chat"),
        policy("default", rule("chat", "chat"), rule("other", "chat")),
        budget(
            "calls",
            {"name": "hour", "unit": "Requests", "max": REQUESTS, "window": {"rolling": "1h"}},
            per="Key",
            selector={"models": ["chat"]},
        ),
        budget(
            "words",
            {"name": "short", "unit": "OutputTokens", "max": 64, "window": {"rolling": f"{WINDOW_S}s"}},
            {"name": "month", "unit": "Tokens", "max": 10**9, "window": {"calendar": "Month", "timeZone": "Europe/Berlin"}},
            selector={"models": ["other"]},
        ),
    )

    def key(*words):
        return command(PENSTOCK, "key", "--namespace", story.namespace, *words).strip()

    alice, bob = key("create", "alice", "--team=search"), key("create", "bob", "--team=search")
    story.wait_ready(("llmbackend", "chat"), ("routingpolicy", "default"), ("tokenbudget", "calls"), ("tokenbudget", "words"))
    story.wait_ready(("virtualkey", "alice"), ("virtualkey", "bob"))
    url = story.gateway_url()
    wait_until("the gateway's NodePort", lambda: sdk(url, key=alice).models.list().data, 30)

    # Each call has a connection of its own, so both replicas have a part in it; far more ask than may.
    with concurrent.futures.ThreadPoolExecutor(16) as pool_of_callers:
        answers = list(pool_of_callers.map(lambda _: call(url, alice, "chat", 4), range(3 * REQUESTS)))
    served = sum(answer is None for answer in answers)
    check(served == REQUESTS, f"{served} of {len(answers)} requests were answered, and {REQUESTS} may be")
    # While some are under way, others may come soon; when all are over, when the window has passed.
    soon = {answer.headers.get("retry-after") for answer in answers if answer is not None}
    check(all(text and 1 <= int(text) <= 3660 for text in soon), f"Retry-After of refusals: {soon}")
    refused = wait_until("a refusal for the rest of the window", lambda: refused_for(call(url, alice, "chat", 4), 3400), 10)
    told = {name: refused.headers.get(name) for name in ("retry-after", "x-ratelimit-limit-requests", "x-penstock-reason")}
    check(told["x-ratelimit-limit-requests"] == str(REQUESTS), f"headers of a refusal: {told}")
    check(told["x-penstock-reason"] == "budget_exceeded", f"headers of a refusal: {told}")
    check(call(url, bob, "chat", 4) is None, "a key is refused for what another one took")

    # What is left bounds the answer; and when the window is over there is all of it again.
    check(call(url, bob, "other", 4096) is None, "an answer was not made as short as what was left")
    # As long as what the last answers took is not told, more may come soon.
    refused = wait_until("the limit is reached", lambda: refused_for(call(url, bob, "other", 4096), 2), 10)
    wait_s = int(refused.headers["retry-after"])
    check(1 <= wait_s <= WINDOW_S + 1, f"Retry-After: {wait_s}")
    check(refused.headers["x-ratelimit-limit-tokens"] == "64", f"headers of a refusal: {refused.headers}")
    time.sleep(wait_s)
    check(call(url, bob, "other", 4096) is None, "the window is over, and a request is refused")

    limits = wait_until("the status tells how the limit stands", lambda: standing(story, f"{story.namespace}/alice"), 90)
    check(limits["spent"] == REQUESTS and limits["remaining"] == 0, f"status: {limits}")

    key("revoke", "alice")
    wait_until("the key is refused", lambda: call(url, alice, "chat", 4, openai.AuthenticationError), 10)
    for _ in range(8):
        check(call(url, alice, "chat", 4, openai.AuthenticationError), "a gateway takes a key that was taken back")
    stored_key(story, url)


def stored_key(story, url):
    """A key in the gateways' store: every replica knows it, counts it, and refuses it when it is taken back."""
    story.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "default-admin"}, "stringData": {"token": TOKEN}})
    admin = story.expose("default-admin", {"penstock.dev/gateway": "default"}, 9090)

    def key(*words, ok=True):
        return command("env", f"PENSTOCK_ADMIN_TOKEN={TOKEN}", PENSTOCK, "key", "--admin", admin, *words, ok=ok)

    # Each question has a connection of its own, so it may come to either replica.
    wait_until("keys can be managed", lambda: all(key("list", ok=False).returncode == 0 for _ in range(6)), 60)
    carol = key("create", "carol", "--team=search").strip()
    answers = [call(url, carol, "chat", 4) for _ in range(REQUESTS + 4)]
    check([answer is None for answer in answers] == [True] * REQUESTS + [False] * 4, "a key in the store has another budget")
    check("carol" in key("list") and carol not in key("list"), "penstock key list does not tell of a key in the store")
    key("revoke", "carol")
    taken_back = time.monotonic()
    last = taken_back
    while time.monotonic() < taken_back + 3.0:
        # As long as it is known, its budget refuses it.
        if call(url, carol, "chat", 4, (openai.AuthenticationError, openai.RateLimitError)).status_code != 401:
            last = time.monotonic()
    check(last - taken_back < 1.0, f"a key that was taken back was good for {last - taken_back:.1f} s")


def refused_for(answer, seconds):
    """The refusal, if it is for so long."""
    return answer if answer is not None and int(answer.headers["retry-after"]) > seconds else None


def budget(name, *limits, **spec):
    return {
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": "TokenBudget",
        "metadata": {"name": name},
        "spec": {**spec, "limits": list(limits)},
    }


def call(url, key, model, tokens, expected=openai.RateLimitError):
    """The answer with which a call is refused; None if it is answered."""
    client = sdk(url, key=key)
    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello."}], max_tokens=tokens)
    except expected as error:
        return error.response
    finally:
        client.close()
    return None


def standing(story, of):
    """How the status of the TokenBudget `calls` says that a key's limit stands."""
    for limit in story.get("tokenbudget", "calls").get("status", {}).get("limits", []):
        if limit.get("of") == of and limit["spent"]:
            return limit
    return None
