//! A rule's limits of parameters → `config::Parameters`.

use penstock_core::config::{Bounds, OnExceed, Parameters};

use super::rule::{Scope, number};
use crate::policy::{DecimalLimitSpec, OnExceedSpec, ParametersSpec, TokenLimitSpec};
use crate::problem::Reason;
use crate::text::DecimalText;

/// More than any model's context has.
const MAX_TOKENS: u32 = 100_000_000;
/// More than any engine takes.
const MAX_CHOICES: u32 = 1024;
/// In thousandths: no protocol takes more.
const MAX_TEMPERATURE: u32 = 2000;
/// In thousandths: it is a probability.
const MAX_TOP_P: u32 = 1000;

pub(super) fn compile(spec: Option<&ParametersSpec>, scope: &mut Scope<'_>) -> Parameters {
    let Some(spec) = spec else {
        return Parameters::default();
    };
    let at = |name: &str| format!(".parameters.{name}");
    let is_empty = spec.max_output_tokens.is_none()
        && spec.temperature.is_none()
        && spec.top_p.is_none()
        && spec.n.is_none();
    if is_empty {
        let message = "limits nothing: set maxOutputTokens, temperature, topP or n".to_owned();
        scope.refuse(".parameters", Reason::InvalidValue, message);
    }
    let n = spec.n.as_ref();
    Parameters {
        max_output_tokens: tokens(
            spec.max_output_tokens.as_ref(),
            &at("maxOutputTokens"),
            scope,
        ),
        temperature: decimals(
            spec.temperature.as_ref(),
            MAX_TEMPERATURE,
            &at("temperature"),
            scope,
        ),
        top_p: decimals(spec.top_p.as_ref(), MAX_TOP_P, &at("topP"), scope),
        n: Bounds {
            max: n.and_then(|n| number(n.max, 1, MAX_CHOICES, &at("n.max"), scope)),
            ..Bounds::default()
        },
        on_exceed: match spec.on_exceed {
            Some(OnExceedSpec::Refuse) => OnExceed::Refuse,
            Some(OnExceedSpec::Clamp) | None => OnExceed::Clamp,
        },
    }
}

fn tokens(spec: Option<&TokenLimitSpec>, at: &str, scope: &mut Scope<'_>) -> Bounds {
    let Some(spec) = spec else {
        return Bounds::default();
    };
    let mut read = |name: &str, value: Option<i32>| {
        number(value?, 1, MAX_TOKENS, &format!("{at}.{name}"), scope)
    };
    let bounds = Bounds {
        default: read("default", spec.default),
        min: None,
        max: read("max", spec.max),
    };
    let is_empty = spec.default.is_none() && spec.max.is_none();
    in_order(bounds, is_empty, at, scope)
}

fn decimals(spec: Option<&DecimalLimitSpec>, most: u32, at: &str, scope: &mut Scope<'_>) -> Bounds {
    let Some(spec) = spec else {
        return Bounds::default();
    };
    let mut read = |name: &str, text: Option<&DecimalText>| {
        let text = text?;
        let value = text.thousandths().filter(|value| *value <= most);
        if value.is_none() {
            let most = most / 1000;
            let message = format!(
                "'{}' is out of range: use \"0\" to \"{most}\", with up to three decimals",
                text.0
            );
            scope.refuse(&format!("{at}.{name}"), Reason::InvalidValue, message);
        }
        value
    };
    let bounds = Bounds {
        default: read("default", spec.default.as_ref()),
        min: read("min", spec.min.as_ref()),
        max: read("max", spec.max.as_ref()),
    };
    let is_empty = spec.default.is_none() && spec.min.is_none() && spec.max.is_none();
    in_order(bounds, is_empty, at, scope)
}

fn in_order(bounds: Bounds, is_empty: bool, at: &str, scope: &mut Scope<'_>) -> Bounds {
    if is_empty {
        let message = "limits nothing: set default or max".to_owned();
        scope.refuse(at, Reason::InvalidValue, message);
    }
    let given = [bounds.min, bounds.default, bounds.max];
    if given.into_iter().flatten().is_sorted() {
        return bounds;
    }
    let message = "min may not be above max, and default must lie between them".to_owned();
    scope.refuse(at, Reason::InvalidValue, message);
    Bounds::default()
}
