//! Prompts that a policy keeps: a rule's own, and those that callers ask for by OpenAI's member `prompt`. Values of
//! variables are text that is put in as text. Pure; `prompts::insert` says where they go in each protocol.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use penstock_core::config::{self, Part, PromptRef, Role, template};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::edits::{Edits, given};
use crate::openai::{Api, CallError};
use crate::reject::Reject;

mod insert;

/// All texts of a prompt, with the values of its variables. A variable may be in a template many times.
const MAX_PROMPT_BYTES: usize = 1 << 20;
/// Callers see at most this much of a name that they sent.
const MAX_SHOWN_CHARS: usize = 64;

/// The prompts of one policy: name → version → prompt.
#[derive(Debug, Default)]
pub struct Library(BTreeMap<String, BTreeMap<u32, Arc<Prompt>>>);

/// One version of a prompt.
#[derive(Debug)]
pub struct Prompt {
    /// `name@version`, for headers and logs.
    label: String,
    system: Option<Template>,
    messages: Vec<(Role, Template)>,
}

/// A text with places for values.
#[derive(Debug)]
struct Template(Vec<Piece>);

#[derive(Debug)]
enum Piece {
    Text(Box<str>),
    Variable(Box<str>),
}

/// What a prompt says, with the values of its variables.
#[derive(Debug, Default)]
struct Said {
    system: Option<String>,
    messages: Vec<(Role, String)>,
}

impl Library {
    /// `None` if one of them cannot be used; the compiler of configs lets none such through.
    pub fn new(prompts: &[config::Prompt]) -> Option<Self> {
        let mut library = Self::default();
        for prompt in prompts {
            let messages = prompt.messages.iter();
            let messages =
                messages.map(|message| Some((message.role, Template::new(&message.text)?)));
            let built = Prompt {
                label: format!("{}@{}", prompt.name, prompt.version),
                system: match &prompt.system {
                    Some(text) => Some(Template::new(text)?),
                    None => None,
                },
                messages: messages.collect::<Option<_>>()?,
            };
            let versions = library.0.entry(prompt.name.clone()).or_default();
            versions.insert(prompt.version, Arc::new(built));
        }
        Some(library)
    }

    /// The prompt that a rule names.
    pub fn find(&self, wanted: &PromptRef) -> Option<&Arc<Prompt>> {
        self.0.get(&wanted.name)?.get(&wanted.version)
    }

    /// The prompt that a caller asks for.
    fn asked(&self, asked: &Asked<'_>) -> Result<&Prompt, Reject> {
        let shown: String = asked.id.chars().take(MAX_SHOWN_CHARS).collect();
        let versions = self.0.get(asked.id.as_ref());
        let versions = versions
            .ok_or_else(|| invalid("prompt.id", format!("There is no prompt '{shown}'.")))?;
        let found = match asked.version.map(RawValue::get) {
            None | Some("null") => versions.last_key_value().map(|(_, prompt)| prompt),
            Some(raw) => {
                let digits = raw.trim_matches('"');
                digits
                    .parse()
                    .ok()
                    .and_then(|version: u32| versions.get(&version))
            }
        };
        found.map(AsRef::as_ref).ok_or_else(|| {
            let known: Vec<String> = versions.keys().map(u32::to_string).collect();
            let known = known.join(", ");
            invalid(
                "prompt.version",
                format!("The prompt '{shown}' has no such version. It has: {known}."),
            )
        })
    }
}

impl Prompt {
    fn said(&self, values: &BTreeMap<Cow<'_, str>, String>) -> Result<Said, Reject> {
        let name = self.label.split('@').next().unwrap_or_default();
        let templates = || {
            self.system
                .iter()
                .chain(self.messages.iter().map(|(_, text)| text))
        };
        let known: BTreeSet<&str> = templates().flat_map(Template::variables).collect();
        if let Some(missing) = known.iter().find(|name| !values.contains_key(**name)) {
            let message = format!(
                "The prompt '{name}' needs a value for '{missing}': give it in prompt.variables."
            );
            return Err(invalid("prompt.variables", message));
        }
        if let Some(unknown) = values.keys().find(|name| !known.contains(name.as_ref())) {
            let unknown: String = unknown.chars().take(MAX_SHOWN_CHARS).collect();
            let message = format!("The prompt '{name}' has no variable '{unknown}': leave it out.");
            return Err(invalid("prompt.variables", message));
        }
        let mut left = MAX_PROMPT_BYTES;
        let mut fill = |template: &Template| {
            template.filled(values, &mut left).ok_or_else(|| {
                let message =
                    format!("With its values the prompt has more than {MAX_PROMPT_BYTES} bytes.");
                invalid("prompt.variables", message)
            })
        };
        let messages = self.messages.iter();
        Ok(Said {
            system: self.system.as_ref().map(&mut fill).transpose()?,
            messages: messages
                .map(|(role, text)| Ok((*role, fill(text)?)))
                .collect::<Result<_, Reject>>()?,
        })
    }
}

impl Template {
    fn new(text: &str) -> Option<Self> {
        let pieces = template(text).ok()?.into_iter().map(|part| match part {
            Part::Text(text) => Piece::Text(text.into()),
            Part::Variable(name) => Piece::Variable(name.into()),
        });
        Some(Self(pieces.collect()))
    }

    fn variables(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|piece| match piece {
            Piece::Text(_) => None,
            Piece::Variable(name) => Some(name.as_ref()),
        })
    }

    /// The text; `None` if it takes more than is `left`.
    fn filled(&self, values: &BTreeMap<Cow<'_, str>, String>, left: &mut usize) -> Option<String> {
        let mut text = String::new();
        for piece in &self.0 {
            let next = match piece {
                Piece::Text(text) => text.as_ref(),
                Piece::Variable(name) => values.get(name.as_ref()).map_or("", String::as_str),
            };
            *left = left.checked_sub(next.len())?;
            text.push_str(next);
        }
        Some(text)
    }
}

/// OpenAI's reference to a reusable prompt
/// (<https://platform.openai.com/docs/api-reference/responses/create>).
#[derive(Deserialize)]
struct Asked<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow, default)]
    version: Option<&'a RawValue>,
    #[serde(borrow, default)]
    variables: Option<BTreeMap<Cow<'a, str>, Value<'a>>>,
}

/// A text, as it is or as a part of an input.
#[derive(Deserialize)]
#[serde(untagged)]
enum Value<'a> {
    #[serde(borrow)]
    Text(Cow<'a, str>),
    Part(TextPart<'a>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename = "input_text")]
struct TextPart<'a> {
    #[serde(borrow)]
    text: Cow<'a, str>,
}

impl Asked<'_> {
    fn values(&self) -> BTreeMap<Cow<'_, str>, String> {
        let variables = self.variables.iter().flatten();
        let values = variables.map(|(name, value)| match value {
            Value::Text(text) | Value::Part(TextPart { text }) => {
                (Cow::Borrowed(name.as_ref()), text.to_string())
            }
        });
        values.collect()
    }
}

/// The members that prompts go to. Two of one name are refused, because parsers disagree on which one counts.
#[derive(Deserialize)]
struct View<'a> {
    #[serde(borrow, default, deserialize_with = "given")]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    instructions: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    input: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    system: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    prompt: Option<&'a RawValue>,
}

/// Puts a rule's prompt, and the one that the caller asks for, into a request; adds which ones to `changed`. Calls
/// without a system prompt have no place for them.
pub fn put_in(
    api: Api,
    own: Option<&Prompt>,
    library: &Library,
    body: &[u8],
    edits: &mut Edits,
    changed: &mut Vec<String>,
) -> Result<(), Reject> {
    let is_openai = matches!(api, Api::Chat | Api::Responses);
    let may_ask = is_openai && !library.0.is_empty();
    let has_system = is_openai || matches!(api, Api::Messages | Api::CountTokens);
    if !has_system || (own.is_none() && !may_ask) {
        return Ok(());
    }
    let view: View<'_> = serde_json::from_slice(body).map_err(|err| CallError::Json {
        line: err.line(),
        column: err.column(),
    })?;
    let mut said = Said::default();
    if let Some(own) = own {
        said = own.said(&BTreeMap::new())?;
        changed.push(format!("prompt {}", own.label));
    }
    let asked = view
        .prompt
        .filter(|raw| may_ask && raw.get().starts_with('{'));
    if let Some(raw) = asked {
        let asked: Asked<'_> = serde_json::from_str(raw.get()).map_err(|_| {
            let message = "A prompt has an 'id', and may have a 'version' and 'variables' whose values are texts.";
            invalid("prompt", message.to_owned())
        })?;
        let prompt = library.asked(&asked)?;
        let more = prompt.said(&asked.values())?;
        said.system = joined(said.system, more.system);
        said.messages = more.messages;
        changed.push(format!("prompt {}", prompt.label));
    }
    if own.is_none() && asked.is_none() {
        return Ok(());
    }
    insert::insert(api, &view, asked, said, body, edits)
}

fn joined(first: Option<String>, second: Option<String>) -> Option<String> {
    match (first, second) {
        (Some(first), Some(second)) => Some(format!("{first}{}{second}", insert::APART)),
        (first, second) => first.or(second),
    }
}

fn invalid(param: &'static str, message: String) -> Reject {
    Reject::InvalidPrompt { param, message }
}

#[cfg(test)]
mod tests;
