//! (IO) One streamed chat request, timed from the moment it was due.

use std::time::Duration;

use anyhow::Context as _;
use bytes::{Buf as _, Bytes};
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use rand::{Rng, RngExt as _};
use tokio::time::Instant;

use super::report::{Failure, Outcome};

pub(super) type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// One line of an answer may be this long; a longer one is a broken answer.
const MAX_LINE_BYTES: usize = 1024 * 1024;
/// Longest part of an error message that is kept.
const MAX_DETAIL_CHARS: usize = 300;
/// Words of filler: one is about one token of 4 bytes.
const WORD: &str = "flow ";

pub(super) fn connector() -> HttpsConnector<HttpConnector> {
    let mut http = HttpConnector::new();
    http.set_nodelay(true);
    http.enforce_http(false);
    hyper_rustls::HttpsConnectorBuilder::new()
        .with_webpki_roots()
        .https_or_http()
        .enable_http1()
        .wrap_connector(http)
}

/// Where all requests go.
pub(super) struct Target {
    uri: Uri,
    model: String,
    authorization: Option<HeaderValue>,
}

impl Target {
    pub(super) fn new(url: &str, model: String, api_key: Option<String>) -> anyhow::Result<Self> {
        let text = format!("{}/v1/chat/completions", url.trim_end_matches('/'));
        let uri: Uri = text
            .parse()
            .with_context(|| format!("--url '{url}' is not a URL"))?;
        anyhow::ensure!(
            uri.host().is_some(),
            "--url '{url}' needs http:// or https:// and a host"
        );
        let authorization = match api_key {
            None => None,
            Some(key) => {
                let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                    .context("--api-key holds characters that a header cannot")?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        Ok(Self {
            uri,
            model,
            authorization,
        })
    }
}

/// `256` or `100:400`.
pub(super) fn parse_range(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| {
        let number = text
            .parse()
            .ok()
            .filter(|number| (1..=1_000_000).contains(number));
        number.ok_or_else(|| format!("'{text}' is not a number from 1 to 1000000"))
    };
    let (from, to) = text.split_once(':').unwrap_or((text, text));
    let (from, to) = (number(from)?, number(to)?);
    if from <= to {
        Ok((from, to))
    } else {
        Err(format!("{from} is above {to}"))
    }
}

/// One request to be.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) at: Duration,
    id: u64,
    /// Which of the shared prefixes.
    prefix: u32,
    shared_prefix_tokens: u32,
    prompt_tokens: u32,
    output_tokens: u32,
}

/// Prompts that begin alike, as those of one application do.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedPrefixes {
    /// Length of each.
    pub(super) tokens: u32,
    /// How many different ones.
    pub(super) count: u32,
}

impl Plan {
    pub(super) fn draw(
        at: Duration,
        prompt: (u32, u32),
        output: (u32, u32),
        shared: SharedPrefixes,
        rng: &mut impl Rng,
    ) -> Self {
        Self {
            at,
            id: rng.random(),
            prefix: rng.random_range(0..shared.count.max(1)),
            shared_prefix_tokens: shared.tokens,
            prompt_tokens: rng.random_range(prompt.0..=prompt.1),
            output_tokens: rng.random_range(output.0..=output.1),
        }
    }

    fn body(&self, model: &str) -> Bytes {
        let words =
            |tokens: u32| WORD.repeat(usize::try_from(tokens).unwrap_or(0) * 4 / WORD.len());
        let shared = self.shared_prefix_tokens.min(self.prompt_tokens);
        // The number comes right after the shared part: what follows it is cached nowhere.
        let content = format!(
            "{:04x} {}{:016x} {}",
            self.prefix,
            words(shared),
            self.id,
            words(self.prompt_tokens - shared)
        );
        let body = serde_json::json!({
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.output_tokens,
            "ignore_eos": true,
            "stream": true,
        });
        Bytes::from(body.to_string())
    }
}

/// Sends one request and reads its whole answer. Dropping the future closes the connection.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(super) async fn send(
    client: &HttpClient,
    target: &Target,
    plan: &Plan,
    due: Instant,
    timeout: Duration,
) -> Outcome {
    match tokio::time::timeout_at(
        Instant::now() + timeout,
        exchange(client, target, plan, due),
    )
    .await
    {
        Err(_) => Outcome::Failed("timeout".into()),
        Ok(Err(failure)) => Outcome::Failed(failure),
        Ok(Ok(outcome)) => outcome,
    }
}

async fn exchange(
    client: &HttpClient,
    target: &Target,
    plan: &Plan,
    due: Instant,
) -> Result<Outcome, Failure> {
    let mut request =
        Request::post(target.uri.clone()).header(header::CONTENT_TYPE, "application/json");
    if let Some(authorization) = &target.authorization {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    let request = request
        .body(Full::new(plan.body(&target.model)))
        .map_err(|_| "bad_request")?;
    let response = client.request(request).await.map_err(|err| Failure {
        kind: if err.is_connect() { "connect" } else { "reset" },
        detail: last_cause(&err),
    })?;
    if response.status() != StatusCode::OK {
        return Err(Failure {
            kind: status_kind(response.status()),
            detail: error_message(response.into_body()).await,
        });
    }
    Ok(read_stream(response.into_body(), due).await?)
}

/// What lies under an error, such as "Connection refused".
fn last_cause(err: &dyn std::error::Error) -> String {
    let mut cause = err;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// The message of an OpenAI-shaped error; empty if the body is no such thing.
async fn error_message(body: Incoming) -> String {
    let Ok(body) = Limited::new(body, MAX_LINE_BYTES).collect().await else {
        return String::new();
    };
    let value: serde_json::Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
    let message = value["error"]["message"].as_str().unwrap_or_default();
    message.chars().take(MAX_DETAIL_CHARS).collect()
}

#[expect(
    clippy::match_overlapping_arm,
    reason = "the common ones have names of their own"
)]
fn status_kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "status_400",
        401 => "status_401",
        403 => "status_403",
        404 => "status_404",
        413 => "status_413",
        429 => "status_429",
        500 => "status_500",
        502 => "status_502",
        503 => "status_503",
        504 => "status_504",
        400..=499 => "status_4xx",
        500..=599 => "status_5xx",
        _ => "status_other",
    }
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
async fn read_stream(mut body: Incoming, due: Instant) -> Result<Outcome, &'static str> {
    let mut line = Vec::new();
    let (mut first, mut last): (Option<Instant>, Option<Instant>) = (None, None);
    let mut gaps = Vec::new();
    let mut done = false;
    while let Some(frame) = body.frame().await {
        let Ok(mut data) = frame.map_err(|_| "cut")?.into_data() else {
            continue;
        };
        let now = Instant::now();
        while data.has_remaining() {
            let end = data.iter().position(|byte| *byte == b'\n');
            let taken = data.split_to(end.map_or(data.len(), |end| end + 1));
            if line.len() + taken.len() > MAX_LINE_BYTES {
                return Err("bad_answer");
            }
            line.extend_from_slice(&taken);
            if end.is_none() {
                continue;
            }
            match read_line(&line)? {
                Line::Token => {
                    if let Some(last) = last {
                        gaps.push(now - last);
                    }
                    first.get_or_insert(now);
                    last = Some(now);
                }
                Line::Done => done = true,
                Line::Other => {}
            }
            line.clear();
        }
    }
    match first {
        Some(first) if done => Ok(Outcome::Answered {
            ttft: first - due,
            gaps,
            whole: last.unwrap_or(first) - due,
        }),
        _ => Err("cut"),
    }
}

enum Line {
    Token,
    Done,
    Other,
}

/// A chunk with `finish_reason: abort` is a cut answer whatever follows, and so is an error event.
fn read_line(line: &[u8]) -> Result<Line, &'static str> {
    let Some(data) = line.strip_prefix(b"data:") else {
        return Ok(Line::Other);
    };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Ok(Line::Done);
    }
    let chunk: serde_json::Value = serde_json::from_slice(data).map_err(|_| "bad_answer")?;
    if chunk.get("error").is_some() {
        return Err("cut");
    }
    let choice = &chunk["choices"][0];
    if choice["finish_reason"] == "abort" {
        return Err("cut");
    }
    Ok(if choice["delta"]["content"].is_string() {
        Line::Token
    } else {
        Line::Other
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aborted_and_failed_streams_are_cuts() {
        assert_eq!(
            read_line(br#"data: {"choices":[{"delta":{},"finish_reason":"abort"}]}"#).err(),
            Some("cut")
        );
        assert_eq!(
            read_line(br#"data: {"error":{"message":"x"}}"#).err(),
            Some("cut")
        );
        assert!(matches!(read_line(b"data: [DONE]\r\n"), Ok(Line::Done)));
    }

    #[test]
    fn prompt_has_about_the_asked_tokens_and_a_shared_beginning() {
        let plan = |id| Plan {
            at: Duration::ZERO,
            id,
            prefix: 0,
            shared_prefix_tokens: 100,
            prompt_tokens: 400,
            output_tokens: 1,
        };
        let (a, b) = (plan(1).body("m"), plan(2).body("m"));
        let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        assert!(same > 400 && same < 500, "{same}");
        assert!((1_500..1_800).contains(&a.len()), "{}", a.len());
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(parse_range("5"), Ok((5, 5)));
        assert_eq!(parse_range("5:9"), Ok((5, 9)));
        assert!(
            parse_range("9:5").is_err() && parse_range("0").is_err() && parse_range("x").is_err()
        );
    }
}
