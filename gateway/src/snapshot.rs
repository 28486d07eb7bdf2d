//! `Snapshot`: a config, the endpoints and the credentials, resolved for the request path and swapped as a whole.
//! Pure: [`Snapshot::build`] takes the previous one and carries live state (requests in flight, failures, pools,
//! turns, caches) over by backend id and address. A request keeps what it resolved, never the snapshot.

mod build;
mod candidate;
mod tier;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use penstock_core::config::{
    self, CallerCredentials, FailureClass, FanOut, FanOutMode, GatewayConfig, HealthCheck,
    Parameters, Profile, Protocol, Repeat, Slo, Strategy, Urgency,
};
use penstock_core::ids::{BackendId, Id};

use crate::balance::adaptive::Adaptive;
use crate::balance::peak_ewma::PeakEwma;
use crate::balance::prefix_affinity::{Owner, PrefixIndex};
use crate::budgets::Budgets;
use crate::cache::exact::ExactCache;
use crate::conditions::{Asked, Conditions, Held};
use crate::engine_load::EngineLoad;
use crate::health::Health;
use crate::hedge_budget::HedgeBudget;
use crate::identity::sets::Sets;
use crate::lengths::Lengths;
use crate::limits::Limits;
use crate::load::{BackendLedger, Ledger};
use crate::metrics::{Known, Metrics};
use crate::models::Models;
use crate::name::Name;
use crate::outlier::Outlier;
use crate::outlook::Outlook;
use crate::pace::Pace;
use crate::patience::{Patience, at_endpoint};
use crate::principal::{Principals, Who};
use crate::prompts::{Library, Prompt};
use crate::provider::Rest;
use crate::provider::bedrock::Signer;
use crate::provider::target::Targets;
use crate::pulse::Pulse;
use crate::queue::Queue;
use crate::retry_budget::RetryBudget;
use crate::settings::Place;
use crate::stored_keys::StoredKeys;
use crate::tasks::TaskSet;
use crate::trust::{LastHandshake, Secured, Trust, Unsecured};
use crate::upstream::Pool;
use crate::vitals::{self, Means, Vitals};
use crate::wish::HashOn;

pub use candidate::{Candidate, Model};
pub use tier::{Slot, Tier};

/// So many may wait at an endpoint, however slow it is: engines compute a few prompts together.
const MIN_WAITING: f64 = 4.0;

/// What builds live state for backends that are new.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// For the balancer and `GET /load`.
    pub ledger: &'a Ledger,
    /// For handles.
    pub metrics: &'a Metrics,
    /// Now, in the process's ms.
    pub now_ms: u64,
    /// Where this gateway is.
    pub place: &'a Place,
    /// Number of workers, which is the number of pools of an endpoint.
    pub workers: usize,
    /// Where requests wait for room.
    pub queue: &'a Arc<Queue>,
    /// Which endpoint was sent which prompts.
    pub prefixes: &'a Arc<PrefixIndex>,
    /// Whom backends are believed to be by.
    pub trust: &'a Trust,
    /// What tokens of callers are verified by.
    pub(crate) key_sets: &'a Arc<Sets>,
    /// Callers' keys in the store.
    pub(crate) stored_keys: &'a Arc<StoredKeys>,
}

/// Everything that a request may need, resolved.
pub struct Snapshot {
    /// The config it was made from.
    pub config: Arc<GatewayConfig>,
    /// Its digest.
    pub digest: String,
    /// Objects that are not served as the config says.
    pub rejected: Vec<String>,
    /// What callers may ask for by name.
    pub models: Models,
    /// Who may call; `None`: anybody.
    pub principals: Option<Principals>,
    /// How much callers may take.
    pub(crate) budgets: Budgets,
    rules: Vec<Arc<Rule>>,
    /// Model → rules with that exact name, in order.
    exact: ExactRules,
    /// Prefixes in rule order.
    prefixes: Vec<(String, usize)>,
    /// Rules for backends that speak plain HTTP, in order.
    services: Vec<usize>,
    backends: BTreeMap<BackendId, Arc<Backend>>,
    caches: BTreeMap<Id, (config::Cache, Arc<ExactCache>)>,
    /// By policy.
    tasks: BTreeMap<Id, Arc<TaskSet>>,
}

type ExactRules = HashMap<String, Vec<usize>>;

/// Of what a rule was made.
#[derive(Clone, Debug)]
pub struct Version {
    /// `metadata.generation` of its policy; 0 where objects come from files.
    pub generation: i64,
    /// The config's.
    pub digest: Arc<str>,
}

/// One rule.
pub struct Rule {
    /// `namespace/policy/rule`, for logs and metrics.
    pub label: String,
    /// Its policy.
    pub policy: Id,
    /// Whether it takes callers that the gateway does not know.
    pub anonymous: bool,
    /// Of what it was made.
    pub version: Version,
    /// What must hold of a request besides its model.
    pub conditions: Conditions,
    /// Candidates by priority, then by what they come after; never empty ones.
    pub tiers: Vec<Tier>,
    /// How to choose among equals.
    pub strategy: Strategy,
    /// The header that `Hash` and `Sticky` keep together.
    pub hash_on: HashOn,
    /// What another region counts as, in ms.
    pub region_penalty_ms: f32,
    /// What callers are to see.
    pub slo: Slo,
    /// Attempts in all.
    pub attempts: usize,
    /// What is followed by another attempt, at candidates without `after`.
    pub retry_on: BTreeSet<FailureClass>,
    /// Which requests to plain HTTP may be sent again once they went upstream.
    pub repeat: Repeat,
    /// Whether a stream that is cut is continued elsewhere.
    pub rescues: bool,
    /// Repeats at endpoints that fail.
    pub retries: Arc<RetryBudget>,
    /// When a slow attempt gets a second one beside it.
    pub hedge: Option<Hedge>,
    /// Whether requests go to several backends at once.
    pub fan_out: Option<FanOut>,
    /// Whether small calls for embeddings are made together.
    pub join: Option<Join>,
    /// How long its answers are.
    pub lengths: Arc<Lengths>,
    /// How many wait for its backends' `Retry-After` to be over.
    pub waiting: Arc<AtomicU32>,
    /// How long its callers wait, if that matters.
    pub patience: Arc<Patience>,
    /// Who goes first where not all can be answered in time.
    pub urgency: Urgency,
    /// To connect.
    pub connect: Duration,
    /// To the first token of a stream, or the first byte of another answer's body.
    pub first_token: Duration,
    /// To the first byte of a whole answer of a model.
    pub whole: Duration,
    /// Between two pieces of an answer.
    pub idle: Duration,
    /// From the request's head to its answer's end.
    pub total: Duration,
    /// How often streams on which nothing goes out get a comment.
    pub heartbeat: Option<Duration>,
    /// What callers may ask of a model.
    pub parameters: Parameters,
    /// Comes before the system prompts of callers.
    pub prompt: Option<Arc<Prompt>>,
    /// The prompts that callers may ask for.
    pub prompts: Arc<Library>,
    /// Parts of a request that a backend's protocol cannot carry.
    pub rest: Rest,
    /// Whether streams are held until they are whole.
    pub buffers: bool,
    /// How long an event stream goes on without its caller, and is kept for the caller to come back.
    pub resumable: Option<Duration>,
    /// Where answers are stored, with the cache's name.
    pub cache: Option<(String, Arc<ExactCache>)>,
}

/// See [`Rule::join`].
pub struct Join {
    /// How long the first call waits for others.
    pub within: Duration,
    /// Inputs of one joined call.
    pub max_inputs: usize,
}

/// See [`Rule::hedge`].
pub struct Hedge {
    /// Without a first token for this long.
    pub after: Duration,
    /// Tokens that hedges may add, in percent of all.
    pub extra_percent: u32,
    /// What is saved of them.
    pub budget: Arc<HedgeBudget>,
}

impl Rule {
    /// Those of all tiers.
    pub fn candidates(&self) -> impl Iterator<Item = &Candidate> {
        self.tiers.iter().flat_map(|tier| &tier.candidates)
    }

    /// Those that are asked first: the first priority's without `after`.
    pub fn first_tier(&self) -> Option<&Tier> {
        let is_first = |tier: &&Tier| !tier.candidates.iter().any(Candidate::is_fallback);
        self.tiers.iter().find(is_first)
    }

    /// Whether a failure of this class is followed by another attempt, at one candidate or another.
    pub fn falls_back_on(&self, class: FailureClass) -> bool {
        let mut candidates = self.candidates();
        self.retry_on.contains(&class)
            || candidates.any(|candidate| candidate.after.contains(&class))
    }

    /// Whether callers get the answers of several backends.
    pub fn wants_all(&self) -> bool {
        let wants_all = |fan_out: FanOut| fan_out.mode == FanOutMode::All;
        self.fan_out.is_some_and(wants_all)
    }
}

/// Something that answers.
pub struct Backend {
    /// Its name.
    pub id: BackendId,
    /// Its name as text, for logs, headers and labels.
    pub label: HeaderValue,
    /// What it speaks.
    pub protocol: Protocol,
    /// What it is like.
    pub profile: Profile,
    /// Those that may take new requests.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Whether there is one, or one will be soon.
    pub outlook: Outlook,
    /// What goes upstream as credential.
    pub credential: Credential,
    /// What becomes of the caller's own.
    pub caller_credentials: CallerCredentials,
    /// TLS towards it; `None`: in the clear, or not yet.
    pub secured: Option<Arc<Secured>>,
    /// Why TLS cannot be spoken as the config says. While there is no older form, it has no endpoint.
    pub unsecured: Option<Unsecured>,
    /// Requests in flight and waiting.
    pub ledger: Arc<BackendLedger>,
    /// Where the scan for the next endpoint begins.
    pub turn: Arc<AtomicUsize>,
    /// How long its callers wait, if that matters.
    pub patience: Arc<Patience>,
    /// State of all known addresses, those that are not ready included.
    lives: BTreeMap<Address, Arc<EndpointLive>>,
}

/// What goes upstream as credential.
pub enum Credential {
    /// Nothing.
    None,
    /// This header, its value marked sensitive.
    Header(HeaderName, HeaderValue),
    /// A signature of each request.
    Signed(Box<Signer>),
    /// It should, but no value has arrived: the backend cannot be used.
    Missing,
}

/// Where to connect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// A pod.
    Socket(SocketAddr),
    /// Scheme and authority of a provider.
    Origin(String),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Origin(origin) => f.write_str(origin),
        }
    }
}

/// One address of a backend.
pub struct Endpoint {
    /// Where to connect.
    pub address: Address,
    /// The `Host` header.
    pub host: HeaderValue,
    /// Request targets.
    pub targets: Targets,
    /// The zone of its node.
    pub zone: Option<String>,
    /// What its pod was made from; endpoints without it are alike.
    pub revision: Option<String>,
    /// TLS towards it; `None`: in the clear.
    pub secured: Option<Arc<Secured>>,
    /// Whether it speaks HTTP/2 in the clear.
    pub speaks_h2c: bool,
    /// What outlives snapshots.
    pub live: Arc<EndpointLive>,
}

impl Endpoint {
    /// Whether a connection to it is one of HTTP/2, or becomes one if the other side likes.
    pub(crate) fn may_speak_http2(&self) -> bool {
        match &self.secured {
            Some(_) => !self.live.speaks_http1.load(Ordering::Relaxed),
            None => self.speaks_h2c,
        }
    }
}

/// State of one address.
pub struct EndpointLive {
    /// Different for each address that this process has known; never 0.
    pub id: Owner,
    /// The backend whose address it is.
    pub backend: BackendId,
    /// What leads to it.
    pub name: Name,
    /// Requests in flight from this gateway.
    pub in_flight: AtomicU32,
    /// Those among them whose answer has not begun: streams without a first token, and all others.
    pub waiting: AtomicU32,
    /// Prompt tokens of the streams among them that have no first token yet.
    pub waiting_tokens: AtomicU32,
    /// Answers that it begins a second.
    pub pace: Pace,
    /// How long callers of its backend wait, if that matters.
    pub patience: Arc<Patience>,
    /// Where requests wait for room here.
    pub queue: Arc<Queue>,
    /// Failures in a row.
    pub outlier: Outlier,
    /// What it said of its limits, by model.
    pub limits: Limits,
    /// What health checks found.
    pub health: Health,
    /// Whether TLS could be agreed on.
    pub handshake: LastHandshake,
    /// Whether it chose HTTP/1.1 when it was asked last.
    pub speaks_http1: AtomicBool,
    /// How many streams of HTTP/2 it allowed on a connection when it was asked last; 0: it was not asked.
    pub http2_streams: AtomicUsize,
    /// What its engine says of itself.
    pub engine: EngineLoad,
    /// When it became ready, in the process's ms.
    pub ready_ms: AtomicU64,
    /// Whether it still says something.
    pub pulse: Pulse,
    /// How well it answers, compared with its peers.
    pub vitals: Vitals,
    /// Until the first token of a stream, per unit of work that lay before it.
    to_first_token: PeakEwma,
    /// Until the end of any other answer.
    to_end: PeakEwma,
    /// What `Adaptive` has learned of its streams.
    pub adaptive: Adaptive,
    /// Connections, by worker.
    pub pool: Pool,
}

impl EndpointLive {
    fn new(
        workers: usize,
        backend: BackendId,
        address: &Address,
        patience: Arc<Patience>,
        queue: Arc<Queue>,
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            backend,
            name: match address {
                Address::Socket(_) => Name::default(),
                Address::Origin(origin) => Name::of(origin),
            },
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            waiting_tokens: AtomicU32::new(0),
            pace: Pace::default(),
            patience,
            queue,
            outlier: Outlier::default(),
            limits: Limits::default(),
            health: Health::default(),
            handshake: LastHandshake::default(),
            speaks_http1: AtomicBool::new(false),
            http2_streams: AtomicUsize::new(0),
            engine: EngineLoad::default(),
            ready_ms: AtomicU64::new(0),
            pulse: Pulse::default(),
            vitals: Vitals::default(),
            to_first_token: PeakEwma::default(),
            to_end: PeakEwma::default(),
            adaptive: Adaptive::default(),
            pool: Pool::new(workers),
        }
    }

    /// Whether one more request would be answered in time: always, unless callers give up in masses. By Little's law
    /// those who wait for so long are as many as are answered in that time.
    pub fn has_room(&self, now_ms: u64) -> bool {
        let Some(patience) = self.patience.known(now_ms) else {
            return true;
        };
        let in_time = f64::from(self.pace.per_s(now_ms)) * at_endpoint(patience).as_secs_f64();
        f64::from(self.waiting.load(Ordering::Relaxed)) < in_time.max(MIN_WAITING)
    }

    /// For how long it has been ready, in ms.
    pub fn ready_for_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.ready_ms.load(Ordering::Relaxed))
    }

    /// It refused or failed. Where nothing is known of how quick it is, it must not look better than one that answers.
    pub fn presume_slow(&self, now_ms: u64) {
        self.to_first_token.presume_slow(now_ms);
        self.to_end.presume_slow(now_ms);
    }

    /// How long callers waited here lately: for a stream to begin, per unit of work before it; for another answer to be
    /// whole.
    pub fn latency(&self, stream: bool) -> &PeakEwma {
        if stream {
            &self.to_first_token
        } else {
            &self.to_end
        }
    }
}

/// Why no rule takes a request.
#[derive(Clone, Debug)]
pub enum NoRule {
    /// None names its model.
    Model,
    /// Those that do have conditions that do not hold.
    Conditions,
    /// It depends on which of these tasks it is about.
    Unclassified(Arc<TaskSet>),
}

impl Snapshot {
    /// The first rule in order that takes a request.
    pub fn rule_for(&self, asked: &Asked<'_>) -> Result<&Arc<Rule>, NoRule> {
        let model = asked.call.model.as_ref();
        let exact = self.exact.get(model).map_or(&[][..], Vec::as_slice);
        let mut exact = exact.iter().copied().peekable();
        let mut prefixes = self
            .prefixes
            .iter()
            .filter(|(prefix, _)| model.starts_with(prefix.as_str()))
            .map(|(_, index)| *index)
            .peekable();
        let mut none = NoRule::Model;
        loop {
            let next = match (exact.peek(), prefixes.peek()) {
                (Some(first), Some(second)) if first < second => exact.next(),
                (Some(_), None) => exact.next(),
                _ => prefixes.next(),
            };
            let Some(rule) = next.and_then(|next| self.rules.get(next)) else {
                return Err(none);
            };
            match rule.conditions.hold(asked) {
                Held::Yes => return Ok(rule),
                Held::No => none = NoRule::Conditions,
                Held::Unclassified(set) => return Err(NoRule::Unclassified(Arc::clone(set))),
            }
        }
    }

    /// The first rule in order that takes a request which is no call of a model.
    pub fn service_for(&self, asked: &Asked<'_>) -> Option<&Arc<Rule>> {
        let mut rules = self
            .services
            .iter()
            .filter_map(|index| self.rules.get(*index));
        rules.find(|rule| matches!(rule.conditions.hold(asked), Held::Yes))
    }

    /// Whether some rule takes callers that the gateway does not know.
    pub fn takes_strangers(&self) -> bool {
        self.rules.iter().any(|rule| rule.anonymous)
    }

    /// Whether a caller may use the rule of this number.
    pub fn is_open(&self, rule: usize, who: &Who) -> bool {
        self.rules.get(rule).is_some_and(|rule| {
            who.may_use(&rule.policy, rule.anonymous).is_ok()
                && (*who == Who::Anyone || rule.conditions.are_open_to(who.principal()))
        })
    }

    /// The rule of this label.
    pub fn rule_named(&self, label: &str) -> Option<&Arc<Rule>> {
        self.rules.iter().find(|rule| rule.label == label)
    }

    /// The tasks that policies tell apart.
    pub fn task_sets(&self) -> impl Iterator<Item = &Arc<TaskSet>> {
        self.tasks.values()
    }

    /// Every backend.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.backends.values()
    }

    /// The endpoints of engines that rules, or jobs that wait, want to know more of.
    pub fn engines_to_read(&self, now_ms: u64) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.rules.iter().flat_map(move |rule| {
            let reads = matches!(rule.strategy, Strategy::KvAware | Strategy::Adaptive);
            rule.candidates()
                .flat_map(|candidate| &candidate.backend.endpoints)
                .filter(move |endpoint| reads || endpoint.live.engine.is_wanted(now_ms))
                // Providers have no such page, and would not like to be asked.
                .filter(|endpoint| matches!(endpoint.address, Address::Socket(_)))
        })
    }

    /// All endpoints, and how they are to be asked whether they are well.
    pub fn health_checks(&self) -> impl Iterator<Item = (&Arc<Endpoint>, Option<&HealthCheck>)> {
        self.backends.values().flat_map(|backend| {
            let check = backend.profile.health_check.as_ref();
            let endpoints = backend.endpoints.iter();
            endpoints.map(move |endpoint| (endpoint, check))
        })
    }

    /// Which series there may be.
    pub fn known(&self) -> Known<'_> {
        let candidates = self.rules.iter().flat_map(|rule| rule.candidates());
        let routes =
            candidates.map(|candidate| (candidate.metrics.rule(), candidate.metrics.backend()));
        Known {
            rules: self.rules.iter().map(|rule| rule.label.as_str()).collect(),
            routes: routes.collect(),
        }
    }
}

impl Backend {
    /// Answers that its endpoints begin a second.
    pub fn per_s(&self, now_ms: u64) -> u32 {
        let paces = self.endpoints.iter();
        paces.map(|endpoint| endpoint.live.pace.per_s(now_ms)).sum()
    }

    /// Compares its endpoints with each other.
    pub fn compare(&self, now_ms: u64) {
        let peers: Vec<Means> = self
            .endpoints
            .iter()
            .map(|endpoint| endpoint.live.vitals.means(now_ms))
            .collect();
        for (endpoint, share) in self.endpoints.iter().zip(vitals::shares(&peers)) {
            endpoint.live.vitals.set_share(share);
        }
    }

    /// Whether there is a ready endpoint of this address.
    fn has(&self, address: &Address) -> bool {
        let mut endpoints = self.endpoints.iter();
        endpoints.any(|endpoint| endpoint.address == *address)
    }

    /// Every known address's state, those that are not ready included.
    pub fn lives(&self) -> impl Iterator<Item = &Arc<EndpointLive>> {
        self.lives.values()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use penstock_core::config::{
        Cache, CredentialRef, FORMAT, NameMatch, Retry, Strategy, Target, Timeouts,
    };
    use penstock_core::endpoints::{Endpoints, ServicePort};
    use prometheus_client::registry::Registry;
    use proptest::prelude::*;

    use super::*;
    use crate::source::{Credential, Credentials};

    pub(crate) fn backend(service: &str) -> config::Backend {
        let service_port = ServicePort {
            service: Id::new("ns", service),
            port: 8000,
        };
        config::Backend {
            target: Target::Endpoints {
                service_port,
                port_name: None,
                may_sleep: false,
            },
            protocol: Protocol::OpenAi,
            model: None,
            api_version: None,
            region: None,
            credential: None,
            profile: Profile::default(),
            caller_credentials: CallerCredentials::Dropped,
            transport: config::Transport::default(),
        }
    }

    pub(crate) fn rule(
        name: &str,
        models: &[NameMatch],
        backends: &[(&str, u32, u32)],
    ) -> config::Rule {
        config::Rule {
            policy: Id::new("ns", "p"),
            name: name.to_owned(),
            models: models.to_vec(),
            conditions: Vec::new(),
            backends: backends
                .iter()
                .map(|(name, weight, priority)| config::RuleBackend {
                    backend: Id::new("ns", *name),
                    weight: *weight,
                    priority: *priority,
                    model_override: None,
                    after: BTreeSet::new(),
                })
                .collect(),
            strategy: Strategy::LeastRequests,
            hash_on: None,
            region_penalty_ms: None,
            slo: Slo::default(),
            retry: Retry {
                attempts: 3,
                on: config::usual_failures(),
                repeat: Repeat::Safe,
                rescue_streams: false,
            },
            timeouts: Timeouts {
                connect_ms: 1000,
                first_token_ms: 1000,
                whole_ms: None,
                idle_ms: 1000,
                total_ms: 60_000,
            },
            parameters: config::Parameters::default(),
            prompt: None,
            on_unsupported: config::OnUnsupported::Refuse,
            streaming: config::Streaming::Passed,
            heartbeat_ms: None,
            resumable_ms: None,
            join_embeddings: None,
            urgency: config::Urgency::Normal,
            hedge: None,
            fan_out: None,
            anonymous: false,
            cache: None,
        }
    }

    /// The rule that takes a chat with this model and nothing else.
    pub(crate) fn rule_of(snapshot: &Snapshot, model: &str) -> Option<Arc<Rule>> {
        let body = serde_json::json!({ "model": model }).to_string();
        let call = crate::openai::Call::parse(body.as_bytes()).ok()?;
        let headers = http::HeaderMap::new();
        let asked = Asked {
            method: &http::Method::POST,
            path: "/v1/chat/completions",
            headers: &headers,
            region: None,
            principal: None,
            call: &call,
            tasks: &[],
        };
        snapshot.rule_for(&asked).ok().map(Arc::clone)
    }

    pub(crate) fn config(backends: &[&str], rules: Vec<config::Rule>) -> GatewayConfig {
        GatewayConfig {
            format: FORMAT,
            gateway: Id::new("ns", "g"),
            objects: BTreeMap::new(),
            backends: backends
                .iter()
                .map(|name| (Id::new("ns", *name), backend(name)))
                .collect(),
            caches: BTreeMap::new(),
            prompts: BTreeMap::new(),
            tasks: BTreeMap::new(),
            callers: None,
            budgets: BTreeMap::new(),
            rules,
        }
    }

    pub(crate) fn endpoints(services: &[(&str, &[u16])]) -> Endpoints {
        let services = services
            .iter()
            .map(|(name, ports)| {
                let endpoints = ports
                    .iter()
                    .map(|port| penstock_core::endpoints::Endpoint {
                        address: SocketAddr::from(([10, 0, 0, 1], *port)),
                        ready: true,
                        zone: None,
                        revision: None,
                    })
                    .collect();
                (
                    ServicePort {
                        service: Id::new("ns", *name),
                        port: 8000,
                    },
                    endpoints,
                )
            })
            .collect();
        Endpoints { services }
    }

    pub(crate) fn build(
        config: GatewayConfig,
        endpoints: &Endpoints,
        credentials: &Credentials,
        previous: Option<&Snapshot>,
    ) -> Snapshot {
        let ledger = Ledger::new(1);
        let metrics = Metrics::register(&mut Registry::default());
        let parts = Parts {
            now_ms: 0,
            ledger: &ledger,
            place: &Place::default(),
            metrics: &metrics,
            workers: 1,
            queue: &Arc::default(),
            prefixes: &Arc::default(),
            trust: &Trust::new(None).unwrap(),
            key_sets: &Arc::default(),
            stored_keys: &Arc::new(StoredKeys::new(None, "ns")),
        };
        let digest = config.digest().unwrap();
        Snapshot::build(
            Arc::new(config),
            digest,
            endpoints,
            credentials,
            previous,
            parts,
        )
    }

    fn exact(name: &str) -> NameMatch {
        NameMatch::Exact(name.to_owned())
    }

    fn prefix(name: &str) -> NameMatch {
        NameMatch::Prefix(name.to_owned())
    }

    #[test]
    fn live_state_is_carried_over_by_backend_and_address() {
        let config = config(&["a"], vec![rule("r", &[exact("m")], &[("a", 1, 0)])]);
        let none = Credentials::default();
        let first = build(config.clone(), &endpoints(&[("a", &[1, 2])]), &none, None);
        let second = build(config, &endpoints(&[("a", &[2, 3])]), &none, Some(&first));
        let live = |snapshot: &Snapshot, index: usize| {
            Arc::clone(
                &rule_of(snapshot, "m").unwrap().tiers[0].candidates[0]
                    .backend
                    .endpoints[index]
                    .live,
            )
        };
        assert!(Arc::ptr_eq(&live(&first, 1), &live(&second, 0)));
        assert!(!Arc::ptr_eq(&live(&first, 0), &live(&second, 1)));
        assert!(Arc::ptr_eq(
            &first.rules[0].tiers[0].wheel,
            &second.rules[0].tiers[0].wheel
        ));
    }

    #[test]
    fn endpoints_that_are_not_ready_keep_their_state_but_get_no_request() {
        let config = config(&["a"], vec![rule("r", &[exact("m")], &[("a", 1, 0)])]);
        let mut some = endpoints(&[("a", &[1, 2])]);
        some.services.values_mut().next().unwrap()[0].ready = false;
        let snapshot = build(config, &some, &Credentials::default(), None);
        let backend = snapshot.backends().next().unwrap();
        assert_eq!((backend.endpoints.len(), backend.lives.len()), (1, 2));
    }

    #[test]
    fn urls_become_origin_and_path_and_bad_ones_keep_the_last_good_backend() {
        let mut config = config(&["a"], vec![rule("r", &[exact("m")], &[("a", 1, 0)])]);
        let id = Id::new("ns", "a");
        let with = |config: &mut GatewayConfig, url: &str| {
            config.backends.get_mut(&id).unwrap().target = Target::Url(url.to_owned());
        };
        let (none, nowhere) = (Credentials::default(), Endpoints::default());
        with(&mut config, "https://api.example.com:8443/openai/v1");
        let good = build(config.clone(), &nowhere, &none, None);
        let endpoint = Arc::clone(&good.backends().next().unwrap().endpoints[0]);
        assert_eq!(endpoint.address.to_string(), "https://api.example.com:8443");
        let target = endpoint.targets.of(crate::openai::Api::Chat, false, "m");
        assert_eq!(target.unwrap(), "/openai/v1/chat/completions");
        assert_eq!(endpoint.host, "api.example.com:8443");
        for bad in ["ftp://x/v1", "not a url", "https://user:pass@x/v1"] {
            with(&mut config, bad);
            let kept = build(config.clone(), &nowhere, &none, Some(&good));
            assert_eq!(kept.rejected, ["LLMBackend/ns/a"]);
            assert!(Arc::ptr_eq(
                &kept.backends().next().unwrap().endpoints[0],
                &endpoint
            ));
            assert!(
                build(config.clone(), &nowhere, &none, None)
                    .backends()
                    .next()
                    .unwrap()
                    .endpoints
                    .is_empty()
            );
        }
    }

    #[test]
    fn a_credential_that_has_not_arrived_makes_the_backend_unusable() {
        let mut config = config(&["a"], vec![rule("r", &[exact("m")], &[("a", 1, 0)])]);
        let reference = CredentialRef {
            id: "ns.s.k".into(),
            version: String::new(),
        };
        config.backends.values_mut().next().unwrap().credential = Some(reference);
        let some = endpoints(&[("a", &[1])]);
        let missing = build(config.clone(), &some, &Credentials::default(), None);
        assert!(matches!(
            missing.backends().next().unwrap().credential,
            super::Credential::Missing
        ));
        let credentials = Credentials {
            values: BTreeMap::from([("ns.s.k".to_owned(), Credential::new("sk-1\n"))]),
        };
        let arrived = build(config, &some, &credentials, Some(&missing));
        let super::Credential::Header(_, value) = &arrived.backends().next().unwrap().credential
        else {
            panic!()
        };
        assert_eq!(value, "Bearer sk-1");
        assert!(value.is_sensitive());
    }

    #[test]
    fn a_cache_is_kept_until_its_settings_change() {
        let mut config = config(&["a"], vec![rule("r", &[exact("m")], &[("a", 1, 0)])]);
        let id = Id::new("ns", "c");
        config.caches.insert(
            id.clone(),
            Cache {
                ttl_ms: 1,
                max_bytes: 1,
            },
        );
        config.rules[0].cache = Some(id.clone());
        let (none, nowhere) = (Credentials::default(), Endpoints::default());
        let store = |snapshot: &Snapshot| Arc::clone(&snapshot.rules[0].cache.as_ref().unwrap().1);
        let first = build(config.clone(), &nowhere, &none, None);
        let second = build(config.clone(), &nowhere, &none, Some(&first));
        config.caches.get_mut(&id).unwrap().ttl_ms = 2;
        let third = build(config, &nowhere, &none, Some(&second));
        assert!(Arc::ptr_eq(&store(&first), &store(&second)));
        assert!(!Arc::ptr_eq(&store(&second), &store(&third)));
    }

    proptest! {
        #[test]
        fn the_first_rule_in_order_takes_the_model(
            rules in prop::collection::vec(prop::collection::vec((any::<bool>(), "[ab]{0,2}"), 1..3), 1..6),
            model in "[ab]{1,3}",
        ) {
            let rules: Vec<config::Rule> = rules.iter().enumerate().map(|(index, models)| {
                let models: Vec<NameMatch> = models.iter().map(|(is_exact, name)| {
                    if *is_exact { exact(name) } else { prefix(name) }
                }).collect();
                rule(&format!("r{index}"), &models, &[("a", 1, 0)])
            }).collect();
            let expected = rules.iter().find(|rule| rule.models.iter().any(|one| one.matches(&model))).map(|rule| format!("ns/p/{}", rule.name));
            let snapshot = build(config(&["a"], rules), &Endpoints::default(), &Credentials::default(), None);
            prop_assert_eq!(rule_of(&snapshot, &model).map(|rule| rule.label.clone()), expected);
        }
    }
}
