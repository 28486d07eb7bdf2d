//! Where a prompt goes in a request: before the system prompt that the caller wrote, as part of it. Many engines take
//! one system message only, at the beginning. Pure.

use std::borrow::Cow;

use penstock_core::config::Role;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::{Said, View};
use crate::edits::{Edits, place};
use crate::openai::Api;
use crate::reject::Reject;

/// Between two system prompts.
pub(super) const APART: &str = "\n\n";

/// Puts `said` where `api` has it, and takes out the member `asked`.
pub(super) fn insert(
    api: Api,
    view: &View<'_>,
    asked: Option<&RawValue>,
    said: Said,
    body: &[u8],
    edits: &mut Edits,
) -> Result<(), Reject> {
    if let Some(asked) = asked {
        edits.remove_member(body, place(body, asked.get()));
    }
    let mut target = Target { body, edits };
    match api {
        Api::Chat => target.chat(view, &said),
        Api::Responses => {
            if let Some(system) = &said.system {
                target.text("instructions", view.instructions, system, false)?;
            }
            target.input(view.input, &listed(&said))
        }
        _ => match &said.system {
            Some(system) => target.text("system", view.system, system, true),
            None => Ok(()),
        },
    }
}

/// A prompt's messages as JSON; OpenAI's two protocols have the same form.
fn listed(said: &Said) -> Vec<String> {
    let messages = said.messages.iter().map(|(role, text)| {
        let role = match role {
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        json!({"role": role, "content": text}).to_string()
    });
    messages.collect()
}

#[derive(Deserialize)]
struct First<'a> {
    #[serde(borrow, default)]
    role: Cow<'a, str>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

struct Target<'a> {
    body: &'a [u8],
    edits: &'a mut Edits,
}

impl Target<'_> {
    fn chat(&mut self, view: &View<'_>, said: &Said) -> Result<(), Reject> {
        let new = listed(said);
        let system = said.system.as_deref();
        let message = |text| json!({"role": "system", "content": text}).to_string();
        let Some(raw) = view.messages.filter(|raw| raw.get() != "null") else {
            let all: Vec<String> = system.map(message).into_iter().chain(new).collect();
            self.set("messages", view.messages, &format!("[{}]", all.join(",")));
            return Ok(());
        };
        let unreadable = |_| wrong("messages", "a list of messages");
        let old: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(unreadable)?;
        let first = old.first().copied();
        let parsed = first.map(|first| serde_json::from_str::<First<'_>>(first.get()));
        let parsed = parsed.transpose().map_err(unreadable)?;
        let is_system = |parsed: &First<'_>| matches!(parsed.role.as_ref(), "system" | "developer");
        let of_caller = first.zip(parsed.filter(is_system));
        let mut new = new;
        if let Some((raw_first, parsed)) = of_caller {
            let end = place(self.body, raw_first.get()).end;
            let put = match (system, parsed.content) {
                (Some(system), Some(content)) => self.before(content, system),
                _ => system.is_none(),
            };
            if put {
                new.insert(0, String::new());
                self.edits.replace(end..end, new.join(","));
                return Ok(());
            }
        }
        if let Some(system) = system {
            new.insert(0, message(system));
        }
        self.head(raw, &new);
        Ok(())
    }

    fn input(&mut self, input: Option<&RawValue>, new: &[String]) -> Result<(), Reject> {
        if new.is_empty() {
            return Ok(());
        }
        match input.map(RawValue::get) {
            None | Some("null") => self.set("input", input, &format!("[{}]", new.join(","))),
            Some(text) if text.starts_with('"') => {
                let at = place(self.body, text);
                let start = format!("[{},{{\"role\":\"user\",\"content\":", new.join(","));
                self.edits.replace(at.start..at.start, start);
                self.edits.replace(at.end..at.end, "}]".to_owned());
            }
            Some(list) if list.starts_with('[') => {
                if let Some(input) = input {
                    self.head(input, new);
                }
            }
            Some(_) => return Err(wrong("input", "a text or a list")),
        }
        Ok(())
    }

    /// The system prompt where it is a member of its own.
    fn text(
        &mut self,
        name: &'static str,
        member: Option<&RawValue>,
        system: &str,
        may_be_list: bool,
    ) -> Result<(), Reject> {
        match member.filter(|raw| raw.get() != "null") {
            None => {
                self.set(name, member, &json!(system).to_string());
                Ok(())
            }
            Some(raw) if raw.get().starts_with('[') && !may_be_list => Err(wrong(name, "a text")),
            Some(raw) if self.before(raw, system) => Ok(()),
            Some(_) if may_be_list => Err(wrong(name, "a text or a list of texts")),
            Some(_) => Err(wrong(name, "a text")),
        }
    }

    /// Puts `system` before a content, which is a text or a list of parts; `false` if it is neither.
    fn before(&mut self, content: &RawValue, system: &str) -> bool {
        let at = place(self.body, content.get());
        if content.get().starts_with('"') {
            let text = json!(format!("{system}{APART}")).to_string();
            let inside = text.get(1..text.len() - 1).unwrap_or_default();
            let start = at.start + 1;
            self.edits.replace(start..start, inside.to_owned());
            return true;
        }
        let is_list = content.get().starts_with('[');
        if is_list {
            let part = json!({"type": "text", "text": system}).to_string();
            self.head(content, &[part]);
        }
        is_list
    }

    /// Puts `new` at the head of a list.
    fn head(&mut self, list: &RawValue, new: &[String]) {
        if new.is_empty() {
            return;
        }
        let inside = list.get().get(1..).unwrap_or_default();
        let is_empty = inside.trim_start().starts_with(']');
        let at = place(self.body, list.get()).start + 1;
        let end = if is_empty { "" } else { "," };
        self.edits.replace(at..at, new.join(",") + end);
    }

    /// Sets a member that is missing or `null`.
    fn set(&mut self, name: &str, member: Option<&RawValue>, value: &str) {
        match member {
            Some(null) => {
                let at = place(self.body, null.get());
                self.edits.replace(at, value.to_owned());
            }
            None => self.edits.add_member(self.body, name, value),
        }
    }
}

fn wrong(param: &str, expected: &'static str) -> Reject {
    Reject::InvalidField {
        param: param.to_owned(),
        expected,
    }
}
