//! What clients send and what they are refused: `OpenAI`'s chat and text completions as vLLM 0.32 takes them.
//!
//! Request bytes flow in; a checked [`Generation`] or an error with its status flows out. The whole answer is fixed
//! here, as it depends on the prompt alone; the step model decides only when each of its tokens exists.

pub(crate) mod answer;
mod tokenize;

pub(crate) use tokenize::tokenize;

use http::StatusCode;
use serde::Deserialize;
use serde_json::json;

use crate::model::{Ending, Submission};
use crate::text::{Answer, TOKEN_BYTES, Tokens};

/// Bytes of one request body. A prompt of a million tokens is 4 MB at four bytes a token.
pub(crate) const MAX_BODY_BYTES: usize = 8 * 1024 * 1024;

/// Stop strings of one request: each is searched for in the whole answer. `OpenAI` takes 4.
const MAX_STOP_STRINGS: usize = 16;

/// Output limit of a text completion that sets none, as in vLLM and `OpenAI`.
const COMPLETION_MAX_TOKENS: u32 = 16;

/// Which of the two generating paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// An answer that is not a generation, in vLLM's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// The HTTP status, also `code` in the body.
    pub(crate) status: StatusCode,
    /// `type` in the body.
    pub(crate) kind: &'static str,
    /// For people.
    pub(crate) message: String,
    /// The field at fault.
    pub(crate) param: Option<&'static str>,
}

impl Rejection {
    fn bad(param: &'static str, message: impl Into<String>) -> Self {
        let (status, kind) = (StatusCode::BAD_REQUEST, "BadRequestError");
        Self {
            status,
            kind,
            message: message.into(),
            param: Some(param),
        }
    }

    /// The body is not what the path takes.
    pub(crate) fn unreadable(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "Bad Request",
            message: message.into(),
            param: None,
        }
    }

    /// The body is longer than [`MAX_BODY_BYTES`].
    pub(crate) fn too_large() -> Self {
        let message = format!("the request body is larger than {MAX_BODY_BYTES} bytes");
        Self {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            kind: "Request Entity Too Large",
            message,
            param: None,
        }
    }

    /// `max_num_queued_reqs` unfinished requests are here. vLLM sends no `Retry-After` with it.
    pub(crate) fn busy() -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "Service Unavailable",
            message: "The engine is currently busy and cannot accept new requests. Please try again later or on a \
                      different instance."
                .to_owned(),
            param: None,
        }
    }

    /// The start-up delay is not over. A real vLLM does not listen yet.
    pub(crate) fn loading() -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "Service Unavailable",
            message: "The model is still being loaded.".to_owned(),
            param: None,
        }
    }

    /// The engine drains or has stopped. The words are those of the Python executor behind vLLM's API server.
    pub(crate) fn stopping() -> Self {
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "Internal Server Error",
            message: "cannot schedule new futures after shutdown".to_owned(),
            param: None,
        }
    }

    /// `--fault-status` is set.
    pub(crate) fn fault(status: StatusCode) -> Self {
        Self {
            status,
            kind: status.canonical_reason().unwrap_or("Error"),
            message: "this engine was started with --fault-status".to_owned(),
            param: None,
        }
    }

    fn too_long(max_model_len: u32, prompt_tokens: u32, output_tokens: i64) -> Self {
        let message = format!(
            "This model's maximum context length is {max_model_len} tokens. However, you requested {output_tokens} \
             output tokens and your prompt contains {prompt_tokens} input tokens. Please reduce the length of the \
             input prompt or the number of requested output tokens."
        );
        Self::bad("max_tokens", message)
    }

    /// The JSON body.
    pub(crate) fn body(&self) -> String {
        let code = self.status.as_u16();
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": code}}).to_string()
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    /// The only model name that is known.
    pub(crate) served_model: &'a str,
    /// Longest prompt and output together, in tokens.
    pub(crate) max_model_len: u32,
    /// Tokens per KV block.
    pub(crate) block_size: u32,
}

/// An answer that is certain, before any of it exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Output {
    answer: Answer,
    /// Tokens to generate; at least 1.
    tokens: u32,
    /// Bytes of text that the client sees: a stop string and what follows it in the last token are left out.
    visible_bytes: usize,
    ending: Ending,
    /// The stop string that ended it.
    stop: Option<String>,
}

impl Output {
    /// Tokens in all.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// The visible text of token `index`.
    fn token(&self, index: u32) -> &'static str {
        let text = self.answer.token(index);
        let start = index as usize * TOKEN_BYTES;
        &text[..self.visible_bytes.saturating_sub(start).min(text.len())]
    }

    /// The visible text of the first `tokens` tokens.
    fn text(&self, tokens: u32) -> String {
        let mut text = self.answer.text(tokens);
        text.truncate(self.visible_bytes);
        text
    }
}

/// A request that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Generation {
    pub(crate) api: Api,
    pub(crate) stream: bool,
    /// A last chunk with the usage.
    pub(crate) include_usage: bool,
    /// The usage so far in every chunk.
    pub(crate) continuous_usage: bool,
    pub(crate) output: Output,
    pub(crate) submission: Submission,
}

#[derive(Deserialize)]
struct Wire {
    model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Prompt>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    min_tokens: Option<i64>,
    n: Option<i64>,
    stop: Option<OneOrMany>,
    ignore_eos: Option<bool>,
    tools: Option<serde_json::Value>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// Reads and checks one request body.
pub(crate) fn parse(api: Api, body: &[u8], rules: Rules<'_>) -> Result<Generation, Rejection> {
    let wire = read(body, rules)?;
    if wire.n.is_some_and(|n| n != 1) {
        return Err(Rejection::bad(
            "n",
            "n must be 1: this engine makes one answer per request",
        ));
    }
    let stream = wire.stream.unwrap_or(false);
    if wire.stream_options.is_some() && !stream {
        return Err(Rejection::bad(
            "stream_options",
            "Stream options can only be defined when `stream=True`.",
        ));
    }
    let tokens = match api {
        Api::Chat => chat_tokens(&wire, Tokens::new(rules.block_size))?,
        Api::Completions => prompt_tokens(wire.prompt.as_ref(), Tokens::new(rules.block_size))?,
    };
    let (max_tokens, output) = plan(api, &wire, &tokens, rules.max_model_len)?;
    let options = wire.stream_options.as_ref();
    Ok(Generation {
        api,
        stream,
        include_usage: options
            .and_then(|options| options.include_usage)
            .unwrap_or(false),
        continuous_usage: options
            .and_then(|options| options.continuous_usage_stats)
            .unwrap_or(false),
        submission: submission(tokens, max_tokens, &output),
        output,
    })
}

/// A body that asks for the model that is served, or for none.
fn read(body: &[u8], rules: Rules<'_>) -> Result<Wire, Rejection> {
    let wire: Wire =
        serde_json::from_slice(body).map_err(|error| Rejection::unreadable(error.to_string()))?;
    match &wire.model {
        Some(model) if model != rules.served_model => Err(Rejection {
            status: StatusCode::NOT_FOUND,
            kind: "NotFoundError",
            message: format!("The model `{model}` does not exist."),
            param: Some("model"),
        }),
        _ => Ok(wire),
    }
}

/// Reads the conversation into `tokens`.
fn chat_tokens(wire: &Wire, mut tokens: Tokens) -> Result<Tokens, Rejection> {
    let Some(messages) = wire
        .messages
        .as_deref()
        .filter(|messages| !messages.is_empty())
    else {
        return Err(Rejection::unreadable(
            "messages: at least one message is required",
        ));
    };
    let goes_on = wire.continue_final_message.unwrap_or(false);
    let begins = wire.add_generation_prompt.unwrap_or(true);
    if goes_on && begins {
        return Err(Rejection::bad(
            "continue_final_message",
            "continue_final_message and add_generation_prompt are not compatible: set add_generation_prompt to false",
        ));
    }
    if let Some(tools) = wire.tools.as_ref().filter(|tools| !tools.is_null()) {
        tokens.message("tools", std::iter::once(tools.to_string().as_str()));
    }
    let last = messages.len() - 1;
    for (index, message) in messages.iter().enumerate() {
        tokens.open(&message.role);
        match &message.content {
            None => {}
            Some(Content::Text(text)) => tokens.text(text),
            Some(Content::Parts(parts)) => {
                if let Some(part) = parts.iter().find(|part| part.text.is_none()) {
                    let message = format!(
                        "a content part of type {:?} is not text; this model takes text only",
                        part.kind
                    );
                    return Err(Rejection::bad("messages", message));
                }
                let texts = parts.iter().filter_map(|part| part.text.as_deref());
                texts.for_each(|text| tokens.text(text));
            }
        }
        if index < last || !goes_on {
            tokens.close();
        }
    }
    if begins {
        tokens.open("assistant");
    }
    Ok(tokens)
}

/// Reads the prompt into `tokens`.
fn prompt_tokens(prompt: Option<&Prompt>, mut tokens: Tokens) -> Result<Tokens, Rejection> {
    match prompt {
        Some(Prompt::Text(text)) => tokens.text(text),
        Some(Prompt::Tokens(ids)) => ids.iter().for_each(|&id| tokens.push(id)),
        Some(Prompt::Texts(texts)) if texts.len() == 1 => {
            for text in texts {
                tokens.text(text);
            }
        }
        Some(Prompt::TokenLists(lists)) if lists.len() == 1 => {
            lists.iter().flatten().for_each(|&id| tokens.push(id));
        }
        Some(Prompt::Texts(_) | Prompt::TokenLists(_)) => {
            return Err(Rejection::bad(
                "prompt",
                "this engine takes one prompt per request",
            ));
        }
        None => return Err(Rejection::unreadable("prompt: field required")),
    }
    if tokens.count() == 0 {
        return Err(Rejection::bad("prompt", "the prompt is empty"));
    }
    Ok(tokens)
}

/// The limit on output tokens and the output itself.
fn plan(
    api: Api,
    wire: &Wire,
    tokens: &Tokens,
    max_model_len: u32,
) -> Result<(u32, Output), Rejection> {
    let prompt_tokens = tokens.count();
    let room = max_model_len.saturating_sub(prompt_tokens);
    let wanted = wire.max_completion_tokens.or(wire.max_tokens);
    if wanted.is_some_and(|wanted| wanted < 1) {
        return Err(Rejection::bad(
            "max_tokens",
            "max_tokens must be at least 1",
        ));
    }
    if room == 0 || wanted.is_some_and(|wanted| wanted > i64::from(room)) {
        return Err(Rejection::too_long(
            max_model_len,
            prompt_tokens,
            wanted.unwrap_or(1),
        ));
    }
    let wanted = wanted
        .and_then(|wanted| u32::try_from(wanted).ok())
        .or(match api {
            Api::Chat => None,
            Api::Completions => Some(COMPLETION_MAX_TOKENS.min(room)),
        });
    let answer = Answer::new(tokens.digest());
    let limit = wanted.unwrap_or(room);
    // A limit is also the wish of whoever measures: with one, the answer is exactly as long.
    let endless = wanted.is_some() || wire.ignore_eos.unwrap_or(false);
    let at_least = wire
        .min_tokens
        .and_then(|least| u32::try_from(least).ok())
        .unwrap_or(0);
    let natural = answer.natural_tokens().max(at_least);
    let output = if endless || natural > limit {
        Output {
            answer,
            tokens: limit,
            visible_bytes: usize::MAX,
            ending: Ending::Length,
            stop: None,
        }
    } else {
        Output {
            answer,
            tokens: natural,
            visible_bytes: usize::MAX,
            ending: Ending::Stop,
            stop: None,
        }
    };
    Ok((limit, cut_at_stop(output, wire.stop.as_ref())?))
}

/// Ends `output` at the first of the stop strings that occurs in it.
fn cut_at_stop(output: Output, stop: Option<&OneOrMany>) -> Result<Output, Rejection> {
    let stops = match stop {
        None => return Ok(output),
        Some(OneOrMany::One(one)) => std::slice::from_ref(one),
        Some(OneOrMany::Many(many)) => many.as_slice(),
    };
    if stops.len() > MAX_STOP_STRINGS {
        return Err(Rejection::bad(
            "stop",
            format!("more than {MAX_STOP_STRINGS} stop strings"),
        ));
    }
    if stops.iter().any(String::is_empty) {
        return Err(Rejection::bad(
            "stop",
            "stop cannot contain an empty string.",
        ));
    }
    let text = output.answer.text(output.tokens);
    let found = stops.iter().filter_map(|stop| {
        text.find(stop.as_str())
            .map(|at| (at + stop.len(), at, stop))
    });
    let Some((end, at, stop)) = found.min_by_key(|(end, at, _)| (end.div_ceil(TOKEN_BYTES), *at))
    else {
        return Ok(output);
    };
    let tokens = u32::try_from(end.div_ceil(TOKEN_BYTES)).unwrap_or(output.tokens);
    Ok(Output {
        tokens,
        visible_bytes: at,
        ending: Ending::Stop,
        stop: Some(stop.clone()),
        ..output
    })
}

fn submission(mut tokens: Tokens, max_tokens: u32, output: &Output) -> Submission {
    let prompt_tokens = tokens.count();
    // The answer's blocks stay in the prefix cache for the conversation's next turn.
    (0..output.tokens).for_each(|index| tokens.text(output.answer.token(index)));
    Submission {
        prompt_tokens,
        output_tokens: output.tokens,
        ending: output.ending,
        max_tokens,
        block_hashes: tokens.into_block_hashes(),
    }
}

#[cfg(test)]
mod tests;
