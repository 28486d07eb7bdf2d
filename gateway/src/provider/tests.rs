//! What translations carry, both ways.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

mod habits;

fn translate(way: Way, request: &Value, rest: Rest) -> Result<Value, Misfit> {
    let body = request.to_string();
    let translated = way.request(body.as_bytes(), rest)?;
    let model: String =
        serde_json::from_slice(&translated.body[translated.model_at.unwrap()]).unwrap();
    assert_eq!(Some(model.as_str()), request["model"].as_str());
    Ok(serde_json::from_slice(&translated.body).unwrap())
}

fn refused(way: Way, request: &Value) -> String {
    match translate(way, request, Rest::Refuse) {
        Err(Misfit::Unsupported(param)) => param,
        other => panic!("{request}: {other:?}"),
    }
}

fn chat(extra: Value) -> Value {
    let mut request = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
    request
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    request
}

fn message(extra: Value) -> Value {
    let mut request =
        json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]});
    request
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    request
}

/// A conversation with everything that both protocols have.
fn chat_in_full() -> Value {
    json!({
        "model": "cl\"aude", "stream": true, "stream_options": {"include_usage": true},
        "max_completion_tokens": 50, "temperature": 0.5, "top_p": 0.9, "stop": ["END", "STOP"], "n": 1,
        "user": "u1", "parallel_tool_calls": false, "tool_choice": "required", "reasoning_effort": "high",
        "metadata": {"a": "b"}, "frequency_penalty": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"z": {}, "a": {}}}}}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "And kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Ulm\"}"}},
                {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
            {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "rain"}]},
            {"role": "user", "content": "And now?"}
        ]
    })
}

#[test]
fn a_chat_is_carried_whole_to_anthropic() {
    let sent = translate(Way::ChatOverMessages, &chat_in_full(), Rest::Refuse).unwrap();
    insta::assert_json_snapshot!(sent);
}

fn message_in_full() -> Value {
    json!({
        "model": "qwen", "stream": true, "max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "stop_sequences": ["END"], "metadata": {"user_id": "u1"}, "service_tier": "standard_only",
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "And kind."}],
        "thinking": {"type": "enabled", "budget_tokens": 4000},
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": true},
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"z": {}, "a": {}}}, "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "See"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                {"type": "document", "title": "a.pdf", "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"}},
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "plain"}}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Wait"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Ulm"}}, {"type": "tool_use", "id": "t2", "name": "weather", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}, {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": true},
                {"type": "text", "text": "And now?"}]}
        ]
    })
}

#[test]
fn a_message_is_carried_whole_to_a_chat() {
    let sent = translate(Way::MessagesOverChat, &message_in_full(), Rest::Refuse).unwrap();
    insta::assert_json_snapshot!(sent);
}

#[test]
fn a_count_is_of_the_conversation_that_a_chat_would_be() {
    let mut counted = message_in_full();
    let blocks = counted["messages"][0]["content"].as_array_mut().unwrap();
    blocks.retain(|block| block["type"] != "image" && block["title"].is_null());
    let results = &mut counted["messages"][2]["content"];
    results[0]["content"].as_array_mut().unwrap().truncate(1);
    let chat = translate(Way::MessagesOverChat, &counted, Rest::Refuse).unwrap();
    let sent = translate(Way::CountOverTokenize, &counted, Rest::Refuse).unwrap();
    let same = ["model", "messages", "tools"].map(|name| (name.to_owned(), chat[name].clone()));
    let mut expected: serde_json::Map<String, Value> = same.into_iter().collect();
    expected.insert("add_generation_prompt".to_owned(), true.into());
    assert_eq!(sent, Value::Object(expected));
}

#[test]
fn what_an_engine_cannot_count_is_refused_by_name_or_dropped() {
    let way = Way::CountOverTokenize;
    let of = |block: Value| {
        message(
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, block]}]}),
        )
    };
    let picture = json!({"type": "image", "source": {"type": "url", "url": "https://x/y.png"}});
    let file = json!({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"}});
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": [picture.clone()]});
    for (block, param) in [
        (picture, "messages[0].content[1].type"),
        (file, "messages[0].content[1].type"),
        (result, "messages[0].content[1].content[0].type"),
    ] {
        assert_eq!(refused(way, &of(block.clone())), param);
        let dropped = translate(way, &of(block), Rest::Drop).unwrap();
        assert!(!dropped.to_string().contains("image"), "{dropped}");
    }
}

#[test]
fn what_an_engine_counted_is_what_a_caller_is_told() {
    let counted = br#"{"count":3,"max_model_len":512,"tokens":[1,2,3],"token_strs":null}"#;
    let answer = Way::CountOverTokenize.answer(counted, 0);
    assert_eq!(answer.unwrap(), r#"{"input_tokens":3}"#);
    assert_eq!(Way::CountOverTokenize.answer(b"{\"tokens\":[]}", 0), None);
}

#[test]
fn schemas_keep_their_order_because_models_read_it() {
    let body = chat_in_full().to_string().replace(
        r#"{"properties":{"a":{},"z":{}},"type":"object"}"#,
        r#"{"z": 1, "a":2}"#,
    );
    let sent = Way::ChatOverMessages
        .request(body.as_bytes(), Rest::Refuse)
        .unwrap();
    let sent = String::from_utf8(sent.body.to_vec()).unwrap();
    assert!(sent.contains(r#""input_schema":{"z": 1, "a":2}"#), "{sent}");
}

#[test]
fn what_anthropic_has_not_is_refused_by_name_or_dropped() {
    for (extra, param) in [
        (json!({"n": 2}), "n"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"seed": 1}), "seed"),
        (json!({"logit_bias": {"1": 2}}), "logit_bias"),
        (json!({"presence_penalty": 0.5}), "presence_penalty"),
        (json!({"temperature": 1.5}), "temperature"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"store": true}), "store"),
        (json!({"service_tier": "flex"}), "service_tier"),
        (json!({"invented_later": {}}), "invented_later"),
        (
            json!({"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
            "tools[0].type",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}),
            "messages[0].content[0].type",
        ),
    ] {
        let request = chat(extra);
        assert_eq!(refused(Way::ChatOverMessages, &request), param);
        if param.starts_with("messages") {
            continue;
        }
        let sent = translate(Way::ChatOverMessages, &request, Rest::Drop).unwrap();
        assert_eq!(sent["messages"][0]["content"][0]["text"], "Hi");
        assert!(sent.get(param).is_none(), "{sent}");
    }
}

#[test]
fn what_says_nothing_is_no_reason_to_refuse() {
    let harmless = json!({
        "n": 1, "logprobs": false, "top_logprobs": 0, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {},
        "modalities": ["text"], "store": false, "verbosity": "medium", "seed": null, "prediction": {}, "prompt_cache_key": "k"
    });
    let sent = translate(Way::ChatOverMessages, &chat(harmless), Rest::Refuse).unwrap();
    let expected = json!({"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]});
    assert_eq!(sent, expected);
}

#[test]
fn what_chats_have_not_is_refused_by_name_or_dropped() {
    for (extra, param) in [
        (json!({"container": "c"}), "container"),
        (json!({"mcp_servers": []}), "mcp_servers"),
        (
            json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
            "tools[0].type",
        ),
        (json!({"system": [{"type": "image"}]}), "system[0].type"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "document", "citations": {"enabled": true}, "source": {"type": "text", "media_type": "text/plain", "data": "x"}}, {"type": "text", "text": "Hi"}]}]}),
            "messages[0].content[0].citations",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}, {"type": "text", "text": "Hi"}]}]}),
            "messages[0].content[0].source",
        ),
    ] {
        let request = message(extra);
        assert_eq!(refused(Way::MessagesOverChat, &request), param);
        let sent = translate(Way::MessagesOverChat, &request, Rest::Drop).unwrap();
        assert_eq!(
            sent["messages"].as_array().unwrap().last().unwrap()["content"],
            "Hi"
        );
    }
}

#[test]
fn what_is_wrong_by_its_own_protocol_is_named() {
    for (way, request, param) in [
        (
            Way::ChatOverMessages,
            chat(json!({"messages": "Hi"})),
            "messages",
        ),
        (
            Way::ChatOverMessages,
            chat(json!({"messages": []})),
            "messages",
        ),
        (
            Way::ChatOverMessages,
            chat(json!({"messages": [{"role": "me", "content": "Hi"}]})),
            "messages[0].role",
        ),
        (
            Way::ChatOverMessages,
            chat(json!({"max_tokens": "many"})),
            "max_tokens",
        ),
        (
            Way::ChatOverMessages,
            chat(json!({"tool_choice": "perhaps"})),
            "tool_choice",
        ),
        (
            Way::ChatOverMessages,
            chat(json!({"reasoning_effort": "much"})),
            "reasoning_effort",
        ),
        (
            Way::ChatOverMessages,
            chat(
                json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1]"}}]}]}),
            ),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            Way::MessagesOverChat,
            message(json!({"messages": 3})),
            "messages",
        ),
        (
            Way::MessagesOverChat,
            message(json!({"tool_choice": {"type": "tool"}})),
            "tool_choice",
        ),
        (
            Way::MessagesOverChat,
            message(json!({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]})),
            "messages[0].content[0].tool_use_id",
        ),
    ] {
        match translate(way, &request, Rest::Drop) {
            Err(Misfit::Invalid(found, _)) => assert_eq!(found, param),
            other => panic!("{request}: {other:?}"),
        }
    }
}

#[test]
fn a_whole_message_becomes_a_chat_completion() {
    let message = json!({
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "tool_use", "stop_sequence": null,
        "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Let me "}, {"type": "text", "text": "see."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Ulm"}}],
        "usage": {"input_tokens": 10, "cache_creation_input_tokens": 1, "cache_read_input_tokens": 20, "output_tokens": 5}
    });
    let answer = Way::ChatOverMessages
        .answer(message.to_string().as_bytes(), 7)
        .unwrap();
    insta::assert_json_snapshot!(serde_json::from_slice::<Value>(&answer).unwrap());
    assert_eq!(
        Way::ChatOverMessages.answer(br#"{"type":"error"}"#, 7),
        None
    );
}

#[test]
fn a_whole_chat_completion_becomes_a_message() {
    let completion = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "qwen",
        "choices": [{"index": 0, "finish_reason": "tool_calls", "stop_reason": null, "message": {"role": "assistant", "content": "Let me see.", "reasoning": "hm", "refusal": null,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Ulm\"}"}},
                {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{\"ci"}}]}}],
        "usage": {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35, "prompt_tokens_details": {"cached_tokens": 20}}
    });
    let answer = Way::MessagesOverChat
        .answer(completion.to_string().as_bytes(), 7)
        .unwrap();
    insta::assert_json_snapshot!(serde_json::from_slice::<Value>(&answer).unwrap());
    assert_eq!(Way::MessagesOverChat.answer(br#"{"choices":[]}"#, 7), None);
}

#[test]
fn the_reasons_to_stop_have_their_counterparts() {
    for (finish, stopped_at, expected) in [
        ("stop", Value::Null, "end_turn"),
        ("stop", json!("END"), "stop_sequence"),
        ("stop", json!(151_645), "end_turn"),
        ("length", Value::Null, "max_tokens"),
        ("content_filter", Value::Null, "refusal"),
    ] {
        let completion = json!({"choices": [{"finish_reason": finish, "stop_reason": stopped_at, "message": {"content": "x"}}]});
        let answer = Way::MessagesOverChat
            .answer(completion.to_string().as_bytes(), 7)
            .unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["stop_reason"], expected);
        assert_eq!(
            answer["stop_sequence"].is_string(),
            expected == "stop_sequence"
        );
    }
    for (stop, expected) in [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
    ] {
        let message = json!({"content": [], "stop_reason": stop});
        let answer = Way::ChatOverMessages
            .answer(message.to_string().as_bytes(), 7)
            .unwrap();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["choices"][0]["finish_reason"], expected);
    }
}

fn chunk(delta: Value, finish: Value) -> String {
    let chunk = json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "qwen", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
    format!("data: {chunk}\n\n")
}

fn call(index: u32, id: Option<&str>, name: Option<&str>, arguments: &str) -> Value {
    let mut call = json!({"index": index, "function": {"arguments": arguments}});
    if let (Some(id), Some(name)) = (id, name) {
        call["id"] = json!(id);
        call["type"] = json!("function");
        call["function"]["name"] = json!(name);
    }
    json!({"tool_calls": [call]})
}

fn chunks() -> String {
    [
        chunk(json!({"role": "assistant", "content": ""}), Value::Null),
        chunk(json!({"reasoning_content": "hm "}), Value::Null),
        chunk(json!({"reasoning": "hm"}), Value::Null),
        chunk(json!({"content": "Let mé "}), Value::Null),
        chunk(json!({"content": "see."}), Value::Null),
        chunk(call(0, Some("c1"), Some("weather"), ""), Value::Null),
        chunk(call(0, None, None, "{\"city\":"), Value::Null),
        chunk(call(0, None, None, " \"Ulm\"}"), Value::Null),
        chunk(call(1, Some("c2"), Some("weather"), "{}"), Value::Null),
        chunk(json!({}), json!("tool_calls")),
        format!("data: {}\n\n", json!({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 20}}})),
        "data: [DONE]\n\n".to_owned(),
    ]
    .concat()
}

fn event(kind: &str, mut members: Value) -> String {
    members["type"] = json!(kind);
    format!("event: {kind}\ndata: {members}\n\n")
}

fn events() -> String {
    [
        event("message_start", json!({"message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": [], "usage": {"input_tokens": 10, "cache_read_input_tokens": 20, "output_tokens": 1}}})),
        event("content_block_start", json!({"index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}})),
        event("content_block_delta", json!({"index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}})),
        event("content_block_delta", json!({"index": 0, "delta": {"type": "signature_delta", "signature": "s"}})),
        event("content_block_stop", json!({"index": 0})),
        event("content_block_start", json!({"index": 1, "content_block": {"type": "text", "text": ""}})),
        event("ping", json!({})),
        event("content_block_delta", json!({"index": 1, "delta": {"type": "text_delta", "text": "Let mé see."}})),
        event("content_block_stop", json!({"index": 1})),
        event("content_block_start", json!({"index": 2, "content_block": {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}})),
        event("content_block_delta", json!({"index": 2, "delta": {"type": "input_json_delta", "partial_json": ""}})),
        event("content_block_delta", json!({"index": 2, "delta": {"type": "input_json_delta", "partial_json": "{\"city\": \"Ulm\"}"}})),
        event("content_block_stop", json!({"index": 2})),
        event("content_block_start", json!({"index": 3, "content_block": {"type": "tool_use", "id": "t2", "name": "weather", "input": {}}})),
        event("content_block_stop", json!({"index": 3})),
        event("message_delta", json!({"delta": {"stop_reason": "tool_use", "stop_sequence": null}, "usage": {"output_tokens": 5}})),
        event("message_stop", json!({})),
    ]
    .concat()
}

fn stream(way: Way, pieces: &[&[u8]]) -> String {
    let mut translator = way.stream(7, true).unwrap();
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&translator.feed(piece).unwrap());
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn chunks_become_the_events_of_a_message() {
    insta::assert_snapshot!(stream(Way::MessagesOverChat, &[chunks().as_bytes()]));
}

#[test]
fn events_of_a_message_become_chunks() {
    insta::assert_snapshot!(stream(Way::ChatOverMessages, &[events().as_bytes()]));
}

#[test]
fn an_error_inside_a_stream_is_told_in_the_callers_words() {
    let error = "data: {\"error\":{\"message\":\"busy\"}}\n\n";
    let told = stream(Way::MessagesOverChat, &[error.as_bytes()]);
    assert_eq!(
        told,
        "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"busy\"}}\n\n"
    );
    for (error, kind) in [
        (json!({"type": "rate_limit_exceeded"}), "rate_limit_error"),
        (json!({"code": 503}), "overloaded_error"),
        (json!({"type": "server_error"}), "api_error"),
    ] {
        let error = format!("data: {}\n\n", json!({ "error": error }));
        let told = stream(Way::MessagesOverChat, &[error.as_bytes()]);
        assert!(told.contains(&format!(r#""type":"{kind}""#)), "{told}");
    }
    let error = event(
        "error",
        json!({"error": {"type": "overloaded_error", "message": "busy"}}),
    );
    let told = stream(Way::ChatOverMessages, &[error.as_bytes()]);
    let told: Value = serde_json::from_str(told.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(told["error"]["message"], "busy");
    assert_eq!(told["error"]["type"], "overloaded_error");
}

#[test]
fn a_backends_refusal_is_told_in_the_callers_shape() {
    let status = StatusCode::BAD_REQUEST;
    let openai = br#"{"error":{"message":"no","type":"x","code":null}}"#;
    let told: Value = serde_json::from_slice(&error(openai, status, Dialect::Anthropic)).unwrap();
    let expected =
        json!({"type": "error", "error": {"type": "invalid_request_error", "message": "no"}});
    assert_eq!(told, expected);
    let told: Value =
        serde_json::from_slice(&error(told.to_string().as_bytes(), status, Dialect::OpenAi))
            .unwrap();
    assert_eq!(told["error"]["type"], "invalid_request_error");
    assert!(error(b"<html>", status, Dialect::OpenAi).is_empty());
}

proptest! {
    #[test]
    fn a_stream_means_the_same_wherever_it_is_split(cuts in prop::collection::vec(0usize..3000, 0..40)) {
        for (way, text) in [(Way::MessagesOverChat, chunks()), (Way::ChatOverMessages, events())] {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % bytes.len()).collect();
            cuts.push(0);
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(stream(way, &pieces), stream(way, &[bytes]));
        }
    }

    #[test]
    fn any_bytes_are_translated_or_refused_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        for way in [Way::ChatOverMessages, Way::MessagesOverChat] {
            let _ = way.request(&body, Rest::Drop);
            let _ = way.answer(&body, 7);
            let _ = way.stream(7, true).unwrap().feed(&body);
        }
    }
}
