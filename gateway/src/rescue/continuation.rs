//! The request that asks another engine to go on with an answer: whether there can be one, and its body. Pure.
//!
//! Only requests all of whose members are known to mean the same for the second half of an answer have one; a member
//! that is not known here may mean anything.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::delivered::{Members, is_void};
use crate::edits::{Edits, place};
use crate::openai::Api;

/// A text completion that sets no bound has this one, in OpenAI's API as in vLLM and SGLang.
const COMPLETION_MAX_TOKENS: u64 = 16;
/// The members that bound an answer's tokens.
const BOUNDS: [&str; 2] = ["max_completion_tokens", "max_tokens"];

/// Whether an answer to this request may be continued, as far as the request says.
pub(super) fn is_possible(api: Api, body: &[u8]) -> bool {
    let Ok(members) = serde_json::from_slice::<Members<'_>>(body) else {
        return false;
    };
    let prompt = match api {
        Api::Chat => "messages",
        Api::Completions => "prompt",
        _ => return false,
    };
    let mut all = members.iter();
    members.contains_key(prompt) && all.all(|(name, value)| is_kept(api, name, value))
}

/// Whether a member means the same for the rest of an answer as for all of it.
fn is_kept(api: Api, name: &str, value: &RawValue) -> bool {
    let is_void = is_void(value);
    let value = value.get();
    match name {
        // Who asks what, and how each token is drawn.
        "model"
        | "stream"
        | "stream_options"
        | "user"
        | "metadata"
        | "store"
        | "safety_identifier"
        | "prompt_cache_key"
        | "prompt_cache_retention"
        | "service_tier"
        | "priority"
        | "cache_salt"
        | "temperature"
        | "top_p"
        | "top_k"
        | "min_p"
        | "seed"
        | "frequency_penalty"
        | "presence_penalty"
        | "repetition_penalty"
        | "logit_bias"
        | "stop_token_ids"
        | "allowed_token_ids"
        | "ignore_eos"
        | "skip_special_tokens"
        | "spaces_between_special_tokens"
        | "add_special_tokens"
        | "chat_template_kwargs"
        | "reasoning_effort"
        | "parallel_tool_calls" => true,
        "messages" => api == Api::Chat && ends_with_a_question(value),
        "prompt" => api == Api::Completions && value.starts_with('"'),
        "max_tokens" | "max_completion_tokens" => is_void || value.parse::<u64>().is_ok(),
        "n" | "best_of" => is_void || value == "1",
        "tool_choice" => is_void || matches!(value, "\"none\"" | "\"auto\""),
        "response_format" => is_void || is_text_format(value),
        "logprobs" | "echo" | "use_beam_search" => is_void || value == "false",
        "top_logprobs" | "min_tokens" => is_void || value == "0",
        // Set here, and twice would be once too often.
        "continue_final_message" | "add_generation_prompt" => false,
        // Tools, schemas, grammars; stop strings, which the joint could cut in two; what is not known.
        _ => is_void,
    }
}

/// Whether the last message is no beginning of an answer itself.
fn ends_with_a_question(messages: &str) -> bool {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow)]
        role: Cow<'a, str>,
    }
    let messages: Result<Vec<&RawValue>, _> = serde_json::from_str(messages);
    let last = messages.ok().and_then(|messages| messages.last().copied());
    let last = last.and_then(|last| serde_json::from_str::<Message<'_>>(last.get()).ok());
    last.is_some_and(|last| last.role != "assistant")
}

fn is_text_format(value: &str) -> bool {
    let members: Result<BTreeMap<Cow<'_, str>, Cow<'_, str>>, _> = serde_json::from_str(value);
    members.is_ok_and(|members| {
        members.len() == 1 && members.get("type").is_some_and(|kind| kind == "text")
    })
}

/// The body that asks for what follows `text`, of which `tokens` were counted. `None` where nothing may follow.
pub(super) fn body(api: Api, body: &[u8], text: &str, tokens: u64) -> Option<Bytes> {
    let members: Members<'_> = serde_json::from_slice(body).ok()?;
    let mut edits = Edits::default();
    let mut is_bounded = false;
    for bound in BOUNDS.iter().filter_map(|name| members.get(*name)) {
        is_bounded = true;
        if bound.get() != "null" {
            let left = left(bound.get().parse().ok()?, tokens)?;
            edits.replace(place(body, bound.get()), left.to_string());
        }
    }
    if api == Api::Completions && !is_bounded {
        let left = left(COMPLETION_MAX_TOKENS, tokens)?;
        edits.add_member(body, "max_tokens", &left.to_string());
    }
    let text_json = serde_json::to_string(text).ok()?;
    // Without a text there is nothing to go on with: the same is asked again.
    match api {
        _ if text.is_empty() => {}
        Api::Chat => {
            let end = place(body, members.get("messages")?.get())
                .end
                .checked_sub(1)?;
            let message = format!(r#",{{"role":"assistant","content":{text_json}}}"#);
            edits.replace(end..end, message);
            edits.add_member(body, "continue_final_message", "true");
            edits.add_member(body, "add_generation_prompt", "false");
        }
        _ => {
            let end = place(body, members.get("prompt")?.get())
                .end
                .checked_sub(1)?;
            let inner = text_json.strip_prefix('"')?.strip_suffix('"')?;
            edits.replace(end..end, inner.to_owned());
        }
    }
    Some(edits.apply(body))
}

fn left(bound: u64, used: u64) -> Option<u64> {
    bound.checked_sub(used).filter(|left| *left > 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn chat(rest: &str) -> String {
        format!(
            r#"{{"model":"m","stream":true{rest},"messages":[{{"role":"user","content":"hi"}}]}}"#
        )
    }

    fn asked(api: Api, request: &str, text: &str, tokens: u64) -> Option<Value> {
        let body = body(api, request.as_bytes(), text, tokens)?;
        Some(serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn plain_texts_can_be_continued() {
        for rest in [
            "",
            r#","n":1,"temperature":0.5,"seed":7,"stream_options":{"include_usage":true}"#,
            r#","tools":[],"tool_choice":"none","stop":null,"logprobs":false,"top_logprobs":0"#,
            r#","response_format":{"type":"text"},"max_tokens":null,"max_completion_tokens":9"#,
        ] {
            assert!(is_possible(Api::Chat, chat(rest).as_bytes()), "{rest}");
        }
        assert!(is_possible(
            Api::Completions,
            br#"{"model":"m","prompt":"a","max_tokens":5}"#
        ));
    }

    #[test]
    fn what_is_more_than_a_text_cannot() {
        for rest in [
            r#","n":2"#,
            r#","tools":[{"type":"function"}]"#,
            r#","functions":[{"name":"f"}]"#,
            r#","response_format":{"type":"json_object"}"#,
            r#","guided_regex":"a+""#,
            r#","structured_outputs":{"choice":["a"]}"#,
            r#","logprobs":true"#,
            r#","stop":["x"]"#,
            r#","min_tokens":5"#,
            r#","max_tokens":"5""#,
            r#","truncate_prompt_tokens":5"#,
            r#","continue_final_message":false"#,
            r#","something_new":1"#,
        ] {
            assert!(!is_possible(Api::Chat, chat(rest).as_bytes()), "{rest}");
        }
        let begun = r#"{"model":"m","messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"He"}]}"#;
        for (api, body) in [
            (Api::Chat, begun),
            (Api::Chat, r#"{"model":"m","messages":[]}"#),
            (Api::Chat, r#"{"model":"m","prompt":"a"}"#),
            (Api::Completions, r#"{"model":"m"}"#),
            (Api::Completions, r#"{"model":"m","prompt":["a"]}"#),
            (
                Api::Completions,
                r#"{"model":"m","prompt":"a","suffix":"b"}"#,
            ),
            (
                Api::Completions,
                r#"{"model":"m","prompt":"a","echo":true}"#,
            ),
            (
                Api::Completions,
                r#"{"model":"m","prompt":"a","logprobs":0}"#,
            ),
            (Api::Responses, r#"{"model":"m","input":"a"}"#),
        ] {
            assert!(!is_possible(api, body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn the_text_is_the_last_message_and_all_else_stays() {
        let request = chat(r#","seed": 1.0"#);
        let sent = body(Api::Chat, request.as_bytes(), "a\"b\n\u{e9}", 3).unwrap();
        assert_eq!(
            sent,
            r#"{"continue_final_message":true,"add_generation_prompt":false,"model":"m","stream":true,"seed": 1.0,"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"a\"b\né"}]}"#
        );
        let request = r#"{"model":"m","prompt":"Once \u0041","max_tokens":20}"#;
        let sent = body(Api::Completions, request.as_bytes(), " upon\n", 3).unwrap();
        assert_eq!(
            sent,
            r#"{"model":"m","prompt":"Once \u0041 upon\n","max_tokens":17}"#
        );
    }

    #[test]
    fn tokens_that_came_are_taken_off_every_bound() {
        let both = chat(r#","max_tokens":10,"max_completion_tokens":8"#);
        let sent = asked(Api::Chat, &both, "x", 3).unwrap();
        assert_eq!(
            [&sent["max_tokens"], &sent["max_completion_tokens"]],
            [&json!(7), &json!(5)]
        );
        assert_eq!(asked(Api::Chat, &both, "x", 8), None);
        assert_eq!(asked(Api::Chat, &both, "x", 99), None);
        let unbounded = asked(Api::Chat, &chat(""), "x", 99).unwrap();
        assert_eq!(unbounded.get("max_tokens"), None);
        let usual = r#"{"model":"m","prompt":"a"}"#;
        assert_eq!(
            asked(Api::Completions, usual, "x", 6).unwrap()["max_tokens"],
            10
        );
        assert_eq!(asked(Api::Completions, usual, "x", 16), None);
    }

    #[test]
    fn without_a_text_the_same_is_asked_again() {
        let request = chat(r#","max_tokens":10"#);
        let sent = body(Api::Chat, request.as_bytes(), "", 1).unwrap();
        assert_eq!(sent, request.replace("10", "9"));
    }

    proptest! {
        #[test]
        fn any_text_arrives_as_it_is(prompt in any::<String>(), text in any::<String>()) {
            let request = json!({"model": "m", "messages": [{"role": "user", "content": prompt}]}).to_string();
            prop_assert!(is_possible(Api::Chat, request.as_bytes()));
            let sent = asked(Api::Chat, &request, &text, 0).unwrap();
            prop_assert_eq!(&sent["messages"][0]["content"], &json!(prompt));
            if !text.is_empty() {
                prop_assert_eq!(&sent["messages"][1]["content"], &json!(text));
            }
            let request = json!({"model": "m", "prompt": prompt}).to_string();
            let sent = asked(Api::Completions, &request, &text, 0).unwrap();
            prop_assert_eq!(&sent["prompt"], &json!(format!("{prompt}{text}")));
        }
    }
}
