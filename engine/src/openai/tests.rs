//! Claims about requests, refusals and answers.

use proptest::prelude::*;
use serde_json::Value;

use super::answer::{Envelope, Events, Progress, whole};
use super::*;

const RULES: Rules<'_> = Rules {
    served_model: "tiny",
    max_model_len: 512,
    block_size: 16,
};

fn chat(extra: &Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "How does water get down?"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn parsed(extra: &Value) -> Result<Generation, Rejection> {
    parse(Api::Chat, chat(extra).to_string().as_bytes(), RULES)
}

fn completion(body: &Value) -> Result<Generation, Rejection> {
    parse(Api::Completions, body.to_string().as_bytes(), RULES)
}

fn envelope() -> Envelope {
    Envelope {
        id: "chatcmpl-1".to_owned(),
        created: 7,
        model: "ti\"ny".to_owned(),
    }
}

/// The events of a stream that is told of `steps` of progress, without `data: `.
fn stream(generation: &Generation, steps: &[Progress]) -> Vec<String> {
    let mut events = Events::new(&envelope(), generation.clone());
    let mut out = Vec::new();
    for progress in steps {
        events.write(progress, &mut out);
    }
    let text = String::from_utf8(out).unwrap();
    assert!(text.is_empty() || text.ends_with("\n\n"));
    text.split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").unwrap().to_owned())
        .collect()
}

fn generated(tokens: u32) -> Progress {
    Progress {
        generated: tokens,
        cached_tokens: 16,
        aborted: false,
    }
}

fn values(events: &[String]) -> Vec<Value> {
    let (last, rest) = events.split_last().unwrap();
    assert_eq!(last, "[DONE]");
    rest.iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

#[test]
fn a_conversation_has_as_many_tokens_as_its_generation_counts() {
    let tokenized = |body: &Value| -> Value {
        let answer = tokenize(body.to_string().as_bytes(), RULES).unwrap();
        serde_json::from_str(&answer).unwrap()
    };
    for extra in [
        json!({}),
        json!({"tools": [{"type": "function"}]}),
        json!({"continue_final_message": true, "add_generation_prompt": false}),
    ] {
        let told = tokenized(&chat(&extra));
        let counted = parsed(&extra).unwrap().submission.prompt_tokens;
        assert_eq!(told["count"], counted, "{extra}");
        assert_eq!(told["tokens"].as_array().unwrap().len(), counted as usize);
        assert_eq!(told["max_model_len"], 512);
    }
    assert_eq!(tokenized(&json!({"prompt": "abcdefghi"}))["count"], 3);
    let unknown = tokenize(br#"{"model":"other","prompt":"a"}"#, RULES);
    assert_eq!(unknown.unwrap_err().status, StatusCode::NOT_FOUND);
}

#[test]
fn limit_makes_the_answer_exactly_as_long() {
    for field in ["max_tokens", "max_completion_tokens"] {
        let generation = parsed(&json!({field: 40})).unwrap();
        assert_eq!(generation.output.tokens(), 40);
        assert_eq!(generation.submission.ending, Ending::Length);
        assert_eq!(generation.submission.max_tokens, 40);
    }
}

#[test]
fn a_final_message_is_gone_on_with_where_the_answer_would_be() {
    let answered = |message: &str, extra: &Value| {
        let question = json!({"role": "user", "content": "How does water get down?"});
        let mut body = json!({"messages": [question, {"role": "assistant", "content": message}]});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        parsed(&body)
    };
    let goes_on = json!({"continue_final_message": true, "add_generation_prompt": false});
    let from_start = parsed(&json!({"max_tokens": 30})).unwrap().submission;
    let begun = answered("the water runs dow", &goes_on).unwrap().submission;
    // Four bytes a token, and what stands before is the same.
    assert_eq!(begun.prompt_tokens, from_start.prompt_tokens + 5);
    let shared = from_start.prompt_tokens as usize / 16;
    assert_eq!(
        begun.block_hashes[..shared],
        from_start.block_hashes[..shared]
    );
    for extra in [
        json!({"continue_final_message": true}),
        json!({"continue_final_message": true, "add_generation_prompt": true}),
    ] {
        let refused = answered("the", &extra).unwrap_err();
        assert_eq!(refused.param, Some("continue_final_message"));
    }
    let usual = answered("the", &json!({})).unwrap().submission;
    assert!(usual.prompt_tokens > begun.prompt_tokens);
}

#[test]
fn without_a_limit_a_chat_stops_by_itself_and_the_same_prompt_stops_at_the_same_place() {
    let generation = parsed(&json!({})).unwrap();
    assert!((16..=256).contains(&generation.output.tokens()));
    assert_eq!(generation.submission.ending, Ending::Stop);
    assert_eq!(generation, parsed(&json!({})).unwrap());
    let endless = parsed(&json!({"ignore_eos": true})).unwrap();
    assert_eq!(
        endless.output.tokens() + endless.submission.prompt_tokens,
        RULES.max_model_len
    );
}

#[test]
fn text_completion_without_a_limit_has_sixteen_tokens() {
    assert_eq!(
        completion(&json!({"prompt": "abc"}))
            .unwrap()
            .output
            .tokens(),
        16
    );
}

#[test]
fn prompts_are_counted_by_bytes_or_by_given_tokens() {
    for (prompt, tokens) in [
        (json!("abcdefgh"), 2),
        (json!(["abcdefghi"]), 3),
        (json!([5, 6, 7, 8]), 4),
        (json!([[5, 6, 7, 8, 9]]), 5),
    ] {
        assert_eq!(
            completion(&json!({"prompt": prompt}))
                .unwrap()
                .submission
                .prompt_tokens,
            tokens
        );
    }
    // Start, role, break, six tokens of text, end, break; start, three tokens of role, break.
    assert_eq!(
        parsed(&json!({})).unwrap().submission.prompt_tokens,
        3 + 6 + 2 + 5
    );
    let parts =
        json!([{"type": "text", "text": "How does "}, {"type": "text", "text": "water get down?"}]);
    let parts = parsed(&json!({"messages": [{"role": "user", "content": parts}]})).unwrap();
    assert_eq!(parts.submission.prompt_tokens, 3 + 3 + 4 + 2 + 5);
}

fn assert_refused(
    case: &Value,
    result: Result<Generation, Rejection>,
    status: u16,
    kind: &str,
    param: Option<&str>,
) {
    let rejection = result.expect_err(&case.to_string());
    let body: Value = serde_json::from_str(&rejection.body()).unwrap();
    assert_eq!(rejection.status.as_u16(), status, "{case}");
    assert_eq!(body["error"]["code"], status, "{case}");
    assert_eq!(body["error"]["type"], kind, "{case}");
    assert_eq!(body["error"]["param"], json!(param), "{case}");
    assert!(!body["error"]["message"].as_str().unwrap().is_empty());
}

#[test]
fn wrong_values_are_refused_with_the_field_at_fault() {
    let image = json!([{"role": "user", "content": [{"type": "image_url"}]}]);
    for (extra, param) in [
        (json!({"max_tokens": 513}), "max_tokens"),
        (json!({"max_tokens": 510}), "max_tokens"),
        (json!({"max_tokens": i64::MAX}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"n": 2}), "n"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stream_options": {}}), "stream_options"),
        (json!({"messages": image}), "messages"),
    ] {
        assert_refused(&extra, parsed(&extra), 400, "BadRequestError", Some(param));
    }
    for prompt in [json!(""), json!(["a", "b"]), json!([[1], [2]])] {
        let body = json!({"prompt": prompt});
        assert_refused(
            &body,
            completion(&body),
            400,
            "BadRequestError",
            Some("prompt"),
        );
    }
    let body = json!({"prompt": "x".repeat(4 * 512)});
    assert_refused(
        &body,
        completion(&body),
        400,
        "BadRequestError",
        Some("max_tokens"),
    );
}

#[test]
fn bodies_of_the_wrong_shape_are_refused() {
    for extra in [
        json!({"max_tokens": "ten"}),
        json!({"messages": []}),
        json!({"messages": null}),
    ] {
        assert_refused(&extra, parsed(&extra), 400, "Bad Request", None);
    }
    assert_refused(&json!({}), completion(&json!({})), 400, "Bad Request", None);
    let cut = parse(Api::Chat, b"{\"model\":", RULES);
    assert_refused(&json!("cut"), cut, 400, "Bad Request", None);
}

#[test]
fn unknown_model_is_not_found() {
    let extra = json!({"model": "gpt"});
    assert_refused(&extra, parsed(&extra), 404, "NotFoundError", Some("model"));
}

#[test]
fn unknown_fields_and_a_missing_model_are_taken() {
    assert!(
        parsed(&json!({"model": null, "temperature": 0.2, "seed": 1, "logit_bias": {}})).is_ok()
    );
}

#[test]
fn stop_string_ends_the_answer_before_it() {
    let free = parsed(&json!({"max_tokens": 100})).unwrap();
    let text = free.output.text(100);
    let stop = &text[101..106];
    let at = text.find(stop).unwrap();
    let generation = parsed(&json!({"max_tokens": 100, "stop": ["neverthere", stop]})).unwrap();
    assert_eq!(
        generation.output.tokens() as usize,
        (at + stop.len()).div_ceil(TOKEN_BYTES)
    );
    assert_eq!(generation.submission.ending, Ending::Stop);
    let body = whole(
        &envelope(),
        &generation,
        &generated(generation.output.tokens()),
    );
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["choices"][0]["message"]["content"], text[..at]);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["stop_reason"], stop);
}

#[test]
fn stream_is_role_then_tokens_then_usage_then_done() {
    let options =
        json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 3});
    let generation = parsed(&options).unwrap();
    let events = values(&stream(
        &generation,
        &[generated(0), generated(1), generated(3)],
    ));
    assert_eq!(events.len(), 5);
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let text: String = events[1..4]
        .iter()
        .map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(text, generation.output.text(3));
    let reasons: Vec<_> = events[..4]
        .iter()
        .map(|event| event["choices"][0]["finish_reason"].clone())
        .collect();
    assert_eq!(
        reasons,
        [Value::Null, Value::Null, Value::Null, json!("length")]
    );
    assert_eq!(events[4]["choices"], json!([]));
    let usage = json!({
        "prompt_tokens": 16, "completion_tokens": 3, "total_tokens": 19, "prompt_tokens_details": {"cached_tokens": 16},
    });
    assert_eq!(events[4]["usage"], usage);
    for event in &events {
        assert_eq!(event["id"], "chatcmpl-1");
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["model"], "ti\"ny");
        assert_eq!(event["created"], 7);
    }
}

#[test]
fn continuous_usage_counts_up() {
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let generation =
        parsed(&json!({"stream": true, "stream_options": options, "max_tokens": 2})).unwrap();
    let events = values(&stream(&generation, &[generated(2)]));
    let counts: Vec<_> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(counts[1..], [1, 2, 2]);
}

#[test]
fn aborted_stream_ends_with_abort_and_done() {
    let generation = parsed(&json!({"stream": true, "max_tokens": 30})).unwrap();
    for before in [0, 5] {
        let cut = Progress {
            aborted: true,
            ..generated(before)
        };
        let events = values(&stream(&generation, &[generated(before), cut]));
        assert_eq!(events.len(), 1 + before as usize + 1);
        let last = events.last().unwrap();
        assert_eq!(last["choices"][0]["finish_reason"], "abort");
        assert_eq!(last["choices"][0]["delta"]["content"], "");
    }
    let body: Value = serde_json::from_str(&whole(
        &envelope(),
        &generation,
        &Progress {
            aborted: true,
            ..generated(5)
        },
    ))
    .unwrap();
    assert_eq!(body["choices"][0]["finish_reason"], "abort");
    assert_eq!(
        body["choices"][0]["message"]["content"],
        generation.output.text(5)
    );
}

#[test]
fn abort_after_the_last_token_changes_nothing() {
    let generation = parsed(&json!({"stream": true, "max_tokens": 4})).unwrap();
    let cut = Progress {
        aborted: true,
        ..generated(4)
    };
    let events = values(&stream(&generation, &[cut, cut]));
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
}

#[test]
fn text_completion_streams_text() {
    let body = json!({"prompt": "abc", "stream": true, "max_tokens": 2});
    let generation = completion(&body).unwrap();
    let events = values(&stream(&generation, &[generated(1), generated(2)]));
    assert_eq!(events.len(), 2);
    assert_eq!(events[0]["object"], "text_completion");
    assert_eq!(events[0]["choices"][0]["text"], generation.output.text(1));
    assert_eq!(events[1]["choices"][0]["finish_reason"], "length");
}

proptest! {
    #[test]
    fn any_pace_gives_the_same_events(tokens in 1..40_u32, mut paces in prop::collection::vec(0..40_u32, 0..10)) {
        let options = json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": tokens});
        let generation = parsed(&options).unwrap();
        paces.push(tokens);
        paces.sort_unstable();
        let steps: Vec<_> = paces.iter().map(|&pace| generated(pace.min(tokens))).collect();
        prop_assert_eq!(stream(&generation, &steps), stream(&generation, &[generated(tokens)]));
    }

    #[test]
    fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(Api::Chat, &body, RULES);
    }
}
