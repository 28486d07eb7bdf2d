//! What callers may take: reserved before it is sent, settled by what backends counted, over all gateways together.

use std::time::Duration;

use penstock_core::config::{Budget, Enforcement, Limit, Per, Price, Selects, Unit, Window};
use penstock_gateway::store::Spec;
use serde_json::{Value, json};

use crate::harness::*;
use crate::jobs::{Kept, value};

/// What [`completion`] says that it took.
const TOOK: u64 = 7;

fn limit(name: &str, unit: Unit, max: u64) -> Limit {
    let window = (unit != Unit::Concurrency).then_some(Window::SlidingMs(3_600_000));
    Limit {
        name: name.to_owned(),
        unit,
        max,
        window,
    }
}

fn budget(limits: &[Limit]) -> Budget {
    Budget {
        selects: Selects::default(),
        per: Per::Budget,
        limits: limits.to_vec(),
        enforcement: Enforcement::Hard,
        max_output_tokens: 64,
        unpriced_micro_usd: None,
        cache_hit_percent: 0,
        is_broken: false,
    }
}

fn with(mut plan: Plan, name: &str, budget: Budget) -> Plan {
    plan.config.budgets.insert(id(name), budget);
    plan
}

fn requests(plan: Plan, max: u64) -> Plan {
    with(plan, "b", budget(&[limit("hour", Unit::Requests, max)]))
}

fn bounded(max_tokens: u64) -> String {
    json!({"model": "chat", "max_tokens": max_tokens, "messages": [{"role": "user", "content": "hi"}]}).to_string()
}

impl Gateway {
    async fn standings(&self) -> Vec<Value> {
        let told = value(&self.admin_get("/budgets").await);
        told["data"].as_array().unwrap().clone()
    }

    /// Waits until the store knows of so much that was spent, and nothing that is reserved.
    async fn spent(&self, spent: u64) {
        let wait = async {
            loop {
                let standings = self.standings().await;
                if standings.iter().any(|of| of["spent"] == spent) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = tokio::time::timeout(SOON, wait).await.is_ok();
        assert!(in_time, "{:?}", self.standings().await);
    }
}

async fn a_limit_is_shared_by_gateways(kept: &[Spec]) {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = requests(Plan::chain(&[upstream.address]), 5);
    let mut gateways = Vec::new();
    for spec in kept {
        let mut settings = settings();
        settings.store = Some(spec.clone());
        gateways.push(Gateway::start_with(&plan, settings).await);
    }
    let mut statuses = Vec::new();
    for number in 0..8 {
        let gateway = &gateways[number % gateways.len()];
        statuses.push(gateway.post(&bounded(8)).await.status);
    }
    assert_eq!(statuses, [200, 200, 200, 200, 200, 429, 429, 429]);
    assert_eq!(upstream.count(), 5);
    let refused = gateways[0].post(&bounded(8)).await;
    assert_eq!(refused.code(), "budget_exceeded");
    assert!(
        refused.body.contains("'b/hour' has 0 of 5 requests left"),
        "{}",
        refused.body
    );
    for (header, text) in [
        ("x-ratelimit-limit-requests", "5"),
        ("x-ratelimit-remaining-requests", "0"),
    ] {
        assert_eq!(refused.header(header), text);
    }
    // A part of the window counts until all of it is over.
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((3_500..=3_660).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn a_limit_holds_with_a_file() {
    let kept = Kept::file();
    a_limit_is_shared_by_gateways(&[kept.settings().store.unwrap()]).await;
}

#[tokio::test]
async fn a_limit_holds_for_two_gateways_with_one_redis() {
    let Some(kept) = Kept::redis() else { return };
    let spec = kept.settings().store.unwrap();
    a_limit_is_shared_by_gateways(&[spec.clone(), spec]).await;
}

#[tokio::test]
async fn a_limit_holds_for_two_gateways_with_one_cluster() {
    let Some(kept) = Kept::cluster() else { return };
    let spec = kept.settings().store.unwrap();
    a_limit_is_shared_by_gateways(&[spec.clone(), spec]).await;
}

#[tokio::test]
async fn what_an_answer_takes_is_settled_by_what_its_backend_counts() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let tokens = budget(&[limit("hour", Unit::Tokens, 10_000)]);
    let plan = with(Plan::chain(&[upstream.address]), "b", tokens);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    for _ in 0..10 {
        assert_eq!(gateway.post(&bounded(50)).await.status, 200);
    }
    gateway.spent(10 * TOOK).await;
}

#[tokio::test]
async fn how_its_budgets_stand_is_explained_of_a_request() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let plan = requests(Plan::chain(&[upstream.address]), 5);
    let gateway = kept.gateway(&plan).await;
    assert_eq!(gateway.post(&bounded(8)).await.status, 200);
    gateway.spent(1).await;
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &bounded(8)).await;
    let told = value(&client.answer().await);
    let limit = &told["budgets"][0];
    assert_eq!(
        (&limit["limit"], &limit["remaining"]),
        (&json!("hour"), &json!(4))
    );
}

#[tokio::test]
async fn an_answer_without_a_bound_gets_the_budgets() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let tokens = budget(&[limit("hour", Unit::Tokens, 10_000)]);
    let plan = with(Plan::chain(&[upstream.address]), "b", tokens);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let sent: Value = serde_json::from_str(&upstream.requests()[0].body).unwrap();
    assert_eq!(sent["max_completion_tokens"], 64);
    // Whose own is shorter keeps it.
    assert_eq!(gateway.post(&bounded(9)).await.status, 200);
    let sent: Value = serde_json::from_str(&upstream.requests()[1].body).unwrap();
    assert_eq!(
        (&sent["max_tokens"], &sent["max_completion_tokens"]),
        (&json!(9), &Value::Null)
    );
}

#[tokio::test]
async fn an_answer_is_as_long_as_what_is_left_allows() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let answers = budget(&[
        limit("day", Unit::OutputTokens, 1_000),
        limit("hour", Unit::OutputTokens, 100),
    ]);
    let plan = with(Plan::chain(&[upstream.address]), "b", answers);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    // An answer takes two, and two may lie idle.
    for (wanted, sent) in [(5_000, 100), (5_000, 96), (50, 50)] {
        assert_eq!(gateway.post(&bounded(wanted)).await.status, 200);
        let request = upstream.requests().pop().unwrap();
        let body: Value = serde_json::from_str(&request.body).unwrap();
        assert_eq!(body["max_tokens"], sent);
    }
}

#[tokio::test]
async fn an_answer_that_was_made_shorter_is_refused_with_the_time_when_it_may_come() {
    let upstream =
        Upstream::always(|| Reply::Json(200, completion("x").replace(":2}", ":90}"))).await;
    let answers = budget(&[limit("hour", Unit::OutputTokens, 100)]);
    let plan = with(Plan::chain(&[upstream.address]), "b", answers);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    assert_eq!(gateway.post(&bounded(5_000)).await.status, 200);
    let refused = gateway.post(&bounded(5_000)).await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (429, "budget_exceeded")
    );
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((3_500..=3_660).contains(&seconds), "{seconds}");
    assert_eq!(refused.header("x-ratelimit-remaining-tokens"), "8");
}

#[tokio::test]
async fn what_has_no_bound_is_refused_where_a_limit_is_hard() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let tokens = budget(&[limit("hour", Unit::Tokens, 10_000)]);
    let plan = with(Plan::chain(&[upstream.address]), "b", tokens);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    let body = r#"{"model":"chat","input":"x","max_output_tokens":5,"previous_response_id":"r"}"#;
    let answer = gateway.call("POST", "/v1/responses", "", body).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (400, "budget_unbounded")
    );
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_request_goes_to_a_backend_for_which_there_is_enough() {
    let dear = Upstream::always(|| json_answer("dear")).await;
    let cheap = Upstream::always(|| json_answer("cheap")).await;
    let mut plan = with(
        Plan::chain(&[dear.address, cheap.address]),
        "b",
        budget(&[limit("hour", Unit::MicroUsd, 2_000)]),
    );
    for (name, usd) in [("a", 100_000_000), ("b", 1_000)] {
        let backend = plan.config.backends.get_mut(&id(name)).unwrap();
        backend.profile.price = Some(Price {
            input: usd,
            cached_input: usd,
            output: usd,
        });
    }
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    // 100 USD a million tokens, and more than 20 of them may be taken.
    let answer = gateway.post(&bounded(20)).await;
    assert_eq!((answer.status, dear.count(), cheap.count()), (200, 0, 1));
    // Without a price it does not go anywhere.
    for backend in plan.config.backends.values_mut() {
        backend.profile.price = None;
    }
    gateway.apply(&plan).await;
    let refused = gateway.post(&bounded(20)).await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (403, "budget_unpriced")
    );
}

#[tokio::test]
async fn so_many_are_answered_at_one_time_and_no_more() {
    let (steps, reply) = driven();
    let reply = std::sync::Mutex::new(Some(reply));
    let upstream = Upstream::start(move |_, _| {
        let first = reply.lock().unwrap().take();
        first.unwrap_or_else(|| json_answer("x"))
    })
    .await;
    let one = budget(&[limit("at-once", Unit::Concurrency, 1)]);
    let plan = with(Plan::chain(&[upstream.address]), "b", one);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    let mut client = gateway.begun(&steps).await;
    let refused = gateway.post(&chat(false)).await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (429, "budget_exceeded")
    );
    assert_eq!(refused.header("retry-after"), "1");
    finish(&mut client, &steps).await;
    drop(client);
    let wait = async {
        while gateway.post(&chat(false)).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within("the place is free", wait).await;
}

#[tokio::test]
async fn attempts_that_fail_cost_nothing_and_callers_who_leave_pay_what_came() {
    let (steps, reply) = driven();
    let reply = std::sync::Mutex::new(Some(reply));
    let failing = Upstream::always(|| Reply::Json(500, shaped_error("no"))).await;
    let upstream = Upstream::start(move |_, _| {
        let first = reply.lock().unwrap().take();
        first.unwrap_or_else(|| json_answer("x"))
    })
    .await;
    let answers = budget(&[limit("hour", Unit::OutputTokens, 10_000)]);
    let plan = with(
        Plan::chain(&[failing.address, upstream.address]),
        "b",
        answers,
    );
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    let client = gateway.begun(&steps).await;
    drop(client);
    // One word came; the attempt before cost nothing.
    gateway.spent(1).await;
    assert_eq!(failing.count(), 1);
}

#[tokio::test]
async fn soft_limits_refuse_late_and_shadows_never() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    for (enforcement, last) in [(Enforcement::Soft, 429), (Enforcement::Shadow, 200)] {
        let mut some = budget(&[limit("hour", Unit::Requests, 2)]);
        some.enforcement = enforcement;
        let plan = with(Plan::chain(&[upstream.address]), "b", some);
        let kept = Kept::file();
        let gateway = kept.gateway(&plan).await;
        for _ in 0..2 {
            assert_eq!(gateway.post(&chat(false)).await.status, 200);
        }
        assert_eq!(
            gateway.post(&chat(false)).await.status,
            last,
            "{enforcement:?}"
        );
        if enforcement == Enforcement::Shadow {
            // What is beyond is counted all the same.
            gateway.spent(3).await;
            let text = gateway.metrics().await;
            let line = r#"penstock_gateway_budget_attempts_total{budget="ns/b",limit="hour",result="exceeded"} 1"#;
            assert!(text.contains(line), "{text}");
        }
    }
}

#[tokio::test]
async fn a_soft_limit_expects_answers_to_be_as_long_as_its_rules_are() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut some = budget(&[limit("hour", Unit::OutputTokens, 320)]);
    some.enforcement = Enforcement::Soft;
    let plan = with(Plan::chain(&[upstream.address]), "b", some);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    // Each takes 2. As long as nothing is known, 211 are expected: so the last of them would find too little left.
    for _ in 0..100 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
}

#[tokio::test]
async fn without_a_store_hard_limits_let_nothing_through() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = requests(Plan::chain(&[upstream.address]), 5);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "budget_unavailable")
    );
    assert_eq!(gateway.applied().rejected, ["TokenBudget/ns/b"]);
    let mut soft = plan.clone();
    soft.config.budgets.get_mut(&id("b")).unwrap().enforcement = Enforcement::Soft;
    gateway.apply(&soft).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
}

#[tokio::test]
async fn a_hard_budget_with_a_mistake_lets_nothing_through() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let broken = Budget {
        is_broken: true,
        ..budget(&[])
    };
    let plan = with(Plan::chain(&[upstream.address]), "b", broken);
    let gateway = kept.gateway(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "budget_broken")
    );
    assert!(answer.body.contains("'b'"), "{}", answer.body);
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_store_that_may_forget_lets_nothing_through_either() {
    let no_log = [("appendonly", "no"), ("maxmemory", "0")];
    let evicting = [("maxmemory", "100mb"), ("maxmemory-policy", "volatile-lru")];
    for set in [no_log, evicting] {
        let Some(kept) = Kept::redis() else { return };
        if let Kept::Redis(server) = &kept {
            for (name, value) in set {
                server.set(name, value);
            }
        }
        let upstream = Upstream::always(|| json_answer("x")).await;
        let plan = requests(Plan::chain(&[upstream.address]), 1_000);
        let gateway = kept.gateway(&plan).await;
        for _ in 0..10 {
            let answer = gateway.post(&chat(false)).await;
            assert_eq!(
                (answer.status, answer.code().as_str()),
                (503, "budget_not_durable"),
                "{set:?}"
            );
        }
        assert_eq!(upstream.count(), 0);
    }
}

#[tokio::test]
async fn a_store_that_dies_stops_hard_limits_and_forgets_nothing() {
    let Some(Kept::Redis(mut server)) = Kept::redis() else {
        return;
    };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = requests(Plan::chain(&[upstream.address]), 3);
    let mut settings = settings();
    settings.store = Some(server.url().parse().unwrap());
    let gateway = Gateway::start_with(&plan, settings).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    gateway.spent(1).await;
    server.kill();
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "budget_unavailable")
    );
    server.restart();
    let mut answered = 0;
    let wait = async {
        loop {
            match gateway.post(&chat(false)).await.status {
                200 => answered += 1,
                429 => break,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait)
        .await
        .unwrap();
    assert_eq!((answered, upstream.count()), (2, 3));
}

#[tokio::test]
async fn what_a_gateway_has_left_over_is_given_back_at_its_end() {
    let Some(kept) = Kept::redis() else { return };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = requests(Plan::chain(&[upstream.address]), 100);
    let mut first = kept.gateway(&plan).await;
    assert_eq!(first.post(&chat(false)).await.status, 200);
    first.shutdown.cancel();
    first.ended().await.unwrap();
    let second = kept.gateway(&plan).await;
    assert_eq!(second.post(&chat(false)).await.status, 200);
    second.spent(2).await;
    let standings = second.standings().await;
    assert_eq!(standings[0]["estimated"], 0);
    // One that lies idle, of 2 %; the other one's are back.
    assert!(
        standings[0]["reserved"].as_u64().unwrap() <= 2,
        "{standings:?}"
    );
}

#[tokio::test]
async fn stored_answers_count_as_much_as_is_said() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut some = budget(&[
        limit("requests", Unit::Requests, 2),
        limit("tokens", Unit::Tokens, 1_000_000),
    ]);
    let plan = |budget: &Budget| {
        let plan = with(Plan::chain(&[upstream.address]), "b", budget.clone());
        plan.cached(60_000)
    };
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&some)).await;
    for _ in 0..5 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(upstream.count(), 1, "the others cost nothing");
    some.cache_hit_percent = 50;
    gateway.apply(&plan(&some)).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    // Half of seven.
    gateway.spent(TOOK + 4).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 429);
}

/// All at one time, spread over gateways.
async fn of_five_hundred_ten_are_answered(kept: &[Spec]) {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = requests(Plan::chain(&[upstream.address]), 10);
    let mut gateways = Vec::new();
    for spec in kept {
        let mut settings = settings();
        settings.store = Some(spec.clone());
        gateways.push(Gateway::start_with(&plan, settings).await);
    }
    let body = bounded(8);
    let posts = (0..500).map(|number| gateways[number % gateways.len()].post(&body));
    let answers = futures::future::join_all(posts).await;
    let count = |status| {
        answers
            .iter()
            .filter(|answer| answer.status == status)
            .count()
    };
    assert_eq!((count(200), count(429), upstream.count()), (10, 490, 10));
}

#[tokio::test]
async fn of_five_hundred_requests_at_once_a_gateway_answers_ten() {
    let kept = Kept::file();
    of_five_hundred_ten_are_answered(&[kept.settings().store.unwrap()]).await;
}

#[tokio::test]
async fn of_five_hundred_requests_at_once_three_gateways_answer_ten() {
    let Some(kept) = Kept::redis() else { return };
    let spec = kept.settings().store.unwrap();
    of_five_hundred_ten_are_answered(&[spec.clone(), spec.clone(), spec]).await;
}
