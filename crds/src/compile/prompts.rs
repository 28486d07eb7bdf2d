//! Prompts of a policy → `config::Prompt`s.

use std::collections::BTreeSet;

use penstock_core::config::{Part, Prompt, PromptMessage, PromptRef, Role, template};
use penstock_core::ids::Id;

use super::rule::Scope;
use crate::object::{Kind, ObjectRef};
use crate::policy::{PromptRefSpec, PromptSpec, RoleSpec};
use crate::problem::{Problem, Reason};

/// Lists and texts are bounded here too: files are not checked against the schema's maxima.
const MAX_PROMPTS: usize = 64;
const MAX_MESSAGES: usize = 16;
/// About 4,000 tokens.
const MAX_TEXT_BYTES: usize = 16_384;
/// All texts of a policy: a gateway's config must fit into a ConfigMap, beside those of other policies.
const MAX_ALL_BYTES: usize = 256 << 10;
const MAX_VERSION: i32 = 1_000_000;

/// The prompts that can be used; says what is wrong with the others.
pub(super) fn compile(id: &Id, specs: &[PromptSpec], problems: &mut Vec<Problem>) -> Vec<Prompt> {
    let object = ObjectRef::new(Kind::RoutingPolicy, id.clone());
    let mut refuse = |path: String, message: String| {
        problems.push(Problem::invalid(object.clone(), path, message));
    };
    if specs.len() > MAX_PROMPTS {
        let message = format!("has {} entries: use {MAX_PROMPTS} at most", specs.len());
        refuse("spec.prompts".to_owned(), message);
    }
    let all: usize = specs
        .iter()
        .flat_map(texts)
        .map(|(_, text)| text.len())
        .sum();
    if all > MAX_ALL_BYTES {
        let message = format!(
            "the texts have {all} bytes: use {MAX_ALL_BYTES} at most, and remove versions that nobody uses"
        );
        refuse("spec.prompts".to_owned(), message);
        return Vec::new();
    }
    let mut known = BTreeSet::new();
    let mut prompts = Vec::new();
    for (index, spec) in specs.iter().take(MAX_PROMPTS).enumerate() {
        let wrong = mistakes(spec);
        if wrong.is_empty() && !known.insert((&spec.name, spec.version)) {
            let (name, version) = (&spec.name, spec.version);
            let message = format!("version {version} of '{name}' is there twice: number it anew");
            refuse(format!("spec.prompts[{index}].version"), message);
        } else if let (true, Some(prompt)) = (wrong.is_empty(), prompt(spec)) {
            prompts.push(prompt);
        }
        for (path, message) in wrong {
            refuse(format!("spec.prompts[{index}]{path}"), message);
        }
    }
    prompts.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
    prompts
}

/// Its texts, with their paths.
fn texts(spec: &PromptSpec) -> impl Iterator<Item = (String, &str)> {
    let system = spec.system.iter();
    let system = system.map(|text| (".system".to_owned(), text.as_str()));
    let messages = spec.messages.iter().enumerate();
    system.chain(messages.map(|(at, message)| {
        let path = format!(".messages[{at}].text");
        (path, message.text.as_str())
    }))
}

fn mistakes(spec: &PromptSpec) -> Vec<(String, String)> {
    let mut wrong = Vec::new();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if spec.name.is_empty() || spec.name.len() > 64 || !spec.name.bytes().all(is_name) {
        let message = format!(
            "'{}' is not a name: use up to 64 letters, digits, '_' and '-'",
            spec.name
        );
        wrong.push((".name".to_owned(), message));
    }
    if !(1..=MAX_VERSION).contains(&spec.version) {
        let message = format!("{} is out of range: use 1 to {MAX_VERSION}", spec.version);
        wrong.push((".version".to_owned(), message));
    }
    if spec.system.is_none() && spec.messages.is_empty() {
        wrong.push((
            String::new(),
            "says nothing: write system, messages or both".to_owned(),
        ));
    }
    if spec.messages.len() > MAX_MESSAGES {
        let message = format!(
            "has {} entries: use {MAX_MESSAGES} at most",
            spec.messages.len()
        );
        wrong.push((".messages".to_owned(), message));
    }
    for (path, text) in texts(spec) {
        if text.is_empty() || text.len() > MAX_TEXT_BYTES {
            let message = format!("has {} bytes: use 1 to {MAX_TEXT_BYTES}", text.len());
            wrong.push((path, message));
        } else if let Err(start) = template(text) {
            let message = format!(
                "'{start}' is not a variable: write letters, digits and '_' between '{{{{' and '}}}}', and '{{{{' for \
                 nothing else"
            );
            wrong.push((path, message));
        }
    }
    wrong
}

fn prompt(spec: &PromptSpec) -> Option<Prompt> {
    let messages = spec.messages.iter();
    let messages = messages.map(|message| PromptMessage {
        role: match message.role {
            RoleSpec::User => Role::User,
            RoleSpec::Assistant => Role::Assistant,
        },
        text: message.text.clone(),
    });
    Some(Prompt {
        name: spec.name.clone(),
        version: u32::try_from(spec.version).ok()?,
        system: spec.system.clone(),
        messages: messages.collect(),
    })
}

/// The prompt that a rule names. One that cannot be used stays named, so that the rule does not go on without it.
pub(super) fn of_rule(
    spec: Option<&PromptRefSpec>,
    prompts: &[Prompt],
    scope: &mut Scope<'_>,
) -> Option<PromptRef> {
    let spec = spec?;
    let wanted = spec
        .version
        .map(|version| u32::try_from(version).unwrap_or(0));
    let mut same = prompts.iter().filter(|prompt| prompt.name == spec.name);
    // They are sorted: the last one is the newest.
    let found = same.rfind(|prompt| wanted.is_none_or(|version| prompt.version == version));
    let Some(prompt) = found else {
        let which = wanted.map_or(String::new(), |version| format!(" version {version} of"));
        let message = format!(
            "there is no{which} prompt '{}' that can be used in spec.prompts: write it there or correct the name",
            spec.name
        );
        scope.refuse(".prompt", Reason::InvalidValue, message);
        return Some(PromptRef {
            name: spec.name.clone(),
            version: wanted.unwrap_or(0),
        });
    };
    let system = prompt.system.as_deref();
    let parts = system.and_then(|text| template(text).ok());
    let has_variables = parts
        .unwrap_or_default()
        .iter()
        .any(|part| matches!(part, Part::Variable(_)));
    if system.is_none() || has_variables || !prompt.messages.is_empty() {
        let message = format!(
            "version {} of '{}' is for callers to ask for: a rule's prompt has a system text without variables, and no \
             messages",
            prompt.version, prompt.name
        );
        scope.refuse(".prompt", Reason::InvalidValue, message);
    }
    Some(PromptRef {
        name: prompt.name.clone(),
        version: prompt.version,
    })
}
