//! New configs, endpoints and credentials while requests run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use penstock_core::config::{NameMatch, Target};
use penstock_gateway::source::{Credential, Credentials};

use crate::harness::*;
use crate::report::{listen, report_where};

#[tokio::test]
async fn a_stream_outlives_the_config_that_it_began_under() {
    let (steps, reply) = driven();
    let old = Upstream::replies(vec![reply]).await;
    let new = Upstream::always(hello).await;
    let gateway = Gateway::start(&Plan::chain(&[old.address])).await;
    let mut client = gateway.begun(&steps).await;

    let mut plan = Plan::new().backend("b", &[new.address], 1, 0);
    plan.config.rules[0].name = "other".to_owned();
    gateway.apply(&plan).await;
    assert_eq!(
        gateway.post(&chat(true)).await.header("x-penstock-backend"),
        "ns/b"
    );

    steps.send(Step::Chunk(word("two"))).unwrap();
    client.expect(&word("two")).await;
    finish(&mut client, &steps).await;
    assert_eq!((old.count(), old.gone()), (1, 0));
}

#[tokio::test]
async fn endpoints_that_leave_get_no_new_request_and_keep_their_streams() {
    let (steps, reply) = driven();
    let reply = std::sync::Mutex::new(Some(reply));
    let old = Upstream::start(move |_, _| {
        reply
            .lock()
            .unwrap()
            .take()
            .unwrap_or_else(|| json_answer("old"))
    })
    .await;
    let new = Upstream::always(|| json_answer("new")).await;
    let mut plan = Plan::chain(&[old.address]);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.begun(&steps).await;
    plan.set_endpoints("a", &[new.address]);
    gateway
        .publisher
        .endpoints
        .send_replace(Arc::new(plan.endpoints.clone()));
    within("the new endpoint answers", async {
        while gateway.post(&chat(false)).await.body != completion("new") {}
    })
    .await;
    let before = old.count();
    for _ in 0..5 {
        assert_eq!(gateway.post(&chat(false)).await.body, completion("new"));
    }
    assert_eq!(old.count(), before);
    finish(&mut client, &steps).await;
}

#[tokio::test]
async fn a_request_without_a_ready_endpoint_is_held_until_there_is_one() {
    let upstream = Upstream::always(|| json_answer("late")).await;
    let mut plan = Plan::chain(&[nobody()]);
    plan.set_endpoints("a", &[]);
    let gateway = Gateway::start(&plan).await;
    let mut lines = listen(&gateway).await;
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    let report = report_where(&mut lines, "held", |load| load.held == 1).await;
    let load = &report.backends[&id("a")];
    assert_eq!((load.waiting, load.arrivals), (1, 1));
    plan.set_endpoints("a", &[upstream.address]);
    gateway.apply(&plan).await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.body), (200, completion("late")));
    let report = report_where(&mut lines, "the end", |load| load.in_flight == 0).await;
    let load = &report.backends[&id("a")];
    assert_eq!((load.held, load.arrivals), (0, 1), "counted once");
}

#[tokio::test]
async fn nobody_waits_for_endpoints_that_were_ready_and_are_gone() {
    let upstream = Upstream::always(|| json_answer("early")).await;
    let mut plan = Plan::chain(&[upstream.address]);
    let mut settings = settings();
    settings.hold = Duration::from_mins(10);
    let gateway = Gateway::start_with(&plan, settings).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    plan.set_endpoints("a", &[]);
    gateway.apply(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (
            answer.status,
            answer.code().as_str(),
            answer.header("retry-after")
        ),
        (503, "no_endpoint", "5")
    );
}

#[tokio::test]
async fn pods_that_may_have_been_put_to_sleep_are_waited_for() {
    let upstream = Upstream::always(|| json_answer("awake")).await;
    let mut plan = Plan::chain(&[upstream.address]);
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    if let Target::Endpoints { may_sleep, .. } = &mut backend.target {
        *may_sleep = true;
    }
    let gateway = Gateway::start(&plan).await;
    plan.set_endpoints("a", &[]);
    gateway.apply(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    gateway
        .metric_is("penstock_gateway_held_requests", 1.0)
        .await;
    plan.set_endpoints("a", &[upstream.address]);
    gateway.apply(&plan).await;
    assert_eq!(client.answer().await.body, completion("awake"));
}

#[tokio::test]
async fn holding_is_bounded_in_time_and_number() {
    let mut plan = Plan::chain(&[nobody()]);
    plan.set_endpoints("a", &[]);
    let mut settings = settings();
    settings.hold = Duration::from_secs(1);
    settings.limits.held = 1;
    let gateway = Gateway::start_with(&plan, settings).await;
    let mut first = gateway.client().await;
    first.post("", &chat(true)).await;
    gateway
        .metric_is("penstock_gateway_held_requests", 1.0)
        .await;
    let second = gateway.post(&chat(true)).await;
    assert_eq!(
        (
            second.status,
            second.code().as_str(),
            second.header("retry-after")
        ),
        (503, "no_endpoint", "5")
    );
    let answer = first.answer().await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "no_endpoint")
    );
}

#[tokio::test]
async fn other_candidates_come_before_holding() {
    let second = Upstream::always(|| json_answer("second")).await;
    let mut plan = Plan::chain(&[nobody(), second.address]);
    plan.set_endpoints("a", &[]);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(
        gateway
            .post(&chat(false))
            .await
            .header("x-penstock-backend"),
        "ns/b"
    );
}

const CANARY: &str = "sk-canary-5f1d";

fn canary() -> Credentials {
    // Secrets made from files end in a line feed.
    let value = Credential::new(format!("{CANARY}\n"));
    Credentials {
        values: BTreeMap::from([("ns.s.k".to_owned(), value)]),
    }
}

#[tokio::test]
async fn a_credential_goes_upstream_once_it_has_arrived() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]).credential("a", "ns.s.k");
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "credential_missing")
    );
    gateway.set_credentials(canary());
    within("the credential is in use", async {
        while gateway
            .post_with("authorization: Bearer caller\r\n", &chat(false))
            .await
            .status
            != 200
        {}
    })
    .await;
    let sent = &upstream.requests()[0].headers["authorization"];
    assert_eq!(sent, &format!("Bearer {CANARY}"));
}

#[tokio::test]
async fn other_candidates_come_before_one_without_its_credential() {
    let first = Upstream::always(|| json_answer("x")).await;
    let second = Upstream::always(hello).await;
    let plan = Plan::chain(&[first.address, second.address]).credential("a", "ns.s.k");
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(answer.header("x-penstock-backend"), "ns/b");
    assert_eq!(first.count(), 0);
}

#[tokio::test]
async fn no_credential_shows_in_any_answer_or_report() {
    // A backend that says what it was sent, in all the ways in which backends refuse.
    let upstream = Upstream::start(|number, received| {
        let sent = received.headers["authorization"].clone();
        match number {
            0 => Reply::Json(401, shaped_error(&format!("bad key {sent}"))),
            1 => Reply::Json(403, sent),
            2 => Reply::Json(400, sent),
            3 => Reply::Json(429, sent),
            4 | 5 => Reply::Json(500, sent),
            // A connection that was used before is replaced without counting an attempt.
            6..=8 => Reply::Raw(sent),
            _ => json_answer("x"),
        }
    })
    .await;
    let plan = Plan::chain(&[upstream.address])
        .credential("a", "ns.s.k")
        .rule(|rule| rule.retry.attempts = 2);
    let gateway = Gateway::empty(settings()).await;
    gateway.set_credentials(canary());
    gateway.apply(&plan).await;
    let caller = "authorization: Bearer sk-canary-caller\r\nx-api-key: sk-canary-caller\r\ncookie: sk-canary-caller\r\n";
    let mut shown = Vec::new();
    for expected in [502, 502, 400, 429, 502, 503, 200] {
        let answer = gateway.post_with(caller, &chat(false)).await;
        assert_eq!(answer.status, expected, "{}", answer.body);
        shown.push(format!("{answer:?}"));
    }
    assert_eq!(upstream.count(), 10);
    for body in ["{", "{}", "{\"model\":\"nope\"}"] {
        shown.push(format!("{:?}", gateway.post_with(caller, body).await));
    }
    shown.push(gateway.admin_get("/config").await.body);
    shown.push(gateway.metrics().await);
    let mut lines = listen(&gateway).await;
    let report = report_where(&mut lines, "requests", |load| load.arrivals > 0).await;
    shown.push(serde_json::to_string(&report).unwrap());
    shown.push(format!("{:?}", gateway.publisher));
    for text in &shown {
        assert!(!text.contains("canary"), "{text}");
    }
    let sent = format!("{:?}", upstream.requests());
    assert!(sent.contains(CANARY) && !sent.contains("canary-caller"));
}

#[tokio::test]
async fn a_backend_that_cannot_be_used_keeps_its_last_good_form_and_the_rest_is_applied() {
    let kept = Upstream::always(|| json_answer("kept")).await;
    let other = Upstream::always(|| json_answer("other")).await;
    let good = Plan::new().url("a", &format!("http://{}/v1", kept.address));
    let gateway = Gateway::start(&good).await;
    assert_eq!(gateway.applied().rejected, [""; 0]);

    let mut broken = good.clone();
    broken.config.backends.get_mut(&id("a")).unwrap().target = Target::Url("ftp://x".to_owned());
    let other_rule = Plan::new()
        .backend("b", &[other.address], 1, 0)
        .rule(|rule| {
            rule.name = "other".to_owned();
            rule.models = vec![NameMatch::Exact("other".to_owned())];
        });
    broken.config.backends.extend(other_rule.config.backends);
    broken.config.rules.extend(other_rule.config.rules);
    broken.endpoints = other_rule.endpoints;
    gateway.apply(&broken).await;
    assert_eq!(gateway.applied().digest, broken.config.digest().unwrap());
    assert_eq!(gateway.applied().rejected, ["LLMBackend/ns/a"]);
    assert_eq!(gateway.post(&chat(false)).await.body, completion("kept"));
    assert_eq!(
        gateway.post("{\"model\":\"other\"}").await.body,
        completion("other")
    );
    let shown = gateway.admin_get("/config").await.body;
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["rejected"][0], "LLMBackend/ns/a");

    gateway.apply(&good).await;
    assert_eq!(gateway.applied().rejected, [""; 0]);
    assert_eq!(gateway.post("{\"model\":\"other\"}").await.status, 404);
}

#[tokio::test]
async fn a_rule_that_names_what_is_not_there_keeps_its_last_good_form() {
    let kept = Upstream::always(|| json_answer("kept")).await;
    let good = Plan::chain(&[kept.address]);
    let gateway = Gateway::start(&good).await;
    let mut broken = good.clone();
    broken.config.rules[0].backends[0].backend = id("gone");
    gateway.apply(&broken).await;
    assert_eq!(gateway.applied().rejected, ["RoutingPolicy/ns/policy"]);
    assert_eq!(gateway.post(&chat(false)).await.body, completion("kept"));
    let mut broken = good.clone().cached(1000);
    broken.config.caches.clear();
    gateway.apply(&broken).await;
    assert_eq!(gateway.applied().rejected, ["RoutingPolicy/ns/policy"]);
    assert_eq!(gateway.post(&chat(false)).await.body, completion("kept"));
    gateway.apply(&good).await;
    assert_eq!(gateway.applied().rejected, [""; 0]);
}

#[tokio::test]
async fn every_request_is_answered_while_configs_change_all_the_time() {
    let old = Upstream::always(|| json_answer("x")).await;
    let new = Upstream::always(|| json_answer("x")).await;
    let plans = [old.address, new.address].map(|address| Plan::chain(&[address]));
    let plans = plans.map(|plan| {
        let address = plan.endpoints.services[&service("a")][0].address;
        let mut plan = plan;
        plan.config.rules[0].name = address.to_string();
        plan
    });
    let gateway = Gateway::start(&plans[0]).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let address = gateway.address;
        callers.spawn(async move {
            let mut client = Client::connect(address).await;
            for _ in 0..50 {
                client.post("", &chat(false)).await;
                let answer = client.answer().await;
                assert_eq!(
                    (answer.status, answer.complete),
                    (200, true),
                    "{}",
                    answer.body
                );
            }
        });
    }
    let mut number = 0;
    while !callers.is_empty() {
        number += 1;
        gateway.apply(&plans[number % 2]).await;
        while let Some(ended) = callers.try_join_next() {
            ended.unwrap();
        }
    }
    assert_eq!(old.count() + new.count(), 200);
}
