//! What docs/protocols.md says of each member, against what becomes of it.

use penstock_core::config::Protocol;
use penstock_gateway::openai::Api;
use penstock_gateway::provider::{Misfit, Rest, Route};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../../docs/protocols.md");

const PROTOCOLS: [(Protocol, &str); 5] = [
    (Protocol::OpenAi, "a backend that speaks chat completions"),
    (
        Protocol::AzureOpenAi,
        "a backend that speaks chat completions",
    ),
    (Protocol::Anthropic, "a backend that speaks Messages"),
    (Protocol::Gemini, "Gemini"),
    (Protocol::Bedrock, "Bedrock"),
];

/// The cells of the lines of a section's tables, less their heads.
fn rows(title: &str) -> Vec<Vec<&'static str>> {
    let start = PAGE.find(&format!("\n## {title}\n"));
    let start = start.unwrap_or_else(|| panic!("there is no section '{title}'"));
    let section = &PAGE[start + 4..];
    let section = &section[..section.find("\n## ").unwrap_or(section.len())];
    cells(section)
}

fn cells(text: &'static str) -> Vec<Vec<&'static str>> {
    let lines = text.lines().filter(|line| line.starts_with("| "));
    lines
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect()
}

/// The names in backticks, each as far as it is a member's.
fn names(cell: &str) -> impl Iterator<Item = &str> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.map(|name| name.split(['.', '[', ':']).next().unwrap_or(name))
}

#[test]
fn the_table_says_who_may_ask_whom() {
    let rows = cells(PAGE);
    for api in Api::ALL {
        if api == Api::Http {
            continue;
        }
        // What stands for all paths below it.
        let rest = if api.is_open() { "/…" } else { "" };
        let call = format!("`/v1{}{rest}`", api.path());
        let mut of_call = rows.iter().filter(|row| row.len() == 6 && row[0] == call);
        let row = of_call
            .next()
            .unwrap_or_else(|| panic!("no line of {call}"));
        for ((protocol, _), cell) in PROTOCOLS.into_iter().zip(&row[1..]) {
            let expected = match Route::of(api, protocol) {
                None => "refused",
                Some(route) if route.is_straight() => "as it is",
                Some(_) => "translated",
            };
            assert_eq!(*cell, expected, "{call} of {protocol:?}");
        }
    }
}

fn with(base: &Value, members: &Value) -> Value {
    let mut request = base.clone();
    let members = members.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(members);
    request
}

/// What becomes of a request; the sort of change, as the tables name it, between it and `base`.
fn verdict(route: Route, base: &Value, request: &Value) -> &'static [&'static str] {
    let of = |request: &Value| {
        let sent = route.request(request.to_string().as_bytes(), Rest::Refuse)?;
        Ok::<_, Misfit>((sent.body, sent.include_usage, sent.vectors))
    };
    let plain = of(base).unwrap();
    match of(request) {
        Err(Misfit::Unsupported(_)) => &["refused"],
        Err(invalid) => panic!("{request}: {invalid:?}"),
        Ok(sent) if sent == plain => &["not sent", "in the path"],
        Ok(_) => &["carried", "emulated"],
    }
}

/// Each sample is a member's name, as the table has it, and what a request has then.
fn check(api: Api, title: &str, base: &Value, samples: &[(&str, Value)]) {
    for (protocol, out) in PROTOCOLS {
        let Some(route) = Route::of(api, protocol).filter(|route| !route.is_straight()) else {
            continue;
        };
        let rows = rows(&format!("{title}, asked of {out}"));
        assert!(rows.iter().any(|row| row[0] == "answer"), "{title}, {out}");
        for (name, members) in samples {
            let verdict = verdict(route, base, &with(base, members));
            let mut said = rows
                .iter()
                .filter(|row| names(row[0]).any(|named| named == *name))
                .peekable();
            if said.peek().is_none() {
                let rest = rows.iter().find(|row| row[0].contains("everything else"));
                assert!(rest.is_some() && verdict == ["refused"], "{out}: {name}");
                continue;
            }
            assert!(
                said.any(|row| verdict.iter().any(|word| row[1].contains(word))),
                "{title}, {out}: {members} is {verdict:?}, and the table of '{name}' does not say so"
            );
        }
    }
}

fn said(parts: &Value) -> Value {
    json!({"messages": [{"role": "user", "content": parts}]})
}

#[test]
fn the_tables_of_chat_completions_say_what_becomes_of_each_member() {
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let text = json!({"type": "text", "text": "Hi"});
    let base = with(
        &json!({"model": "m", "tools": [tool]}),
        &said(&json!([text])),
    );
    let part = |part: Value| said(&json!([text, part]));
    let image = |url: &str| part(json!({"type": "image_url", "image_url": {"url": url}}));
    let mut samples = vec![
        ("image_url", image("data:image/png;base64,AAAA")),
        ("image_url", image("https://x/y.png")),
        (
            "file",
            part(
                json!({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}),
            ),
        ),
        (
            "file",
            part(json!({"type": "file", "file": {"file_id": "f"}})),
        ),
        (
            "input_audio",
            part(json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})),
        ),
        (
            "tools",
            json!({"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
        ),
        (
            "tools",
            json!({"tools": [{"type": "function", "function": {"name": "g", "strict": true}}]}),
        ),
        (
            "response_format",
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}),
        ),
    ];
    samples.extend(values_of(&chat_values()));
    check(Api::Chat, "Chat completions", &base, &samples);
}

/// Samples of members with these values.
fn values_of(members: &[(&'static str, Value)]) -> Vec<(&'static str, Value)> {
    let of_member = |(name, values): &(&'static str, Value)| {
        let values = values.as_array().unwrap().iter();
        let samples = values.map(|value| (*name, json!({ *name: value })));
        samples.collect::<Vec<_>>()
    };
    members.iter().flat_map(of_member).collect()
}

fn chat_values() -> Vec<(&'static str, Value)> {
    vec![
        ("stream", json!([true])),
        ("stream_options", json!([{"include_usage": true}])),
        ("max_completion_tokens", json!([5])),
        ("max_tokens", json!([5])),
        ("temperature", json!([0.5, 1.5])),
        ("top_p", json!([0.5])),
        ("top_k", json!([5])),
        ("seed", json!([5])),
        ("stop", json!(["END"])),
        ("n", json!([1, 2])),
        ("logprobs", json!([false, true])),
        ("top_logprobs", json!([0, 1])),
        ("presence_penalty", json!([0, 0.5])),
        ("frequency_penalty", json!([0, 0.5])),
        ("logit_bias", json!([{}, {"1": 1}])),
        ("modalities", json!([["text"], ["audio"]])),
        ("store", json!([false, true])),
        ("verbosity", json!(["medium", "high"])),
        (
            "tool_choice",
            json!(["required", "none", {"type": "allowed_tools"}]),
        ),
        ("parallel_tool_calls", json!([false])),
        ("response_format", json!([{"type": "json_object"}])),
        ("reasoning_effort", json!(["low"])),
        ("user", json!(["u"])),
        ("safety_identifier", json!(["u"])),
        ("service_tier", json!(["auto", "default", "flex"])),
        ("metadata", json!([{"a": "b"}])),
        ("prompt_cache_key", json!(["k"])),
        ("prompt_cache_retention", json!(["24h"])),
        ("prediction", json!([{}])),
        ("audio", json!([{}])),
        ("functions", json!([[]])),
        ("web_search_options", json!([{}])),
        ("invented_later", json!([1])),
    ]
}

fn message() -> Value {
    let members =
        json!({"model": "m", "max_tokens": 9, "tools": [{"name": "f", "input_schema": {}}]});
    with(&members, &said(&json!([{"type": "text", "text": "Hi"}])))
}

fn message_samples() -> Vec<(&'static str, Value)> {
    let part = |part: Value| said(&json!([{"type": "text", "text": "Hi"}, part]));
    let base64 = |kind: &str| json!({"type": "base64", "media_type": kind, "data": "AAAA"});
    let at =
        |kind: &str| part(json!({"type": kind, "source": {"type": "url", "url": "https://x/y"}}));
    let mut samples = vec![
        (
            "image",
            part(json!({"type": "image", "source": base64("image/png")})),
        ),
        (
            "document",
            part(json!({"type": "document", "source": base64("application/pdf")})),
        ),
        (
            "document",
            part(
                json!({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}),
            ),
        ),
        ("document", at("document")),
        (
            "tools",
            json!({"tools": [{"name": "g", "input_schema": {}, "strict": true}]}),
        ),
        (
            "tools",
            json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ),
    ];
    samples.extend(values_of(&[
        ("stream", json!([true])),
        ("max_tokens", json!([5])),
        ("temperature", json!([0.5])),
        ("top_p", json!([0.5])),
        ("top_k", json!([5])),
        ("stop_sequences", json!([["END"]])),
        ("system", json!(["Be brief."])),
        (
            "tool_choice",
            json!([{"type": "any"}, {"type": "none"}, {"type": "auto", "disable_parallel_tool_use": true}]),
        ),
        (
            "thinking",
            json!([{"type": "enabled", "budget_tokens": 2048}, {"type": "disabled"}]),
        ),
        (
            "output_config",
            json!([{"effort": "low"}, {"format": {"type": "json_schema", "schema": {}}}]),
        ),
        ("metadata", json!([{"user_id": "u"}])),
        ("service_tier", json!(["auto", "standard_only"])),
        ("cache_control", json!([{"type": "ephemeral"}])),
        ("container", json!(["c"])),
        ("mcp_servers", json!([[]])),
        ("speed", json!(["fast"])),
        ("inference_geo", json!(["eu"])),
        ("invented_later", json!([1])),
    ]));
    samples
}

#[test]
fn the_tables_of_messages_say_what_becomes_of_each_member() {
    let mut samples = message_samples();
    let picture = json!({"type": "image", "source": {"type": "url", "url": "https://x/y.png"}});
    samples.push((
        "image",
        said(&json!([{"type": "text", "text": "Hi"}, picture])),
    ));
    check(Api::Messages, "Messages", &message(), &samples);
}

#[test]
fn the_table_of_counts_says_what_becomes_of_each_member() {
    let samples = message_samples();
    check(Api::CountTokens, "Counts of tokens", &message(), &samples);
}

#[test]
fn the_table_of_embeddings_says_what_becomes_of_each_member() {
    let base = json!({"model": "m", "input": "a"});
    let samples = [
        ("input", json!({"input": ["a", "b"]})),
        ("input", json!({"input": [1, 2]})),
        ("dimensions", json!({"dimensions": 3})),
        ("encoding_format", json!({"encoding_format": "base64"})),
        ("user", json!({"user": "u"})),
        ("invented_later", json!({"invented_later": 1})),
    ];
    check(Api::Embeddings, "Embeddings", &base, &samples);
}
