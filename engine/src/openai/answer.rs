//! What clients get: the JSON of a whole answer, or server-sent events for a streamed one, field for field as vLLM
//! 0.32 writes them. Progress flows in, bytes flow out; one event per token, however many tokens a write carries.

use serde_json::{Value, json};

use super::{Api, Generation, Output};
use crate::model::Ending;

/// How far a request has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Tokens generated so far.
    pub(crate) generated: u32,
    /// Prompt tokens that came from the prefix cache; known from the first token on.
    pub(crate) cached_tokens: u32,
    /// Cut short by shutdown.
    pub(crate) aborted: bool,
}

/// Names and times that all parts of one answer carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// `id`, of letters, digits and `.:_-` only.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The served model's name.
    pub(crate) model: String,
}

fn usage(prompt_tokens: u32, progress: &Progress) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens.saturating_add(progress.generated),
        "completion_tokens": progress.generated,
        "prompt_tokens_details": {"cached_tokens": progress.cached_tokens},
    })
}

fn finish_reason(output: &Output, progress: &Progress) -> &'static str {
    match output.ending {
        _ if progress.aborted => "abort",
        Ending::Stop => "stop",
        Ending::Length => "length",
    }
}

fn stop_reason<'a>(output: &'a Output, progress: &Progress) -> Option<&'a str> {
    output.stop.as_deref().filter(|_| !progress.aborted)
}

/// The body of an answer that is not streamed.
pub(crate) fn whole(envelope: &Envelope, generation: &Generation, progress: &Progress) -> String {
    let output = &generation.output;
    let text = output.text(progress.generated);
    let (object, mut choice) = match generation.api {
        Api::Chat => (
            "chat.completion",
            json!({"index": 0, "message": {"role": "assistant", "content": text}}),
        ),
        Api::Completions => ("text_completion", json!({"index": 0, "text": text})),
    };
    choice["logprobs"] = Value::Null;
    choice["finish_reason"] = json!(finish_reason(output, progress));
    choice["stop_reason"] = json!(stop_reason(output, progress));
    json!({
        "id": envelope.id,
        "object": object,
        "created": envelope.created,
        "model": envelope.model,
        "choices": [choice],
        "usage": usage(generation.submission.prompt_tokens, progress),
    })
    .to_string()
}

/// A streamed answer, event by event.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    generation: Generation,
    /// Every event's beginning, up to `"choices":[`.
    head: String,
    opened: bool,
    sent: u32,
    finished: bool,
}

impl Events {
    /// Nothing sent yet.
    pub(crate) fn new(envelope: &Envelope, generation: Generation) -> Self {
        let object = match generation.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completions => "text_completion",
        };
        let model = Value::from(envelope.model.as_str());
        let (id, created) = (&envelope.id, envelope.created);
        let head = format!(
            r#"data: {{"id":"{id}","object":"{object}","created":{created},"model":{model},"choices":["#
        );
        Self {
            generation,
            head,
            opened: false,
            sent: 0,
            finished: false,
        }
    }

    /// Whether `[DONE]` was written.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Appends all events that `progress` makes due.
    pub(crate) fn write(&mut self, progress: &Progress, out: &mut Vec<u8>) {
        if self.finished || (progress.generated <= self.sent && !progress.aborted) {
            return;
        }
        if !std::mem::replace(&mut self.opened, true) && self.generation.api == Api::Chat {
            self.event(
                r#"{"role":"assistant","content":""}"#,
                "",
                None,
                progress,
                out,
            );
        }
        let tokens = self.generation.output.tokens();
        while self.sent < progress.generated.min(tokens) {
            let text = self.generation.output.token(self.sent);
            self.sent += 1;
            let so_far = Progress {
                generated: self.sent,
                aborted: false,
                ..*progress
            };
            self.text(text, (self.sent == tokens).then_some(&so_far), &so_far, out);
        }
        if self.sent == tokens {
            self.finish(
                &Progress {
                    aborted: false,
                    ..*progress
                },
                out,
            );
        } else if progress.aborted {
            self.text("", Some(progress), progress, out);
            self.finish(progress, out);
        }
    }

    /// One event with text; `end` if it is the last.
    fn text(&self, text: &str, end: Option<&Progress>, so_far: &Progress, out: &mut Vec<u8>) {
        // The text needs no escaping: letters and spaces.
        match self.generation.api {
            Api::Chat => self.event(r#"{"content":""#, text, end, so_far, out),
            Api::Completions => self.event(r#"""#, text, end, so_far, out),
        }
    }

    /// One event. `opening` is a complete delta if it ends with a brace, else what comes before `text`.
    fn event(
        &self,
        opening: &str,
        text: &str,
        end: Option<&Progress>,
        so_far: &Progress,
        out: &mut Vec<u8>,
    ) {
        let (field, closing) = match self.generation.api {
            Api::Chat => ("delta", if opening.ends_with('}') { "" } else { "\"}" }),
            Api::Completions => ("text", "\""),
        };
        for part in [
            &self.head,
            r#"{"index":0,""#,
            field,
            "\":",
            opening,
            text,
            closing,
        ] {
            out.extend_from_slice(part.as_bytes());
        }
        match end {
            None => out.extend_from_slice(br#","logprobs":null,"finish_reason":null}]"#),
            Some(progress) => {
                let output = &self.generation.output;
                let reason = finish_reason(output, progress);
                let stop = Value::from(stop_reason(output, progress));
                let tail = format!(
                    r#","logprobs":null,"finish_reason":"{reason}","stop_reason":{stop}}}]"#
                );
                out.extend_from_slice(tail.as_bytes());
            }
        }
        if self.generation.continuous_usage {
            let usage = usage(self.generation.submission.prompt_tokens, so_far);
            out.extend_from_slice(format!(r#","usage":{usage}"#).as_bytes());
        }
        out.extend_from_slice(b"}\n\n");
    }

    fn finish(&mut self, progress: &Progress, out: &mut Vec<u8>) {
        self.finished = true;
        if self.generation.include_usage {
            let usage = usage(self.generation.submission.prompt_tokens, progress);
            out.extend_from_slice(self.head.as_bytes());
            out.extend_from_slice(format!("],\"usage\":{usage}}}\n\n").as_bytes());
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}
