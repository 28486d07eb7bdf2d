//! What callers took, summed up in the store.

use penstock_core::config::{Hedge, Price};
use penstock_gateway::UsageTarget;
use serde_json::{Value, json};

use crate::harness::*;
use crate::jobs::{Kept, value};

impl Gateway {
    async fn usage(&self) -> Vec<Value> {
        let day = k8s_openapi::jiff::Timestamp::now().to_string();
        let day = &day[..10];
        let told = value(&self.admin_get(&format!("/usage?from={day}&to={day}")).await);
        told["data"].as_array().unwrap().clone()
    }
}

fn priced(upstream: &Upstream) -> Plan {
    let mut plan = Plan::chain(&[upstream.address]);
    for backend in plan.config.backends.values_mut() {
        backend.profile.price = Some(Price {
            input: 1_000_000,
            cached_input: 1_000_000,
            output: 2_000_000,
        });
    }
    plan
}

async fn replicas_sum_up_together(kept: Kept) {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = priced(&upstream);
    let mut gateway = kept.gateway(&plan).await;
    for _ in 0..3 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    let row = json!({
        "team": "", "user": "", "key": "", "model": "chat", "backend": "ns/a", "requests": 3, "estimated": 0,
        "inputTokens": 15, "cachedTokens": 0, "outputTokens": 6, "picoUsd": 27_000_000,
    });
    let told = |mut line: Value| {
        line.as_object_mut().unwrap().remove("day");
        line
    };
    assert_eq!(told(gateway.usage().await.remove(0)), row);
    // A later process goes on with the same sums.
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    gateway.shutdown.cancel();
    gateway.ended().await.unwrap();
    let gateway = kept.gateway(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let lines = gateway.usage().await;
    assert_eq!((lines.len(), &lines[0]["requests"]), (1, &json!(5)));
}

/// A line for each request, with whose it was and what it cost then.
#[tokio::test]
async fn each_request_has_a_line_where_they_are_wanted() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let (kept, folder) = (Kept::file(), tempfile::tempdir().unwrap());
    let mut settings = kept.settings();
    settings.usage_export = Some(UsageTarget::Folder(folder.path().to_owned()));
    let gateway = Gateway::start_with(&priced(&upstream), settings).await;
    for _ in 0..3 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    let read = || {
        let days = std::fs::read_dir(folder.path()).unwrap();
        let objects = days.flat_map(|day| std::fs::read_dir(day.unwrap().path()).unwrap());
        let texts = objects.map(|object| std::fs::read_to_string(object.unwrap().path()).unwrap());
        let lines: Vec<Value> = texts
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect();
        lines
    };
    let mut lines = Vec::new();
    for _ in 0..200 {
        lines = read();
        if lines.len() == 3 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(lines.len(), 3);
    let line = &lines[0];
    assert_eq!(
        (
            &line["backend"],
            &line["inputTokens"],
            &line["picoUsd"],
            &line["status"]
        ),
        (&json!("ns/a"), &json!(5), &json!(9_000_000), &json!(200))
    );
    assert_eq!(line["price"]["output"], 2_000_000);
}

#[tokio::test]
async fn processes_sum_up_together_in_a_file() {
    replicas_sum_up_together(Kept::file()).await;
}

#[tokio::test]
async fn processes_sum_up_together_in_redis() {
    if let Some(kept) = Kept::redis() {
        replicas_sum_up_together(kept).await;
    }
}

#[tokio::test]
async fn what_no_backend_counted_is_estimated_and_refusals_are_nothing() {
    let (steps, reply) = driven();
    let reply = std::sync::Mutex::new(Some(reply));
    let upstream = Upstream::start(move |_, _| {
        let first = reply.lock().unwrap().take();
        first.unwrap_or_else(|| Reply::Json(400, shaped_error("no")))
    })
    .await;
    let kept = Kept::file();
    let gateway = kept.gateway(&priced(&upstream)).await;
    drop(gateway.begun(&steps).await);
    assert_eq!(gateway.post(&chat(false)).await.status, 400);
    let wait = async {
        while gateway.usage().await.is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    within("it is counted", wait).await;
    let lines = gateway.usage().await;
    let counts = ["requests", "estimated", "outputTokens"].map(|name| lines[0][name].as_u64());
    assert_eq!((lines.len(), counts), (1, [Some(1), Some(1), Some(1)]));
    assert!(lines[0]["inputTokens"].as_u64() > Some(0), "{lines:?}");
}

#[tokio::test]
async fn days_that_cannot_be_told_are_refused() {
    let plan = Plan::chain(&[nobody()]);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    for days in [
        "from=2026-01-02&to=2026-01-01",
        "from=2026-01-01&to=2026-12-31",
        "from=x&to=y",
        "",
    ] {
        assert_eq!(
            gateway.admin_get(&format!("/usage?{days}")).await.status,
            400,
            "{days}"
        );
    }
    let gateway = Gateway::start(&plan).await;
    let answer = gateway
        .admin_get("/usage?from=2026-01-01&to=2026-01-01")
        .await;
    assert_eq!(answer.status, 404);
}

/// Who loses a race, or breaks off, has read the prompt all the same.
#[tokio::test]
async fn attempts_without_an_answer_are_summed_up_by_their_prompts() {
    let (silent, quick) = (
        Upstream::always(|| Reply::Silent).await,
        Upstream::always(|| Reply::Sse(vec![role(), word("one"), DONE.to_owned()])).await,
    );
    let mut plan = Plan::chain(&[silent.address, quick.address]);
    plan.config.rules[0].hedge = Some(Hedge {
        after_ms: 50,
        extra_percent: 100,
    });
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert!(answer.body.contains("one"), "{answer:?}");
    let rows = gateway.usage().await;
    let of = |backend: &str| rows.iter().find(|row| row["backend"] == backend).unwrap();
    assert_eq!(
        (&of("ns/a")["requests"], &of("ns/a")["estimated"]),
        (&json!(0), &json!(1))
    );
    assert!(of("ns/a")["inputTokens"].as_u64() > Some(0));
    assert_eq!(
        (&of("ns/a")["outputTokens"], &of("ns/b")["requests"]),
        (&json!(0), &json!(1))
    );
}
