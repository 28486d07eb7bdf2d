//! What vendors do that is easily overlooked.

use super::*;

#[test]
fn calls_whose_blocks_are_open_at_a_time_keep_their_own_arguments() {
    let start = |index: u32, kind: &str| {
        let block = json!({"type": kind, "id": format!("t{index}"), "name": "f", "input": {}});
        event(
            "content_block_start",
            json!({"index": index, "content_block": block}),
        )
    };
    let part = |index: u32, json: &str| {
        let delta = json!({"type": "input_json_delta", "partial_json": json});
        event(
            "content_block_delta",
            json!({"index": index, "delta": delta}),
        )
    };
    let stop = |index: u32| event("content_block_stop", json!({"index": index}));
    let events = [
        start(0, "tool_use"),
        start(1, "tool_use"),
        part(0, "{\"a\":"),
        // A tool that runs at Anthropic is no call of the caller's.
        start(2, "server_tool_use"),
        part(2, "{\"query\":0}"),
        part(1, "{\"b\":"),
        part(0, "1}"),
        part(1, "2}"),
        stop(2),
        start(3, "tool_use"),
        stop(0),
        stop(1),
        stop(3),
    ];
    let told = stream(Way::ChatOverMessages, &[events.concat().as_bytes()]);
    let mut calls = [String::new(), String::new(), String::new()];
    for data in told.lines().filter_map(|line| line.strip_prefix("data: ")) {
        let chunk: Value = serde_json::from_str(data).unwrap();
        let call = &chunk["choices"][0]["delta"]["tool_calls"][0];
        let index = usize::try_from(call["index"].as_u64().unwrap()).unwrap();
        calls[index].push_str(call["function"]["arguments"].as_str().unwrap());
    }
    assert_eq!(calls, ["{\"a\":1}", "{\"b\":2}", "{}"]);
}

#[test]
fn a_call_that_was_forced_is_a_use_of_a_tool_though_it_ends_in_stop() {
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let completion = json!({"choices": [{"finish_reason": "stop", "message": {"content": null, "tool_calls": [call]}}]});
    let answer = Way::MessagesOverChat.answer(completion.to_string().as_bytes(), 7);
    let answer: Value = serde_json::from_slice(&answer.unwrap()).unwrap();
    assert_eq!(answer["stop_reason"], "tool_use");
    let chunks = [
        chunk(self::call(0, Some("c1"), Some("f"), "{}"), Value::Null),
        chunk(json!({}), json!("stop")),
        "data: [DONE]\n\n".to_owned(),
    ];
    let told = stream(Way::MessagesOverChat, &[chunks.concat().as_bytes()]);
    assert!(told.contains(r#""stop_reason":"tool_use""#), "{told}");
}

#[test]
fn ids_of_calls_that_anthropic_refuses_are_changed_alike_wherever_they_stand() {
    let call = json!({"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let said = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "1"}]);
    let sent = translate(
        Way::ChatOverMessages,
        &chat(json!({"messages": said})),
        Rest::Refuse,
    );
    let sent = sent.unwrap();
    assert_eq!(sent["messages"][1]["content"][0]["id"], "functions_f_0");
    assert_eq!(
        sent["messages"][2]["content"][0]["tool_use_id"],
        "functions_f_0"
    );
}

#[test]
fn texts_of_white_space_are_left_out_where_anthropic_refuses_them() {
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let said = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n\n", "tool_calls": [call]}]);
    let sent = translate(
        Way::ChatOverMessages,
        &chat(json!({"messages": said})),
        Rest::Refuse,
    );
    let content = sent.unwrap()["messages"][1]["content"].clone();
    assert_eq!(
        content,
        json!([{"type": "tool_use", "id": "c1", "name": "f", "input": {}}])
    );
}

#[test]
fn counts_beyond_all_bounds_are_no_more_than_the_largest() {
    let most = u64::MAX;
    let usage = json!({"input_tokens": most, "cache_read_input_tokens": 1, "output_tokens": most});
    let message = json!({"content": [], "usage": usage}).to_string();
    let answer = Way::ChatOverMessages.answer(message.as_bytes(), 7).unwrap();
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["usage"]["total_tokens"], most);
}
