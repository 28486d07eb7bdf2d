//! A request as its rule wants it. Everything behind sees only that: cache key, hashes of the prompt, translations,
//! backends. Pure.

use bytes::Bytes;

use crate::edits::Edits;
use crate::openai::{Api, Call, Encoding};
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
    if call.encoding != Encoding::Json {
        return Ok(None);
    }
    let (mut edits, mut changes) = (Edits::default(), Vec::new());
    let own = rule.prompt.as_deref();
    prompts::put_in(api, own, &rule.prompts, body, &mut edits, &mut changes)?;
    parameters::limit(api, &rule.parameters, body, &mut edits, &mut changes)?;
    Ok((!edits.is_empty()).then(|| Reshaped {
        body: edits.apply(body),
        changes,
    }))
}
