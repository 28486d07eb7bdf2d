"""Bad objects are refused, or a condition says what to change; everything else goes on serving."""

from client import check, sdk, stream_chat, wait_until
from cluster import backend, policy, pool, rule


def run(story):
    story.apply(pool("chat"), policy("default", rule("chat", "chat")))
    story.wait_ready(("llmbackend", "chat"), ("routingpolicy", "default"))
    client = sdk(story.gateway_url())
    wait_until("the gateway's NodePort", lambda: client.models.list().data, 30)

    refused_at_once(story)
    shown_in_conditions(story)

    text = stream_chat(client, "chat", "Still there?", 8)[0]
    check(text, "the good rule no longer answers")
    check(story.condition("routingpolicy", "default", "Ready").get("status") == "True", "the good policy lost Ready")


def refused_at_once(story):
    cases = [
        (policy("nothing"), "spec.rules"),
        (policy("empty", {}), "name"),
        (policy("no-backends", rule("x")), "backends"),
        (pool("hot", scaling={"maxReplicas": 2, "kvCacheUtilizationPercent": 150}), "kvCacheUtilizationPercent"),
        (pool("slow", scaling={"maxReplicas": 2, "ttftP90": "half a second"}), "ttftP90"),
        (pool("never", scaling={"maxReplicas": 2, "ttftP90": "0s"}), "ttftP90 must be above 0s"),
        (pool("turned", scaling={"minReplicas": 3, "maxReplicas": 2}), "minReplicas must not be above maxReplicas"),
        (pool("both", replicas=2, scaling={"maxReplicas": 2}), "set replicas or scaling, not both"),
        (backend("none"), "set exactly one of pool, service and external"),
        (
            backend("two", service={"name": "a", "port": 80}, external={"url": "https://a.example/v1"}),
            "set exactly one of pool, service and external",
        ),
    ]
    for obj, word in cases:
        said = story.refused(obj)
        check(word in said, f"{obj['metadata']['name']}: the refusal does not name `{word}`: {said}")


def shown_in_conditions(story):
    story.apply(
        policy("dangling", rule("lost", "nowhere")),
        policy("shadowed", rule("chat", "chat")),
        backend("mirror", service={"name": "default-gateway", "port": 80}),
        backend("absent", service={"name": "no-such-service", "port": 80}),
    )
    expected = [
        ("routingpolicy", "dangling", "ResolvedRefs", "BackendNotFound", "nowhere"),
        ("routingpolicy", "shadowed", "Accepted", "UnreachableRule", "chat"),
        ("llmbackend", "mirror", "Accepted", "RoutingLoop", "default-gateway"),
        ("llmbackend", "absent", "ResolvedRefs", "ServiceNotFound", "no-such-service"),
    ]
    for kind, name, condition, reason, word in expected:
        found = story.wait_condition(kind, name, condition, "False", timeout_s=30)
        check(found["reason"] == reason, f"{kind} {name}: {condition} is {found['reason']}: {found['message']}")
        check(word in found["message"], f"{kind} {name}: the message does not say `{word}`: {found['message']}")
