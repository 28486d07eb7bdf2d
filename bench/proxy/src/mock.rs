//! (IO) An upstream that speaks as vLLM does and thinks of nothing. What it answers stands in the request's body, where
//! every proxy leaves it: `stream`, `max_tokens` (deltas of a stream) and `seed` (ms between two of them).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use memchr::memmem;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::wire::{Body, Buffer, head};

/// Stands once in each answer and once in each delta.
pub(crate) const MARK: &[u8] = b"qzx";
/// Ends each stream.
pub(crate) const LAST: &[u8] = b"[DONE]";
/// Longer streams are cut to this.
const MAX_DELTAS: u64 = 1000;
/// Proxies that write the body anew may put short members before or after the long ones.
const LOOK_BYTES: usize = 2 << 10;

const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade of an old qzx tree."},"finish_reason":"stop"}],"usage":{"prompt_tokens":180,"completion_tokens":26,"total_tokens":206}}"#;
const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
const MODELS: &str = r#"{"object":"list","data":[{"id":"mock","object":"model","created":1,"owned_by":"mock","root":"mock","max_model_len":1000000}]}"#;
/// What routers ask their workers besides.
const INFO: &str = r#"{"status":"ok","model_path":"mock","tokenizer_path":"mock","served_model_name":"mock","is_generation":true,"tp_size":1,"dp_size":1,"version":"1","max_total_num_tokens":1000000}"#;

/// All that is ever written, made once.
struct Texts {
    answer: Vec<u8>,
    models: Vec<u8>,
    info: Vec<u8>,
    deltas: Vec<Vec<u8>>,
    end: Vec<u8>,
    end_with_usage: Vec<u8>,
}

/// What a request's body asks for.
#[derive(Debug, PartialEq, Eq)]
struct Ask {
    stream: bool,
    usage: bool,
    deltas: u64,
    gap: Duration,
}

pub(crate) async fn run(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.context("listen")?;
    let texts = Arc::new(Texts::new());
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        while connections.try_join_next().is_some() {}
        let texts = Arc::clone(&texts);
        // Whoever goes away ends only its own connection.
        connections.spawn(async move { connection(stream, &texts).await });
    }
}

async fn connection(mut stream: TcpStream, texts: &Texts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Buffer::new();
    let mut payload = Vec::new();
    loop {
        let head = loop {
            if let Some(head) = head(buffer.data())? {
                break head;
            }
            if !buffer.fill(&mut stream).await? {
                return Ok(());
            }
        };
        let page = page(&buffer.data()[..head.bytes], texts);
        buffer.consume(head.bytes);
        payload.clear();
        let mut body = Body::new(head.framing);
        loop {
            let taken = body.take(buffer.data(), |piece| payload.extend_from_slice(piece))?;
            buffer.consume(taken);
            if body.is_done() {
                break;
            }
            if !buffer.fill(&mut stream).await? {
                return Ok(());
            }
        }
        match page {
            Some(page) => stream.write_all(page).await?,
            None => answer(&mut stream, texts, &Ask::read(&payload)).await?,
        }
    }
}

/// What is answered whatever the body says.
fn page<'a>(head: &[u8], texts: &'a Texts) -> Option<&'a [u8]> {
    if head.starts_with(b"POST ") {
        None
    } else if head.starts_with(b"GET /v1/models") {
        Some(&texts.models)
    } else {
        Some(&texts.info)
    }
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
async fn answer(stream: &mut TcpStream, texts: &Texts, ask: &Ask) -> io::Result<()> {
    if !ask.stream {
        return stream.write_all(&texts.answer).await;
    }
    let start = Instant::now();
    // Engines write the head before they have a token.
    stream.write_all(STREAM_HEAD).await?;
    let mut due = start;
    for number in 0..usize::try_from(ask.deltas).unwrap_or(usize::MAX) {
        if !ask.gap.is_zero() && number > 0 {
            due += ask.gap;
            tokio::time::sleep_until(due).await;
        }
        // Others have their turn between two deltas, as they would between two steps of an engine.
        if ask.gap.is_zero() {
            tokio::task::yield_now().await;
        }
        let delta = &texts.deltas[number.min(texts.deltas.len() - 1)];
        stream.write_all(delta).await?;
    }
    let end = if ask.usage {
        &texts.end_with_usage
    } else {
        &texts.end
    };
    stream.write_all(end).await
}

impl Ask {
    fn read(body: &[u8]) -> Self {
        let (first, last) = if body.len() <= 2 * LOOK_BYTES {
            (body, &[][..])
        } else {
            (&body[..LOOK_BYTES], &body[body.len() - LOOK_BYTES..])
        };
        let find = |key: &str| value(first, key).or_else(|| value(last, key));
        let number = |key: &str| find(key).and_then(number);
        let is_true = |key: &str| find(key).is_some_and(|value| value.starts_with(b"true"));
        Self {
            stream: is_true("\"stream\""),
            usage: is_true("\"include_usage\""),
            deltas: number("\"max_tokens\"")
                .or_else(|| number("\"max_completion_tokens\""))
                .unwrap_or(16)
                .clamp(1, MAX_DELTAS),
            gap: Duration::from_millis(number("\"seed\"").unwrap_or(0)),
        }
    }
}

/// What follows the member's name and colon.
fn value<'a>(text: &'a [u8], key: &str) -> Option<&'a [u8]> {
    let at = memmem::find(text, key.as_bytes())? + key.len();
    let rest = text[at..].trim_ascii_start().strip_prefix(b":")?;
    Some(rest.trim_ascii_start())
}

fn number(text: &[u8]) -> Option<u64> {
    let digits = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    std::str::from_utf8(&text[..digits]).ok()?.parse().ok()
}

impl Texts {
    fn new() -> Self {
        let deltas = (0..MAX_DELTAS).map(|number| {
            let role = if number == 0 { r#""role":"assistant","# } else { "" };
            chunk(&event(&format!(
                r#"{{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{{"index":0,"delta":{{{role}"content":"qzx{number} "}},"finish_reason":null}}]}}"#
            )))
        });
        let stop = event(
            r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
        );
        let usage = event(
            r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"mock","choices":[],"usage":{"prompt_tokens":180,"completion_tokens":26,"total_tokens":206}}"#,
        );
        let done = event("[DONE]");
        let end = |events: &str| [chunk(events), b"0\r\n\r\n".to_vec()].concat();
        Self {
            answer: whole(ANSWER),
            models: whole(MODELS),
            info: whole(INFO),
            deltas: deltas.collect(),
            end: end(&format!("{stop}{done}")),
            end_with_usage: end(&format!("{stop}{usage}{done}")),
        }
    }
}

fn whole(json: &str) -> Vec<u8> {
    let bytes = json.len();
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {bytes}\r\n\r\n{json}"
    )
    .into_bytes()
}

fn event(data: &str) -> String {
    format!("data: {data}\n\n")
}

fn chunk(content: &str) -> Vec<u8> {
    format!("{:x}\r\n{content}\r\n", content.len()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_found_at_either_end() {
        let expected = Ask {
            stream: true,
            usage: true,
            deltas: 7,
            gap: Duration::from_millis(20),
        };
        let long = "x".repeat(100_000);
        let first = format!(
            r#"{{"stream":true,"max_tokens":7,"seed":20,"stream_options":{{"include_usage":true}},"c":"{long}"}}"#
        );
        let last = format!(
            r#"{{"c":"{long}","max_completion_tokens": 7, "seed": 20, "stream": true, "stream_options": {{"include_usage": true}}}}"#
        );
        assert_eq!(Ask::read(first.as_bytes()), expected);
        assert_eq!(Ask::read(last.as_bytes()), expected);
    }

    #[test]
    fn a_body_that_asks_for_nothing_gets_a_whole_answer() {
        let ask = Ask::read(br#"{"model":"mock","stream":false}"#);
        assert!(!ask.stream && !ask.usage && ask.gap.is_zero());
    }
}
