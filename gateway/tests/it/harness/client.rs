//! A client that sees every segment.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::upstream::{find, parse_head};
use super::within;

/// A client that sees what arrives when.
pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    buffer: Vec<u8>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    /// The body came to its proper end.
    pub(crate) complete: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The reason in an error that the gateway made.
    pub(crate) fn code(&self) -> String {
        let value: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        let error = value["error"].as_object().unwrap();
        let members: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(members, ["code", "message", "param", "type"]);
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty())
        );
        error["code"].as_str().unwrap().to_owned()
    }
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    pub(crate) async fn post(&mut self, headers: &str, body: &str) {
        self.post_to("/v1/chat/completions", headers, body).await;
    }

    pub(crate) async fn post_to(&mut self, path: &str, headers: &str, body: &str) {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
        ))
        .await;
    }

    async fn more(&mut self) -> bool {
        let read = within("more of an answer", self.stream.read_buf(&mut self.buffer)).await;
        read.is_ok_and(|bytes| bytes > 0)
    }

    /// Whether the peer closes without a further byte.
    pub(crate) async fn closed(&mut self) -> bool {
        !self.more().await
    }

    pub(crate) async fn head(&mut self) -> (u16, BTreeMap<String, String>) {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).unwrap();
                let (line, headers) = parse_head(&head);
                return (line.split(' ').nth(1).unwrap().parse().unwrap(), headers);
            }
            assert!(
                self.more().await,
                "closed before an answer: {:?}",
                String::from_utf8_lossy(&self.buffer)
            );
        }
    }

    /// The next chunk of a chunked body; `None` at its end, `Err` if it breaks off.
    pub(crate) async fn chunk(&mut self) -> Result<Option<String>, ()> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n") {
                let size = std::str::from_utf8(&self.buffer[..end]).unwrap();
                let size = usize::from_str_radix(size, 16).unwrap();
                if self.buffer.len() >= end + 2 + size + 2 {
                    let all: Vec<u8> = self.buffer.drain(..end + 2 + size + 2).collect();
                    let text = String::from_utf8(all[end + 2..end + 2 + size].to_vec()).unwrap();
                    return Ok((size > 0).then_some(text));
                }
            }
            if !self.more().await {
                return Err(());
            }
        }
    }

    /// Chunks until `text` is complete; panics if something else comes.
    pub(crate) async fn expect(&mut self, text: &str) {
        let mut got = String::new();
        while got != text {
            assert!(text.starts_with(&got), "got {got:?} instead of {text:?}");
            got.push_str(&self.chunk().await.unwrap().expect("more of the body"));
        }
    }

    pub(crate) async fn answer(&mut self) -> Answer {
        let (status, headers) = self.head().await;
        if headers
            .get("transfer-encoding")
            .is_some_and(|encoding| encoding == "chunked")
        {
            let mut body = String::new();
            loop {
                match self.chunk().await {
                    Ok(Some(text)) => body.push_str(&text),
                    Ok(None) => {
                        return Answer {
                            status,
                            headers,
                            body,
                            complete: true,
                        };
                    }
                    Err(()) => {
                        return Answer {
                            status,
                            headers,
                            body,
                            complete: false,
                        };
                    }
                }
            }
        }
        let length: usize = headers
            .get("content-length")
            .map_or(0, |length| length.parse().unwrap());
        while self.buffer.len() < length {
            if !self.more().await {
                let body = String::from_utf8_lossy(&self.buffer).into_owned();
                return Answer {
                    status,
                    headers,
                    body,
                    complete: false,
                };
            }
        }
        let body = String::from_utf8(self.buffer.drain(..length).collect()).unwrap();
        Answer {
            status,
            headers,
            body,
            complete: true,
        }
    }
}
