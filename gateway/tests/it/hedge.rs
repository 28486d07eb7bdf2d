//! A second attempt beside one whose first token is slow to come.

use penstock_core::config::Hedge;

use crate::harness::*;

fn hedged(plan: Plan, extra_percent: u32) -> Plan {
    plan.rule(|rule| {
        let after_ms = 100;
        rule.hedge = Some(Hedge {
            after_ms,
            extra_percent,
        });
    })
}

fn answering() -> Reply {
    Reply::Sse(vec![role(), word("b"), DONE.to_owned()])
}

async fn results(gateway: &Gateway, result: &str) -> bool {
    let series = format!("penstock_gateway_hedges_total{{result=\"{result}\"}} 1");
    gateway.metrics().await.contains(&series)
}

/// Requests in flight at the second candidate's endpoint.
async fn in_flight_at_second(gateway: &Gateway) -> u64 {
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &chat(true)).await;
    let told: serde_json::Value = serde_json::from_str(&client.answer().await.body).unwrap();
    told["candidates"][1]["endpoints"][0]["inFlight"]
        .as_u64()
        .unwrap()
}

#[tokio::test]
async fn a_slow_first_token_is_overtaken_and_the_slow_one_is_ended() {
    let slow = Upstream::always(|| Reply::Silent).await;
    let quick = Upstream::always(answering).await;
    let plan = hedged(Plan::chain(&[slow.address, quick.address]), 100);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/b")
    );
    assert_eq!(answer.body, [role(), word("b"), DONE.to_owned()].concat());
    until("the slow connection is closed", || slow.gone() == 1).await;
    assert!(results(&gateway, "won").await);
}

#[tokio::test]
async fn the_first_attempt_may_still_win() {
    let (steps, reply) = driven();
    let first = Upstream::replies(vec![reply]).await;
    let second = Upstream::always(|| Reply::Silent).await;
    let plan = hedged(Plan::chain(&[first.address, second.address]), 100);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("the hedge is under way", || second.count() == 1).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    assert_eq!(client.head().await.1["x-penstock-backend"], "ns/a");
    client.expect(&word("one")).await;
    until("the hedge is ended", || second.gone() == 1).await;
    assert!(results(&gateway, "lost").await);
}

#[tokio::test]
async fn when_one_of_the_two_fails_the_other_is_waited_for() {
    let (steps, reply) = driven();
    let first = Upstream::replies(vec![reply]).await;
    let second = Upstream::always(|| Reply::Json(500, "{}".to_owned())).await;
    let plan = hedged(Plan::chain(&[first.address, second.address]), 100);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("the hedge is under way", || second.count() == 1).await;
    within("the hedge has failed", async {
        while in_flight_at_second(&gateway).await != 0 {}
    })
    .await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    assert_eq!(client.head().await.1["x-penstock-backend"], "ns/a");
    assert!(results(&gateway, "failed").await);
}

#[tokio::test]
async fn hedges_cost_no_more_than_their_share() {
    let slow = Upstream::always(|| Reply::Silent).await;
    let quick = Upstream::always(answering).await;
    let plan = hedged(Plan::chain(&[slow.address, quick.address]), 50)
        .rule(|rule| rule.timeouts.first_token_ms = 300);
    let gateway = Gateway::start(&plan).await;
    // Half of its own prompt is not enough for the first request; it goes on when the limit of the first token passes.
    assert_eq!(gateway.post(&chat(true)).await.status, 200);
    assert!(
        !gateway
            .metrics()
            .await
            .contains("penstock_gateway_hedges_total{")
    );
    assert_eq!((slow.count(), quick.count()), (1, 1));
}

#[tokio::test]
async fn what_is_not_streamed_is_not_asked_for_twice() {
    let slow =
        Upstream::always(|| Reply::Late(std::time::Duration::from_millis(300), completion("x")))
            .await;
    let quick = Upstream::always(answering).await;
    let plan = hedged(Plan::chain(&[slow.address, quick.address]), 100);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!(quick.count(), 0);
}
