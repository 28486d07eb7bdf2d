//! Reads a trigger's metadata, as KEDA passes it with every call, into a [`TargetSpec`].
//!
//! Every problem is reported, not the first alone; an unknown key is refused and the closest known one is named, so
//! that a typing error never means "the default".

use std::collections::BTreeMap;
use std::time::Duration;

use kube::core::{Expression, Selector};
use penstock_core::duration;
use penstock_core::names::{BACKEND_LABEL, ENGINE_PORT};

use crate::selector;

/// More keys than exist; a bound on what one call can make us read.
pub const MAX_KEYS: usize = 64;
/// Longest value. Only queries come near it.
pub const MAX_VALUE_BYTES: usize = 4096;

const BACKEND: &str = "backend";
const SELECTOR: &str = "selector";
const PORT: &str = "port";
const PROMETHEUS: &str = "prometheus";
const KV_CACHE_QUERY: &str = "kvCacheQuery";
const RUNNING_QUERY: &str = "runningQuery";
const WAITING_QUERY: &str = "waitingQuery";
const TTFT_ATTAINMENT_QUERY: &str = "ttftAttainmentQuery";
const TTFT_P90_QUERY: &str = "ttftP90Query";
const KV_PERCENT: &str = "kvCacheUtilizationPercent";
const TTFT_P90: &str = "ttftP90";
const POLICY: &str = "policy";
const TOLERANCE: &str = "toleranceEffective";

/// The keys that mean something to this scaler.
const OWN_KEYS: [&str; 13] = [
    BACKEND,
    SELECTOR,
    PORT,
    PROMETHEUS,
    KV_CACHE_QUERY,
    RUNNING_QUERY,
    WAITING_QUERY,
    TTFT_ATTAINMENT_QUERY,
    TTFT_P90_QUERY,
    KV_PERCENT,
    TTFT_P90,
    POLICY,
    TOLERANCE,
];

/// Keys that KEDA itself reads; it passes them on, and they mean nothing here.
const KEDA_KEYS: [&str; 6] = [
    "scalerAddress",
    "enableTLS",
    "unsafeSsl",
    "caCert",
    "tlsClientCert",
    "tlsClientKey",
];

/// `kvCacheUtilizationPercent` when it is not given.
const DEFAULT_KV_PERCENT: u32 = 75;
/// `ttftP90` when it is not given.
const DEFAULT_TTFT_P90: Duration = Duration::from_millis(500);
/// Longest `ttftP90`: beyond it no window of ours could hold evidence.
const MAX_TTFT_P90: Duration = Duration::from_mins(1);

/// What to watch for one ScaledObject and what to hold it to.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetSpec {
    /// Where the numbers come from.
    pub source: Source,
    /// KV-cache use that each replica should stay at or below, 1..=100 percent.
    pub kv_percent: u32,
    /// Nine in ten first tokens should come within this.
    pub ttft_p90: Duration,
    /// The HPA's tolerance, 0..=100 percent; none: read from the HPA.
    pub tolerance_percent: Option<u32>,
}

/// Where a target's numbers come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Engine pods, scraped directly, and the load reports of Penstock gateways.
    Engines {
        /// LLMBackend in the ScaledObject's namespace whose gateway load counts; none without a gateway.
        backend: Option<String>,
        /// Pods of the ScaledObject's namespace.
        selector: Selector,
        /// Port of `/metrics` on them.
        port: u16,
    },
    /// A Prometheus server.
    Prometheus {
        /// Base URL; must be one that the scaler was started with.
        server: String,
        /// What to ask it.
        queries: Queries,
    },
}

/// PromQL expressions, each an instant vector of exactly one sample.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queries {
    /// Sum over the pods of KV use, 1 = one full pod.
    pub kv_cache: Option<String>,
    /// Requests running.
    pub running: Option<String>,
    /// Requests waiting.
    pub waiting: Option<String>,
    /// Share of first tokens within `ttftP90`, 0..=1.
    pub ttft_attainment: Option<String>,
    /// 90th percentile of the time to first token, seconds.
    pub ttft_p90: Option<String>,
}

/// One thing that is wrong with the metadata.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No such key.
    #[error("unknown metadata key '{key}'{}", closest.map(|closest| format!(": did you mean '{closest}'?")).unwrap_or_default())]
    UnknownKey {
        /// As given.
        key: String,
        /// The known key that reads most like it.
        closest: Option<&'static str>,
    },
    /// A key and its `FromEnv` form.
    #[error("'{0}' is given twice: plainly and as '{0}FromEnv'")]
    Twice(&'static str),
    /// A value that does not fit its key.
    #[error("{key}: '{value}' {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// As given, shortened.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// Nothing says where the numbers come from.
    #[error("set backend, selector or prometheus, to say where the numbers come from")]
    NoSource,
    /// Two keys that exclude each other.
    #[error("'{0}' does not go with '{1}'")]
    Conflict(&'static str, &'static str),
    /// A Prometheus source without anything to scale on.
    #[error("with prometheus, set kvCacheQuery, ttftAttainmentQuery or ttftP90Query")]
    NoQuery,
    /// More than [`MAX_KEYS`] keys.
    #[error("more than {MAX_KEYS} metadata keys")]
    TooManyKeys,
    /// Longer than [`MAX_VALUE_BYTES`].
    #[error("'{0}' is longer than {MAX_VALUE_BYTES} bytes")]
    TooLong(&'static str),
    /// A server that the scaler may not ask.
    #[error(
        "prometheus: '{0}' is not one of the servers that this scaler may ask (--allowed-prometheus)"
    )]
    ServerNotAllowed(String),
}

/// Reads metadata. `allowed_prometheus` holds base URLs without a trailing slash.
pub fn parse<'a>(
    metadata: impl IntoIterator<Item = (&'a String, &'a String)>,
    allowed_prometheus: &[String],
) -> Result<TargetSpec, Vec<Problem>> {
    let mut problems = Vec::new();
    let values = known_values(metadata, &mut problems);
    let source = source(&values, allowed_prometheus, &mut problems);
    let kv_percent =
        number(&values, KV_PERCENT, 1, 100, &mut problems).unwrap_or(DEFAULT_KV_PERCENT);
    let ttft_p90 = ttft_p90(&values, &mut problems);
    let tolerance_percent = number(&values, TOLERANCE, 0, 100, &mut problems);
    if let Some(&policy) = values.get(POLICY)
        && policy != "threshold"
    {
        problems.push(wrong(
            POLICY,
            policy,
            "is not a policy: the only one is threshold",
        ));
    }
    match source {
        Some(source) if problems.is_empty() => Ok(TargetSpec {
            source,
            kv_percent,
            ttft_p90,
            tolerance_percent,
        }),
        _ => Err(problems),
    }
}

/// What identifies a target among the triggers of its ScaledObject: KEDA's own keys, which may hold certificates, are
/// left out.
pub fn own<'a>(
    metadata: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> BTreeMap<String, String> {
    let own = |(key, _): &(&String, &String)| {
        !KEDA_KEYS.contains(&key.strip_suffix("FromEnv").unwrap_or(key))
    };
    metadata
        .into_iter()
        .filter(own)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// All problems in one line, for a gRPC status.
pub fn describe(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

fn known_values<'a>(
    metadata: impl IntoIterator<Item = (&'a String, &'a String)>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<&'static str, &'a str> {
    let mut values = BTreeMap::new();
    for (count, (key, value)) in metadata.into_iter().enumerate() {
        if count == MAX_KEYS {
            problems.push(Problem::TooManyKeys);
            break;
        }
        // KEDA resolves `<key>FromEnv` from the target container's environment and keeps the key's name.
        let plain = key.strip_suffix("FromEnv").unwrap_or(key);
        if KEDA_KEYS.contains(&plain) {
            continue;
        }
        let Some(known) = OWN_KEYS.into_iter().find(|own| *own == plain) else {
            problems.push(unknown(key));
            continue;
        };
        if value.len() > MAX_VALUE_BYTES {
            problems.push(Problem::TooLong(known));
        } else if values.insert(known, value.trim()).is_some() {
            problems.push(Problem::Twice(known));
        }
    }
    values
}

fn unknown(key: &str) -> Problem {
    let key: String = key.chars().take(64).collect();
    let likeness = |known: &str| strsim::jaro_winkler(&key.to_lowercase(), &known.to_lowercase());
    let closest = OWN_KEYS
        .into_iter()
        .map(|known| (likeness(known), known))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    Problem::UnknownKey {
        key,
        closest: closest.map(|(_, known)| known),
    }
}

fn wrong(key: &'static str, value: &str, expected: impl Into<String>) -> Problem {
    Problem::Value {
        key,
        value: value.chars().take(64).collect(),
        expected: expected.into(),
    }
}

fn number(
    values: &BTreeMap<&'static str, &str>,
    key: &'static str,
    low: u32,
    high: u32,
    problems: &mut Vec<Problem>,
) -> Option<u32> {
    let text = values.get(key)?;
    match text.parse::<u32>() {
        Ok(number) if (low..=high).contains(&number) => Some(number),
        _ => {
            problems.push(wrong(
                key,
                text,
                format!("is not a whole number from {low} to {high}"),
            ));
            None
        }
    }
}

fn ttft_p90(values: &BTreeMap<&'static str, &str>, problems: &mut Vec<Problem>) -> Duration {
    let Some(text) = values.get(TTFT_P90) else {
        return DEFAULT_TTFT_P90;
    };
    match duration::parse(text) {
        Ok(ttft) if ttft > Duration::ZERO && ttft <= MAX_TTFT_P90 => ttft,
        Ok(_) => {
            problems.push(wrong(TTFT_P90, text, "is not within 1ms and 60s"));
            DEFAULT_TTFT_P90
        }
        Err(_) => {
            problems.push(wrong(
                TTFT_P90,
                text,
                "is not a duration: write a whole number and ms, s, m or h, such as 500ms",
            ));
            DEFAULT_TTFT_P90
        }
    }
}

fn source(
    values: &BTreeMap<&'static str, &str>,
    allowed_prometheus: &[String],
    problems: &mut Vec<Problem>,
) -> Option<Source> {
    match values.get(PROMETHEUS) {
        Some(server) => prometheus(server, values, allowed_prometheus, problems),
        None => engines(values, problems),
    }
}

fn engines(values: &BTreeMap<&'static str, &str>, problems: &mut Vec<Problem>) -> Option<Source> {
    let queries = [
        KV_CACHE_QUERY,
        RUNNING_QUERY,
        WAITING_QUERY,
        TTFT_ATTAINMENT_QUERY,
        TTFT_P90_QUERY,
    ];
    for query in queries
        .into_iter()
        .filter(|query| values.contains_key(query))
    {
        problems.push(wrong(query, "", "is only for a prometheus source"));
    }
    let port = number(values, PORT, 1, 65_535, problems)
        .and_then(|port| u16::try_from(port).ok())
        .unwrap_or(ENGINE_PORT);
    let backend = match values.get(BACKEND) {
        Some(name) if is_object_name(name) => Some((*name).to_owned()),
        Some(name) => {
            problems.push(wrong(BACKEND, name, "is not the name of an LLMBackend"));
            return None;
        }
        None => None,
    };
    let selector = match (values.get(SELECTOR), &backend) {
        (Some(text), _) => match selector::parse(text) {
            Ok(selector) => selector,
            Err(err) => {
                problems.push(wrong(SELECTOR, text, format!("cannot be read: {err}")));
                return None;
            }
        },
        (None, Some(name)) => {
            Selector::from_iter([Expression::Equal(BACKEND_LABEL.to_owned(), name.clone())])
        }
        (None, None) => {
            problems.push(Problem::NoSource);
            return None;
        }
    };
    Some(Source::Engines {
        backend,
        selector,
        port,
    })
}

/// A DNS subdomain name, as object names are.
fn is_object_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    !text.is_empty() && text.len() <= 253 && text.chars().all(allowed)
}

fn prometheus(
    server: &str,
    values: &BTreeMap<&'static str, &str>,
    allowed_prometheus: &[String],
    problems: &mut Vec<Problem>,
) -> Option<Source> {
    for other in [BACKEND, SELECTOR, PORT]
        .into_iter()
        .filter(|other| values.contains_key(other))
    {
        problems.push(Problem::Conflict(other, PROMETHEUS));
    }
    let server = server.trim_end_matches('/').to_owned();
    if !allowed_prometheus.contains(&server) {
        problems.push(Problem::ServerNotAllowed(
            server.chars().take(256).collect(),
        ));
        return None;
    }
    let query = |key: &str| {
        values
            .get(key)
            .filter(|query| !query.is_empty())
            .map(|query| (*query).to_owned())
    };
    let queries = Queries {
        kv_cache: query(KV_CACHE_QUERY),
        running: query(RUNNING_QUERY),
        waiting: query(WAITING_QUERY),
        ttft_attainment: query(TTFT_ATTAINMENT_QUERY),
        ttft_p90: query(TTFT_P90_QUERY),
    };
    if queries.ttft_attainment.is_some() && queries.ttft_p90.is_some() {
        problems.push(Problem::Conflict(TTFT_ATTAINMENT_QUERY, TTFT_P90_QUERY));
    }
    if queries.kv_cache.is_none() && queries.ttft_attainment.is_none() && queries.ttft_p90.is_none()
    {
        problems.push(Problem::NoQuery);
    }
    if queries.waiting.is_some() && queries.running.is_none() {
        problems.push(wrong(
            WAITING_QUERY,
            "",
            format!(
                "needs {RUNNING_QUERY}: what a waiting request will use is what a running one does"
            ),
        ));
    }
    Some(Source::Prometheus { server, queries })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<TargetSpec, String> {
        let map: BTreeMap<String, String> = pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        parse(&map, &["http://prometheus.monitoring:9090".to_owned()])
            .map_err(|problems| describe(&problems))
    }

    #[test]
    fn backend_alone_gets_every_default() {
        let spec = read(&[
            ("backend", "chat"),
            ("scalerAddress", "penstock-scaler:6000"),
        ])
        .unwrap();
        assert_eq!(spec.kv_percent, 75);
        assert_eq!(spec.ttft_p90, Duration::from_millis(500));
        assert_eq!(spec.tolerance_percent, None);
        let Source::Engines {
            backend,
            selector,
            port,
        } = spec.source
        else {
            panic!("{spec:?}")
        };
        assert_eq!(
            (backend.as_deref(), selector.to_string().as_str(), port),
            (Some("chat"), "penstock.dev/backend=chat", 8000)
        );
    }

    #[test]
    fn unknown_key_is_named_with_the_closest_known_one() {
        for (key, closest) in [
            ("kvCacheUtilisationPercent", "kvCacheUtilizationPercent"),
            ("ttft", "ttftP90"),
            ("selectors", "selector"),
            ("serverAddress", "selector"),
            ("toleranceEfective", "toleranceEffective"),
        ] {
            let error = read(&[("backend", "chat"), (key, "1")]).unwrap_err();
            assert!(error.contains(&format!("'{key}'")), "{error}");
            if closest != "selector" {
                assert!(
                    error.contains(&format!("did you mean '{closest}'")),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let error = read(&[
            ("kvCacheUtilizationPercent", "0"),
            ("ttftP90", "fast"),
            ("policy", "magic"),
            ("nope", "1"),
        ])
        .unwrap_err();
        for part in [
            "backend, selector or prometheus",
            "kvCacheUtilizationPercent: '0'",
            "ttftP90: 'fast'",
            "policy: 'magic'",
            "'nope'",
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn values_outside_their_range_are_refused() {
        for (key, value) in [
            ("kvCacheUtilizationPercent", "101"),
            ("kvCacheUtilizationPercent", "0.75"),
            ("ttftP90", "0s"),
            ("ttftP90", "61s"),
            ("ttftP90", "0.5s"),
            ("toleranceEffective", "101"),
            ("port", "0"),
            ("port", "65536"),
            ("backend", "Not/AName"),
            ("selector", "a b"),
            ("policy", ""),
            ("kvCacheQuery", "up"),
        ] {
            let base = if key == "backend" {
                vec![]
            } else {
                vec![("backend", "chat")]
            };
            let pairs: Vec<_> = base.into_iter().chain([(key, value)]).collect();
            let error = read(&pairs).unwrap_err();
            assert!(error.contains(key), "{key}={value}: {error}");
        }
    }

    #[test]
    fn selector_with_backend_takes_pods_from_one_and_load_from_the_other() {
        let spec = read(&[
            ("backend", "chat"),
            ("selector", "app=vllm"),
            ("port", "8001"),
        ])
        .unwrap();
        let Source::Engines {
            backend,
            selector,
            port,
        } = spec.source
        else {
            panic!("{spec:?}")
        };
        assert_eq!(
            (backend.as_deref(), selector.to_string().as_str(), port),
            (Some("chat"), "app=vllm", 8001)
        );
    }

    #[test]
    fn prometheus_server_must_be_allowed_and_have_a_query() {
        let allowed = ("prometheus", "http://prometheus.monitoring:9090/");
        assert!(read(&[allowed, ("kvCacheQuery", "sum(vllm:kv_cache_usage_perc)")]).is_ok());
        assert!(read(&[allowed]).unwrap_err().contains("kvCacheQuery"));
        assert!(
            read(&[
                ("prometheus", "http://169.254.169.254"),
                ("kvCacheQuery", "x")
            ])
            .unwrap_err()
            .contains("--allowed-prometheus")
        );
        assert!(
            read(&[allowed, ("kvCacheQuery", "x"), ("selector", "a=b")])
                .unwrap_err()
                .contains("'selector' does not go with 'prometheus'")
        );
        assert!(
            read(&[allowed, ("ttftP90Query", "x"), ("ttftAttainmentQuery", "y")])
                .unwrap_err()
                .contains("does not go with")
        );
    }

    #[test]
    fn value_from_the_environment_counts_once() {
        assert_eq!(
            read(&[("backendFromEnv", "chat")]).unwrap(),
            read(&[("backend", "chat")]).unwrap()
        );
        assert!(
            read(&[("backendFromEnv", "chat"), ("backend", "chat")])
                .unwrap_err()
                .contains("twice")
        );
    }

    #[test]
    fn keys_and_values_are_bounded() {
        let many: BTreeMap<String, String> = (0..=MAX_KEYS)
            .map(|n| (format!("scalerAddress{n}"), String::new()))
            .collect();
        assert!(
            parse(&many, &[])
                .unwrap_err()
                .contains(&Problem::TooManyKeys)
        );
        let long = "x".repeat(MAX_VALUE_BYTES + 1);
        assert!(
            read(&[("backend", &long)])
                .unwrap_err()
                .contains("longer than")
        );
        assert!(read(&[("selector", &format!("a={}", "b".repeat(64)))]).is_err());
    }
}
