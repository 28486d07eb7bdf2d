//! Files, and batches of their lines, before both kinds of stores.

use serde_json::{Value, json};

use crate::harness::*;
use crate::jobs::*;

/// A batch of good, bad and blank lines, before both stores.
async fn batch_is_run(kept: Kept) {
    let upstream = Upstream::start(|_, request| {
        if request.body.contains("refuse") {
            Reply::Json(400, shaped_error("no such thing"))
        } else {
            json_answer("fine")
        }
    })
    .await;
    let gateway = kept.gateway(&plan(&upstream)).await;
    let mut lines = String::new();
    for number in 0..40 {
        let text = if number % 10 == 3 { "refuse" } else { "hi" };
        lines.push_str(&line(&format!("line-{number}"), text));
        if number % 7 == 0 {
            lines.push_str(" \n");
        }
    }
    let batch = gateway.batch(lines.trim_end()).await;
    assert_eq!(batch["metadata"]["night"], "1");
    let done = gateway.stands(&batch_path(&batch), "completed").await;
    assert_eq!(
        done["request_counts"],
        json!({"total": 40, "completed": 36, "failed": 4})
    );
    let output = gateway.lines(&done["output_file_id"]).await;
    let ids: Vec<&str> = output
        .iter()
        .map(|line| line["custom_id"].as_str().unwrap())
        .collect();
    assert_eq!((ids.len(), ids[0], ids[35]), (36, "line-0", "line-39"));
    assert_eq!(output[0]["response"]["status_code"], 200);
    assert_eq!(
        output[0]["response"]["body"]["choices"][0]["message"]["content"],
        "fine"
    );
    let errors = gateway.lines(&done["error_file_id"]).await;
    assert_eq!(errors.len(), 4);
    assert_eq!(errors[0]["custom_id"], "line-3");
    assert_eq!(
        errors[0]["response"]["body"]["error"]["message"],
        "no such thing"
    );
    batch_is_told(&gateway, &batch, &done).await;
}

/// What a batch that is over leaves.
async fn batch_is_told(gateway: &Gateway, batch: &Value, done: &Value) {
    let path = format!("/v1/files/{}", done["output_file_id"].as_str().unwrap());
    let file = value(&gateway.get(&path).await);
    let output = gateway.get(&format!("{path}/content")).await.body;
    assert_eq!(
        (&file["bytes"], &file["purpose"]),
        (&json!(output.len()), &json!("batch_output"))
    );
    let listed = async |path| {
        value(&gateway.get(path).await)["data"]
            .as_array()
            .unwrap()
            .clone()
    };
    assert_eq!(listed("/v1/batches").await[0]["id"], batch["id"]);
    assert_eq!(listed("/v1/files").await.len(), 3);
    assert_eq!(listed("/v1/files?purpose=batch").await.len(), 1);
    let cancel = format!("{}/cancel", batch_path(batch));
    let late = gateway.call("POST", &cancel, "", "").await;
    assert_eq!((late.status, late.code().as_str()), (409, "conflict"));
}

#[tokio::test]
async fn a_batch_is_run_line_by_line_with_a_file() {
    batch_is_run(Kept::file()).await;
}

#[tokio::test]
async fn a_batch_is_run_line_by_line_with_redis() {
    if let Some(kept) = Kept::redis() {
        batch_is_run(kept).await;
    }
}

#[tokio::test]
async fn mistakes_in_a_batch_are_told_with_their_lines() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    let lines = line("a", "x") + "nonsense\n" + &line("a", "y");
    let batch = gateway.batch(&lines).await;
    let failed = gateway.stands(&batch_path(&batch), "failed").await;
    let errors: Vec<(Value, Value)> = failed["errors"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| (error["code"].clone(), error["line"].clone()))
        .collect();
    let expected = [
        (json!("invalid_json_line"), json!(2)),
        (json!("duplicate_custom_id"), json!(3)),
    ];
    assert_eq!(errors, expected);
    assert_eq!(upstream.count(), 0);
    for (body, param) in [
        (
            json!({"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "24h"}),
            "id",
        ),
        (
            json!({"input_file_id": "file-x", "endpoint": "/v1/x", "completion_window": "24h"}),
            "endpoint",
        ),
        (
            json!({"input_file_id": "file-x", "endpoint": "/v1/embeddings", "completion_window": "1h"}),
            "completion_window",
        ),
    ] {
        let answer = gateway
            .call("POST", "/v1/batches", "", &body.to_string())
            .await;
        assert_eq!(value(&answer)["error"]["param"], param, "{answer:?}");
    }
}

#[tokio::test]
async fn a_cancelled_batch_ends_with_what_is_done() {
    let upstream = Upstream::start(|_, request| {
        if request.body.contains("slow") {
            Reply::Silent
        } else {
            json_answer("fine")
        }
    })
    .await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    let batch = gateway
        .batch(&(line("a", "quick") + &line("b", "slow")))
        .await;
    until("both are called", || upstream.count() == 2).await;
    let cancel = format!("{}/cancel", batch_path(&batch));
    let cancelling = value(&gateway.call("POST", &cancel, "", "").await);
    assert_eq!(cancelling["status"], "cancelling");
    let cancelled = gateway.stands(&batch_path(&batch), "cancelled").await;
    until("the call is aborted", || upstream.gone() == 1).await;
    assert_eq!(gateway.lines(&cancelled["output_file_id"]).await.len(), 1);
}

#[tokio::test]
async fn files_have_limits_and_ends() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let mut settings = kept.settings();
    settings.limits.file_bytes = 600 << 10;
    let gateway = Gateway::start_with(&plan(&upstream), settings).await;
    let content = "é".repeat(290 << 10);
    let file = value(&gateway.upload("", &content).await);
    assert_eq!(
        (&file["bytes"], &file["filename"]),
        (&json!(580 << 10), &json!("in.jsonl"))
    );
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    let read = gateway.get(&format!("{path}/content")).await;
    assert!(read.body == content && read.complete);
    let large = gateway.upload("", &"x".repeat(601 << 10)).await;
    assert_eq!(
        (large.status, large.code().as_str()),
        (413, "body_too_large")
    );
    let answer = gateway.call("POST", "/v1/files", "", "{}").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (400, "invalid_field")
    );
    let wrong = gateway.call("PUT", &path, "", "").await;
    assert_eq!((wrong.status, wrong.header("allow")), (405, "GET, DELETE"));
    assert_eq!(
        value(&gateway.call("DELETE", &path, "", "").await)["deleted"],
        true
    );
    assert_eq!(gateway.get(&path).await.status, 404);
    assert_eq!(value(&gateway.get("/v1/files").await)["data"], json!([]));
}

#[tokio::test]
async fn a_caller_may_fill_its_own_share_of_the_store_only() {
    let upstream = Upstream::always(|| responded("x")).await;
    for kept in [Some(Kept::file()), Kept::redis()].into_iter().flatten() {
        let mut settings = kept.settings();
        settings.limits.owner_bytes = 1 << 20;
        let gateway = Gateway::start_with(&plan(&upstream), settings).await;
        let (alice, bob) = ("authorization: Bearer a\r\n", "authorization: Bearer b\r\n");
        let file = "x".repeat(600 << 10);
        let first = gateway.upload(alice, &file).await;
        let refused = gateway.upload(alice, &file).await;
        let code = refused.code();
        assert_eq!(
            (refused.status, code.as_str()),
            (403, "storage_quota_exceeded")
        );
        assert!(refused.body.contains("1048576 bytes"), "{}", refused.body);
        assert_eq!(gateway.upload(bob, &file).await.status, 200);
        let large = format!(
            "{{\"model\":\"chat\",\"background\":true,\"input\":\"{}\"}}",
            "x".repeat(500 << 10)
        );
        let response = async |headers| gateway.call("POST", "/v1/responses", headers, &large).await;
        assert_eq!(response(alice).await.code(), "storage_quota_exceeded");
        let id = value(&first)["id"].as_str().unwrap().to_owned();
        let deleted = gateway
            .call("DELETE", &format!("/v1/files/{id}"), alice, "")
            .await;
        assert_eq!(deleted.status, 200);
        let made = value(&response(alice).await);
        assert_eq!(response(alice).await.status, 202);
        assert_eq!(response(alice).await.code(), "storage_quota_exceeded");
        gateway.stands_for(alice, &path(&made), "completed").await;
        let deleted = gateway.call("DELETE", &path(&made), alice, "").await;
        assert_eq!(deleted.status, 200);
        assert_eq!(response(alice).await.status, 202);
    }
}

#[tokio::test]
async fn a_caller_may_have_so_many_jobs_only() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream)).await;
    let (alice, bob) = ("authorization: Bearer a\r\n", "authorization: Bearer b\r\n");
    let some = (0..50).map(|_| async {
        let mut first = None;
        for _ in 0..20 {
            first = Some(gateway.background(alice, "").await);
        }
        first.unwrap()
    });
    let made = futures::future::join_all(some).await;
    let body = "{\"model\":\"chat\",\"background\":true,\"input\":\"x\"}";
    let more = async |headers| gateway.call("POST", "/v1/responses", headers, body).await;
    assert_eq!(more(alice).await.code(), "too_many_jobs");
    assert_eq!(more(bob).await.status, 202);
    let cancel = format!("{}/cancel", path(&made[0]));
    assert_eq!(gateway.call("POST", &cancel, alice, "").await.status, 200);
    assert_eq!(more(alice).await.status, 202, "there is a place again");
    assert_eq!(more(alice).await.code(), "too_many_jobs");
}
