//! Work that outlives its connection: background responses, files, batches; before both kinds of stores.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use penstock_gateway::Settings;
use penstock_gateway::store::{Spec, Target};
use serde_json::{Value, json};

use crate::harness::*;

/// Where a test's gateways keep their jobs.
pub(crate) enum Kept {
    File(tempfile::TempDir),
    Redis(Server),
    Cluster(Cluster),
}

impl Kept {
    pub(crate) fn file() -> Self {
        Self::File(tempfile::tempdir().unwrap())
    }

    pub(crate) fn redis() -> Option<Self> {
        Server::start().map(Self::Redis)
    }

    pub(crate) fn cluster() -> Option<Self> {
        Cluster::start().map(Self::Cluster)
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut settings = settings();
        settings.store = Some(match self {
            Self::File(folder) => Spec::new(Target::File(folder.path().join("store.redb"))),
            Self::Redis(server) => server.url().parse().unwrap(),
            Self::Cluster(cluster) => cluster.url().parse().unwrap(),
        });
        settings
    }

    pub(crate) async fn gateway(&self, plan: &Plan) -> Gateway {
        Gateway::start_with(plan, self.settings()).await
    }
}

pub(crate) fn plan(upstream: &Upstream) -> Plan {
    Plan::new().backend("a", &[upstream.address], 1, 0)
}

impl Gateway {
    pub(crate) async fn call(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let mut client = self.client().await;
        let length = body.len();
        client
            .send(&format!(
                "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
            ))
            .await;
        client.answer().await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, "", "").await
    }

    pub(crate) async fn background(&self, headers: &str, more: &str) -> Value {
        let body = format!("{{\"model\":\"chat\",\"input\":\"hi\",\"background\":true{more}}}");
        let answer = self.call("POST", "/v1/responses", headers, &body).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        value(&answer)
    }

    /// Polls until a response or batch stands so.
    pub(crate) async fn stands(&self, path: &str, status: &str) -> Value {
        self.stands_for("", path, status).await
    }

    /// The same for whoever sends these headers.
    pub(crate) async fn stands_for(&self, headers: &str, path: &str, status: &str) -> Value {
        let mut last = Value::Null;
        let wait = async {
            while last["status"] != status {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                last = value(&self.call("GET", path, headers, "").await);
            }
        };
        let in_time = tokio::time::timeout(SOON, wait).await.is_ok();
        assert!(in_time, "{path} is not {status}: {last}");
        last
    }

    pub(crate) async fn upload(&self, headers: &str, content: &str) -> Answer {
        let mut client = self.client().await;
        let body = format!(
            "--X\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--X\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\nContent-Type: application/octet-stream\r\n\r\n{content}\r\n--X--\r\n"
        );
        let length = body.len();
        client
            .send(&format!(
                "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=X\r\n{headers}content-length: {length}\r\n\r\n"
            ))
            .await;
        client.send(&body).await;
        client.answer().await
    }

    pub(crate) async fn batch(&self, lines: &str) -> Value {
        let file = value(&self.upload("", lines).await);
        let body = json!({
            "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"night": "1"},
        });
        let answer = self
            .call("POST", "/v1/batches", "", &body.to_string())
            .await;
        assert_eq!(answer.status, 202, "{answer:?}");
        value(&answer)
    }

    pub(crate) async fn lines(&self, file: &Value) -> Vec<Value> {
        let path = format!("/v1/files/{}/content", file.as_str().unwrap());
        let answer = self.get(&path).await;
        assert_eq!((answer.status, answer.complete), (200, true), "{answer:?}");
        let lines = answer.body.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

pub(crate) fn value(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{answer:?}"))
}

pub(crate) fn path(object: &Value) -> String {
    format!("/v1/responses/{}", object["id"].as_str().unwrap())
}

pub(crate) fn batch_path(object: &Value) -> String {
    format!("/v1/batches/{}", object["id"].as_str().unwrap())
}

/// An answer to `POST /v1/responses`.
pub(crate) fn responded(text: &str) -> Reply {
    let body = json!({
        "id": "resp_backend", "object": "response", "status": "completed", "model": "chat",
        "output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}],
        "usage": {"input_tokens": 5, "output_tokens": 2},
    });
    Reply::Json(200, body.to_string())
}

pub(crate) fn event(kind: &str, members: &Value) -> String {
    let mut event = json!({"type": kind, "sequence_number": 0});
    event
        .as_object_mut()
        .unwrap()
        .extend(members.as_object().unwrap().clone());
    format!("event: {kind}\ndata: {event}\n\n")
}

pub(crate) fn delta(text: &str) -> String {
    event("response.output_text.delta", &json!({"delta": text}))
}

pub(crate) fn started() -> String {
    let response = json!({"id": "resp_backend", "status": "in_progress"});
    event("response.created", &json!({"response": response}))
        + &event("response.in_progress", &json!({"response": response}))
}

pub(crate) fn completed() -> String {
    let response = json!({"id": "resp_backend", "status": "completed", "output": []});
    event("response.completed", &json!({"response": response}))
}

/// Types and numbers of events.
pub(crate) fn told(text: &str) -> Vec<(String, u64)> {
    text.split("\n\n")
        .filter_map(|event| event.lines().find_map(|line| line.strip_prefix("data: ")))
        .map(|data| {
            let event: Value = serde_json::from_str(data).unwrap();
            let kind = event["type"].as_str().unwrap().to_owned();
            (kind, event["sequence_number"].as_u64().unwrap())
        })
        .collect()
}

pub(crate) fn line(custom_id: &str, text: &str) -> String {
    let body = json!({"model": "chat", "messages": [{"role": "user", "content": text}]});
    let line = json!({
        "custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body,
    });
    format!("{line}\n")
}

#[tokio::test]
async fn without_a_store_nothing_is_kept_and_callers_are_told() {
    let upstream = Upstream::always(|| responded("x")).await;
    let gateway = Gateway::start(&plan(&upstream)).await;
    for (method, path, body) in [
        ("GET", "/v1/files", ""),
        ("GET", "/v1/responses/resp_1", ""),
        (
            "POST",
            "/v1/responses",
            "{\"model\":\"chat\",\"input\":\"hi\",\"background\":true}",
        ),
    ] {
        let answer = gateway.call(method, path, "", body).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (501, "no_store"),
            "{path}"
        );
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_background_response_is_accepted_run_and_read() {
    let kept = [Some(Kept::file()), Kept::redis(), Kept::cluster()];
    for kept in kept.into_iter().flatten() {
        is_accepted_run_and_read(kept).await;
    }
}

async fn is_accepted_run_and_read(kept: Kept) {
    let upstream = Upstream::always(|| responded("done")).await;
    let gateway = kept.gateway(&plan(&upstream)).await;
    let accepted = gateway
        .background("x-team: red\r\n", ",\"instructions\":\"be brief\"")
        .await;
    assert_eq!(accepted["status"], "queued");
    assert_eq!(accepted["instructions"], "be brief");
    let done = gateway.stands(&path(&accepted), "completed").await;
    assert_eq!(done["id"], accepted["id"]);
    assert_eq!(done["background"], true);
    assert_eq!(done["output"][0]["content"][0]["text"], "done");
    let asked = &upstream.requests()[0];
    assert!(!asked.body.contains("background"), "{}", asked.body);
    assert_eq!(asked.headers["x-team"], "red");
    assert_eq!(
        asked.headers["x-request-id"],
        accepted["id"].as_str().unwrap()
    );
    gateway
        .metric_is(
            "penstock_gateway_jobs_ended_total{kind=\"response\",result=\"completed\"}",
            1.0,
        )
        .await;
    let deleted = gateway.call("DELETE", &path(&accepted), "", "").await;
    assert_eq!(value(&deleted)["deleted"], true);
    assert_eq!(gateway.get(&path(&accepted)).await.status, 404);
}

#[tokio::test]
async fn jobs_are_their_callers_own() {
    let upstream = Upstream::always(|| responded("x")).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    let (alice, bob) = ("authorization: Bearer a\r\n", "authorization: Bearer b\r\n");
    let job = gateway.background(alice, "").await;
    let file = value(&gateway.upload(alice, &line("1", "x")).await);
    let file_path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    for path in [&path(&job), &file_path, &format!("{file_path}/content")] {
        for headers in [bob, ""] {
            let answer = gateway.call("GET", path, headers, "").await;
            assert_eq!(
                (answer.status, answer.code().as_str()),
                (404, "not_found"),
                "{path}"
            );
        }
        assert_eq!(
            gateway.call("GET", path, alice, "").await.status,
            200,
            "{path}"
        );
    }
    let listed =
        async |headers| value(&gateway.call("GET", "/v1/files", headers, "").await)["data"].clone();
    assert_eq!(listed(bob).await, json!([]));
    assert_eq!(listed(alice).await[0]["id"], file["id"]);
    let stolen = json!({
        "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
    });
    let answer = gateway
        .call("POST", "/v1/batches", bob, &stolen.to_string())
        .await;
    assert_eq!(answer.status, 404, "{answer:?}");
}

#[tokio::test]
async fn a_cancelled_response_aborts_its_call() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    let job = gateway.background("", "").await;
    until("the call is made", || upstream.count() == 1).await;
    let cancel = format!("{}/cancel", path(&job));
    let cancelled = value(&gateway.call("POST", &cancel, "", "").await);
    assert_eq!(cancelled["status"], "cancelled");
    until("the call is aborted", || upstream.gone() == 1).await;
    assert_eq!(
        value(&gateway.get(&path(&job)).await)["status"],
        "cancelled"
    );
    let again = value(&gateway.call("POST", &cancel, "", "").await);
    assert_eq!(
        again["status"], "cancelled",
        "cancelling twice is no mistake"
    );
}

#[tokio::test]
async fn failures_are_tried_again_and_refusals_are_told() {
    let broken =
        Upstream::replies(vec![Reply::Json(500, "{}".to_owned()), responded("second")]).await;
    let kept = Kept::file();
    let once = plan(&broken).rule(|rule| rule.retry.attempts = 1);
    let gateway = kept.gateway(&once).await;
    let job = gateway.background("", "").await;
    let done = gateway.stands(&path(&job), "completed").await;
    assert_eq!(done["output"][0]["content"][0]["text"], "second");
    let refusing = Upstream::always(|| Reply::Json(400, shaped_error("no such thing"))).await;
    gateway.apply(&plan(&refusing)).await;
    let job = gateway.background("", "").await;
    let failed = gateway.stands(&path(&job), "failed").await;
    assert_eq!(failed["error"]["message"], "no such thing");
    assert_eq!(refusing.count(), 1);
}

#[tokio::test]
async fn a_background_stream_is_read_again_from_any_event() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    let mut client = gateway.client().await;
    let body = "{\"model\":\"chat\",\"input\":\"hi\",\"background\":true,\"stream\":true}";
    client.post_to("/v1/responses", "", body).await;
    let (status, headers) = client.head().await;
    assert_eq!(
        (status, headers["content-type"].as_str()),
        (202, "text/event-stream")
    );
    let opening = client.chunk().await.unwrap().unwrap();
    let kinds = told(&opening);
    assert_eq!(kinds[0], ("response.created".to_owned(), 0));
    assert_eq!(kinds[1], ("response.queued".to_owned(), 1));
    let data = opening
        .lines()
        .find_map(|line| line.strip_prefix("data: "))
        .unwrap();
    let created: Value = serde_json::from_str(data).unwrap();
    let path = path(&created["response"]);
    // The caller leaves; the call goes on.
    drop(client);
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(started())).unwrap();
    for text in ["a", "b", "c"] {
        steps.send(Step::Chunk(delta(text))).unwrap();
    }
    let mut client = gateway.client().await;
    let resume = format!("GET {path}?stream=true&starting_after=1 HTTP/1.1\r\nhost: x\r\n\r\n");
    client.send(&resume).await;
    assert_eq!(client.head().await.0, 200);
    let mut seen = String::new();
    while told(&seen).len() < 4 {
        seen.push_str(&client.chunk().await.unwrap().unwrap());
    }
    steps.send(Step::Chunk(completed())).unwrap();
    steps.send(Step::End).unwrap();
    while let Ok(Some(more)) = client.chunk().await {
        seen.push_str(&more);
    }
    let kinds: Vec<String> = told(&seen).into_iter().map(|(kind, _)| kind).collect();
    let deltas = ["response.output_text.delta"; 3];
    assert_eq!(kinds[0], "response.in_progress");
    assert_eq!(kinds[1..4], deltas);
    assert_eq!(kinds[4..], ["response.completed"]);
    let numbers: Vec<u64> = told(&seen).into_iter().map(|(_, number)| number).collect();
    assert_eq!(numbers, [2, 3, 4, 5, 6]);
    assert!(!seen.contains("resp_backend"), "{seen}");
    let rest = gateway
        .get(&format!("{path}?stream=true&starting_after=4"))
        .await;
    assert!(rest.complete);
    let kinds: Vec<u64> = told(&rest.body)
        .into_iter()
        .map(|(_, number)| number)
        .collect();
    assert_eq!(kinds, [5, 6]);
    assert_eq!(gateway.stands(&path, "completed").await["background"], true);
}

#[tokio::test]
async fn jobs_wait_while_callers_keep_the_pool_busy() {
    let upstream = Upstream::start(|_, request| match request.line.split_once(' ').unwrap() {
        ("GET", _) => Reply::Json(404, String::new()),
        (_, target) if target.starts_with("/v1/responses") => responded("job"),
        _ => Reply::Silent,
    })
    .await;
    let kept = Kept::file();
    let mut settings = kept.settings();
    settings.jobs.busy_at = 1;
    let gateway = Gateway::start_with(&plan(&upstream), settings).await;
    let mut caller = gateway.client().await;
    caller.post("", &chat(false)).await;
    until("the caller is served", || upstream.count() == 1).await;
    let job = gateway.background("", "").await;
    // Several looks of the runner.
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert_eq!(value(&gateway.get(&path(&job)).await)["status"], "queued");
    let sent = upstream.requests();
    let sent = sent.iter().filter(|one| one.line.starts_with("POST "));
    assert_eq!(sent.count(), 1);
    drop(caller);
    gateway.stands(&path(&job), "completed").await;
}

#[tokio::test]
async fn jobs_wait_while_other_gateways_keep_the_pool_busy() {
    let upstream = Upstream::always(|| responded("job")).await;
    upstream.tell(500, 0.9);
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    assert_eq!(upstream.page_reads(), 0, "not before there are jobs");
    let first = gateway.background("", "").await;
    gateway.stands(&path(&first), "completed").await;
    // The first one is taken in by then.
    until("the page is read", || upstream.page_reads() > 1).await;
    let job = gateway.background("", "").await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert_eq!(value(&gateway.get(&path(&job)).await)["status"], "queued");
    assert_eq!(upstream.count(), 1);
    upstream.tell(2, 0.1);
    gateway.stands(&path(&job), "completed").await;
}

#[tokio::test]
async fn a_stopping_gateway_gives_its_jobs_back_and_the_next_one_runs_them() {
    let first = Upstream::always(|| Reply::Silent).await;
    let second = Upstream::always(|| responded("after")).await;
    let kept = Kept::file();
    let mut gateway = kept.gateway(&plan(&first)).await;
    let job = gateway.background("", "").await;
    until("the call is made", || first.count() == 1).await;
    gateway.shutdown.cancel();
    gateway.ended().await.unwrap();
    until("the call is aborted", || first.gone() == 1).await;
    let next = kept.gateway(&plan(&second)).await;
    let done = next.stands(&path(&job), "completed").await;
    assert_eq!(done["output"][0]["content"][0]["text"], "after");
}

#[tokio::test]
async fn a_replica_takes_over_what_a_dead_one_had_and_any_replica_tells() {
    let Some(kept) = Kept::redis() else { return };
    let asked = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::start({
        let asked = Arc::clone(&asked);
        move |_, _| match asked.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::Silent,
            _ => responded("second"),
        }
    })
    .await;
    let first = kept.gateway(&plan(&upstream)).await;
    let job = first.background("", "").await;
    until("the call is made", || asked.load(Ordering::SeqCst) == 1).await;
    // As a process that is killed: nothing is given back.
    drop(first);
    let second = kept.gateway(&plan(&upstream)).await;
    let wait = async {
        while value(&second.get(&path(&job)).await)["status"] != "completed" {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let in_time = tokio::time::timeout(SOON * 3, wait).await;
    assert!(in_time.is_ok(), "the lease of a dead replica ends");
    let third = kept.gateway(&plan(&upstream)).await;
    let told = value(&third.get(&path(&job)).await);
    assert_eq!(told["output"][0]["content"][0]["text"], "second");
    assert_eq!(asked.load(Ordering::SeqCst), 2, "whole, and once");
}

#[tokio::test]
async fn a_store_that_is_away_refuses_jobs_and_nothing_else() {
    let Some(Kept::Redis(mut server)) = Kept::redis() else {
        return;
    };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.store = Some(server.url().parse().unwrap());
    server.kill();
    let gateway = Gateway::start_with(&plan(&upstream), settings).await;
    let answer = gateway.get("/v1/files").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "store_unavailable")
    );
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    server.restart();
    let mut status = 0;
    let back = async {
        while status != 200 {
            status = gateway.get("/v1/files").await.status;
        }
    };
    within("the store is found again", back).await;
}
