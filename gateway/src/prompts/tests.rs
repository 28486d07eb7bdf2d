//! Prompts in the bodies of every protocol.

use penstock_core::config::PromptMessage;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const SYSTEM: &str = "Be \"kind\".";

/// `house` has a system prompt only, `support` variables in two versions.
fn library() -> Library {
    let prompt = |name: &str, version, system: Option<&str>, messages: &[(Role, &str)]| {
        let messages = messages.iter().map(|(role, text)| PromptMessage {
            role: *role,
            text: (*text).to_owned(),
        });
        config::Prompt {
            name: name.to_owned(),
            version,
            system: system.map(str::to_owned),
            messages: messages.collect(),
        }
    };
    Library::new(&[
        prompt("house", 1, Some(SYSTEM), &[]),
        prompt("support", 9, Some("Help {{who}}."), &[]),
        prompt(
            "support",
            10,
            None,
            &[
                (Role::User, "I am {{who}}, {{who}}."),
                (Role::Assistant, "Hi."),
            ],
        ),
    ])
    .unwrap()
}

fn put(api: Api, is_ruled: bool, body: &str) -> Result<(String, Vec<String>), Reject> {
    let library = library();
    let house = PromptRef {
        name: "house".to_owned(),
        version: 1,
    };
    let own = library.find(&house).filter(|_| is_ruled);
    let (mut edits, mut changed) = (Edits::default(), Vec::new());
    let own = own.map(AsRef::as_ref);
    put_in(
        api,
        own,
        &library,
        body.as_bytes(),
        &mut edits,
        &mut changed,
    )?;
    let body = edits.apply(body.as_bytes());
    Ok((String::from_utf8(body.to_vec()).unwrap(), changed))
}

#[test]
fn a_rules_prompt_comes_before_the_callers_and_every_other_byte_stays() {
    for (api, body, expected) in [
        (
            Api::Chat,
            r#"{"x":1.50,"messages":[ {"role":"user","content":"hi"}]}"#,
            r#"{"x":1.50,"messages":[{"role":"system","content":"Be \"kind\"."}, {"role":"user","content":"hi"}]}"#,
        ),
        (
            Api::Chat,
            r#"{"messages":[{"content":"Mine\u0021","role":"system"},{"role":"user","content":"hi"}]}"#,
            r#"{"messages":[{"content":"Be \"kind\".\n\nMine\u0021","role":"system"},{"role":"user","content":"hi"}]}"#,
        ),
        (
            Api::Chat,
            r#"{"messages":[{"role":"developer","content":[{"type":"text","text":"Mine"}]}]}"#,
            r#"{"messages":[{"role":"developer","content":[{"text":"Be \"kind\".","type":"text"},{"type":"text","text":"Mine"}]}]}"#,
        ),
        (
            Api::Chat,
            r#"{"messages":[{"role":"system","content":null}]}"#,
            r#"{"messages":[{"role":"system","content":"Be \"kind\"."},{"role":"system","content":null}]}"#,
        ),
        (
            Api::Chat,
            r#"{"messages":[ ]}"#,
            r#"{"messages":[{"role":"system","content":"Be \"kind\"."} ]}"#,
        ),
        (
            Api::Responses,
            r#"{"instructions":"Mine","input":"hi"}"#,
            r#"{"instructions":"Be \"kind\".\n\nMine","input":"hi"}"#,
        ),
        (
            Api::Responses,
            r#"{"instructions":null,"input":"hi"}"#,
            r#"{"instructions":"Be \"kind\".","input":"hi"}"#,
        ),
        (
            Api::Messages,
            r#"{"messages":[]}"#,
            r#"{"system":"Be \"kind\".","messages":[]}"#,
        ),
        (
            Api::CountTokens,
            r#"{"system":[{"type":"text","text":"Mine"}],"messages":[]}"#,
            r#"{"system":[{"text":"Be \"kind\".","type":"text"},{"type":"text","text":"Mine"}],"messages":[]}"#,
        ),
        (Api::Completions, r#"{"prompt":"hi"}"#, r#"{"prompt":"hi"}"#),
        (Api::Embeddings, r#"{"input":"hi"}"#, r#"{"input":"hi"}"#),
    ] {
        let (got, changed) = put(api, true, body).unwrap();
        let same = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(same(&got), same(expected), "{got}");
        // The order of members of what is added is serde_json's business.
        assert_eq!(got.len(), expected.len(), "{got}");
        let is_added = got != body;
        assert_eq!(changed, vec!["prompt house@1"; usize::from(is_added)]);
    }
}

#[test]
fn a_caller_gets_the_stored_prompt_that_it_asks_for() {
    let hi = json!({"role": "user", "content": "hi"});
    let ada = json!({"role": "user", "content": "I am Ada, Ada."});
    let well = json!({"role": "assistant", "content": "Hi."});
    let newest = r#""prompt":{"id":"support","variables":{"who":"Ada"}}"#;
    let nine = r#""prompt":{"id":"support","version":"9","variables":{"who":{"type":"input_text","text":"Ada"}}}"#;
    for (api, body, expected) in [
        (
            Api::Responses,
            format!(r#"{{{newest},"model":"m","input":"hi"}}"#),
            json!({"model": "m", "input": [ada, well, hi]}),
        ),
        (
            Api::Responses,
            format!(r#"{{"model":"m",{newest}}}"#),
            json!({"model": "m", "input": [ada, well]}),
        ),
        (
            Api::Responses,
            format!(r#"{{"model":"m","input":[],{nine}}}"#),
            json!({"model": "m", "input": [], "instructions": "Help Ada."}),
        ),
        (
            Api::Chat,
            format!(r#"{{"model":"m",{newest},"messages":[{hi}]}}"#),
            json!({"model": "m", "messages": [ada, well, hi]}),
        ),
        (
            Api::Chat,
            format!(
                r#"{{"model":"m",{newest},"messages":[{{"role":"system","content":"S"}},{hi}]}}"#
            ),
            json!({"model": "m", "messages": [{"role": "system", "content": "S"}, ada, well, hi]}),
        ),
        (
            Api::Chat,
            format!(r#"{{"model":"m","messages":null,{nine}}}"#),
            json!({"model": "m", "messages": [{"role": "system", "content": "Help Ada."}]}),
        ),
    ] {
        let (got, changed) = put(api, false, &body).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&got).unwrap(),
            expected,
            "{body}"
        );
        assert_eq!(changed.len(), 1);
    }
    let both = format!(r#"{{"model":"m",{nine},"messages":[{hi}]}}"#);
    let (got, changed) = put(Api::Chat, true, &both).unwrap();
    assert_eq!(changed, ["prompt house@1", "prompt support@9"]);
    let got: Value = serde_json::from_str(&got).unwrap();
    let system = format!("{SYSTEM}\n\nHelp Ada.");
    assert_eq!(
        got["messages"][0],
        json!({"role": "system", "content": system})
    );
}

#[test]
fn what_is_not_there_is_named() {
    for (prompt, param, says) in [
        (r#"{"id":"nobody"}"#, "prompt.id", "no prompt 'nobody'"),
        (
            r#"{"id":"support","version":"11"}"#,
            "prompt.version",
            "It has: 9, 10.",
        ),
        (
            r#"{"id":"support","version":"x"}"#,
            "prompt.version",
            "no such version",
        ),
        (
            r#"{"id":"support"}"#,
            "prompt.variables",
            "needs a value for 'who'",
        ),
        (
            r#"{"id":"support","variables":{"who":"a","where":"b"}}"#,
            "prompt.variables",
            "no variable 'where'",
        ),
        (
            r#"{"id":"support","variables":{"who":{"type":"input_image"}}}"#,
            "prompt",
            "texts",
        ),
        (r#"{"version":"1"}"#, "prompt", "'id'"),
    ] {
        let body = format!(r#"{{"model":"m","prompt":{prompt},"messages":[]}}"#);
        let refused = put(Api::Chat, false, &body).unwrap_err();
        let Reject::InvalidPrompt { param: at, message } = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(at, param, "{message}");
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn what_cannot_take_a_prompt_is_refused() {
    for (api, body) in [
        (Api::Chat, r#"{"messages":"hi"}"#),
        (Api::Chat, r#"{"messages":[1]}"#),
        (
            Api::Chat,
            r#"{"messages":[{"role":"system","role":"user","content":"x"}]}"#,
        ),
        (Api::Responses, r#"{"instructions":["x"]}"#),
        (Api::Messages, r#"{"system":{}}"#),
    ] {
        assert!(
            matches!(put(api, true, body), Err(Reject::InvalidField { .. })),
            "{body}"
        );
    }
    let twice = r#"{"system":"a","syste\u006d":"b"}"#;
    assert!(matches!(
        put(Api::Messages, true, twice),
        Err(Reject::InvalidJson { .. })
    ));
}

#[test]
fn a_prompt_is_bounded_however_often_a_value_is_in_it() {
    let ask = |bytes: usize| {
        let who = "x".repeat(bytes);
        let prompt = json!({"id": "support", "variables": {"who": who}});
        put(
            Api::Chat,
            false,
            &json!({"model": "m", "prompt": prompt}).to_string(),
        )
    };
    assert!(ask(MAX_PROMPT_BYTES / 2 - 20).is_ok());
    assert!(matches!(
        ask(MAX_PROMPT_BYTES / 2),
        Err(Reject::InvalidPrompt { .. })
    ));
}

proptest! {
    #[test]
    fn values_are_text_and_nothing_else(who in any::<String>(), own in any::<String>()) {
        for who in [who.clone(), format!("{who}\"}}]{{{{who}}}}{{{{x}}}}\\")] {
            let body = json!({"model": "m", "prompt": {"id": "support", "version": 10, "variables": {"who": who}},
                "messages": [{"role": "system", "content": own}]});
            let (got, _) = put(Api::Chat, true, &body.to_string()).unwrap();
            let got: Value = serde_json::from_str(&got).unwrap();
            let expected = json!({"model": "m", "messages": [
                {"role": "system", "content": format!("{SYSTEM}\n\n{own}")},
                {"role": "user", "content": format!("I am {who}, {who}.")},
                {"role": "assistant", "content": "Hi."}]});
            prop_assert_eq!(got, expected);
        }
    }
}
