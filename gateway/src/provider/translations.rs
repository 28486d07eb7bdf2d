//! A request in other protocols, each made when the first backend that speaks it is chosen. Pure.

use std::sync::OnceLock;

use penstock_core::config::Protocol;

use super::{Misfit, Translated};

/// Those of one request.
#[derive(Default)]
pub struct Translations {
    chat: Translation,
    messages: Translation,
    gemini: Translation,
    bedrock: Translation,
}

type Translation = OnceLock<Box<Result<Translated, Misfit>>>;

impl Translations {
    /// The request for backends that speak `protocol`, made by `make` unless it was before.
    pub fn of(
        &self,
        protocol: Protocol,
        make: impl FnOnce() -> Result<Translated, Misfit>,
    ) -> &Result<Translated, Misfit> {
        let translation = match protocol {
            Protocol::OpenAi | Protocol::AzureOpenAi | Protocol::Http => &self.chat,
            Protocol::Anthropic => &self.messages,
            Protocol::Gemini => &self.gemini,
            Protocol::Bedrock => &self.bedrock,
        };
        translation.get_or_init(|| Box::new(make()))
    }
}
