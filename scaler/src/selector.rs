//! Reads a label selector in the form of `kubectl -l`: `app=vllm,tier in (a,b),!canary`. Matching is kube's.

use kube::core::{Expression, Selector};

/// More terms than anyone writes; a bound on what a ScaledObject can make us evaluate per pod.
const MAX_TERMS: usize = 16;

/// Text that is not a label selector.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSelectorError {
    /// It would select every pod of the namespace.
    #[error("a selector must have at least one term, such as app=vllm")]
    Empty,
    /// Too long to evaluate for each pod.
    #[error("a selector may have at most {MAX_TERMS} terms")]
    TooManyTerms,
    /// One term is not in the syntax.
    #[error(
        "'{0}' is not a selector term: write key=value, key!=value, key in (a,b), key notin (a,b), key or !key"
    )]
    Term(String),
}

/// Reads `text`.
pub fn parse(text: &str) -> Result<Selector, ParseSelectorError> {
    if text.trim().is_empty() {
        return Err(ParseSelectorError::Empty);
    }
    let terms = split_terms(text);
    if terms.len() > MAX_TERMS {
        return Err(ParseSelectorError::TooManyTerms);
    }
    terms
        .into_iter()
        .map(|term| expression(term).ok_or_else(|| ParseSelectorError::Term(term.to_owned())))
        .collect()
}

/// Splits at commas outside parentheses.
fn split_terms(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let (mut start, mut depth) = (0, 0_u32);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                terms.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(text[start..].trim());
    terms
}

fn expression(term: &str) -> Option<Expression> {
    if let Some((key, values)) = term.split_once(" notin ") {
        return Some(Expression::NotIn(name(key)?, set(values)?));
    }
    if let Some((key, values)) = term.split_once(" in ") {
        return Some(Expression::In(name(key)?, set(values)?));
    }
    if let Some((key, text)) = term.split_once("!=") {
        return Some(Expression::NotEqual(name(key)?, value(text)?));
    }
    if let Some((key, text)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return Some(Expression::Equal(name(key)?, value(text)?));
    }
    match term.strip_prefix('!') {
        Some(key) => Some(Expression::DoesNotExist(name(key)?)),
        None => Some(Expression::Exists(name(term)?)),
    }
}

fn set<C: FromIterator<String>>(text: &str) -> Option<C> {
    let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
    inner.split(',').map(value).collect()
}

/// A label key: an optional DNS prefix and a name (Kubernetes API conventions, "Labels and selectors").
fn name(text: &str) -> Option<String> {
    let text = text.trim();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    (!text.is_empty() && text.len() <= 317 && text.chars().all(allowed)).then(|| text.to_owned())
}

/// A label value; may be empty.
fn value(text: &str) -> Option<String> {
    let text = text.trim();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (text.len() <= 63 && text.chars().all(allowed)).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kube::core::SelectorExt;

    use super::*;

    fn matches(selector: &str, labels: &[(&str, &str)]) -> bool {
        let labels: BTreeMap<_, _> = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        parse(selector).unwrap().matches(&labels)
    }

    #[test]
    fn each_operator_matches_as_kubectl_does() {
        let pod = [("app", "vllm"), ("penstock.dev/backend", "chat")];
        for selector in [
            "app=vllm",
            "app==vllm",
            "app",
            "!canary",
            "app!=other",
            "missing!=other",
            "app in (vllm, sglang)",
            "app notin (sglang)",
            "app=vllm, penstock.dev/backend in (chat,code), !canary",
        ] {
            assert!(matches(selector, &pod), "{selector}");
        }
        for selector in [
            "app=other",
            "canary",
            "!app",
            "app!=vllm",
            "app in (a,b)",
            "app=vllm,tier=x",
        ] {
            assert!(!matches(selector, &pod), "{selector}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_term() {
        assert_eq!(parse(" "), Err(ParseSelectorError::Empty));
        assert_eq!(parse("a=b,"), Err(ParseSelectorError::Term(String::new())));
        assert_eq!(parse("a b"), Err(ParseSelectorError::Term("a b".into())));
        assert_eq!(
            parse("a in b"),
            Err(ParseSelectorError::Term("a in b".into()))
        );
        assert_eq!(
            parse("a=b=c"),
            Err(ParseSelectorError::Term("a=b=c".into()))
        );
    }

    #[test]
    fn terms_are_bounded() {
        let terms = |count: usize| vec!["a=b"; count].join(",");
        assert!(parse(&terms(MAX_TERMS)).is_ok());
        assert_eq!(
            parse(&terms(MAX_TERMS + 1)),
            Err(ParseSelectorError::TooManyTerms)
        );
    }
}
