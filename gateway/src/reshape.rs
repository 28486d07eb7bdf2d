//! A request as its rule wants it. Everything behind sees only that: cache key, hashes of the prompt, translations,
//! backends. Pure.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::edits::{Edits, place};
use crate::openai::{Api, Call, Encoding, Wanted};
use crate::parameters;
use crate::prompts;
use crate::reject::Reject;
use crate::snapshot::Rule;

/// A body that is not as its caller sent it.
#[derive(Debug)]
pub struct Reshaped {
    /// As it goes on.
    pub body: Bytes,
    /// What is another: prompts, and names of members.
    pub changes: Vec<String>,
}

/// The body as `rule` wants it; `None` if it is that already.
pub fn reshape(
    rule: &Rule,
    api: Api,
    call: &Call<'_>,
    body: &[u8],
) -> Result<Option<Reshaped>, Reject> {
    if rule.wants_all() {
        let is_form = call.encoding == Encoding::Form;
        if call.stream && (is_form || !rule.buffers) {
            return Err(in_one_document("stream"));
        }
        if call.wanted == Wanted::Later {
            return Err(in_one_document("background"));
        }
    }
    if call.encoding != Encoding::Json {
        return Ok(None);
    }
    let (mut edits, mut changes) = (Edits::default(), Vec::new());
    let own = rule.prompt.as_deref();
    prompts::put_in(api, own, &rule.prompts, body, &mut edits, &mut changes)?;
    parameters::limit(api, &rule.parameters, body, &mut edits, &mut changes)?;
    if call.stream && rule.wants_all() {
        unstream(body, &mut edits)?;
        changes.push("stream".to_owned());
    }
    Ok((!edits.is_empty()).then(|| Reshaped {
        body: edits.apply(body),
        changes,
    }))
}

#[derive(Deserialize)]
struct Streams<'a> {
    #[serde(borrow)]
    stream: &'a RawValue,
    #[serde(borrow, default)]
    stream_options: Option<&'a RawValue>,
}

/// Asks for an answer that is no stream.
fn unstream(body: &[u8], edits: &mut Edits) -> Result<(), Reject> {
    let streams: Result<Streams<'_>, _> = serde_json::from_slice(body);
    let streams = streams.map_err(|_| in_one_document("stream"))?;
    edits.replace(place(body, streams.stream.get()), "false".to_owned());
    if let Some(options) = streams.stream_options {
        edits.replace(place(body, options.get()), "null".to_owned());
    }
    Ok(())
}

fn in_one_document(param: &str) -> Reject {
    Reject::InvalidField {
        param: param.to_owned(),
        expected: "false or left out: several backends answer for this model, in one document",
    }
}
