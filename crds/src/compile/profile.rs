//! What an `LLMBackend` says of itself → `config::Profile`.

use std::time::Duration;

use penstock_core::config::{Capabilities, HealthCheck, Need, Price, Profile};

use super::backend::Check;
use crate::backend::LLMBackendSpec;
use crate::prices;
use crate::problem::Reason;
use crate::profile::{CapabilitiesSpec, HealthCheckSpec, PriceSpec, TokenPriceSpec};
use crate::text::DurationText;

/// A USD for each token: dearer ones do not exist, and sums of them stay far below what integers hold.
const MAX_MICRO_USD: i64 = 1_000_000_000_000;
const MAX_SLOW_START: Duration = Duration::from_hours(1);
const MAX_INTERVAL: Duration = Duration::from_mins(10);

pub(super) fn compile(spec: &LLMBackendSpec, check: &mut Check<'_>) -> Profile {
    let price = spec.price.as_ref();
    if spec.region.as_deref() == Some("") {
        let message = "name a region, or leave it out".to_owned();
        check.refuse("spec.region", Reason::InvalidValue, message);
    }
    Profile {
        capabilities: compile_capabilities(spec, check),
        slow_start_ms: spec.slow_start.as_ref().and_then(|text| {
            let least = Duration::from_millis(1);
            check.duration("spec.slowStart", text, least, MAX_SLOW_START);
            u64::try_from(text.parse().ok()?.as_millis()).ok()
        }),
        region: spec.region.clone(),
        price: price.and_then(|spec| compile_price(spec, check)),
        health_check: spec
            .health_check
            .as_ref()
            .map(|spec| compile_health_check(spec, check)),
    }
}

fn compile_capabilities(backend: &LLMBackendSpec, check: &mut Check<'_>) -> Capabilities {
    let unsaid = CapabilitiesSpec::default();
    let spec = backend.capabilities.as_ref().unwrap_or(&unsaid);
    if let Some(tokens) = spec.context_tokens {
        check.within("spec.capabilities.contextTokens", tokens, 1, 100_000_000);
    }
    let features = [
        (Need::Vision, spec.vision),
        (Need::Audio, spec.audio),
        (Need::Tools, spec.tools),
        (Need::JsonSchema, spec.json_schema),
    ];
    let lacks = features.into_iter().filter(|(_, has)| *has == Some(false));
    Capabilities {
        context_tokens: spec.context_tokens.and_then(|n| u32::try_from(n).ok()),
        lacks: lacks.map(|(need, _)| need).collect(),
        lacks_stream_usage: spec.stream_usage == Some(false),
        continue_final_message: spec.continue_final_message == Some(true),
        // Both engines of pools have it.
        tokenize: spec.tokenize.unwrap_or(backend.pool.is_some()),
    }
}

fn compile_health_check(spec: &HealthCheckSpec, check: &mut Check<'_>) -> HealthCheck {
    let is_plain = spec
        .path
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'#');
    if !spec.path.starts_with('/') || !is_plain {
        let message = format!(
            "'{}' is no path: it begins with '/', as '/health'",
            spec.path
        );
        check.refuse("spec.healthCheck.path", Reason::InvalidValue, message);
    }
    let interval = "spec.healthCheck.interval";
    check.duration(
        interval,
        &spec.interval,
        Duration::from_secs(1),
        MAX_INTERVAL,
    );
    let most = spec.interval.parse().unwrap_or(MAX_INTERVAL);
    let least = Duration::from_millis(100);
    check.duration("spec.healthCheck.timeout", &spec.timeout, least, most);
    let mut times = |name: &str, value: i32| {
        check.within(&format!("spec.healthCheck.{name}"), value, 1, 100);
        u32::try_from(value).unwrap_or(1)
    };
    let ms = |text: &DurationText| {
        let ms = text.parse().map(|duration: Duration| duration.as_millis());
        ms.ok()
            .and_then(|ms| u64::try_from(ms).ok())
            .unwrap_or(1000)
    };
    HealthCheck {
        path: spec.path.clone(),
        interval_ms: ms(&spec.interval),
        timeout_ms: ms(&spec.timeout),
        unhealthy_threshold: times("unhealthyThreshold", spec.unhealthy_threshold),
        healthy_threshold: times("healthyThreshold", spec.healthy_threshold),
    }
}

fn compile_price(spec: &PriceSpec, check: &mut Check<'_>) -> Option<Price> {
    match (&spec.per_million_tokens, &spec.catalogue) {
        (Some(own), None) => own_price(own, check),
        (None, Some(model)) => {
            let catalogue = prices::catalogue();
            let price = catalogue.price(model);
            if price.is_none() {
                let alike = match catalogue.like(model).join(", ") {
                    alike if alike.is_empty() => String::new(),
                    alike => format!(" (there are {alike})"),
                };
                let message = format!(
                    "'{model}' is not in the catalogue of {}{alike}: write perMillionTokens, or a name that `penstock prices` lists",
                    catalogue.source
                );
                check.refuse("spec.price.catalogue", Reason::InvalidValue, message);
            }
            price
        }
        _ => {
            let message = "write either perMillionTokens or catalogue".to_owned();
            check.refuse("spec.price", Reason::InvalidValue, message);
            None
        }
    }
}

fn own_price(spec: &TokenPriceSpec, check: &mut Check<'_>) -> Option<Price> {
    let mut micro_usd = |name: &str, value: i64| {
        let number = u64::try_from(value).ok();
        let number = number.filter(|_| value <= MAX_MICRO_USD);
        if number.is_none() {
            let path = format!("spec.price.perMillionTokens.{name}");
            let message = format!("{value} is out of range: use 0 to {MAX_MICRO_USD}");
            check.refuse(&path, Reason::InvalidValue, message);
        }
        number
    };
    let input = micro_usd("inputMicroUsd", spec.input_micro_usd);
    let cached = spec.cached_input_micro_usd.unwrap_or(spec.input_micro_usd);
    let cached_input = micro_usd("cachedInputMicroUsd", cached);
    let output = micro_usd("outputMicroUsd", spec.output_micro_usd);
    Some(Price {
        input: input?,
        cached_input: cached_input?,
        output: output?,
    })
}
