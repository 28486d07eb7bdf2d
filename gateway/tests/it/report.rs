//! What the gateway says about itself: `/load`, `/config`, `/metrics`, `/v1/models`.

use penstock_core::config::NameMatch;
use penstock_core::load::{BackendLoad, LoadReport};

use crate::harness::*;

pub(crate) async fn listen(gateway: &Gateway) -> Client {
    let mut client = Client::connect(gateway.admin).await;
    client.send("GET /load HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let (status, headers) = client.head().await;
    assert_eq!(
        (status, headers["content-type"].as_str()),
        (200, "application/x-ndjson")
    );
    client
}

pub(crate) async fn next_report(client: &mut Client) -> LoadReport {
    let line = client.chunk().await.unwrap().expect("a line");
    assert!(line.ends_with('\n'));
    serde_json::from_str(&line).unwrap()
}

/// The first report that fits.
pub(crate) async fn report_where(
    client: &mut Client,
    what: &str,
    fits: impl Fn(&BackendLoad) -> bool,
) -> LoadReport {
    within(what, async {
        loop {
            let report = next_report(client).await;
            if report.backends.get(&id("a")).is_some_and(&fits) {
                return report;
            }
        }
    })
    .await
}

#[tokio::test]
async fn load_shows_a_request_from_its_arrival_to_its_end() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut lines = listen(&gateway).await;
    let first = next_report(&mut lines).await;
    assert_eq!(first.gateway, "replica-0");
    assert!(first.backends.values().all(|load| load.arrivals == 0));

    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    let report = report_where(&mut lines, "arrival", |load| load.arrivals == 1).await;
    let load = &report.backends[&id("a")];
    assert_eq!((load.in_flight, load.waiting, load.held), (1, 1, 0));
    assert_eq!(load.prompt_tokens, chat(true).len() as u64 / 4);
    assert_eq!(load.waiting_ages_ms.len(), 1);
    assert_eq!((load.ttft.count(), load.itl.count()), (0, 0));

    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    client.head().await;
    client.expect(&word("one")).await;
    steps.send(Step::Chunk(word("two"))).unwrap();
    client.expect(&word("two")).await;
    let report = report_where(&mut lines, "tokens", |load| load.itl.count() > 0).await;
    let load = &report.backends[&id("a")];
    assert_eq!((load.in_flight, load.waiting), (1, 0));
    assert_eq!((load.ttft.count(), load.itl.count()), (1, 1));

    finish(&mut client, &steps).await;
    let report = report_where(&mut lines, "the end", |load| load.in_flight == 0).await;
    let load = &report.backends[&id("a")];
    assert_eq!((load.arrivals, load.ttft.count()), (1, 1));
}

#[tokio::test]
async fn new_demand_is_told_at_once() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut lines = listen(&gateway).await;
    // A busy machine may be late now and then; without the push every line comes a second after the last.
    let prompt = async {
        loop {
            let before = next_report(&mut lines).await;
            let arrivals = before
                .backends
                .get(&id("a"))
                .map_or(0, |load| load.arrivals);
            let mut client = gateway.client().await;
            client.post("", &chat(true)).await;
            let after = report_where(&mut lines, "demand", |load| load.arrivals > arrivals).await;
            if after.at_ms - before.at_ms < 700 {
                return;
            }
            drop(client);
            report_where(&mut lines, "no demand", |load| load.in_flight == 0).await;
        }
    };
    within("a line that did not wait for its second", prompt).await;
}

#[tokio::test]
async fn load_listeners_are_bounded() {
    let gateway = Gateway::start(&Plan::new()).await;
    let mut listeners = Vec::new();
    for _ in 0..16 {
        listeners.push(listen(&gateway).await);
    }
    assert_eq!(gateway.admin_get("/load").await.status, 503);
    listeners.pop();
    within("the place of a listener that left is free", async {
        loop {
            let mut client = Client::connect(gateway.admin).await;
            client.send("GET /load HTTP/1.1\r\nhost: x\r\n\r\n").await;
            if client.head().await.0 == 200 {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn callers_who_come_before_the_first_config_wait_for_it() {
    let upstream = Upstream::always(hello).await;
    let gateway = Gateway::empty(settings()).await;
    let plan = Plan::chain(&[upstream.address]);
    let request = chat(false);
    let early = gateway.post(&request);
    let (answer, ()) = tokio::join!(early, gateway.apply(&plan));
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn config_says_what_is_in_force() {
    let gateway = Gateway::empty(settings()).await;
    assert_eq!(gateway.admin_get("/config").await.status, 503);
    assert_eq!(gateway.admin_get("/readyz").await.status, 503);
    assert_eq!(gateway.admin_get("/healthz").await.status, 200);
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "not_configured")
    );

    let plan = Plan::chain(&[nobody()]);
    gateway.apply(&plan).await;
    assert_eq!(gateway.admin_get("/readyz").await.status, 200);
    let answer = gateway.admin_get("/config").await;
    let value: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    let digest = plan.config.digest().unwrap();
    assert_eq!(value["digest"], digest.as_str());
    let config: penstock_core::config::GatewayConfig =
        serde_json::from_value(value["config"].clone()).unwrap();
    assert_eq!(config.digest().unwrap(), digest);
    assert!(gateway.metrics().await.contains(&format!(
        "penstock_gateway_config_info{{digest=\"{digest}\"}} 1"
    )));
}

#[tokio::test]
async fn models_are_listed() {
    let gateway = Gateway::start(&Plan::chain(&[nobody()])).await;
    let mut client = gateway.client().await;
    client
        .send("GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.body,
        "{\"data\":[{\"created\":0,\"id\":\"chat\",\"object\":\"model\",\"owned_by\":\"penstock\"}],\"object\":\"list\"}"
    );
    client
        .send("GET /v1/models HTTP/1.1\r\nhost: x\r\nanthropic-version: 2023-06-01\r\n\r\n")
        .await;
    let listed: serde_json::Value = serde_json::from_str(&client.answer().await.body).unwrap();
    assert_eq!(
        (&listed["data"][0]["type"], &listed["last_id"]),
        (&"model".into(), &"chat".into())
    );
}

#[tokio::test]
async fn one_model_is_told_of_or_not_there() {
    let mut plan = Plan::chain(&[nobody()]);
    let names = ["chat", "org/chat v1"].map(|name| NameMatch::Exact(name.to_owned()));
    plan.config.rules[0].models = names.into();
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    for (path, headers, id) in [
        ("chat", "", Some("chat")),
        ("org%2Fchat%20v1", "", Some("org/chat v1")),
        ("org/chat%20v1", "", Some("org/chat v1")),
        ("chat", "anthropic-version: 2023-06-01\r\n", Some("chat")),
        ("other", "", None),
        ("chat/", "", None),
    ] {
        let head = format!("GET /v1/models/{path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        client.send(&head).await;
        let answer = client.answer().await;
        let told: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        if let Some(id) = id {
            assert_eq!((answer.status, &told["id"]), (200, &id.into()), "{path}");
        } else {
            assert_eq!(
                (answer.status, answer.code().as_str()),
                (404, "model_not_found")
            );
            assert!(told["error"]["message"].is_string());
        }
    }
}

#[tokio::test]
async fn metrics_follow_the_genai_conventions() {
    let upstream = Upstream::start(|number, _| {
        if number == 0 {
            hello()
        } else {
            json_answer("x")
        }
    })
    .await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    gateway.post(&chat(true)).await;
    gateway.post(&chat(false)).await;
    let labels = "gen_ai_operation_name=\"chat\",rule=\"ns/policy/chat\",backend=\"ns/a\"";
    let tokens = "gen_ai_operation_name=\"chat\",gen_ai_token_type=\"output\",rule=\"ns/policy/chat\",backend=\"ns/a\"";
    let expected = [
        (
            format!("gen_ai_server_request_duration_seconds_count{{{labels}}}"),
            2.0,
        ),
        (
            format!("gen_ai_server_time_to_first_token_seconds_count{{{labels}}}"),
            1.0,
        ),
        (
            format!("gen_ai_server_time_per_output_token_seconds_count{{{labels}}}"),
            1.0,
        ),
        (format!("gen_ai_client_token_usage_sum{{{tokens}}}"), 2.0),
        ("penstock_gateway_in_flight_requests".to_owned(), 0.0),
    ];
    for (series, value) in expected {
        gateway.metric_is(&series, value).await;
    }
}

#[tokio::test]
async fn a_request_is_explained_without_being_sent() {
    let upstream = Upstream::always(hello).await;
    let plan = Plan::chain(&[upstream.address, upstream.address])
        .speaking("a", penstock_core::config::Protocol::Anthropic);
    let gateway = Gateway::start(&plan).await;
    let explain = async |path: &str, body: &str| {
        let mut client = Client::connect(gateway.admin).await;
        client
            .post_to(&format!("/explain?path={path}"), "", body)
            .await;
        client.answer().await
    };
    let seeded =
        r#"{"model":"chat","seed":7,"stream":true,"messages":[{"role":"user","content":"Hi"}]}"#;
    let answer = explain("/v1/chat/completions", seeded).await;
    let told: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(told["rule"], "ns/policy/chat");
    assert_eq!(told["chosen"]["backend"], "ns/b");
    let dropped = told["candidates"][0]["dropped"].as_str().unwrap();
    assert_eq!(dropped, "its protocol cannot carry 'seed'");
    assert_eq!(told["candidates"][1]["endpoints"][0]["standing"], "good");
    assert_eq!(
        explain("/v1/chat/completions", "{}").await.code(),
        "missing_model"
    );
    assert_eq!(
        explain("/v1/nothing", seeded).await.code(),
        "path_not_found"
    );
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_caller_who_asks_is_told_how_it_was_decided() {
    let busy = Upstream::always(|| Reply::Json(503, "{}".to_owned())).await;
    let working = Upstream::always(hello).await;
    let gateway = Gateway::start(&Plan::chain(&[busy.address, working.address])).await;
    let silent = gateway.post(&chat(true)).await;
    assert_eq!(silent.header("x-penstock-decision"), "");
    let answer = gateway
        .post_with("x-penstock-explain: 1\r\n", &chat(true))
        .await;
    assert_eq!(answer.header("x-penstock-attempts"), "2");
    let decision = answer.header("x-penstock-decision");
    assert_eq!(
        decision,
        "LeastRequests tier 1 fresh; after ns/a status_5xx"
    );
}
