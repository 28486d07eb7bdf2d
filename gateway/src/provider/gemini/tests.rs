use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::provider::foreign::{About, Foreign, Incoming, Vectors};
use crate::provider::{Misfit, Rest, Route, Way};

const ABOUT: About<'static> = About {
    created: 7,
    id: "req-1",
    model: "asked",
    vectors: Vectors::Numbers,
};

fn translate(route: Way, request: &Value, rest: Rest) -> Result<Value, Misfit> {
    let route = Route {
        way: route,
        foreign: Some(Foreign::Gemini),
    };
    let translated = route.request(request.to_string().as_bytes(), rest)?;
    assert_eq!(translated.model_at, None);
    Ok(serde_json::from_slice(&translated.body).unwrap())
}

fn chat(extra: Value) -> Value {
    let mut request = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
    let members = extra.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(members);
    request
}

fn whole_chat() -> Value {
    let mut request = json!({
        "model": "m", "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 5, "max_completion_tokens": 64,
        "temperature": 1.50, "top_p": 0.9, "top_k": 40, "seed": 7, "stop": "END", "n": 2, "logprobs": true, "top_logprobs": 3,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "reasoning_effort": "medium", "user": "u", "service_tier": "auto",
        "parallel_tool_calls": true, "metadata": {}, "store": false,
        "tools": [{"type": "function", "function": {"name": "weather", "description": "Tells", "strict": true,
            "parameters": {"type": "object", "properties": {"z": {"type": "number"}, "a": {}}, "additionalProperties": false}}},
            {"type": "function", "function": {"name": "time"}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    });
    request["messages"] = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}}]},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": 1.50}"},
                "extra_content": {"google": {"thought_signature": "c2ln"}}},
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "tool_calls": [{"id": "c3", "type": "function", "function": {"name": "time", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c3", "content": "one"}
    ]);
    request
}

#[test]
fn a_chat_is_carried_whole_to_gemini() {
    let sent = translate(Way::Straight, &whole_chat(), Rest::Refuse).unwrap();
    insta::assert_json_snapshot!(sent);
}

#[test]
fn a_message_is_carried_by_way_of_a_chat() {
    let message = json!({
        "model": "m", "max_tokens": 64, "system": "Be brief.", "stop_sequences": ["END"], "top_k": 40,
        "thinking": {"type": "enabled", "budget_tokens": 4096},
        "messages": [{"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "is_error": true, "content": "no"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}]}],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}
    });
    let sent = translate(Way::MessagesOverChat, &message, Rest::Refuse).unwrap();
    insta::assert_json_snapshot!(sent);
}

#[test]
fn choices_of_tools_have_their_modes() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for (choice, mode, names) in [
        (json!("none"), "NONE", Value::Null),
        (json!("auto"), "AUTO", Value::Null),
        (json!("required"), "ANY", Value::Null),
        (
            json!({"type": "function", "function": {"name": "f"}}),
            "ANY",
            json!(["f"]),
        ),
    ] {
        let request = chat(json!({"tools": tools, "tool_choice": choice}));
        let sent = translate(Way::Straight, &request, Rest::Refuse).unwrap();
        let config = &sent["toolConfig"]["functionCallingConfig"];
        assert_eq!(config["mode"], mode);
        assert_eq!(config["allowedFunctionNames"], names);
    }
}

#[test]
fn what_gemini_has_not_is_refused_by_name_or_dropped() {
    let picture = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}, {"type": "text", "text": "Hi"}]});
    for (extra, param) in [
        (json!({"logit_bias": {"1": 2}}), "logit_bias"),
        (json!({"parallel_tool_calls": false}), "parallel_tool_calls"),
        (json!({"service_tier": "flex"}), "service_tier"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"invented_later": 1}), "invented_later"),
        (
            json!({"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
            "tools[0].type",
        ),
        (
            json!({"messages": [picture]}),
            "messages[0].content[0].image_url.url",
        ),
    ] {
        let refused = translate(Way::Straight, &chat(extra.clone()), Rest::Refuse);
        assert_eq!(refused, Err(Misfit::Unsupported(param.to_owned())));
        let sent = translate(Way::Straight, &chat(extra), Rest::Drop).unwrap();
        assert_eq!(sent["contents"][0]["parts"], json!([{"text": "Hi"}]));
    }
    let message = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": true}});
    assert_eq!(
        translate(Way::MessagesOverChat, &message, Rest::Refuse),
        Err(Misfit::Unsupported(
            "tool_choice.disable_parallel_tool_use".to_owned()
        ))
    );
}

#[test]
fn what_is_wrong_by_its_own_protocol_is_named() {
    for (extra, param) in [
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "tool", "tool_call_id": "gone", "content": "x"}]}),
            "messages[0].tool_call_id",
        ),
        (json!({"reasoning_effort": "much"}), "reasoning_effort"),
        (json!({"n": "two"}), "n"),
    ] {
        match translate(Way::Straight, &chat(extra), Rest::Drop) {
            Err(Misfit::Invalid(found, _)) => assert_eq!(found, param),
            other => panic!("{param}: {other:?}"),
        }
    }
}

fn answer(body: &Value) -> Option<Value> {
    let answer = Foreign::Gemini.answer(body.to_string().as_bytes(), &ABOUT)?;
    Some(serde_json::from_slice(&answer).unwrap())
}

#[test]
fn a_whole_answer_becomes_a_chat_completion() {
    let told = answer(&json!({
        "responseId": "r1", "modelVersion": "gemini-3-pro",
        "candidates": [{"index": 0, "finishReason": "STOP",
            "content": {"role": "model", "parts": [{"text": "hm", "thought": true}, {"text": "Let me "}, {"text": "see."},
                {"functionCall": {"name": "weather", "args": {"city": "Ulm", "n": 1.50}}, "thoughtSignature": "c2ln"},
                {"functionCall": {"id": "own", "name": "time"}}]},
            "logprobsResult": {"chosenCandidates": [{"token": "é", "tokenId": 1, "logProbability": -0.5}],
                "topCandidates": [{"candidates": [{"token": "é", "logProbability": -0.5}, {"token": "e", "logProbability": -1.5}]}]}}],
        "usageMetadata": {"promptTokenCount": 30, "cachedContentTokenCount": 20, "candidatesTokenCount": 3, "thoughtsTokenCount": 2, "totalTokenCount": 35}
    }));
    insta::assert_json_snapshot!(told.unwrap());
    assert_eq!(answer(&json!({"candidates": []})), None);
    assert_eq!(answer(&json!([])), None);
}

#[test]
fn the_reasons_to_finish_have_their_counterparts() {
    for (reason, expected) in [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("MALFORMED_FUNCTION_CALL", "abort"),
        ("UNEXPECTED_TOOL_CALL", "abort"),
        ("TOO_MANY_TOOL_CALLS", "abort"),
        ("MISSING_THOUGHT_SIGNATURE", "abort"),
        ("INVENTED_LATER", "stop"),
    ] {
        let told = answer(&json!({"candidates": [{"finishReason": reason}]})).unwrap();
        assert_eq!(told["choices"][0]["finish_reason"], expected);
    }
    let blocked = json!({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 4}});
    let told = answer(&blocked).unwrap();
    assert_eq!(told["choices"][0]["finish_reason"], "content_filter");
    assert_eq!(told["model"], "asked");
}

fn event(value: &Value) -> String {
    format!("data: {value}\r\n\r\n")
}

fn candidate(parts: &Value, finish: Option<&str>) -> String {
    let mut candidate = json!({"index": 0, "content": {"role": "model", "parts": parts}});
    if let Some(reason) = finish {
        candidate["finishReason"] = json!(reason);
    }
    event(
        &json!({"candidates": [candidate], "responseId": "r1", "modelVersion": "gemini-3-pro",
        "usageMetadata": {"promptTokenCount": 30, "cachedContentTokenCount": 20, "candidatesTokenCount": 3, "thoughtsTokenCount": 2}}),
    )
}

fn events() -> String {
    [
        candidate(&json!([{"text": "hm", "thought": true}]), None),
        candidate(&json!([{"text": "Let mé "}]), None),
        candidate(
            &json!([{"text": "see."}, {"functionCall": {"name": "weather", "args": {"city": "Ulm"}}, "thoughtSignature": "c2ln"}]),
            None,
        ),
        candidate(
            &json!([{"functionCall": {"name": "time", "args": {}}}, {"text": ""}]),
            Some("STOP"),
        ),
    ]
    .concat()
}

fn incoming() -> Incoming {
    let mut headers = http::HeaderMap::new();
    let kind = http::HeaderValue::from_static("text/event-stream");
    headers.insert(http::header::CONTENT_TYPE, kind);
    Foreign::Gemini.chunks(&mut headers, &ABOUT).unwrap()
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
    insta::assert_snapshot!(chunks(&[events().as_bytes()]));
}

#[test]
fn a_stream_that_does_not_say_why_it_ended_has_no_end() {
    let cut = candidate(&json!([{"text": "Let me"}]), None);
    let told = chunks(&[cut.as_bytes()]);
    assert!(
        told.contains("Let me") && !told.contains("[DONE]"),
        "{told}"
    );
    assert!(!chunks(&[]).contains("[DONE]"));
}

#[test]
fn a_count_that_did_not_come_is_not_zero() {
    let bare =
        json!({"candidates": [{"content": {"parts": [{"text": "Hi"}]}, "finishReason": "STOP"}]});
    assert_eq!(answer(&bare).unwrap().get("usage"), None);
    let told = chunks(&[event(&bare).as_bytes()]);
    assert!(!told.contains("usage") && told.ends_with("data: [DONE]\n\n"));
}

#[test]
fn blocks_and_errors_inside_a_stream_are_told() {
    let blocked = event(&json!({"promptFeedback": {"blockReason": "OTHER"}}));
    let told = chunks(&[blocked.as_bytes()]);
    assert!(told.contains("\"content_filter\"") && told.ends_with("data: [DONE]\n\n"));
    let error = event(&json!({"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}));
    let told = chunks(&[error.as_bytes()]);
    assert!(
        told.starts_with("data: {\"error\":{") && told.contains("busy"),
        "{told}"
    );
}

#[test]
fn a_refusal_is_told_in_the_shape_of_chats_and_says_when_to_come_back() {
    let body = json!({"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED",
        "details": [{"@type": "x"}, {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.07s"}]}});
    let mut headers = http::HeaderMap::new();
    let told = Foreign::Gemini.error(&mut headers, body.to_string().as_bytes());
    let told: Value = serde_json::from_slice(&told).unwrap();
    assert_eq!(told["error"]["message"], "quota");
    assert_eq!(headers["retry-after"], "35");
    assert!(Foreign::Gemini.error(&mut headers, b"<html>").is_empty());
}

proptest! {
    #[test]
    fn a_stream_means_the_same_wherever_it_is_split(cuts in prop::collection::vec(0usize..3000, 0..40)) {
        let text = events();
        let bytes = text.as_bytes();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % bytes.len()).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        prop_assert_eq!(chunks(&pieces), chunks(&[bytes]));
    }

    #[test]
    fn any_bytes_are_translated_or_refused_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Foreign::Gemini.request(&body, Rest::Drop);
        let _ = Foreign::Gemini.answer(&body, &ABOUT);
        let mut headers = http::HeaderMap::new();
        let _ = Foreign::Gemini.error(&mut headers, &body);
        let bytes = Bytes::copy_from_slice(&body);
        let mut incoming = incoming();
        let _ = incoming.feed(&bytes);
        let _ = incoming.end();
    }
}
