//! A rule's limits of what callers may ask of a model: a value beyond its bound is replaced or refused, one that is
//! missing gets its default. Pure; see `edits` for what stays as it was.

use penstock_core::config::{Bounds, OnExceed, Parameters};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::edits::{Edits, given, place};
use crate::openai::{Api, CallError};
use crate::reject::Reject;

/// What a text completion has at most where its request says nothing, by its protocol.
pub const COMPLETION_TOKENS: u32 = 16;

/// The members that may be limited. Two of one name are refused, because parsers disagree on which one counts.
#[derive(Deserialize)]
struct View<'a> {
    #[serde(borrow, default, deserialize_with = "given")]
    max_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    max_completion_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    max_output_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    temperature: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    top_p: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    n: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    best_of: Option<&'a RawValue>,
}

/// A member that says how much of something is wanted; `None` if it is not in the body.
type Member<'a> = (&'static str, Option<&'a RawValue>);

/// The members by which `api` bounds an answer, the usual one first.
fn tokens<'a>(api: Api, view: &View<'a>) -> Vec<Member<'a>> {
    match api {
        Api::Chat => vec![
            ("max_completion_tokens", view.max_completion_tokens),
            ("max_tokens", view.max_tokens),
        ],
        Api::Responses => vec![("max_output_tokens", view.max_output_tokens)],
        _ => vec![("max_tokens", view.max_tokens)],
    }
}

/// Keeps a request to `limits`; adds the names of the members that it changes to `changed`. Calls that make no text
/// have no such parameters.
pub fn limit(
    api: Api,
    limits: &Parameters,
    body: &[u8],
    edits: &mut Edits,
    changed: &mut Vec<String>,
) -> Result<(), Reject> {
    let makes_text = matches!(
        api,
        Api::Chat | Api::Completions | Api::Responses | Api::Messages
    );
    if !makes_text || *limits == Parameters::default() {
        return Ok(());
    }
    let view: View<'_> = serde_json::from_slice(body).map_err(|err| CallError::Json {
        line: err.line(),
        column: err.column(),
    })?;
    let mut pass = Pass {
        body,
        on_exceed: limits.on_exceed,
        edits,
        changed,
    };
    let bounds = limits.max_output_tokens;
    let usual = match (api, bounds.max) {
        (Api::Completions, Some(max)) => Some(max.min(COMPLETION_TOKENS)),
        (_, max) => max,
    };
    let default = bounds.default.or(usual);
    let bounds = Bounds { default, ..bounds };
    pass.keep(&tokens(api, &view), bounds, Unit::Ones)?;
    pass.keep(
        &[("temperature", view.temperature)],
        limits.temperature,
        Unit::Thousandths,
    )?;
    pass.keep(&[("top_p", view.top_p)], limits.top_p, Unit::Thousandths)?;
    if let Api::Chat | Api::Completions = api {
        pass.keep(&[("n", view.n)], limits.n, Unit::Ones)?;
    }
    if api == Api::Completions {
        pass.keep(&[("best_of", view.best_of)], limits.n, Unit::Ones)?;
    }
    Ok(())
}

/// What bounds are counted in.
#[derive(Clone, Copy)]
enum Unit {
    Ones,
    Thousandths,
}

impl Unit {
    fn value(self, bound: u32) -> f64 {
        match self {
            Self::Ones => f64::from(bound),
            Self::Thousandths => f64::from(bound) / 1000.0,
        }
    }

    /// As JSON.
    fn text(self, bound: u32) -> String {
        self.value(bound).to_string()
    }
}

struct Pass<'a> {
    body: &'a [u8],
    on_exceed: OnExceed,
    edits: &'a mut Edits,
    changed: &'a mut Vec<String>,
}

impl Pass<'_> {
    /// Keeps one parameter within `bounds`, under each name that the body has it by. The first name is the one to add.
    fn keep(&mut self, members: &[Member<'_>], bounds: Bounds, unit: Unit) -> Result<(), Reject> {
        if bounds == Bounds::default() {
            return Ok(());
        }
        let mut is_said = false;
        for (name, raw) in members {
            if let Some(raw) = raw.filter(|raw| raw.get() != "null") {
                is_said = true;
                self.hold(name, raw, bounds, unit)?;
            }
        }
        if let (false, Some(default)) = (is_said, bounds.default) {
            self.fill(members, &unit.text(default));
        }
        Ok(())
    }

    fn hold(
        &mut self,
        name: &'static str,
        raw: &RawValue,
        bounds: Bounds,
        unit: Unit,
    ) -> Result<(), Reject> {
        // Some parsers read numbers from texts, and some engines take numbers below 0 for "no bound".
        let value = raw.get().parse::<f64>().ok().filter(|value| *value >= 0.0);
        let value = value.ok_or_else(|| Reject::InvalidField {
            param: name.to_owned(),
            expected: "a number from 0",
        })?;
        let above = bounds.max.filter(|max| value > unit.value(*max));
        let below = bounds.min.filter(|min| value < unit.value(*min));
        let Some(bound) = above.or(below) else {
            return Ok(());
        };
        let text = unit.text(bound);
        if self.on_exceed == OnExceed::Refuse {
            let side = if above.is_some() {
                "at most"
            } else {
                "at least"
            };
            return Err(Reject::ParameterOutOfRange {
                param: name,
                bound: format!("{side} {text}"),
            });
        }
        self.edits.replace(place(self.body, raw.get()), text);
        self.changed.push(name.to_owned());
        Ok(())
    }

    /// In the place of a `null`, or as another member.
    fn fill(&mut self, members: &[Member<'_>], text: &str) {
        let null = members
            .iter()
            .find_map(|(name, raw)| Some((*name, (*raw)?)));
        match (null, members.first()) {
            (Some((name, null)), _) => {
                let at = place(self.body, null.get());
                self.edits.replace(at, text.to_owned());
                self.changed.push(name.to_owned());
            }
            (None, Some((name, _))) => {
                self.edits.add_member(self.body, name, text);
                self.changed.push((*name).to_owned());
            }
            (None, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONE: Bounds = Bounds {
        default: None,
        min: None,
        max: None,
    };

    fn limits() -> Parameters {
        let most = |max| Bounds {
            max: Some(max),
            ..NONE
        };
        Parameters {
            max_output_tokens: most(100),
            temperature: Bounds {
                default: Some(700),
                min: Some(100),
                max: Some(1500),
            },
            top_p: most(950),
            n: most(2),
            on_exceed: OnExceed::Clamp,
        }
    }

    fn limited(api: Api, limits: &Parameters, body: &str) -> Result<String, Reject> {
        let (mut edits, mut changed) = (Edits::default(), Vec::new());
        limit(api, limits, body.as_bytes(), &mut edits, &mut changed)?;
        assert_eq!(changed.is_empty(), edits.is_empty());
        let body = edits.apply(body.as_bytes());
        Ok(String::from_utf8(body.to_vec()).unwrap())
    }

    #[test]
    fn values_beyond_a_bound_are_replaced_where_they_stand_and_nothing_else() {
        for (api, body, expected) in [
            (
                Api::Chat,
                r#"{ "model":"m","temperature": 2e0, "x": 1.50,"max_tokens":1e400,"top_p":0.951,"n":3}"#,
                r#"{ "model":"m","temperature": 1.5, "x": 1.50,"max_tokens":100,"top_p":0.95,"n":2}"#,
            ),
            (
                Api::Completions,
                r#"{"temperature":0,"max_tokens":16,"n":1,"best_of":8}"#,
                r#"{"temperature":0.1,"max_tokens":16,"n":1,"best_of":2}"#,
            ),
            (
                Api::Responses,
                r#"{"max_output_tokens":101,"temperature":1,"n":9}"#,
                r#"{"max_output_tokens":100,"temperature":1,"n":9}"#,
            ),
            (
                Api::Messages,
                r#"{"t\u0065mperature":1.501,"max_tokens":100}"#,
                r#"{"t\u0065mperature":1.5,"max_tokens":100}"#,
            ),
        ] {
            assert_eq!(limited(api, &limits(), body).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_not_said_gets_its_default_and_an_answer_its_bound() {
        for (api, body, expected) in [
            (
                Api::Chat,
                r#"{"model":"m"}"#,
                r#"{"max_completion_tokens":100,"temperature":0.7,"model":"m"}"#,
            ),
            (
                Api::Chat,
                r#"{"max_tokens":null,"temperature":null}"#,
                r#"{"max_tokens":100,"temperature":0.7}"#,
            ),
            (
                Api::Chat,
                r#"{"max_tokens":5,"max_completion_tokens":null,"temperature":1}"#,
                r#"{"max_tokens":5,"max_completion_tokens":null,"temperature":1}"#,
            ),
            (
                Api::Completions,
                r#"{"model":"m"}"#,
                r#"{"max_tokens":16,"temperature":0.7,"model":"m"}"#,
            ),
            (
                Api::Responses,
                r#"{"model":"m"}"#,
                r#"{"max_output_tokens":100,"temperature":0.7,"model":"m"}"#,
            ),
        ] {
            assert_eq!(limited(api, &limits(), body).unwrap(), expected);
        }
    }

    #[test]
    fn calls_that_make_no_text_stay_as_they_are() {
        let body = r#"{"model":"m","temperature":9}"#;
        for api in [Api::Embeddings, Api::Transcription, Api::CountTokens] {
            assert_eq!(limited(api, &limits(), body).unwrap(), body);
        }
    }

    #[test]
    fn a_refusal_names_the_parameter_and_the_bound() {
        let limits = Parameters {
            on_exceed: OnExceed::Refuse,
            ..limits()
        };
        for (body, param, bound) in [
            (r#"{"max_tokens":101}"#, "max_tokens", "at most 100"),
            (
                r#"{"max_tokens":1,"temperature":0.05}"#,
                "temperature",
                "at least 0.1",
            ),
        ] {
            let bound = bound.to_owned();
            assert_eq!(
                limited(Api::Chat, &limits, body),
                Err(Reject::ParameterOutOfRange { param, bound })
            );
        }
    }

    #[test]
    fn what_could_slip_by_a_bound_is_refused() {
        for value in ["\"1000\"", "-1", "true", "[]"] {
            let body = format!(r#"{{"max_tokens":{value}}}"#);
            assert!(
                matches!(
                    limited(Api::Chat, &limits(), &body),
                    Err(Reject::InvalidField { .. })
                ),
                "{body}"
            );
        }
        let twice = r#"{"temperature":0.5,"temperatur\u0065":2}"#;
        assert!(matches!(
            limited(Api::Chat, &limits(), twice),
            Err(Reject::InvalidJson { .. })
        ));
    }

    proptest! {
        #[test]
        fn no_number_gets_beyond_its_bounds(tokens in any::<f64>().prop_map(f64::abs), temperature in 0.0..9.0, min in 0u32..1000, more in 0u32..1000, most in 1u32..10_000) {
            let bounds = Bounds { min: Some(min), max: Some(min + more), default: None };
            let limits = Parameters {
                max_output_tokens: Bounds { max: Some(most), ..NONE },
                temperature: bounds,
                ..Parameters::default()
            };
            let body = format!(r#"{{"max_tokens":{tokens:e},"temperature":{temperature}}}"#);
            let kept: serde_json::Value = serde_json::from_str(&limited(Api::Chat, &limits, &body).unwrap()).unwrap();
            prop_assert!(kept["max_tokens"].as_f64().unwrap() <= f64::from(most));
            let kept = kept["temperature"].as_f64().unwrap();
            prop_assert!(kept * 1000.0 >= f64::from(min) - 1e-6 && kept * 1000.0 <= f64::from(min + more) + 1e-6);
        }
    }
}
