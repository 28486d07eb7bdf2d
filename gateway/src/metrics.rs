//! What Prometheus sees. Names follow the OpenTelemetry GenAI conventions where these have one. Label values come
//! from the config and from closed enums, never from callers. Series of a rule or backend that is gone are dropped with
//! it, and what a request that outlived its rule adds to them, with the next config.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::openai::Api;

mod results;

pub use results::{Hedged, Rescued};

/// OpenTelemetry's buckets for durations of GenAI requests, s.
const DURATION_BUCKETS: [f64; 14] = [
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
];
/// OpenTelemetry's buckets for the time to the first token, s.
const TTFT_BUCKETS: [f64; 16] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
/// OpenTelemetry's buckets for the time per output token, s.
const TPOT_BUCKETS: [f64; 13] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];
/// OpenTelemetry's buckets for token counts.
const TOKEN_BUCKETS: [f64; 14] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// Who answered what.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    gen_ai_operation_name: &'static str,
    rule: String,
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    gen_ai_operation_name: &'static str,
    gen_ai_token_type: &'static str,
    rule: String,
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    rule: String,
    backend: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CostLabels {
    rule: String,
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    backend: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConfigLabels {
    digest: String,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All series of the process.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<OutcomeLabels, Counter>,
    failures: Family<FailureLabels, Counter>,
    costs: Family<CostLabels, Counter<f64, AtomicU64>>,
    calls: CallFamilies,
    cache: Family<ResultLabels, Counter>,
    tasks: Family<ResultLabels, Counter>,
    hedges: Family<ResultLabels, Counter>,
    rescues: Family<ResultLabels, Counter>,
    config: Family<ConfigLabels, Gauge>,
    /// Requests in progress.
    pub in_flight: Gauge,
    /// Requests that wait for a ready endpoint.
    pub held: Gauge,
    /// Open client connections.
    pub connections: Gauge,
    /// Attempts after the first one of a request.
    pub retries: Counter,
    /// Endpoints that were left out after failures in a row.
    pub ejections: Counter,
    /// Events that were left out of streams because they cannot be read.
    pub events_left_out: Counter,
    /// Sets of certificates that were put in force.
    pub certificate_reloads: Counter,
    /// Certificates whose newest files cannot be used.
    pub unusable_certificates: Gauge,
    /// Backends whose authorities or certificates cannot be used as they are.
    pub unsecured_backends: Gauge,
    /// Configs that were applied.
    pub reloads: Counter<u64, AtomicU64>,
}

/// The series that there are, since a [`Family`] does not tell: what is to be dropped must be known.
#[derive(Clone, Debug, Default)]
struct Made(Arc<Mutex<Series>>);

#[derive(Debug, Default)]
struct Series {
    outcomes: HashSet<OutcomeLabels>,
    failures: HashSet<FailureLabels>,
    /// Rules and backends that have histograms of calls or a sum of money.
    routes: HashSet<(String, String)>,
}

impl Made {
    fn series(&self) -> MutexGuard<'_, Series> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn route(&self, rule: &str, backend: &str) {
        let route = (rule.to_owned(), backend.to_owned());
        self.series().routes.insert(route);
    }
}

/// What the config in force has.
#[derive(Debug)]
pub struct Known<'a> {
    /// Labels of its rules.
    pub rules: BTreeSet<&'a str>,
    /// Labels of rules and backends that belong together.
    pub routes: BTreeSet<(&'a str, &'a str)>,
}

impl Known<'_> {
    fn has_outcome(&self, labels: &OutcomeLabels) -> bool {
        let OutcomeLabels { rule, backend, .. } = labels;
        // Requests that no rule took, and refusals of a rule.
        let is_rules = backend.is_empty() && self.rules.contains(rule.as_str());
        rule.is_empty() || is_rules || self.has_route(rule, backend)
    }

    fn has_route(&self, rule: &str, backend: &str) -> bool {
        self.routes.contains(&(rule, backend))
    }

    fn has_backend(&self, backend: &str) -> bool {
        self.routes.iter().any(|(_, known)| *known == backend)
    }
}

/// The histograms of calls.
#[derive(Clone, Debug)]
struct CallFamilies {
    made: Made,
    duration: Histograms<RouteLabels>,
    ttft: Histograms<RouteLabels>,
    tpot: Histograms<RouteLabels>,
    tokens: Histograms<TokenLabels>,
}

impl CallFamilies {
    fn of(&self, api: Api, rule: &str, backend: &str) -> CallMetrics {
        let labels = route_labels(api, rule, backend);
        let tokens = |kind| {
            let labels = token_labels(api, kind, rule, backend);
            self.tokens.get_or_create_owned(&labels)
        };
        let metrics = CallMetrics {
            duration: self.duration.get_or_create_owned(&labels),
            ttft: self.ttft.get_or_create_owned(&labels),
            tpot: self.tpot.get_or_create_owned(&labels),
            input_tokens: tokens("input"),
            output_tokens: tokens("output"),
        };
        self.made.route(rule, backend);
        metrics
    }
}

/// Handles for one rule and backend, found once so that a request does not look them up; those of a call when the first
/// such call comes.
#[derive(Debug)]
pub struct RouteMetrics {
    rule: String,
    backend: String,
    ok: Counter,
    families: CallFamilies,
    calls: [OnceLock<CallMetrics>; Api::ALL.len()],
}

/// Handles for one call of one rule and backend.
#[derive(Debug)]
pub struct CallMetrics {
    /// From the request's head to the answer's end, s.
    pub duration: Histogram,
    /// From the request's head to the first token, s; streams only.
    pub ttft: Histogram,
    /// Mean time between tokens of one stream, s.
    pub tpot: Histogram,
    /// Tokens of the prompt as the backend counted them.
    pub input_tokens: Histogram,
    /// Tokens of the answer as the backend counted them.
    pub output_tokens: Histogram,
}

impl Metrics {
    /// Registers everything in `registry`.
    #[expect(clippy::too_many_lines, reason = "one metric after another")]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            failures: Family::default(),
            costs: Family::default(),
            calls: CallFamilies {
                made: Made::default(),
                duration: Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS)),
                ttft: Family::new_with_constructor(|| Histogram::new(TTFT_BUCKETS)),
                tpot: Family::new_with_constructor(|| Histogram::new(TPOT_BUCKETS)),
                tokens: Family::new_with_constructor(|| Histogram::new(TOKEN_BUCKETS)),
            },
            cache: Family::default(),
            tasks: Family::default(),
            hedges: Family::default(),
            rescues: Family::default(),
            config: Family::default(),
            in_flight: Gauge::default(),
            held: Gauge::default(),
            connections: Gauge::default(),
            retries: Counter::default(),
            ejections: Counter::default(),
            events_left_out: Counter::default(),
            certificate_reloads: Counter::default(),
            unusable_certificates: Gauge::default(),
            unsecured_backends: Gauge::default(),
            reloads: Counter::default(),
        };
        let seconds = || Unit::Seconds;
        registry.register_with_unit(
            "gen_ai_server_request_duration",
            "From a request's head to its answer's end",
            seconds(),
            metrics.calls.duration.clone(),
        );
        registry.register_with_unit(
            "gen_ai_server_time_to_first_token",
            "From a request's head to the first token, streams only",
            seconds(),
            metrics.calls.ttft.clone(),
        );
        registry.register_with_unit(
            "gen_ai_server_time_per_output_token",
            "Mean time between the tokens of a stream",
            seconds(),
            metrics.calls.tpot.clone(),
        );
        registry.register(
            "gen_ai_client_token_usage",
            "Tokens as the backend counted them",
            metrics.calls.tokens.clone(),
        );
        registry.register(
            "penstock_gateway_requests",
            "Requests by what became of them; stopping: still open when the time for a drain was over",
            metrics.requests.clone(),
        );
        registry.register(
            "penstock_gateway_attempt_failures",
            "Attempts that failed before the answer began",
            metrics.failures.clone(),
        );
        registry.register(
            "penstock_gateway_cost_usd",
            "What answers cost, by the prices of their backends and the tokens that these counted",
            metrics.costs.clone(),
        );
        registry.register(
            "penstock_gateway_retries",
            "Attempts after the first one of a request",
            metrics.retries.clone(),
        );
        registry.register(
            "penstock_gateway_ejections",
            "Endpoints left out after failures in a row",
            metrics.ejections.clone(),
        );
        registry.register(
            "penstock_gateway_events_left_out",
            "Events left out of streams because they cannot be read",
            metrics.events_left_out.clone(),
        );
        registry.register(
            "penstock_gateway_task_lookups",
            "Requests whose rule depends on what they are about, by what was found",
            metrics.tasks.clone(),
        );
        registry.register(
            "penstock_gateway_cache_lookups",
            "Requests of rules with a cache",
            metrics.cache.clone(),
        );
        registry.register(
            "penstock_gateway_hedges",
            "Second attempts beside a first one whose first token was slow to come",
            metrics.hedges.clone(),
        );
        registry.register(
            "penstock_gateway_rescues",
            "Streams that were cut, under rules that want them rescued",
            metrics.rescues.clone(),
        );
        registry.register(
            "penstock_gateway_in_flight_requests",
            "Requests in progress",
            metrics.in_flight.clone(),
        );
        registry.register(
            "penstock_gateway_held_requests",
            "Requests that wait for a ready endpoint",
            metrics.held.clone(),
        );
        registry.register(
            "penstock_gateway_connections",
            "Open client connections",
            metrics.connections.clone(),
        );
        registry.register(
            "penstock_gateway_certificate_reloads",
            "Sets of certificates for callers that were put in force",
            metrics.certificate_reloads.clone(),
        );
        registry.register(
            "penstock_gateway_certificates_unusable",
            "Certificates for callers whose newest files cannot be used",
            metrics.unusable_certificates.clone(),
        );
        registry.register(
            "penstock_gateway_backends_unsecured",
            "Backends with which TLS cannot be spoken as their objects say",
            metrics.unsecured_backends.clone(),
        );
        registry.register(
            "penstock_gateway_config_reloads",
            "Configs that were applied",
            metrics.reloads.clone(),
        );
        registry.register(
            "penstock_gateway_config_info",
            "1 for the config in force",
            metrics.config.clone(),
        );
        metrics
    }

    /// Handles for one rule and backend.
    pub fn route(&self, rule: &str, backend: &str) -> Arc<RouteMetrics> {
        let outcome = OutcomeLabels {
            rule: rule.to_owned(),
            backend: backend.to_owned(),
            outcome: "ok",
        };
        let ok = self.requests.get_or_create_owned(&outcome);
        self.made().outcomes.insert(outcome);
        Arc::new(RouteMetrics {
            rule: rule.to_owned(),
            backend: backend.to_owned(),
            ok,
            families: self.calls.clone(),
            calls: Default::default(),
        })
    }

    fn made(&self) -> MutexGuard<'_, Series> {
        self.calls.made.series()
    }

    /// Drops the series of rules and backends that are not `known`.
    pub fn retain(&self, known: &Known<'_>) {
        let mut made = self.made();
        made.outcomes.retain(|labels| {
            let stays = known.has_outcome(labels);
            if !stays {
                self.requests.remove(labels);
            }
            stays
        });
        made.failures.retain(|labels| {
            let stays = known.has_backend(&labels.backend);
            if !stays {
                self.failures.remove(labels);
            }
            stays
        });
        made.routes.retain(|(rule, backend)| {
            let stays = known.has_route(rule, backend);
            if !stays {
                self.forget_calls(rule, backend);
            }
            stays
        });
    }

    fn forget_calls(&self, rule: &str, backend: &str) {
        let calls = &self.calls;
        for api in Api::ALL {
            let labels = route_labels(api, rule, backend);
            calls.duration.remove(&labels);
            calls.ttft.remove(&labels);
            calls.tpot.remove(&labels);
            for kind in ["input", "output"] {
                let labels = token_labels(api, kind, rule, backend);
                calls.tokens.remove(&labels);
            }
        }
        self.costs.remove(&CostLabels {
            rule: rule.to_owned(),
            backend: backend.to_owned(),
        });
    }

    /// Counts a request that ended with `outcome`.
    pub fn ended(&self, route: Option<&RouteMetrics>, rule: &str, outcome: &'static str) {
        let labels = match route {
            Some(route) if outcome == "ok" => {
                route.ok.inc();
                return;
            }
            Some(route) => OutcomeLabels {
                rule: route.rule.clone(),
                backend: route.backend.clone(),
                outcome,
            },
            None => OutcomeLabels {
                rule: rule.to_owned(),
                backend: String::new(),
                outcome,
            },
        };
        let is_new = self.requests.get(&labels).is_none();
        self.requests.get_or_create(&labels).inc();
        if is_new {
            self.made().outcomes.insert(labels);
        }
    }

    /// Counts what an answer cost, in pico-USD.
    #[expect(clippy::cast_precision_loss, reason = "sums of money far below 2^52")]
    pub fn cost(&self, route: &RouteMetrics, pico_usd: u128) {
        let labels = CostLabels {
            rule: route.rule.clone(),
            backend: route.backend.clone(),
        };
        let is_new = self.costs.get(&labels).is_none();
        self.costs
            .get_or_create(&labels)
            .inc_by(pico_usd as f64 / 1e12);
        if is_new {
            self.calls.made.route(&route.rule, &route.backend);
        }
    }

    /// Counts an attempt that failed before an answer began.
    pub fn attempt_failed(&self, backend: &str, reason: &'static str) {
        let labels = FailureLabels {
            backend: backend.to_owned(),
            reason,
        };
        let is_new = self.failures.get(&labels).is_none();
        self.failures.get_or_create(&labels).inc();
        if is_new {
            self.made().failures.insert(labels);
        }
    }

    /// Counts a request whose rule depends on its task.
    pub fn task_found(&self, result: &'static str) {
        self.tasks.get_or_create(&ResultLabels { result }).inc();
    }

    /// Counts a request of a rule with a cache.
    pub fn cache(&self, result: &'static str) {
        self.cache.get_or_create(&ResultLabels { result }).inc();
    }

    /// Counts a hedge.
    pub fn hedged(&self, hedge: Hedged) {
        let result = hedge.label();
        self.hedges.get_or_create(&ResultLabels { result }).inc();
    }

    /// Counts a stream that was cut and was to be rescued.
    pub fn rescued(&self, rescued: Rescued) {
        let result = rescued.label();
        self.rescues.get_or_create(&ResultLabels { result }).inc();
    }

    /// Says which config is in force.
    pub fn config(&self, digest: &str) {
        self.config.clear();
        self.config
            .get_or_create(&ConfigLabels {
                digest: digest.to_owned(),
            })
            .set(1);
        self.reloads.inc();
    }
}

impl RouteMetrics {
    /// Handles for one call.
    pub fn call(&self, api: Api) -> &CallMetrics {
        self.calls[api.index()].get_or_init(|| self.families.of(api, &self.rule, &self.backend))
    }

    /// The rule's label.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// The backend's label.
    pub fn backend(&self) -> &str {
        &self.backend
    }
}

fn route_labels(api: Api, rule: &str, backend: &str) -> RouteLabels {
    RouteLabels {
        gen_ai_operation_name: api.operation(),
        rule: rule.to_owned(),
        backend: backend.to_owned(),
    }
}

fn token_labels(api: Api, kind: &'static str, rule: &str, backend: &str) -> TokenLabels {
    TokenLabels {
        gen_ai_operation_name: api.operation(),
        gen_ai_token_type: kind,
        rule: rule.to_owned(),
        backend: backend.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn series_of_a_route_come_and_go_with_it() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let route = metrics.route("ns/p/r", "ns/b");
        metrics.ended(Some(&route), "", "ok");
        metrics.ended(Some(&route), "", "cut");
        route.call(Api::Chat).ttft.observe(0.2);
        metrics.cost(&route, 2_500_000_000);
        let before = text(&registry);
        assert!(
            !before.contains(r#"gen_ai_operation_name="embeddings""#),
            "no such call came"
        );
        assert!(before.contains(
            r#"penstock_gateway_requests_total{rule="ns/p/r",backend="ns/b",outcome="cut"} 1"#
        ));
        assert!(before.contains("gen_ai_server_time_to_first_token_seconds_bucket"));
        assert!(before.contains("gen_ai_client_token_usage_bucket"));
        assert!(
            before.contains(
                r#"penstock_gateway_cost_usd_total{rule="ns/p/r",backend="ns/b"} 0.0025"#
            )
        );
        metrics.retain(&known("ns/p/r", "ns/b"));
        assert_eq!(text(&registry), before);
        metrics.retain(&known("ns/p/r", "ns/c"));
        assert!(!text(&registry).contains("ns/b"));
    }

    fn known<'a>(rule: &'a str, backend: &'a str) -> Known<'a> {
        Known {
            rules: [rule].into(),
            routes: [(rule, backend)].into(),
        }
    }

    #[test]
    fn renaming_rules_and_backends_leaves_no_series_behind() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let mut counts = BTreeSet::new();
        let mut last = None;
        for number in 100..200 {
            let (rule, backend) = (format!("ns/p/{number}"), format!("ns/{number}"));
            let route = metrics.route(&rule, &backend);
            metrics.retain(&known(&rule, &backend));
            metrics.ended(None, "", "model_not_found");
            for outcome in ["no_endpoint", "cached"] {
                metrics.ended(None, &rule, outcome);
            }
            metrics.attempt_failed(&backend, "broken");
            // What began under the rule of before ends now.
            let before = last.replace(Arc::clone(&route)).unwrap_or(route);
            metrics.ended(Some(&before), "", "cut");
            metrics.ended(None, before.rule(), "client_gone");
            metrics.attempt_failed(before.backend(), "connect");
            metrics.cost(&before, 1);
            before.call(Api::Chat).ttft.observe(0.2);
            // Only then the one of before was in force before.
            if number > 101 {
                counts.insert(text(&registry).lines().count());
            }
        }
        assert_eq!(counts.len(), 1, "{counts:?}");
        let text = text(&registry);
        assert!(!text.contains("ns/197"));
        assert!(
            text.contains(r#"outcome="model_not_found"} 100"#),
            "of no rule"
        );
    }

    #[test]
    fn one_config_is_in_force() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.config("aa");
        metrics.config("bb");
        let text = text(&registry);
        assert!(
            text.contains(r#"penstock_gateway_config_info{digest="bb"} 1"#) && !text.contains("aa")
        );
    }
}
