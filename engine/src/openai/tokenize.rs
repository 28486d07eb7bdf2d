//! `POST /tokenize` as vLLM 0.32 has it: the tokens of a conversation or a prompt, as a generation would read them.

use serde_json::json;

use super::{Rejection, Rules, chat_tokens, prompt_tokens, read};
use crate::text::Tokens;

/// The JSON answer to one request body.
pub(crate) fn tokenize(body: &[u8], rules: Rules<'_>) -> Result<String, Rejection> {
    let wire = read(body, rules)?;
    let empty = Tokens::keeping(rules.block_size);
    let tokens = if wire.prompt.is_some() {
        prompt_tokens(wire.prompt.as_ref(), empty)?
    } else {
        chat_tokens(&wire, empty)?
    };
    let answer = json!({
        "count": tokens.count(),
        "max_model_len": rules.max_model_len,
        "tokens": tokens.into_kept(),
        "token_strs": null,
    });
    Ok(answer.to_string())
}
