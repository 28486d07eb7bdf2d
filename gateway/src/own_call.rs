//! (IO) Calls that the gateway makes itself, of jobs and for embeddings: requests as callers would send them, by the
//! same path.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, Uri};
use http_body_util::BodyExt as _;
use penstock_core::names::REASON_HEADER;

use crate::behalf::Behalf;
use crate::body::Source;
use crate::guard::{Caller, Watch};
use crate::handle::answer;
use crate::process::Worker;
use crate::stream::AnswerBody;

/// Where such calls come from: no proxy says where their callers were.
pub(crate) const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// Larger answers are failures.
pub(crate) const MAX_ANSWER_BYTES: usize = 8 << 20;

/// The head of a call with a JSON body.
pub(crate) fn head(path: &str) -> Parts {
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = Method::POST;
    head.uri = Uri::try_from(path).unwrap_or_default();
    let json = HeaderValue::from_static("application/json");
    head.headers.insert(CONTENT_TYPE, json);
    head
}

/// Sends a call and returns the beginning of its answer.
pub(crate) fn send(
    worker: &Arc<Worker>,
    head: Parts,
    body: Bytes,
    behalf: Behalf,
) -> BoxFuture<'static, Response<AnswerBody>> {
    let nobody = Caller {
        address: NOBODY,
        is_tls: false,
    };
    let watch = Arc::new(Watch::new(&worker.clock, nobody));
    let body = Source::Here(Some(body));
    Box::pin(answer(Arc::clone(worker), watch, head, body, behalf))
}

/// An answer as a whole.
pub(crate) struct Outcome {
    pub(crate) status: u16,
    pub(crate) reason: Option<String>,
    pub(crate) body: Bytes,
}

/// Reads an answer to its end. One that breaks off, or is too large, is a failure of the backend.
pub(crate) async fn collect(response: Response<AnswerBody>) -> Outcome {
    let (head, mut body) = response.into_parts();
    let reason = head.headers.get(REASON_HEADER);
    let reason = reason.and_then(|reason| Some(reason.to_str().ok()?.to_owned()));
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame.map(hyper::body::Frame::into_data) {
            Ok(Ok(bytes)) if all.len() + bytes.len() <= MAX_ANSWER_BYTES => {
                all.extend_from_slice(&bytes);
            }
            Ok(Err(_trailers)) => {}
            Ok(Ok(_)) => return broken("The answer is too large to be kept."),
            Err(_) => return broken("The backend broke off."),
        }
    }
    Outcome {
        status: head.status.as_u16(),
        reason,
        body: all.freeze(),
    }
}

fn broken(message: &str) -> Outcome {
    let error = serde_json::json!({
        "error": {"message": message, "type": "server_error", "param": null, "code": "upstream_broken"},
    });
    Outcome {
        status: 502,
        reason: None,
        body: Bytes::from(error.to_string()),
    }
}
