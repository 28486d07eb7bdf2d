//! What a caller sends: one request, made before it is needed, in which only a number changes from call to call.

use bytes::Bytes;

use crate::args::Shape;

/// Of the number that makes each body another one, in hexadecimal.
const NONCE_DIGITS: usize = 16;
pub(crate) const PATH: &str = "/v1/chat/completions";
/// Of every request, besides the length of its body and what [`Shape`] adds.
pub(crate) const HEADERS: [(&str, &str); 4] = [
    ("content-type", "application/json"),
    ("accept", "*/*"),
    ("user-agent", "penstock-bench"),
    ("authorization", "Bearer sk-bench"),
];

/// A request to copy, and what its answer must hold.
pub(crate) struct Template {
    bytes: Vec<u8>,
    head_bytes: usize,
    nonce_at: usize,
    pub(crate) marks: u64,
    pub(crate) stream: bool,
    /// Head and body are written apart.
    pub(crate) split: bool,
}

impl Template {
    pub(crate) fn new(shape: &Shape) -> Self {
        let before = format!(
            r#"{{"model":"mock","stream":{},"max_tokens":{},"seed":{},"messages":[{{"role":"user","content":""#,
            shape.stream, shape.deltas, shape.gap_ms
        );
        let after = r#""}]}"#;
        let fixed = before.len() + NONCE_DIGITS + after.len();
        let filler: String = " Tell me about the fox and the dog."
            .chars()
            .cycle()
            .take(shape.body_bytes.saturating_sub(fixed))
            .collect();
        let nonce = "0".repeat(NONCE_DIGITS);
        let body = format!("{before}{nonce}{filler}{after}");
        let mut head = format!(
            "POST {PATH} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n",
            shape.connect,
            body.len()
        );
        for (name, value) in HEADERS {
            head.extend([name, ": ", value, "\r\n"]);
        }
        for header in &shape.headers {
            head.extend([header, "\r\n"]);
        }
        head.push_str("\r\n");
        Self {
            head_bytes: head.len(),
            nonce_at: head.len() + before.len(),
            bytes: [head, body].concat().into_bytes(),
            marks: if shape.stream { shape.deltas } else { 1 },
            stream: shape.stream,
            split: shape.split,
        }
    }

    /// Head and body as HTTP/1.1 writes them, for [`Self::number`].
    pub(crate) fn request(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Makes a copy another request than all others.
    pub(crate) fn number(&self, request: &mut [u8], nonce: u64) {
        let place = self.nonce_at..self.nonce_at + NONCE_DIGITS;
        request[place].copy_from_slice(format!("{nonce:016x}").as_bytes());
    }

    /// The two parts of a copy.
    pub(crate) fn parts<'a>(&self, request: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        request.split_at(self.head_bytes)
    }

    pub(crate) fn body_bytes(&self) -> usize {
        self.bytes.len() - self.head_bytes
    }

    /// The body alone.
    pub(crate) fn body(&self, nonce: u64) -> Bytes {
        let mut request = self.request();
        self.number(&mut request, nonce);
        Bytes::from(request).slice(self.head_bytes..)
    }

    pub(crate) fn deltas(&self) -> u64 {
        if self.stream { self.marks } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_as_long_as_its_head_says_and_has_its_number() {
        let template = Template::new(&Shape {
            connect: "127.0.0.1:1".parse().unwrap(),
            headers: vec!["x-one: 1".to_owned()],
            body_bytes: 300,
            stream: true,
            deltas: 7,
            gap_ms: 20,
            split: false,
        });
        let mut request = template.request();
        template.number(&mut request, 0xabc);
        let (head, body) = template.parts(&request);
        assert_eq!((body.len(), template.body_bytes()), (300, 300));
        assert_eq!(template.body(0xabc), body);
        let head = std::str::from_utf8(head).unwrap();
        assert!(head.contains("\r\ncontent-length: 300\r\n"));
        assert!(head.ends_with("\r\nx-one: 1\r\n\r\n"));
        let body: serde_json::Value = serde_json::from_slice(body).unwrap();
        let content = body["messages"][0]["content"].as_str().unwrap();
        assert!(content.starts_with("0000000000000abc Tell me"));
    }
}
