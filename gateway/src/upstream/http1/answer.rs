//! `Answer`: the head of an answer and what came with it. Pure.

use bytes::Bytes;
use http::{Method, StatusCode};

use super::decoder::Decoder;
use super::head::{self, Head, Malformed};

/// An answer that has begun.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) head: Head,
    /// What came of its body.
    pub(super) first: Bytes,
    pub(super) decoder: Decoder,
}

/// What came is of an answer.
#[derive(Debug)]
pub(super) enum Part {
    Begun(Answer),
    /// Its head is not here yet. So many bytes were told before it and need not be kept.
    Before(usize),
}

impl Answer {
    /// The answer to a request of `method` of which `bytes` came. Its body may be moved within `bytes`.
    pub(super) fn read(bytes: &mut [u8], method: &Method) -> Result<Part, Malformed> {
        let mut told = 0;
        while let Some(end) = head::end(&bytes[told..]) {
            let (came, body) = bytes[told..].split_at_mut(end);
            let head = head::read(&Bytes::copy_from_slice(came), method)?;
            match head.response.status() {
                // Nobody asked for another protocol.
                StatusCode::SWITCHING_PROTOCOLS => return Err(Malformed),
                status if status.is_informational() => told += end,
                _ => {
                    let mut decoder = Decoder::new(head.length);
                    let content = decoder.decode(body)?;
                    return Ok(Part::Begun(Self {
                        head,
                        first: Bytes::copy_from_slice(&body[..content]),
                        decoder,
                    }));
                }
            }
        }
        Ok(Part::Before(told))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Part, Malformed> {
        Answer::read(&mut bytes.to_vec(), &Method::POST)
    }

    fn begun(bytes: &[u8]) -> Option<Answer> {
        match read(bytes).unwrap() {
            Part::Begun(answer) => Some(answer),
            Part::Before(_) => None,
        }
    }

    #[test]
    fn what_is_told_before_an_answer_is_left_out() {
        let came = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n\
            HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n";
        let answer = begun(came).unwrap();
        assert_eq!(answer.head.response.status(), StatusCode::OK);
        assert!(!answer.head.response.headers().contains_key("link"));
        assert_eq!(answer.first, "hi!");
        assert!(!answer.decoder.is_over());
        let more = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 P\r\n\r\nHTTP/1.1 2";
        assert!(matches!(read(more).unwrap(), Part::Before(43)));
    }

    #[test]
    fn another_protocol_is_no_answer() {
        let came = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n";
        assert!(read(came).is_err());
    }

    proptest! {
        #[test]
        fn nothing_that_comes_ends_the_gateway(bytes: Vec<u8>, head in "HTTP/1.[0-9] [0-9]{3}[ -~\r\n]{0,80}\r\n\r\n") {
            let _ = read(&bytes);
            let _ = read(&[head.as_bytes(), &bytes].concat());
        }

        #[test]
        fn an_answer_is_not_begun_before_its_head_is_here(cut in 0..55_usize) {
            let came = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-some: thing\r\n\r\nhi";
            prop_assert!(cut >= came.len() - 2 || begun(&came[..cut]).is_none());
        }
    }
}
