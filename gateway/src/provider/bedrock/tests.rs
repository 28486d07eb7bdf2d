use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::frames::tests::frame;
use super::{EVENT_STREAM, Signer, read_keys, sign};
use crate::provider::foreign::{About, Foreign, Incoming, Vectors};
use crate::provider::{Misfit, Rest, Route, Way};

const ABOUT: About<'static> = About {
    created: 7,
    id: "req-1",
    model: "asked",
    vectors: Vectors::Numbers,
};

fn translate(way: Way, request: &Value, rest: Rest) -> Result<Value, Misfit> {
    let route = Route {
        way,
        foreign: Some(Foreign::Bedrock),
    };
    let translated = route.request(request.to_string().as_bytes(), rest)?;
    Ok(serde_json::from_slice(&translated.body).unwrap())
}

fn chat(extra: Value) -> Value {
    let mut request = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
    let members = extra.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(members);
    request
}

#[test]
fn a_chat_is_carried_whole_to_converse() {
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "text", "text": ""},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}},
            {"type": "file", "file": {"filename": "my  paper_v2.pdf", "file_data": "data:application/pdf;base64,JVBE"}}]},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"z\": 1.50, \"a\": 2}"}},
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "user", "content": "Go on"}
    ]);
    let tools = json!([{"type": "function", "function": {"name": "weather", "description": "Tells", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "time"}}]);
    let request = chat(json!({
        "messages": messages, "tools": tools, "tool_choice": "required", "stream": true, "max_tokens": 5, "max_completion_tokens": 64,
        "temperature": 0.50, "top_p": 0.9, "stop": ["END"], "user": "u", "metadata": {}, "n": 1, "parallel_tool_calls": true,
        "service_tier": "default", "response_format": {"type": "text"}
    }));
    insta::assert_json_snapshot!(translate(Way::Straight, &request, Rest::Refuse).unwrap());
}

#[test]
fn a_message_is_carried_by_way_of_a_chat() {
    let message = json!({
        "model": "m", "max_tokens": 64, "system": "Be brief.",
        "messages": [{"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]}],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}], "tool_choice": {"type": "tool", "name": "weather"}
    });
    insta::assert_json_snapshot!(translate(Way::MessagesOverChat, &message, Rest::Refuse).unwrap());
    let thinks = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "thinking": {"type": "enabled", "budget_tokens": 9}});
    let refused = translate(Way::MessagesOverChat, &thinks, Rest::Refuse);
    assert_eq!(refused, Err(Misfit::Unsupported("thinking".to_owned())));
}

#[test]
fn what_converse_has_not_is_refused_by_name_or_dropped() {
    let picture = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}, {"type": "text", "text": "Hi"}]});
    let tool = json!([{"type": "function", "function": {"name": "f", "strict": true}}]);
    let plain = json!([{"type": "function", "function": {"name": "f"}}]);
    for (extra, param) in [
        (json!({"temperature": 1.5}), "temperature"),
        (json!({"seed": 1}), "seed"),
        (json!({"n": 2}), "n"),
        (json!({"reasoning_effort": "low"}), "reasoning_effort"),
        (json!({"parallel_tool_calls": false}), "parallel_tool_calls"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"service_tier": "flex"}), "service_tier"),
        (json!({"tools": tool}), "tools[0].function.strict"),
        (
            json!({"tools": plain, "tool_choice": "none"}),
            "tool_choice",
        ),
        (
            json!({"messages": [picture]}),
            "messages[0].content[0].image_url.url",
        ),
        (json!({"invented_later": 1}), "invented_later"),
    ] {
        let refused = translate(Way::Straight, &chat(extra.clone()), Rest::Refuse);
        assert_eq!(refused, Err(Misfit::Unsupported(param.to_owned())));
        let sent = translate(Way::Straight, &chat(extra), Rest::Drop).unwrap();
        assert_eq!(sent["messages"][0]["content"], json!([{"text": "Hi"}]));
    }
}

fn answer(body: &Value) -> Option<Value> {
    let answer = Foreign::Bedrock.answer(body.to_string().as_bytes(), &ABOUT)?;
    Some(serde_json::from_slice(&answer).unwrap())
}

#[test]
fn a_whole_answer_becomes_a_chat_completion() {
    let told = answer(&json!({
        "output": {"message": {"role": "assistant", "content": [
            {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "s"}}}, {"text": "Let me "}, {"text": "see."},
            {"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Ulm"}}}]}},
        "stopReason": "tool_use", "usage": {"inputTokens": 10, "outputTokens": 5, "totalTokens": 36, "cacheReadInputTokens": 20, "cacheWriteInputTokens": 1}
    }));
    insta::assert_json_snapshot!(told.unwrap());
    assert_eq!(answer(&json!({"message": "no"})), None);
}

#[test]
fn the_reasons_to_stop_have_their_counterparts() {
    for (reason, expected) in [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("guardrail_intervened", "content_filter"),
        ("malformed_tool_use", "abort"),
    ] {
        let told = answer(&json!({"output": {"message": {"content": []}}, "stopReason": reason}));
        assert_eq!(told.unwrap()["choices"][0]["finish_reason"], expected);
    }
}

fn event(kind: &str, payload: &Value) -> Vec<u8> {
    let headers = [(":message-type", "event"), (":event-type", kind)];
    frame(&headers, payload.to_string().as_bytes())
}

fn events() -> Vec<u8> {
    let delta = |index: u32, delta: Value| {
        event(
            "contentBlockDelta",
            &json!({"contentBlockIndex": index, "delta": delta, "p": "abc"}),
        )
    };
    let tool = |index: u32, id: &str| {
        let start = json!({"toolUse": {"toolUseId": id, "name": "weather"}});
        event(
            "contentBlockStart",
            &json!({"contentBlockIndex": index, "start": start}),
        )
    };
    let stop = |index: u32| event("contentBlockStop", &json!({"contentBlockIndex": index}));
    [
        event("messageStart", &json!({"role": "assistant"})),
        delta(0, json!({"reasoningContent": {"text": "hm"}})),
        delta(0, json!({"reasoningContent": {"signature": "s"}})),
        stop(0),
        delta(1, json!({"text": "Let mé see."})),
        stop(1),
        tool(2, "t1"),
        delta(2, json!({"toolUse": {"input": ""}})),
        delta(2, json!({"toolUse": {"input": "{\"city\": \"Ulm\"}"}})),
        stop(2),
        tool(3, "t2"),
        stop(3),
        event("messageStop", &json!({"stopReason": "tool_use"})),
        event("metadata", &json!({"usage": {"inputTokens": 10, "outputTokens": 5, "cacheReadInputTokens": 20}, "metrics": {}})),
    ]
    .concat()
}

fn incoming() -> Incoming {
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static(EVENT_STREAM));
    let incoming = Foreign::Bedrock.chunks(&mut headers, &ABOUT).unwrap();
    assert_eq!(headers["content-type"], "text/event-stream");
    incoming
}

fn chunks(pieces: &[&[u8]]) -> String {
    let mut incoming = incoming();
    let mut out = Vec::new();
    for piece in pieces {
        out.extend(incoming.feed(piece).unwrap());
    }
    out.extend(incoming.end());
    String::from_utf8(out).unwrap()
}

#[test]
fn events_become_the_chunks_of_a_chat_completion() {
    insta::assert_snapshot!(chunks(&[&events()]));
}

#[test]
fn calls_whose_blocks_are_open_at_a_time_keep_their_own_arguments() {
    let start = |index: u32| {
        let tool = json!({"toolUse": {"toolUseId": format!("t{index}"), "name": "f"}});
        event(
            "contentBlockStart",
            &json!({"contentBlockIndex": index, "start": tool}),
        )
    };
    let part = |index: u32, json: &str| {
        let delta = json!({"toolUse": {"input": json}});
        event(
            "contentBlockDelta",
            &json!({"contentBlockIndex": index, "delta": delta}),
        )
    };
    let stop = |index: u32| event("contentBlockStop", &json!({"contentBlockIndex": index}));
    let events = [
        start(1),
        start(2),
        part(1, "{\"a\":"),
        part(2, "{\"b\":2}"),
        stop(2),
        part(1, "1}"),
        stop(1),
    ];
    let told = chunks(&[&events.concat()]);
    let mut calls = [String::new(), String::new()];
    for data in told.lines().filter_map(|line| line.strip_prefix("data: ")) {
        let chunk: Value = serde_json::from_str(data).unwrap();
        let call = &chunk["choices"][0]["delta"]["tool_calls"][0];
        let index = usize::try_from(call["index"].as_u64().unwrap()).unwrap();
        calls[index].push_str(call["function"]["arguments"].as_str().unwrap());
    }
    assert_eq!(calls, ["{\"a\":1}", "{\"b\":2}"]);
}

#[test]
fn a_stream_without_a_reason_to_stop_has_no_end() {
    let cut = event("messageStart", &json!({"role": "assistant"}));
    assert!(!chunks(&[&cut]).contains("[DONE]"));
    let stopped = event("messageStop", &json!({"stopReason": "end_turn"}));
    assert!(chunks(&[&stopped]).ends_with("data: [DONE]\n\n"));
    assert!(incoming().feed(&stopped[..20]).unwrap().is_empty());
}

#[test]
fn exceptions_inside_a_stream_are_told() {
    let headers = [
        (":message-type", "exception"),
        (":exception-type", "throttlingException"),
    ];
    let told = chunks(&[&frame(&headers, b"{\"message\":\"slow down\"}")]);
    assert!(
        told.contains("\"message\":\"slow down\"")
            && told.contains("\"type\":\"throttlingException\""),
        "{told}"
    );
    let headers = [
        (":message-type", "error"),
        (":error-code", "internal"),
        (":error-message", "broken"),
    ];
    assert!(chunks(&[&frame(&headers, b"")]).contains("\"message\":\"broken\""));
}

#[test]
fn a_refusal_is_told_in_the_shape_of_chats() {
    let mut headers = HeaderMap::new();
    let kind = "ValidationException:http://internal.amazon.com/coral/";
    headers.insert("x-amzn-errortype", HeaderValue::from_static(kind));
    let told = Foreign::Bedrock.error(&mut headers, br#"{"message":"no"}"#);
    let told: Value = serde_json::from_slice(&told).unwrap();
    assert_eq!(told["error"]["message"], "no");
    assert_eq!(told["error"]["type"], "ValidationException");
    assert!(Foreign::Bedrock.error(&mut headers, b"<html>").is_empty());
}

#[test]
fn a_signature_covers_what_must_not_change_and_is_new_each_time() {
    let signer = Signer {
        keys: read_keys("aws_access_key_id=AKID\naws_secret_access_key=s\naws_session_token=t")
            .unwrap(),
        region: "eu-central-1".to_owned(),
    };
    let signed_at = |seconds: u64| {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("bedrock"));
        headers.insert("x-amz-date", HeaderValue::from_static("theirs"));
        sign(
            &signer,
            &mut headers,
            "/model/m/converse",
            b"{}",
            Duration::from_secs(seconds),
        );
        headers
    };
    let headers = signed_at(1_440_938_160);
    assert_eq!(headers["x-amz-date"], "20150830T123600Z");
    assert_eq!(headers["x-amz-security-token"], "t");
    let value = headers["authorization"].to_str().unwrap();
    let start = "AWS4-HMAC-SHA256 Credential=AKID/20150830/eu-central-1/bedrock/aws4_request, \
        SignedHeaders=content-type;host;x-amz-date;x-amz-security-token, Signature=";
    assert!(value.starts_with(start), "{value}");
    assert!(headers["authorization"].is_sensitive());
    assert_ne!(
        signed_at(1_440_938_161)["authorization"],
        headers["authorization"]
    );
}

proptest! {
    #[test]
    fn a_stream_means_the_same_wherever_it_is_split(cuts in prop::collection::vec(0usize..3000, 0..40)) {
        let bytes = events();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % bytes.len()).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        prop_assert_eq!(chunks(&pieces), chunks(&[&bytes]));
    }

    #[test]
    fn any_bytes_are_translated_or_refused_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Foreign::Bedrock.request(&body, Rest::Drop);
        let _ = Foreign::Bedrock.answer(&body, &ABOUT);
        let _ = Foreign::Bedrock.error(&mut HeaderMap::new(), &body);
        let mut incoming = incoming();
        let _ = incoming.feed(&body);
        let _ = incoming.end();
    }
}
