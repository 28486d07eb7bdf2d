//! The decision log tells of a request what `explain` does, and of each attempt.

use penstock_core::config::{Hedge, Need, Protocol};
use serde_json::{Value, json};

use crate::harness::*;

async fn logging(plan: &Plan) -> Gateway {
    keep_decisions();
    let mut settings = settings();
    settings.decision_log_share = 1.0;
    Gateway::start_with(plan, settings).await
}

/// The answer's status, and what the log tells.
async fn decided(gateway: &Gateway, id: &str, body: &str) -> (u16, Value) {
    let header = format!("x-request-id: {id}\r\n");
    let answer = gateway.post_with(&header, body).await;
    (answer.status, decision(id).await)
}

async fn explained(gateway: &Gateway, body: &str) -> Value {
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", body).await;
    serde_json::from_str(&client.answer().await.body).unwrap()
}

/// With a tool, which some lack, and a member that some protocols cannot carry.
const TOOLS: &str = r#"{"model":"chat","seed":7,"tools":[{"type":"function","function":{"name":"f"}}],"messages":[{"role":"user","content":"hi"}]}"#;

/// Two that cannot answer [`TOOLS`], one that fails, one that answers.
fn mixed(failing: &Upstream, answering: &Upstream) -> Plan {
    let (failing, answering) = (failing.address, answering.address);
    Plan::chain(&[nobody(), nobody(), failing, answering])
        .speaking("a", Protocol::Anthropic)
        .profile("b", |profile| {
            profile.capabilities.lacks = [Need::Tools].into();
        })
}

#[tokio::test]
async fn each_attempt_is_told_with_all_candidates_and_why_they_were_left_out() {
    let failing = Upstream::always(|| Reply::Json(503, "{}".to_owned())).await;
    let answering = Upstream::always(|| json_answer("x")).await;
    let mut plan = mixed(&failing, &answering);
    let version = penstock_core::config::ObjectVersion {
        generation: 7,
        hash: String::new(),
    };
    plan.config
        .objects
        .insert("RoutingPolicy/ns/policy".to_owned(), version);
    let gateway = logging(&plan).await;
    let (status, told) = decided(&gateway, "decided-after-failure", TOOLS).await;
    assert_eq!(status, 200);
    assert_eq!(
        (&told["rule"], &told["generation"], &told["strategy"]),
        (&json!("ns/policy/chat"), &json!(7), &json!("LeastRequests"))
    );
    assert_eq!(told["digest"], json!(plan.config.digest().unwrap()));
    let attempts = told["attempts"].as_array().unwrap();
    let of = |member: &str| -> Vec<&Value> { attempts.iter().map(|one| &one[member]).collect() };
    assert_eq!(of("purpose"), ["first", "retry"]);
    let chosen: Vec<_> = of("chosen")
        .iter()
        .map(|chosen| (chosen["backend"].clone(), chosen["pass"].clone()))
        .collect();
    assert_eq!(
        chosen,
        [
            (json!("ns/c"), json!("fresh")),
            (json!("ns/d"), json!("fresh"))
        ]
    );
    for (number, attempt) in attempts.iter().enumerate() {
        let candidates = attempt["candidates"].as_array().unwrap();
        let dropped: Vec<&Value> = candidates.iter().map(|one| &one["dropped"]).collect();
        assert_eq!(
            dropped,
            [
                &json!("its protocol cannot carry 'seed'"),
                &json!("it lacks Tools"),
                &Value::Null,
                &Value::Null
            ]
        );
        let failed = &candidates[2]["endpoints"][0];
        assert_eq!(failed["address"], json!(failing.address.to_string()));
        let tried = [Value::Null, json!("status_5xx")];
        assert_eq!(failed["tried"], tried[number]);
        assert!(failed["cost"].is_number(), "{failed}");
    }
}

#[tokio::test]
async fn the_log_and_explain_tell_the_same_of_the_same_request() {
    let (first, second) = (
        Upstream::always(|| json_answer("x")).await,
        Upstream::always(|| json_answer("x")).await,
    );
    let plan = mixed(&first, &second);
    let bodies = [TOOLS.to_owned(), chat(false), chat(true)];
    for (number, body) in bodies.iter().enumerate() {
        // Averages fade: one that has seen nothing says the same twice.
        let gateway = logging(&plan).await;
        let mut explained = explained(&gateway, body).await;
        let (_, mut told) = decided(&gateway, &format!("explained-{number}"), body).await;
        let mut first = told["attempts"][0].take();
        for member in ["candidates", "chosen"] {
            assert_eq!(explained[member].take(), first[member].take(), "{member}");
        }
        for member in [
            "rule",
            "generation",
            "digest",
            "strategy",
            "stream",
            "promptTokens",
        ] {
            assert_eq!(explained[member], told[member], "{member}");
            assert!(!told[member].is_null(), "{member}");
        }
    }
}

#[tokio::test]
async fn a_hedge_is_told_as_an_attempt_of_its_own() {
    let slow = Upstream::always(|| Reply::Silent).await;
    let quick = Upstream::always(hello).await;
    let plan = Plan::chain(&[slow.address, quick.address]).rule(|rule| {
        rule.hedge = Some(Hedge {
            after_ms: 50,
            extra_percent: 100,
        });
    });
    let gateway = logging(&plan).await;
    let (status, told) = decided(&gateway, "hedged", &chat(true)).await;
    assert_eq!(status, 200);
    let attempts = told["attempts"].as_array().unwrap();
    let chosen = attempts
        .iter()
        .map(|one| (&one["purpose"], &one["chosen"]["backend"]));
    assert_eq!(
        chosen.collect::<Vec<_>>(),
        [
            (&json!("first"), &json!("ns/a")),
            (&json!("hedge"), &json!("ns/b"))
        ]
    );
    let first = &attempts[1]["candidates"][0]["endpoints"][0];
    assert_eq!(
        (&first["tried"], &first["inFlight"]),
        (&json!("slow"), &json!(1))
    );
}

#[tokio::test]
async fn a_request_that_nobody_can_take_is_told_too() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]).profile("a", |profile| {
        profile.capabilities.lacks = [Need::Tools].into();
    });
    let gateway = logging(&plan).await;
    let (status, told) = decided(&gateway, "unfit", TOOLS).await;
    assert_eq!((status, upstream.count()), (400, 0));
    let attempts = told["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 1);
    assert_eq!(
        (&attempts[0]["nowhere"], &attempts[0]["chosen"]),
        (&json!("no candidate can carry the request"), &Value::Null)
    );
    assert_eq!(attempts[0]["candidates"][0]["dropped"], "it lacks Tools");
}

#[tokio::test]
async fn what_is_not_in_the_sample_is_not_told() {
    keep_decisions();
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    gateway
        .post_with("x-request-id: unsampled\r\n", &chat(false))
        .await;
    gateway
        .metric_is("penstock_gateway_in_flight_requests", 0.0)
        .await;
    assert!(!is_told("unsampled"));
}
