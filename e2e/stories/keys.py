"""A key is made, used, rotated and taken back; every gateway replica refuses it within a second."""

import time

import openai

from client import PENSTOCK, check, sdk, stream_chat, wait_until
from cluster import command, policy, pool, rule


def run(story):
    def key(*words):
        return command(PENSTOCK, "key", "--namespace", story.namespace, *words).strip()

    story.apply(
        pool("chat"),
        pool("large"),
        policy(
            "default",
            {"name": "gold", "match": {"models": ["chat"], "attributes": {"tier": "gold"}}, "backends": [{"name": "large"}]},
            rule("chat", "chat"),
            rule("other", "chat"),
        ),
    )
    story.wait_ready(("llmbackend", "chat"), ("llmbackend", "large"), ("routingpolicy", "default"))
    url = story.gateway_url()
    wait_until("the gateway's NodePort", lambda: sdk(url).models.list().data, 30)
    check(stream_chat(sdk(url), "chat", "Nobody needs a key yet.", 8)[0], "no answer without a key")

    alice = key("create", "alice", "--team=search", "--model=chat")
    bob = key("create", "bob", "--team=ads", "--attribute=tier=gold")
    story.wait_ready(("virtualkey", "alice"), ("virtualkey", "bob"))
    check(refusal(url, "none") == 401, "a caller without a key is not refused")
    check([model.id for model in sdk(url, key=alice).models.list()] == ["chat"], "a key lists models that are not its own")
    check(refusal(url, alice, "other") == 403, "a key is taken for a model that is not its own")
    for name, text, wanted in (("alice", alice, "chat"), ("bob", bob, "large")):
        backend = stream_chat(sdk(url, key=text), "chat", f"Hello from {name}.", 8)[3].get("x-penstock-backend")
        check(backend == f"{story.namespace}/{wanted}", f"{name} was answered by {backend}")
    table = key("list")
    check("alice" in table and "True" in table and alice not in table, f"penstock key list: {table}")

    # The one before stays good for its overlap.
    second = key("rotate", "alice", "--overlap=2h")
    check(second != alice, "a rotation gave the same key")
    story.wait_ready(("virtualkey", "alice"))
    for text in (alice, second):
        check(refusal(url, text) is None, "a key is refused during its overlap")

    for words, status in ((("revoke", "bob", "--suspend"), 403), (("revoke", "alice"), 401)):
        texts = {"bob": (bob,), "alice": (alice, second)}[words[1]]
        key(*words)
        taken_back = time.monotonic()
        last = taken_back
        # Each call has a connection of its own, so both replicas are asked.
        while time.monotonic() < taken_back + 4.0:
            for text in texts:
                refused = refusal(url, text)
                if refused is None:
                    last = time.monotonic()
                else:
                    check(refused == status, f"{words}: refused with {refused}")
        check(last - taken_back < 1.0, f"{words}: taken for {last - taken_back:.1f} s")


def refusal(url, key, model="chat"):
    """The status with which a call is refused; None if it is answered."""
    client = sdk(url, key=key)
    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello."}], max_tokens=1)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        return error.status_code
    finally:
        client.close()
    return None
