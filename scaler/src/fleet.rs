//! Every target that KEDA asks about: what to collect for it, its window, what was learned, its newest decision.
//!
//! Pure: readings, the world and the time come in; scrape lists and decisions go out. Every map is
//! bounded by [`Limits`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use kube::core::{Selector, SelectorExt};
use penstock_core::ids::Id;
use penstock_core::load::{BackendLoad, LoadReport};
use serde::{Deserialize, Serialize};

use crate::decide::{self, Bounds, Decision, Learned};
use crate::drift::{Drift, Side, Tokens};
use crate::inputs::{Inputs, Ledger, Ttft, TtftSource};
use crate::metadata::{self, Queries, Source, TargetSpec};
use crate::selector;
use crate::window::{Member, PROMETHEUS_FRESH_MS, View, WINDOW_S, Window};
use crate::world::{Gateway, Pod, Target, World};
use penstock_core::engine_page::Sample;

/// A target that nobody asked about for this long is forgotten. KEDA asks at least once per `pollingInterval`.
pub const FORGET_MS: u64 = 600_000;
/// A pod that is not ready this long after its creation is not expected any more.
const LOADING_MS: u64 = 900_000;

/// How much may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Targets; asking about one more is RESOURCE_EXHAUSTED.
    pub targets: usize,
    /// Pods that are scraped per target, by name; the others are taken to be like these.
    pub pods_per_target: usize,
}

/// What identifies a target: two triggers of one ScaledObject differ in their metadata only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TargetKey {
    /// The ScaledObject.
    pub object: Id,
    /// Its trigger's metadata.
    pub metadata: BTreeMap<String, String>,
}

/// One page to read every second.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scrape {
    /// Whose.
    pub pod: Id,
    /// Where `/metrics` is.
    pub address: SocketAddr,
}

/// One set of questions to a Prometheus server.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// For which target.
    pub key: Arc<TargetKey>,
    /// Base URL.
    pub server: String,
    /// What to ask.
    pub queries: Queries,
}

/// What a Prometheus server answered; a query that gave no number is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Answers {
    /// `kvCacheQuery`.
    pub kv_cache: Option<f64>,
    /// `runningQuery`.
    pub running: Option<f64>,
    /// `waitingQuery`.
    pub waiting: Option<f64>,
    /// `ttftAttainmentQuery`.
    pub ttft_attainment: Option<f64>,
    /// `ttftP90Query`, seconds.
    pub ttft_p90_s: Option<f64>,
}

/// A target as one replica of the scaler hands it to another that starts.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    key: TargetKey,
    window: Window,
    learned: Learned,
}

/// Whether a target was taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// It is new.
    New,
    /// It was there.
    Known,
    /// There are [`Limits::targets`] already.
    Full,
}

/// All targets.
#[derive(Debug)]
pub struct Fleet {
    limits: Limits,
    targets: BTreeMap<Arc<TargetKey>, State>,
    scrapes: BTreeMap<Scrape, Vec<Arc<TargetKey>>>,
    world: Arc<World>,
}

#[derive(Debug)]
struct State {
    spec: TargetSpec,
    asked_ms: u64,
    pods: Vec<Arc<Pod>>,
    window: Window,
    prometheus: Prometheus,
    learned: Learned,
    drift: Drift,
    wanted: bool,
}

#[derive(Debug, Default)]
struct Prometheus {
    first_ms: Option<u64>,
    heard_ms: u64,
    busy_ms: u64,
    ready: Option<u32>,
    supply_since_ms: u64,
    answers: Answers,
}

impl Fleet {
    /// An empty fleet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            targets: BTreeMap::new(),
            scrapes: BTreeMap::new(),
            world: Arc::default(),
        }
    }

    /// Notes that somebody asks about a target.
    pub fn register(&mut self, key: &TargetKey, spec: TargetSpec, now_ms: u64) -> Registered {
        if let Some(state) = self.targets.get_mut(key) {
            state.asked_ms = now_ms;
            return Registered::Known;
        }
        if self.targets.len() >= self.limits.targets {
            return Registered::Full;
        }
        self.targets
            .insert(Arc::new(key.clone()), State::new(spec, now_ms));
        self.rebuild();
        Registered::New
    }

    /// Takes in a new picture of the world.
    pub fn set_world(&mut self, world: Arc<World>) {
        self.world = world;
        self.rebuild();
    }

    /// Pages to read.
    pub fn scrapes(&self) -> impl Iterator<Item = &Scrape> {
        self.scrapes.keys()
    }

    /// Questions to Prometheus servers.
    pub fn asks(&self) -> Vec<Ask> {
        let ask = |(key, state): (&Arc<TargetKey>, &State)| match &state.spec.source {
            Source::Prometheus { server, queries } => Some(Ask {
                key: key.clone(),
                server: server.clone(),
                queries: queries.clone(),
            }),
            Source::Engines { .. } => None,
        };
        self.targets.iter().filter_map(ask).collect()
    }

    /// Takes in one page.
    pub fn on_sample(&mut self, scrape: &Scrape, now_ms: u64, sample: &Sample) {
        for key in self.scrapes.get(scrape).into_iter().flatten() {
            if let Some(state) = self.targets.get_mut(key) {
                state.compare(&scrape.pod.name, now_ms, sample);
                state.window.on_sample(
                    &scrape.pod.name,
                    now_ms,
                    sample.clone(),
                    state.spec.ttft_p90,
                );
            }
        }
    }

    /// Takes in one line of a gateway. True if a target without demand has some now: decide at once.
    pub fn on_load(&mut self, gateway: &str, now_ms: u64, report: &LoadReport) -> bool {
        let mut woke = false;
        let gateway = self.world.gateways.iter().find(|known| known.id == gateway);
        let Some(Gateway { id, namespace, .. }) = gateway else {
            return false;
        };
        for (key, state) in &mut self.targets {
            let Some(backend) = state.backend(key) else {
                continue;
            };
            if *namespace != key.object.namespace
                && !report.backends.contains_key(&backend)
                && !state.window.hears(id)
            {
                continue;
            }
            // A backend that never had a request may be absent, which means zero.
            let load = report.backends.get(&backend).cloned().unwrap_or_default();
            woke |= !state.wanted && is_wanted(&load);
            let (start, tokens) = (report.process_start_ms, counted(&load));
            let drift = &mut state.drift;
            drift.hear(Side::Gateway, id, start, tokens, now_ms);
            state.window.on_load(
                id,
                now_ms,
                report.process_start_ms,
                load,
                state.spec.ttft_p90,
            );
        }
        woke
    }

    /// Takes in the answers of a Prometheus server.
    pub fn on_answers(&mut self, key: &TargetKey, now_ms: u64, answers: Answers) {
        if let Some(state) = self.targets.get_mut(key) {
            state.prometheus.take(now_ms, answers, &state.spec.source);
        }
    }

    /// Decides for every target; none for one about which nothing is known. Forgets those nobody asks about.
    pub fn tick(&mut self, now_ms: u64) -> BTreeMap<Arc<TargetKey>, Option<Decision>> {
        let before = self.targets.len();
        self.targets
            .retain(|_, state| now_ms.saturating_sub(state.asked_ms) < FORGET_MS);
        if self.targets.len() != before {
            self.rebuild();
        }
        let world = &self.world;
        let decide = |(key, state): (&Arc<TargetKey>, &mut State)| {
            let target = world.targets.get(&key.object);
            let inputs = state.inputs(key, world, target, now_ms);
            state.wanted = inputs.in_flight + inputs.held + inputs.running + inputs.waiting > 0.0;
            let decision = decide::decide(
                &inputs,
                &mut state.learned,
                &state.spec,
                bounds(target),
                now_ms,
            );
            (key.clone(), decision)
        };
        self.targets.iter_mut().map(decide).collect()
    }

    /// What of the tokens that engines say they took gateways did not count, for each target of which that is known:
    /// of prompts, and of answers.
    pub fn drifts(&mut self, now_ms: u64) -> Vec<(Arc<TargetKey>, [Option<f64>; 2])> {
        let most = self.limits.pods_per_target;
        // Where some pods are not read, nobody knows what they did.
        let known = self
            .targets
            .iter_mut()
            .filter(|(key, state)| state.backend(key).is_some() && state.pods.len() <= most);
        known
            .map(|(key, state)| (Arc::clone(key), state.drift.shares(now_ms)))
            .collect()
    }

    /// What another replica needs to decide as this one does.
    pub fn save(&self) -> Vec<Saved> {
        let save = |(key, state): (&Arc<TargetKey>, &State)| Saved {
            key: TargetKey::clone(key),
            window: state.window.clone(),
            learned: state.learned.clone(),
        };
        self.targets.iter().map(save).collect()
    }

    /// Takes in what another replica saved; targets that are known here, or too many, or refused, are left out. Returns
    /// how many were taken.
    pub fn restore(
        &mut self,
        saved: Vec<Saved>,
        allowed_prometheus: &[String],
        now_ms: u64,
    ) -> usize {
        let before = self.targets.len();
        for Saved {
            key,
            window,
            learned,
        } in saved
        {
            let Ok(spec) = metadata::parse(&key.metadata, allowed_prometheus) else {
                continue;
            };
            if self.targets.len() < self.limits.targets && !self.targets.contains_key(&key) {
                let state = State {
                    window,
                    learned,
                    ..State::new(spec, now_ms)
                };
                self.targets.insert(Arc::new(key), state);
            }
        }
        self.rebuild();
        self.targets.len() - before
    }

    /// Assigns pods to targets anew. Runs when the world or the set of targets changes.
    fn rebuild(&mut self) {
        let mut by_namespace: BTreeMap<&str, Vec<&Arc<Pod>>> = BTreeMap::new();
        for pod in &self.world.pods {
            by_namespace.entry(&pod.namespace).or_default().push(pod);
        }
        self.scrapes.clear();
        for (key, state) in &mut self.targets {
            let known = by_namespace
                .get(key.object.namespace.as_str())
                .map_or(&[][..], Vec::as_slice);
            let target = self.world.targets.get(&key.object);
            let (selector, port) = match &state.spec.source {
                Source::Engines { selector, port, .. } => (Some(selector.clone()), Some(*port)),
                Source::Prometheus { .. } => (
                    target.and_then(|target| selector::parse(target.selector.as_deref()?).ok()),
                    None,
                ),
            };
            state.pods = select(known, selector.as_ref());
            let Some(port) = port else {
                continue;
            };
            let scraped = state
                .pods
                .iter()
                .filter(|pod| pod.ready || state.window.knows(&pod.name));
            for pod in scraped.take(self.limits.pods_per_target) {
                let Some(address) = pod.metrics.or(pod.ip.map(|ip| SocketAddr::new(ip, port)))
                else {
                    continue;
                };
                self.scrapes
                    .entry(Scrape {
                        pod: pod.id(),
                        address,
                    })
                    .or_default()
                    .push(key.clone());
            }
        }
    }
}

/// Pods that match and are not on their way out, by name.
fn select(pods: &[&Arc<Pod>], selector: Option<&Selector>) -> Vec<Arc<Pod>> {
    let Some(selector) = selector else {
        return Vec::new();
    };
    let matching = pods
        .iter()
        .filter(|pod| !pod.terminating && selector.matches(&pod.labels));
    let mut matching: Vec<_> = matching.map(|pod| Arc::clone(pod)).collect();
    matching.sort_by(|a, b| a.name.cmp(&b.name));
    matching
}

#[expect(clippy::cast_precision_loss, reason = "shares of them are looked at")]
fn counted(load: &BackendLoad) -> Tokens {
    [load.counted_input as f64, load.counted_output as f64]
}

fn is_wanted(load: &BackendLoad) -> bool {
    load.in_flight + load.held + load.waiting > 0
}

/// Without a ScaledObject in view nothing is bounded but by 1, and the HPA clamps anyway.
fn bounds(target: Option<&Target>) -> Bounds {
    match target {
        Some(target) => Bounds {
            min: target.min,
            max: target.max,
            ordered: target.spec_replicas,
            current: target.status_replicas,
            tolerance_percent: target.tolerance_percent,
        },
        None => Bounds {
            min: 1,
            max: u32::MAX,
            ..Bounds::default()
        },
    }
}

impl State {
    fn new(spec: TargetSpec, now_ms: u64) -> Self {
        Self {
            spec,
            asked_ms: now_ms,
            pods: Vec::new(),
            window: Window::default(),
            prometheus: Prometheus::default(),
            learned: Learned::default(),
            drift: Drift::default(),
            wanted: false,
        }
    }

    /// What an engine says that it did.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "tells one start from another"
    )]
    fn compare(&mut self, pod: &str, now_ms: u64, sample: &Sample) {
        if let Some(tokens) = sample.prompt_tokens.zip(sample.generation_tokens) {
            let start = (sample.process_start_s.unwrap_or(0.0) * 1_000.0) as u64;
            let tokens = [tokens.0, tokens.1];
            self.drift.hear(Side::Engine, pod, start, tokens, now_ms);
        }
    }

    fn backend(&self, key: &TargetKey) -> Option<Id> {
        match &self.spec.source {
            Source::Engines {
                backend: Some(backend),
                ..
            } => Some(Id::new(&key.object.namespace, backend)),
            _ => None,
        }
    }

    fn inputs(
        &mut self,
        key: &TargetKey,
        world: &World,
        target: Option<&Target>,
        now_ms: u64,
    ) -> Inputs {
        let member = |pod: &Arc<Pod>| {
            let loading = !pod.ready
                && !self.window.knows(&pod.name)
                && now_ms.saturating_sub(pod.created_ms) < LOADING_MS;
            (
                pod.name.clone(),
                Member {
                    ready: pod.ready,
                    loading,
                },
            )
        };
        let members = self.pods.iter().map(member).collect();
        let gateways = match self.backend(key) {
            Some(_) => {
                let counts = |gateway: &&Gateway| {
                    gateway.namespace == key.object.namespace || self.window.hears(&gateway.id)
                };
                world
                    .gateways
                    .iter()
                    .filter(counts)
                    .map(|gateway| gateway.id.clone())
                    .collect()
            }
            None => BTreeSet::new(),
        };
        let view = View { members, gateways };
        match &self.spec.source {
            Source::Engines { .. } => self.window.inputs(now_ms, &view, self.spec.ttft_p90),
            Source::Prometheus { queries, .. } => self.prometheus.inputs(
                now_ms,
                &view,
                queries,
                self.spec.ttft_p90.as_secs_f64(),
                target,
            ),
        }
    }
}

impl Prometheus {
    /// A TTFT query rightly gives nothing without traffic; the others always give a number while engines are scraped.
    fn take(&mut self, now_ms: u64, answers: Answers, source: &Source) {
        let Source::Prometheus { queries, .. } = source else {
            return;
        };
        let kept = self.answers;
        // A value that is missing now is not zero: the last one stays until it is stale.
        self.answers = Answers {
            kv_cache: answers.kv_cache.or(kept.kv_cache),
            running: answers.running.or(kept.running),
            waiting: answers.waiting.or(kept.waiting),
            ..answers
        };
        let complete = (queries.kv_cache.is_none() || answers.kv_cache.is_some())
            && (queries.running.is_none() || answers.running.is_some())
            && (queries.waiting.is_none() || answers.waiting.is_some());
        let any = answers != Answers::default();
        if complete && any {
            self.first_ms.get_or_insert(now_ms);
            self.heard_ms = now_ms;
        }
        let seen = [answers.running, answers.waiting, answers.kv_cache];
        if seen.iter().all(Option::is_none) || seen.into_iter().flatten().any(|value| value > 0.0) {
            self.busy_ms = now_ms;
        }
    }

    fn inputs(
        &mut self,
        now_ms: u64,
        view: &View,
        queries: &Queries,
        ttft_p90_s: f64,
        target: Option<&Target>,
    ) -> Inputs {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let ready = match view.members.len() {
            0 => target
                .and_then(|target| target.status_replicas)
                .unwrap_or(0),
            _ => count(view.members.values().filter(|member| member.ready).count()),
        };
        if self.ready.is_some_and(|before| ready > before) {
            self.supply_since_ms = now_ms + WINDOW_S * 1000;
        }
        self.ready = Some(ready);
        let fresh =
            self.first_ms.is_some() && now_ms.saturating_sub(self.heard_ms) <= PROMETHEUS_FRESH_MS;
        let (running, waiting) = (
            self.answers.running.unwrap_or(0.0),
            self.answers.waiting.unwrap_or(0.0),
        );
        let attained = self.answers.ttft_attainment.or_else(|| {
            let p90 = self.answers.ttft_p90_s?;
            // A quantile tells on which side of the limit nine in ten are, and no more than that.
            Some(if p90 <= ttft_p90_s { 1.0 } else { 0.0 })
        });
        let ttft = attained
            .filter(|_| fresh && now_ms >= self.supply_since_ms)
            .map(|share| Ttft {
                source: TtftSource::Prometheus,
                within: 100.0 * share.clamp(0.0, 1.0),
                missed: 100.0 * (1.0 - share.clamp(0.0, 1.0)),
                overdue: 0.0,
            });
        Inputs {
            ready,
            loading: count(
                view.members
                    .values()
                    .filter(|member| member.loading)
                    .count(),
            ),
            counted: 1,
            fresh: u32::from(fresh),
            kv_use: self.answers.kv_cache,
            running,
            waiting,
            peak_concurrency: (queries.running.is_some() && queries.waiting.is_some())
                .then_some(running + waiting),
            ttft,
            ledger: Ledger::Absent,
            full: self
                .first_ms
                .is_some_and(|first| now_ms.saturating_sub(first) >= WINDOW_S * 1000),
            busy: self.busy_ms > 0 && now_ms.saturating_sub(self.busy_ms) < WINDOW_S * 1000,
            ..Inputs::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::{Bound, Hold};
    use crate::hpa::{Behavior, Hpa, Metric, Scale, Spec, Sync, Target as HpaTarget};
    use crate::keda::metric_milli;
    use crate::window::FRESH_MS;
    use penstock_core::engine_page::Buckets;

    const START: u64 = 1_000_000_000;
    const LIMITS: Limits = Limits {
        targets: 3,
        pods_per_target: 4,
    };

    fn key(name: &str, metadata: &[(&str, &str)]) -> TargetKey {
        let metadata = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        TargetKey {
            object: Id::new("team", name),
            metadata,
        }
    }

    fn register(fleet: &mut Fleet, key: &TargetKey, now_ms: u64) -> Registered {
        let allowed = ["http://prometheus".to_owned()];
        fleet.register(
            key,
            metadata::parse(&key.metadata, &allowed).unwrap(),
            now_ms,
        )
    }

    fn pod(name: &str, backend: &str) -> Pod {
        Pod {
            namespace: "team".into(),
            name: name.into(),
            labels: BTreeMap::from([("penstock.dev/backend".into(), backend.into())]),
            ip: Some("10.0.0.1".parse().unwrap()),
            metrics: None,
            ready: true,
            terminating: false,
            created_ms: START,
        }
    }

    fn world(pods: Vec<Pod>, replicas: u32) -> Arc<World> {
        let target = Target {
            min: 1,
            max: 8,
            spec_replicas: Some(replicas),
            status_replicas: Some(replicas),
            tolerance_percent: Some(0),
            ..Target::default()
        };
        Arc::new(World {
            synced: true,
            pods: pods.into_iter().map(Arc::new).collect(),
            gateways: vec![],
            targets: BTreeMap::from([(Id::new("team", "chat"), target)]),
        })
    }

    fn sample(kv_use: f64, running: f64) -> Sample {
        Sample {
            kv_use: Some(kv_use),
            running: Some(running),
            waiting: Some(0.0),
            ..Sample::default()
        }
    }

    fn decision(fleet: &mut Fleet, key: &TargetKey, now_ms: u64) -> Decision {
        fleet.tick(now_ms).get(key).cloned().flatten().unwrap()
    }

    #[test]
    fn pods_are_those_of_the_selector_and_the_namespace() {
        let mut other = pod("elsewhere", "chat");
        other.namespace = "other".into();
        let mut leaving = pod("leaving", "chat");
        leaving.terminating = true;
        let mut fixed = pod("fixed", "chat");
        fixed.metrics = Some("127.0.0.1:4242".parse().unwrap());
        let mut loading = pod("loading", "chat");
        loading.ready = false;
        let mut fleet = Fleet::new(LIMITS);
        fleet.set_world(world(
            vec![
                pod("a", "chat"),
                pod("b", "code"),
                other,
                leaving,
                fixed,
                loading,
            ],
            1,
        ));
        register(
            &mut fleet,
            &key("chat", &[("backend", "chat"), ("port", "8001")]),
            START,
        );
        let scraped: Vec<_> = fleet
            .scrapes()
            .map(|scrape| format!("{} {}", scrape.pod, scrape.address))
            .collect();
        assert_eq!(
            scraped,
            ["team/a 10.0.0.1:8001", "team/fixed 127.0.0.1:4242"]
        );
    }

    #[test]
    fn targets_are_bounded_and_forgotten() {
        let mut fleet = Fleet::new(LIMITS);
        for name in ["a", "b", "c"] {
            assert_eq!(
                register(&mut fleet, &key(name, &[("backend", "x")]), START),
                Registered::New
            );
        }
        assert_eq!(
            register(&mut fleet, &key("a", &[("backend", "x")]), START + 500_000),
            Registered::Known
        );
        assert_eq!(
            register(&mut fleet, &key("d", &[("backend", "x")]), START),
            Registered::Full
        );
        assert_eq!(
            fleet.tick(START + FORGET_MS).len(),
            1,
            "only the one that was asked about again"
        );
        assert_eq!(
            register(
                &mut fleet,
                &key("d", &[("backend", "x")]),
                START + FORGET_MS
            ),
            Registered::New
        );
    }

    #[test]
    fn pods_beyond_the_limit_are_taken_to_be_like_the_others() {
        let mut fleet = Fleet::new(LIMITS);
        let pods = ["a", "b", "c", "d", "e", "f"].map(|name| pod(name, "chat"));
        fleet.set_world(world(pods.to_vec(), 6));
        let key = key("chat", &[("backend", "chat")]);
        register(&mut fleet, &key, START);
        let scrapes: Vec<_> = fleet.scrapes().cloned().collect();
        assert_eq!(scrapes.len(), LIMITS.pods_per_target);
        for scrape in &scrapes {
            fleet.on_sample(scrape, START, &sample(0.5, 5.0));
        }
        let inputs = decision(&mut fleet, &key, START).reasons.inputs;
        assert_eq!(
            (inputs.kv_use, inputs.counted, inputs.fresh),
            (Some(3.0), 6, 4)
        );
    }

    #[test]
    fn two_triggers_of_one_object_are_two_targets() {
        let mut fleet = Fleet::new(LIMITS);
        fleet.set_world(world(vec![pod("a", "chat")], 1));
        register(&mut fleet, &key("chat", &[("backend", "chat")]), START);
        register(
            &mut fleet,
            &key(
                "chat",
                &[("backend", "chat"), ("kvCacheUtilizationPercent", "50")],
            ),
            START,
        );
        let scrapes: Vec<_> = fleet.scrapes().cloned().collect();
        assert_eq!(scrapes.len(), 1, "the pod is read once");
        fleet.on_sample(&scrapes[0], START, &sample(0.7, 5.0));
        let replicas: Vec<_> = fleet
            .tick(START)
            .into_values()
            .map(|decision| decision.unwrap().replicas)
            .collect();
        assert_eq!(replicas, [1, 2]);
    }

    #[test]
    fn gateway_line_wakes_a_target_once() {
        let mut fleet = Fleet::new(LIMITS);
        let mut with_gateways = World::clone(&world(vec![], 1));
        let gateway = |namespace: &str, id: &str| Gateway {
            namespace: namespace.into(),
            id: id.into(),
            admin: "127.0.0.1:1".parse().unwrap(),
        };
        with_gateways.gateways = vec![gateway("team", "g"), gateway("other", "far")];
        fleet.set_world(Arc::new(with_gateways));
        let key = key("chat", &[("backend", "chat")]);
        register(&mut fleet, &key, START);
        let report = |held: u64| {
            let load = BackendLoad {
                held,
                waiting: held,
                ..BackendLoad::default()
            };
            LoadReport {
                gateway: "g".into(),
                process_start_ms: 1,
                at_ms: 0,
                backends: BTreeMap::from([(Id::new("team", "chat"), load)]),
            }
        };
        let empty = LoadReport {
            backends: BTreeMap::new(),
            ..report(0)
        };
        assert!(!fleet.on_load("g", START, &empty));
        assert!(!fleet.on_load("far", START, &empty));
        assert_eq!(
            decision(&mut fleet, &key, START).reasons.inputs.ledger,
            Ledger::Fresh,
            "a gateway elsewhere does not count"
        );
        assert!(fleet.on_load("g", START + 100, &report(1)));
        assert_eq!(
            decision(&mut fleet, &key, START + 100).reasons.inputs.held,
            1.0
        );
        assert!(!fleet.on_load("g", START + 200, &report(2)), "it is awake");
        assert!(!fleet.on_load("unknown", START, &report(1)));
        fleet.on_load("far", START + 300, &report(3));
        assert_eq!(
            decision(&mut fleet, &key, START + 300).reasons.inputs.held,
            5.0,
            "it names the backend, so it counts"
        );
    }

    #[test]
    fn state_is_handed_over_and_bounded() {
        let chat = key("chat", &[("backend", "chat")]);
        let mut old = Fleet::new(LIMITS);
        old.set_world(world(vec![pod("a", "chat")], 3));
        register(&mut old, &chat, START);
        let scrape = old.scrapes().next().unwrap().clone();
        for second in 0..70 {
            old.on_sample(&scrape, START + second * 1000, &sample(0.1, 1.0));
            old.tick(START + second * 1000);
        }
        let text = serde_json::to_string(&old.save()).unwrap();
        let mut new = Fleet::new(LIMITS);
        new.set_world(world(vec![pod("a", "chat")], 3));
        assert_eq!(
            new.restore(serde_json::from_str(&text).unwrap(), &[], START + 70_000),
            1
        );
        new.on_sample(&scrape, START + 70_000, &sample(0.1, 1.0));
        let decided = decision(&mut new, &chat, START + 70_000);
        assert_eq!(
            (decided.replicas, decided.reasons.hold),
            (1, None),
            "no second warm-up"
        );
        assert_eq!(
            new.restore(serde_json::from_str(&text).unwrap(), &[], START),
            0,
            "what is known stays"
        );
        let mut small = Fleet::new(Limits {
            targets: 0,
            ..LIMITS
        });
        assert_eq!(
            small.restore(serde_json::from_str(&text).unwrap(), &[], START),
            0
        );
    }

    #[test]
    fn prometheus_answers_scale_and_their_loss_holds() {
        let metadata = [
            ("prometheus", "http://prometheus"),
            ("kvCacheQuery", "k"),
            ("runningQuery", "r"),
            ("waitingQuery", "w"),
            ("ttftP90Query", "t"),
        ];
        let chat = key("chat", &metadata);
        let mut fleet = Fleet::new(LIMITS);
        fleet.set_world(world(vec![], 2));
        register(&mut fleet, &chat, START);
        assert_eq!(fleet.asks().len(), 1);
        assert_eq!(
            decision(&mut fleet, &chat, START).reasons.hold,
            Some(Hold::Stale)
        );
        let answers = |kv_cache, ttft_p90_s| Answers {
            kv_cache,
            running: Some(20.0),
            waiting: Some(0.0),
            ttft_attainment: None,
            ttft_p90_s,
        };
        let mut at = |second: u64, answers: Option<Answers>| {
            if let Some(answers) = answers {
                fleet.on_answers(&chat, START + second * 1000, answers);
            }
            let decided = decision(&mut fleet, &chat, START + second * 1000);
            (
                decided.replicas,
                decided.reasons.binding,
                decided.reasons.hold,
            )
        };
        assert_eq!(
            at(0, Some(answers(Some(2.0), None))),
            (3, Bound::KvCache, Some(Hold::Warming))
        );
        assert_eq!(
            at(61, Some(answers(Some(0.5), None))),
            (1, Bound::Floor, None)
        );
        assert_eq!(
            at(62, Some(answers(Some(0.5), Some(0.49)))),
            (1, Bound::Floor, None)
        );
        assert_eq!(
            at(63, Some(answers(Some(0.5), Some(2.5)))),
            (3, Bound::Ttft, None),
            "half as many again as the 2 that run"
        );
        assert_eq!(at(64, Some(answers(Some(2.0), Some(0.2)))).0, 3);
        assert_eq!(
            at(65, Some(answers(None, None))).0,
            3,
            "an absent value is not zero"
        );
        assert_eq!(
            at(65 + 40, Some(answers(None, None))),
            (3, Bound::KvCache, Some(Hold::Stale))
        );
    }

    /// Pods that serve `CAPACITY` requests a second each from one queue; what does not fit waits.
    struct Pool {
        ready_at: Vec<u64>,
        waiting: f64,
        /// First tokens per pod and bound of [`BOUNDS`].
        firsts: Vec<[f64; BOUNDS.len()]>,
    }

    const CAPACITY: f64 = 10.0;
    const COLD_START_MS: u64 = 40_000;
    const BOUNDS: [f64; 9] = [0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, f64::INFINITY];

    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    fn float(count: usize) -> f64 {
        count as f64
    }

    impl Pool {
        fn step(&mut self, now_ms: u64, rate: f64) {
            let ready = self.ready_at.iter().filter(|at| **at <= now_ms).count();
            let capacity = CAPACITY * float(ready);
            let ttft_s = 0.1 + self.waiting / capacity;
            let served = (self.waiting + rate).min(capacity);
            self.waiting += rate - served;
            for (pod, _) in self
                .ready_at
                .iter()
                .enumerate()
                .filter(|(_, at)| **at <= now_ms)
            {
                for (bound, count) in BOUNDS.iter().zip(&mut self.firsts[pod]) {
                    *count += if ttft_s <= *bound {
                        served / float(ready)
                    } else {
                        0.0
                    };
                }
            }
        }

        fn resize(&mut self, now_ms: u64, replicas: usize) {
            while self.ready_at.len() < replicas {
                self.ready_at.push(now_ms + COLD_START_MS);
                self.firsts.push([0.0; BOUNDS.len()]);
            }
            self.ready_at.truncate(replicas);
            self.firsts.truncate(replicas);
        }

        fn world(&self, now_ms: u64) -> Arc<World> {
            let pods = self.ready_at.iter().enumerate().map(|(number, at)| Pod {
                ready: *at <= now_ms,
                ..pod(&format!("p{number}"), "chat")
            });
            let mut pods: Vec<_> = pods.collect();
            for (number, pod) in (1_u8..).zip(&mut pods) {
                pod.ip = Some(std::net::Ipv4Addr::new(10, 0, 0, number).into());
            }
            world(pods, u32::try_from(self.ready_at.len()).unwrap())
        }

        fn sample(&self, pod: usize) -> Sample {
            let ttft = Buckets::new(BOUNDS.into_iter().zip(self.firsts[pod]));
            let waiting = self.waiting / float(self.ready_at.len());
            // Prefill-bound: KV stays low whatever waits, as in llm-d-autoscaling#947.
            Sample {
                kv_use: Some(0.04),
                running: Some(10.0),
                waiting: Some(waiting),
                prompt_tokens: Some(ttft.count() * 4000.0),
                ttft,
                ..Sample::default()
            }
        }
    }

    /// Runs scaler and HPA against the pool; returns the replicas at each second.
    fn closed_loop(seconds: u64, rate: impl Fn(u64) -> f64) -> Vec<usize> {
        let mut fleet = Fleet::new(Limits {
            targets: 3,
            pods_per_target: 64,
        });
        let chat = key("chat", &[("backend", "chat")]);
        register(&mut fleet, &chat, START);
        let spec = Spec {
            min: 1,
            max: 32,
            behavior: Some(Behavior::default()),
            tolerance: 0.0,
        };
        let mut hpa = Hpa::new(spec);
        let mut pool = Pool {
            ready_at: vec![START],
            waiting: 0.0,
            firsts: vec![[0.0; BOUNDS.len()]],
        };
        let mut history = Vec::new();
        for second in 0..seconds {
            let now_ms = START + second * 1000;
            pool.step(now_ms, rate(second));
            fleet.set_world(pool.world(now_ms));
            register(&mut fleet, &chat, now_ms);
            let scrapes: Vec<_> = fleet.scrapes().cloned().collect();
            for scrape in scrapes {
                let number: usize = scrape.pod.name[1..].parse().unwrap();
                fleet.on_sample(&scrape, now_ms, &pool.sample(number));
            }
            let value = decision(&mut fleet, &chat, now_ms).value;
            if second % 15 == 0 {
                let count = i32::try_from(pool.ready_at.len()).unwrap();
                let scale = Scale {
                    spec_replicas: count,
                    status_replicas: count,
                    ready_pods: count,
                };
                let metric = Metric {
                    target: HpaTarget::AverageValue(1000),
                    value: Some(metric_milli(value, 0)),
                };
                if let Sync::Scale { replicas, .. } = hpa.sync(now_ms, scale, &[metric]) {
                    pool.resize(now_ms, usize::try_from(replicas).unwrap());
                }
            }
            history.push(pool.ready_at.len());
        }
        history
    }

    #[test]
    fn prefill_bound_load_grows_the_pool_without_running_away_and_shrinks_it_back() {
        let history = closed_loop(1500, |second| {
            if (120..720).contains(&second) {
                25.0
            } else {
                2.0
            }
        });
        assert_eq!(history[119], 1);
        let most = *history.iter().max().unwrap();
        assert!(
            (3..=10).contains(&most),
            "3 pods carry it; while the backlog is worked off, twice that many and a few: {most}"
        );
        assert_eq!(history[1499], 1);
    }

    #[test]
    fn steady_load_that_needs_three_pods_does_not_flap() {
        let history = closed_loop(1500, |second| if second < 120 { 2.0 } else { 25.0 });
        let settled = &history[400..900];
        assert!(settled.iter().all(|replicas| *replicas >= 3), "{settled:?}");
    }

    #[test]
    fn light_load_keeps_one_pod() {
        assert!(
            closed_loop(600, |_| 6.0)
                .iter()
                .all(|replicas| *replicas == 1)
        );
    }

    #[test]
    fn scrapes_that_stop_never_shrink_the_pool() {
        let mut fleet = Fleet::new(LIMITS);
        let chat = key("chat", &[("backend", "chat")]);
        fleet.set_world(world(vec![pod("a", "chat")], 4));
        register(&mut fleet, &chat, START);
        let scrape = fleet.scrapes().next().unwrap().clone();
        for second in 0..90 {
            let tokens = f64::from(u32::try_from(second).unwrap());
            let sample = Sample {
                generation_tokens: Some(tokens),
                ..sample(0.9, 5.0)
            };
            fleet.on_sample(&scrape, START + second * 1000, &sample);
            fleet.tick(START + second * 1000);
        }
        assert_eq!(decision(&mut fleet, &chat, START + 89_000).replicas, 2);
        for ms in (89_000..400_000).step_by(1000) {
            register(&mut fleet, &chat, START + ms);
            let replicas = decision(&mut fleet, &chat, START + ms).replicas;
            let expected = if ms <= 89_000 + FRESH_MS { 2 } else { 4 };
            assert_eq!(
                replicas, expected,
                "at {ms} ms: fresh data may shrink, its loss goes back to what is ordered"
            );
        }
    }
}
