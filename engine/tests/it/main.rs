//! The engine over real sockets.
#![cfg(test)]

mod client;

use std::time::Duration;

use client::{Answer, Engine, STEPS_OF_2_MS, STEPS_OF_20_MS, eventually, settings};
use http::StatusCode;
use penstock_engine::{Settings, model::Limits};
use serde_json::{Value, json};
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";

fn chat(max_tokens: u32, stream: bool) -> Value {
    json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": "Why does a penstock have a surge tank beside it, and how large?"}],
        "max_tokens": max_tokens,
        "stream": stream,
    })
}

#[tokio::test]
async fn chat_answers_json_and_the_second_time_the_prompt_is_cached() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let first = engine.post(CHAT, &chat(9, false)).await.json().await;
    assert_eq!(first["object"], "chat.completion");
    assert_eq!(first["model"], "tiny");
    assert!(first["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(first["choices"][0]["message"]["role"], "assistant");
    assert_eq!(first["choices"][0]["finish_reason"], "length");
    assert_eq!(first["usage"]["completion_tokens"], 9);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let second = engine.post(CHAT, &chat(9, false)).await.json().await;
    assert_eq!(second["choices"], first["choices"]);
    assert_eq!(
        second["usage"]["prompt_tokens_details"]["cached_tokens"],
        16
    );
    engine.stop().await;
}

#[tokio::test]
async fn conversation_finds_its_history_in_the_cache() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let first = engine.post(CHAT, &chat(64, false)).await.json().await;
    let mut next = chat(4, false);
    let messages = next["messages"].as_array_mut().unwrap();
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({"role": "user", "content": "And without one?"}));
    let second = engine.post(CHAT, &next).await.json().await;
    let history = first["usage"]["total_tokens"].as_u64().unwrap();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    assert!(
        cached > history - 17 && cached <= history,
        "{cached} of {history}"
    );
    engine.stop().await;
}

#[tokio::test]
async fn chat_streams_role_tokens_usage_and_done() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let mut body = chat(12, true);
    body["stream_options"] = json!({"include_usage": true});
    let answer = engine.post(CHAT, &body).await;
    assert_eq!(
        answer.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    let events = answer.events().await;
    let (done, events) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let events: Vec<Value> = events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(events.len(), 1 + 12 + 1);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[12]["choices"][0]["finish_reason"], "length");
    assert_eq!(events[13]["choices"], json!([]));
    assert_eq!(events[13]["usage"]["completion_tokens"], 12);
    let streamed: String = events[1..13]
        .iter()
        .map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    let whole = engine.post(CHAT, &chat(12, false)).await.json().await;
    assert_eq!(whole["choices"][0]["message"]["content"], streamed);
    engine.stop().await;
}

#[tokio::test]
async fn first_event_is_sent_before_the_last_token_exists() {
    let engine = Engine::start(settings(&STEPS_OF_20_MS)).await;
    let mut answer = engine.post(CHAT, &chat(400, true)).await;
    let first = answer.chunk().await.unwrap();
    assert!(first.starts_with("data: {") && !first.contains("[DONE]"));
    engine.stop().await;
}

#[tokio::test]
async fn text_completions_answer_and_stream() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let body = json!({"model": "tiny", "prompt": "Water flows", "max_tokens": 5});
    let whole = engine.post("/v1/completions", &body).await.json().await;
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"][0]["text"].as_str().unwrap().len(), 20);
    let body = json!({"prompt": "Water flows", "max_tokens": 5, "stream": true});
    assert_eq!(
        engine
            .post("/v1/completions", &body)
            .await
            .events()
            .await
            .len(),
        6
    );
    engine.stop().await;
}

#[tokio::test]
async fn request_id_becomes_part_of_the_answers_id() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    for (given, expected) in [("trace-7", true), ("no\"quotes", false)] {
        let answer = engine
            .send(
                "POST",
                CHAT,
                &[("x-request-id", given)],
                chat(1, false).to_string(),
            )
            .await;
        let id = answer.json().await["id"].as_str().unwrap().to_owned();
        assert_eq!(id == format!("chatcmpl-{given}"), expected, "{id}");
    }
    engine.stop().await;
}

#[tokio::test]
async fn every_path_answers_and_says_that_it_is_simulated() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    for (method, path, status) in [
        ("GET", "/health", 200),
        ("GET", "/ping", 200),
        ("POST", "/ping", 200),
        ("GET", "/version", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/metrics", 200),
        ("GET", CHAT, 405),
        ("GET", "/tokenize", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/embeddings", 404),
        ("POST", CHAT, 400),
    ] {
        let answer = engine.send(method, path, &[], String::new()).await;
        assert_eq!(answer.status.as_u16(), status, "{method} {path}");
        assert_eq!(
            answer.header("x-penstock-engine"),
            Some("simulated"),
            "{method} {path}"
        );
    }
    let models = engine.get("/v1/models").await.json().await;
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], 1024);
    engine.stop().await;
}

#[tokio::test]
async fn a_prompt_has_the_tokens_that_usage_tells() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let body = chat(1, false);
    let told = engine.post("/tokenize", &body).await.json().await;
    let usage = engine.post(CHAT, &body).await.json().await["usage"].clone();
    assert_eq!(told["count"], usage["prompt_tokens"]);
    let broken = engine.send("POST", "/tokenize", &[], "{".to_owned()).await;
    assert_eq!(broken.json().await["error"]["code"], 400);
    engine.stop().await;
}

#[tokio::test]
async fn refusals_have_vllms_status_and_shape() {
    let engine = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let mut unknown = chat(4, false);
    unknown["model"] = json!("huge");
    for (body, status) in [
        (unknown.to_string(), 404),
        (chat(1025, false).to_string(), 400),
        ("{".to_owned(), 400),
        ("x".repeat(8 * 1024 * 1024 + 1), 413),
    ] {
        let answer = engine.send("POST", CHAT, &[], body).await;
        assert_eq!(answer.status.as_u16(), status);
        assert_eq!(answer.json().await["error"]["code"], status);
    }
    engine.stop().await;
}

#[tokio::test]
async fn api_key_guards_v1_and_nothing_else() {
    let engine = Engine::start(Settings {
        api_keys: vec!["sesame".to_owned()],
        ..settings(&STEPS_OF_2_MS)
    })
    .await;
    let body = chat(1, false).to_string();
    for (headers, status) in [
        (&[][..], 401),
        (&[("authorization", "Bearer sesam")][..], 401),
        (&[("authorization", "Bearer sesame1")][..], 401),
        (&[("authorization", "Bearer sesame")][..], 200),
    ] {
        let answer = engine.send("POST", CHAT, headers, body.clone()).await;
        assert_eq!(answer.status.as_u16(), status, "{headers:?}");
    }
    assert_eq!(
        engine.get("/v1/models").await.json().await,
        json!({"error": "Unauthorized"})
    );
    assert_eq!(engine.get("/metrics").await.status, StatusCode::OK);
    engine.stop().await;
}

/// Waits until the engine holds nothing, and returns how many requests were aborted.
async fn idle(engine: &Engine) -> String {
    eventually("the engine is idle", async || {
        let metrics = engine.metrics().await;
        let load = [
            "vllm:num_requests_running{",
            "vllm:num_requests_waiting{",
            "vllm:kv_cache_usage_perc{",
        ];
        load.iter().all(|name| metrics.value(name) == "0.0")
    })
    .await;
    engine
        .metrics()
        .await
        .value("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\"")
        .to_owned()
}

#[tokio::test]
async fn client_that_leaves_a_stream_frees_its_blocks() {
    let engine = Engine::start(settings(&STEPS_OF_20_MS)).await;
    let mut answer = engine.post(CHAT, &chat(900, true)).await;
    answer.chunk().await.unwrap();
    let metrics = engine.metrics().await;
    assert_eq!(metrics.value("vllm:num_requests_running{"), "1.0");
    assert_ne!(metrics.value("vllm:kv_cache_usage_perc{"), "0.0");
    drop(answer);
    assert_eq!(idle(&engine).await, "1.0");
    engine.stop().await;
}

#[tokio::test]
async fn client_that_leaves_while_it_waits_frees_its_place() {
    let engine = Engine::start(settings(&STEPS_OF_20_MS)).await;
    let body = chat(900, false);
    let mut asking = Box::pin(engine.post(CHAT, &body));
    tokio::select! {
        _ = &mut asking => panic!("900 tokens take longer"),
        () = eventually("the request runs", async || {
            engine.metrics().await.value("vllm:num_requests_running{") == "1.0"
        }) => {}
    }
    drop(asking);
    assert_eq!(idle(&engine).await, "1.0");
    engine.stop().await;
}

#[tokio::test]
async fn request_above_the_queue_limit_gets_503_without_retry_after() {
    let limits = Limits {
        max_num_queued_reqs: 1,
        ..settings(&STEPS_OF_20_MS).limits
    };
    let engine = Engine::start(Settings {
        limits,
        ..settings(&STEPS_OF_20_MS)
    })
    .await;
    let mut first = engine.post(CHAT, &chat(900, true)).await;
    first.chunk().await.unwrap();
    let refused = engine.post(CHAT, &chat(1, true)).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.header("retry-after"), None);
    let body = refused.json().await;
    assert_eq!(body["error"]["type"], "Service Unavailable");
    let rejections =
        "vllm:admission_rejections_total{model_name=\"tiny\",reason=\"max_num_queued_reqs\"";
    assert_eq!(engine.metrics().await.value(rejections), "1.0");
    engine.stop().await;
}

#[tokio::test]
async fn full_batch_leaves_later_requests_waiting() {
    let limits = Limits {
        max_num_seqs: 2,
        ..settings(&STEPS_OF_20_MS).limits
    };
    let engine = Engine::start(Settings {
        limits,
        ..settings(&STEPS_OF_20_MS)
    })
    .await;
    let body = chat(900, false);
    let mut clients = futures::future::join_all((0..5).map(|_| engine.post(CHAT, &body)));
    tokio::select! {
        _ = &mut clients => panic!("900 tokens take longer"),
        () = eventually("two run and three wait", async || {
            let metrics = engine.metrics().await;
            metrics.value("vllm:num_requests_running{") == "2.0" && metrics.value("vllm:num_requests_waiting{") == "3.0"
        }) => {}
    }
    drop(clients);
    assert_eq!(idle(&engine).await, "5.0");
    engine.stop().await;
}

/// How the last event but `[DONE]` says that the answer ended, and how many events carried a token.
fn ending(events: &[String]) -> (String, usize) {
    let (done, events) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let choices: Vec<Value> = events
        .iter()
        .map(|event| serde_json::from_str::<Value>(event).unwrap()["choices"][0].take())
        .collect();
    let tokens = choices.iter().filter(|choice| {
        choice["delta"]["content"]
            .as_str()
            .is_some_and(|text| !text.is_empty())
    });
    (
        choices.last().unwrap()["finish_reason"]
            .as_str()
            .unwrap()
            .to_owned(),
        tokens.count(),
    )
}

#[tokio::test]
async fn without_a_shutdown_timeout_streams_end_at_once_with_200_and_abort() {
    let engine = Engine::start(settings(&STEPS_OF_20_MS)).await;
    let mut answer = engine.post(CHAT, &chat(900, true)).await;
    answer.chunk().await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    let address = engine.address;
    engine.stop().await;
    let (reason, tokens) = ending(&answer.events().await);
    assert_eq!(reason, "abort");
    assert!(tokens < 900);
    assert!(
        TcpStream::connect(address).await.is_err(),
        "nobody listens any more"
    );
}

#[tokio::test]
async fn within_the_shutdown_timeout_streams_finish_while_health_is_200_and_new_requests_get_500() {
    let shutdown_timeout = Duration::from_mins(1);
    let engine = Engine::start(Settings {
        shutdown_timeout,
        ..settings(&STEPS_OF_20_MS)
    })
    .await;
    let mut answer = engine.post(CHAT, &chat(60, true)).await;
    answer.chunk().await.unwrap();
    engine.shutdown.cancel();
    let refused = eventually_refused(&engine).await;
    assert_eq!(refused.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(
        refused.json().await["error"]["message"],
        "cannot schedule new futures after shutdown"
    );
    assert_eq!(engine.get("/health").await.status, StatusCode::OK);
    assert_eq!(
        engine.metrics().await.value("vllm:num_requests_running{"),
        "1.0"
    );
    let (reason, _) = ending(&answer.events().await);
    assert_eq!(reason, "length");
    engine.stop().await;
}

/// The first refusal after shutdown began: the signal takes a moment to be seen.
async fn eventually_refused(engine: &Engine) -> Answer {
    loop {
        let answer = engine.post(CHAT, &chat(1, false)).await;
        if answer.status != StatusCode::OK {
            return answer;
        }
    }
}

#[tokio::test]
async fn stream_that_outlasts_the_shutdown_timeout_is_aborted() {
    let shutdown_timeout = Duration::from_millis(100);
    let engine = Engine::start(Settings {
        shutdown_timeout,
        ..settings(&STEPS_OF_20_MS)
    })
    .await;
    let mut answer = engine.post(CHAT, &chat(900, true)).await;
    answer.chunk().await.unwrap();
    engine.stop().await;
    assert_eq!(ending(&answer.events().await).0, "abort");
}

#[tokio::test]
async fn while_the_model_loads_every_path_answers_503_and_shutdown_ends_at_once() {
    let startup_delay = Duration::from_hours(1);
    let shutdown_timeout = Duration::from_hours(1);
    let settings = Settings {
        startup_delay,
        shutdown_timeout,
        ..settings(&STEPS_OF_2_MS)
    };
    let engine = Engine::start(settings).await;
    for path in ["/health", "/metrics", "/v1/models"] {
        let answer = engine.get(path).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(answer.header("x-penstock-engine"), Some("simulated"));
    }
    let refused = engine.post(CHAT, &chat(1, false)).await;
    assert_eq!(
        refused.json().await["error"]["message"],
        "The model is still being loaded."
    );
    engine.stop().await;
}

#[tokio::test]
async fn engine_serves_once_the_model_is_loaded() {
    let startup_delay = Duration::from_millis(50);
    let engine = Engine::start(Settings {
        startup_delay,
        ..settings(&STEPS_OF_2_MS)
    })
    .await;
    eventually("the model is loaded", async || {
        engine.get("/health").await.status == StatusCode::OK
    })
    .await;
    assert_eq!(
        engine.post(CHAT, &chat(1, false)).await.status,
        StatusCode::OK
    );
    engine.stop().await;
}

#[tokio::test]
async fn engines_of_one_process_share_nothing() {
    let left = Engine::start(settings(&STEPS_OF_2_MS)).await;
    let right = Engine::start(settings(&STEPS_OF_2_MS)).await;
    left.post(CHAT, &chat(3, false)).await.json().await;
    assert_eq!(
        left.metrics().await.value("vllm:generation_tokens_total{"),
        "3.0"
    );
    assert_eq!(
        right.metrics().await.value("vllm:generation_tokens_total{"),
        "0.0"
    );
    left.stop().await;
    assert_eq!(
        right.post(CHAT, &chat(3, false)).await.status,
        StatusCode::OK
    );
    right.stop().await;
}

/// CPU ticks of this process's busiest thread.
#[cfg(target_os = "linux")]
fn busiest_thread_ticks() -> u64 {
    let ticks = |stat: &str| -> Option<u64> {
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
        Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
    };
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok())
        .filter_map(|stat| ticks(&stat))
        .max()
        .unwrap_or(0)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn busy_loop_burns_a_core_without_a_queue_and_stops_at_shutdown() {
    let engine = Engine::start(Settings {
        busy_loop: true,
        ..settings(&STEPS_OF_2_MS)
    })
    .await;
    // No other test of this binary needs a second of CPU on one thread.
    eventually("a thread used a second of CPU", async || {
        busiest_thread_ticks() > 100
    })
    .await;
    let metrics = engine.metrics().await;
    assert_eq!(metrics.value("vllm:num_requests_waiting{"), "0.0");
    assert_eq!(metrics.value("vllm:kv_cache_usage_perc{"), "0.0");
    // Returns only when the spinning thread has ended.
    engine.stop().await;
}
