//! Prompts that a policy keeps, and the text form of their templates.

use serde::{Deserialize, Serialize};

/// One version of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Prompt {
    /// What rules and callers call it.
    pub name: String,
    /// From 1; the greatest is the newest.
    pub version: u32,
    /// A [`template`], for the beginning of the system prompt.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub system: Option<String>,
    /// Come before the caller's messages.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub messages: Vec<PromptMessage>,
}

/// A message of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PromptMessage {
    /// Who says it.
    pub role: Role,
    /// A [`template`].
    pub text: String,
}

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The caller.
    User,
    /// The model.
    Assistant,
}

/// One version of a prompt, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PromptRef {
    /// Its name.
    pub name: String,
    /// Its version; 0 names none.
    pub version: u32,
}

/// A part of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// As it is.
    Text(&'a str),
    /// The value of this variable.
    Variable(&'a str),
}

/// The parts of a template: text, and variables such as `{{name}}`. `Err` is the beginning of what is none.
pub fn template(text: &str) -> Result<Vec<Part<'_>>, &str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(open) = rest.find("{{") {
        let (before, variable) = rest.split_at(open);
        let wrong = || variable.get(..24).unwrap_or(variable);
        let inside = variable.get(2..).unwrap_or_default();
        let (name, behind) = inside.split_once("}}").ok_or_else(wrong)?;
        let name = name.trim();
        if !is_variable(name) {
            return Err(wrong());
        }
        if !before.is_empty() {
            parts.push(Part::Text(before));
        }
        parts.push(Part::Variable(name));
        rest = behind;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest));
    }
    Ok(parts)
}

fn is_variable(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_stand_in_double_braces_and_nothing_else_is_one() {
        use Part::{Text, Variable};
        assert_eq!(
            template("Hi {{ name }}, {\"a\":{\"b\":1}}{{x_1}}"),
            Ok(vec![
                Text("Hi "),
                Variable("name"),
                Text(", {\"a\":{\"b\":1}}"),
                Variable("x_1")
            ])
        );
        assert_eq!(template(""), Ok(Vec::new()));
        for wrong in ["{{", "{{}}", "{{a b}}", "{{1}}", "{{{a}}}", "{{a}"] {
            assert_eq!(template(wrong), Err(wrong));
        }
    }
}
