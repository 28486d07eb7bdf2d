//! (IO) `Record`: one request from its head to its end. Whatever way a request ends (answered, refused, caller gone,
//! backend gone) its record is dropped exactly once, and that is where it is counted and logged.

mod bill;

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderValue;
use penstock_core::config::{FanOutMode, Urgency};

use crate::balance::adaptive::Foreseen;
use crate::budgets::reservation::Reservation;
use crate::choose::{Pass, Tried};
use crate::decisions::Decisions;
use crate::guard::Watch;
use crate::in_flight::InFlight;
use crate::load::Ticket;
use crate::meter::Usage;
use crate::metrics::{Hedged, Rescued};
use crate::openai::{Api, Call};
use crate::outcome;
use crate::principal::Who;
use crate::process::Worker;
use crate::reject::{Broken, Reject};
use crate::snapshot::{Candidate, Rule};
use crate::vitals::Sample;

pub(crate) use bill::{count_usage, sums};

/// Every value of the `outcome` label that a request with a backend may have.
pub(crate) const ROUTE_OUTCOMES: [&str; 12] = [
    OK,
    DETACHED,
    CLIENT_GONE,
    REFUSED,
    "cut",
    "aborted",
    "stalled",
    "malformed",
    "deadline",
    "abandoned",
    STOPPING,
    UPSTREAM_ERROR,
];
/// A whole answer went out.
pub(crate) const OK: &str = "ok";
/// The caller left before the end, and the answer was kept whole.
const DETACHED: &str = "detached";
/// The caller left before the end.
pub(crate) const CLIENT_GONE: &str = "client_gone";
/// The backend refused or failed, and its own answer went out.
pub(crate) const REFUSED: &str = "refused";
/// The backend reported an error inside its stream.
pub(crate) const UPSTREAM_ERROR: &str = "upstream_error";
/// The limit of a drain came before its end.
pub(crate) const STOPPING: &str = "stopping";
/// What the store had could not be read to its end.
pub(crate) const STORE_FAILED: &str = "store_failed";
/// A stored answer went out.
const CACHED: &str = "cached";

/// A stream of as many events has a role and an end, and nothing between.
const EMPTY_EVENTS: u64 = 2;
/// Tokens after which a stream's gaps are looked at.
const GAPS_EVERY: u64 = 16;

/// Everything that is told about a request at its end.
pub(crate) struct Record {
    pub(crate) worker: Arc<Worker>,
    watch: Arc<Watch>,
    /// Its id, on the answer and in the log.
    pub(crate) id: HeaderValue,
    /// When its head was read.
    pub(crate) started: Instant,
    /// Who sent it.
    pub(crate) who: Who,
    /// It is no more urgent than this, whatever its rule says.
    pub(crate) most_urgent: Urgency,
    admitted: bool,
    logged: bool,
    /// It goes on without its caller.
    detached: bool,
    pub(crate) api: Option<Api>,
    model: String,
    /// About how many tokens its prompt has.
    prompt_tokens: u32,
    pub(crate) rule: Option<Arc<Rule>>,
    /// What the rule made another in the request.
    pub(crate) changes: Vec<String>,
    /// Tier, candidate and pass of the last choice.
    chosen: Option<(usize, usize, Pass)>,
    pub(crate) in_flight: Option<InFlight>,
    /// What `Adaptive` foresaw of the stream that is passed on.
    pub(crate) foreseen: Option<Foreseen>,
    pub(crate) ticket: Option<Ticket>,
    pub(crate) attempts: usize,
    /// What became of the last attempt's hedge, if it had one.
    pub(crate) hedge: Option<Hedged>,
    /// How many backends were asked at once, where more than one was, and for what.
    pub(crate) fan_out: Option<(FanOutMode, usize)>,
    pub(crate) tried: Vec<Tried>,
    /// What the decision log is to tell of it, where it is one of the sample.
    pub(crate) decisions: Option<Box<Decisions>>,
    cache: Option<&'static str>,
    pub(crate) status: u16,
    outcome: &'static str,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    tokens: u64,
    /// What of these is settled: of an endpoint whose stream another one went on with.
    settled: u64,
    /// Tokens and time at which the gaps between them were looked at last.
    gaps_from: (u64, Option<Instant>),
    pub(crate) usage: Option<Usage>,
    /// What an earlier attempt took whose answer was gone on with elsewhere; `usage` is the later one's then.
    pub(crate) earlier: Option<Usage>,
    rescued: Option<Rescued>,
    /// What the last attempt that answered has of budgets.
    pub(crate) reservation: Option<Reservation>,
}

impl Record {
    pub(crate) fn open(
        worker: &Arc<Worker>,
        watch: &Arc<Watch>,
        id: HeaderValue,
        started: Instant,
    ) -> Self {
        watch.busy();
        Self {
            worker: Arc::clone(worker),
            watch: Arc::clone(watch),
            id,
            started,
            who: Who::default(),
            most_urgent: Urgency::High,
            admitted: false,
            detached: false,
            logged: tracing::enabled!(target: "access", tracing::Level::INFO),
            api: None,
            model: String::new(),
            prompt_tokens: 0,
            rule: None,
            changes: Vec::new(),
            chosen: None,
            in_flight: None,
            foreseen: None,
            ticket: None,
            attempts: 0,
            hedge: None,
            fan_out: None,
            tried: Vec::new(),
            decisions: None,
            cache: None,
            status: 0,
            outcome: CLIENT_GONE,
            first_token: None,
            last_token: None,
            tokens: 0,
            settled: 0,
            gaps_from: (0, None),
            usage: None,
            earlier: None,
            rescued: None,
            reservation: None,
        }
    }

    /// Takes one of the places for requests in progress.
    pub(crate) fn admit(&mut self) -> Result<(), Reject> {
        let process = &self.worker.process;
        let limit = i64::try_from(process.settings.limits.requests).unwrap_or(i64::MAX);
        self.admitted = true;
        if process.metrics.in_flight.inc() >= limit {
            Err(Reject::Overloaded)
        } else {
            Ok(())
        }
    }

    /// What is asked, and of which model.
    pub(crate) fn asks(&mut self, call: &Call<'_>) {
        let model = &*call.model;
        self.prompt_tokens = call.prompt_tokens;
        if self.logged || self.worker.process.usage.is_kept() {
            model.clone_into(&mut self.model);
        }
    }

    pub(crate) fn choose(&mut self, tier: usize, candidate: usize, pass: Pass) {
        self.chosen = Some((tier, candidate, pass));
    }

    /// What was tried for it together with others failed, and is tried for it alone: as if nothing had been.
    pub(crate) fn start_over(&mut self) {
        self.attempts = 0;
        self.tried.clear();
        self.chosen = None;
        self.in_flight = None;
        self.foreseen = None;
        self.hedge = None;
    }

    /// Tier, candidate and pass of the last choice.
    pub(crate) fn chosen(&self) -> Option<(usize, usize, Pass)> {
        self.chosen
    }

    /// The candidate that was chosen last.
    pub(crate) fn candidate(&self) -> Option<&Candidate> {
        let (tier, candidate, _) = self.chosen?;
        self.rule
            .as_ref()?
            .tiers
            .get(tier)?
            .candidates
            .get(candidate)
    }

    /// Position of the tier that was chosen last.
    pub(crate) fn tier(&self) -> Option<usize> {
        self.chosen.map(|(tier, ..)| tier)
    }

    pub(crate) fn set_cache(&mut self, result: &'static str) {
        self.cache = Some(result);
        self.worker.process.metrics.cache(result);
    }

    pub(crate) fn cache(&self) -> Option<&'static str> {
        self.cache
    }

    /// Tokens arrived.
    pub(crate) fn tokens(&mut self, count: u32, now: Instant) {
        if count == 0 {
            return;
        }
        self.tokens += u64::from(count);
        self.last_token = Some(now);
        self.gaps(now);
        if self.first_token.is_none() {
            self.first_token = Some(now);
        }
        let now_ms = self.worker.process.ms(now);
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.heard(now_ms);
        }
        if let Some(ticket) = &mut self.ticket {
            ticket.tokens(count, now);
        }
    }

    pub(crate) fn rejected(&mut self, reject: &Reject, status: u16) {
        self.outcome = reject.label();
        self.status = status;
    }

    pub(crate) fn broken(&mut self, broken: Broken) {
        self.outcome = broken.label();
        // Neither limits of the rule nor the gateway's own end say anything of the endpoint.
        let is_own = matches!(
            broken,
            Broken::Deadline | Broken::Abandoned | Broken::Stopping
        );
        if !is_own {
            self.broke_off(broken.label());
        }
    }

    /// The backend gave up an answer that had begun.
    pub(crate) fn broke_off(&self, reason: &'static str) {
        if let (Some(in_flight), Some(candidate)) = (&self.in_flight, self.candidate()) {
            let process = &self.worker.process;
            outcome::broke_off(process, candidate, in_flight.endpoint(), reason);
        }
    }

    /// Events of the backend could not be read, and the answer went on without them.
    pub(crate) fn left_out(&self, count: u8, now: Instant) {
        self.worker
            .process
            .metrics
            .events_left_out
            .inc_by(count.into());
        self.vital(Sample::Failed, now);
        let backend = self.candidate().map(|candidate| &candidate.backend.id);
        tracing::warn!(
            request.id = self.id.to_str().unwrap_or(""),
            backend.id = backend.map(tracing::field::display),
            count,
            "events that cannot be read were left out of a stream"
        );
    }

    /// A stream was cut that was to be rescued.
    pub(crate) fn rescued(&mut self, rescued: Rescued) {
        self.rescued = Some(rescued);
        self.worker.process.metrics.rescued(rescued);
    }

    /// Another endpoint goes on with the stream: what its gaps say from now on is of that one.
    pub(crate) fn goes_on_elsewhere(&mut self) {
        self.foreseen = None;
        self.gaps_from = (self.tokens, None);
    }

    /// What is to be compared with the endpoint's peers.
    pub(crate) fn vital(&self, sample: Sample, now: Instant) {
        if let Some(in_flight) = &self.in_flight {
            let now_ms = self.worker.process.ms(now);
            in_flight.endpoint().live.vitals.note(sample, now_ms);
        }
    }

    /// An answer of a backend came to its end, as it should.
    pub(crate) fn completed(&self, streamed: bool, now: Instant) {
        let counted = self.usage.map(|usage| usage.completion_tokens);
        let seems_empty =
            counted == Some(0) || (streamed && self.tokens <= EMPTY_EVENTS && counted.is_none());
        let empty = seems_empty && self.api.is_some_and(Api::generates);
        self.vital(Sample::Ended { empty }, now);
        if let Some(in_flight) = &self.in_flight {
            in_flight.endpoint().live.outlier.succeeded();
        }
    }

    /// Looks at the gaps of a stream every so many tokens, so that a slow one shows before its end.
    fn gaps(&mut self, now: Instant) {
        let (count, since) = self.gaps_from;
        let tokens = self.tokens - count;
        let Some(since) = since else {
            self.gaps_from = (self.tokens, Some(now));
            return;
        };
        if tokens >= GAPS_EVERY {
            let gaps = u16::try_from(tokens).map_or(f32::from(u16::MAX), f32::from);
            let took = now.saturating_duration_since(since).as_secs_f32() * 1000.0;
            self.gaps_from = (self.tokens, Some(now));
            self.vital(Sample::Gap(took / gaps), now);
        }
    }

    pub(crate) fn ended(&mut self, outcome: &'static str) {
        self.outcome = match outcome {
            OK if self.cache == Some("hit") => CACHED,
            OK if self.detached => DETACHED,
            outcome => outcome,
        };
    }

    /// The caller left, and the answer goes on.
    pub(crate) fn detach(&mut self) {
        if !std::mem::replace(&mut self.detached, true) {
            self.watch.idle();
        }
    }

    /// Attempts and decision for a caller who asks: no addresses.
    pub(crate) fn told(&self) -> Option<(HeaderValue, HeaderValue)> {
        self.chosen?;
        let decision = HeaderValue::try_from(self.decision(false)).ok()?;
        Some((HeaderValue::from(self.attempts), decision))
    }

    fn decision(&self, addresses: bool) -> String {
        let mut text = String::new();
        if let (Some(rule), Some((tier, _, pass))) = (&self.rule, self.chosen) {
            let _ = write!(text, "{:?} tier {tier} {}", rule.strategy, pass.label());
        }
        for (number, tried) in self.tried.iter().enumerate() {
            let backend = self
                .rule
                .as_ref()
                .and_then(|rule| rule.tiers.get(tried.tier)?.candidates.get(tried.candidate))
                .map_or("", |candidate| candidate.metrics.backend());
            let start = if number == 0 { "; after " } else { ", " };
            let _ = write!(text, "{start}{backend} ");
            if addresses {
                let _ = write!(text, "{} ", tried.endpoint.address);
            }
            text.push_str(tried.reason);
        }
        if let Some((mode, asked)) = self.fan_out {
            let _ = write!(text, "; {mode:?} of {asked}");
        }
        if let Some(hedge) = self.hedge {
            let _ = write!(text, "; hedge {}", hedge.label());
        }
        match self.rescued {
            Some(Rescued::Joined) => text.push_str("; rescued"),
            Some(rescued) => {
                let _ = write!(text, "; not rescued: {}", rescued.label());
            }
            None => {}
        }
        if !self.changes.is_empty() {
            let _ = write!(text, "; set {}", self.changes.join(", "));
        }
        text
    }

    /// The attempt that answers is over: budgets learn what it took.
    pub(crate) fn settle(&mut self) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        if self.status >= 400 && self.first_token.is_none() {
            return reservation.refused();
        }
        let is_whole = self.outcome == OK || self.outcome == DETACHED;
        let delivered = match (self.first_token, self.usage) {
            (_, Some(_)) if is_whole => None,
            (Some(_), _) => Some(self.tokens - self.settled),
            // Its answer is no stream, and came as a whole, or not at all.
            (None, _) if is_whole => None,
            (None, _) => Some(0),
        };
        reservation.ended(self.usage, delivered);
        self.settled = self.tokens;
    }

    fn log(&self, now: Instant) {
        let ms = |until: Instant| {
            u64::try_from(until.saturating_duration_since(self.started).as_millis())
                .unwrap_or(u64::MAX)
        };
        let backend = self
            .candidate()
            .map_or("", |candidate| candidate.metrics.backend());
        let endpoint = self
            .in_flight
            .as_ref()
            .map(|in_flight| in_flight.endpoint().address.to_string())
            .unwrap_or_default();
        let usage = self.taken().unwrap_or_default();
        let principal = self.who.principal();
        tracing::info!(
            target: "access",
            { request.id = self.id.to_str().unwrap_or(""),
            operation = self.api.map_or("", Api::operation),
            key = principal.map(|of| tracing::field::display(&of.id)),
            team = principal.map(|of| of.team.as_str()),
            user = principal.and_then(|of| of.user.as_deref()),
            model = %self.model,
            rule = self.rule.as_ref().map_or("", |rule| rule.label.as_str()),
            backend.id = backend,
            endpoint,
            attempts = self.attempts,
            decision = %self.decision(true),
            cache = self.cache.unwrap_or(""),
            status = self.status,
            ttft_ms = self.first_token.map(ms),
            duration_ms = ms(now),
            tokens.prompt = usage.prompt_tokens,
            tokens.cached = usage.cached_tokens,
            cost.micro_usd = self.cost().map(|pico| u64::try_from(pico / 1_000_000).unwrap_or(u64::MAX)),
            tokens.completion = usage.completion_tokens,
            tokens.events = self.tokens,
            outcome = self.outcome },
            "request"
        );
    }

    /// A caller who left while waiting for the beginning of an answer shows how long callers wait.
    fn departed(&self, now: Instant) {
        if let (CLIENT_GONE, 0, Some(rule)) = (self.outcome, self.status, &self.rule) {
            let waited = now.saturating_duration_since(self.started);
            let now_ms = self.worker.process.ms(now);
            rule.patience.left(waited, now_ms);
            if let Some(in_flight) = &self.in_flight {
                in_flight.endpoint().live.patience.left(waited, now_ms);
            }
        }
    }

    /// What the stream's gaps say of its endpoint.
    fn written(&self) {
        if let (Some(foreseen), Some(in_flight)) = (&self.foreseen, &self.in_flight)
            && let (Some(first), Some(last)) = (self.first_token, self.last_token)
            && self.tokens > GAPS_EVERY
        {
            let gaps = u16::try_from(self.tokens - 1).map_or(f32::from(u16::MAX), f32::from);
            let took_ms = last.saturating_duration_since(first).as_secs_f32() * 1000.0;
            let live = &in_flight.endpoint().live;
            live.adaptive.written(foreseen, took_ms / gaps);
        }
    }

    fn count(&self, now: Instant) {
        let metrics = &self.worker.process.metrics;
        if self.admitted {
            metrics.in_flight.dec();
        }
        self.departed(now);
        self.written();
        let candidate = self.candidate();
        let rule = self.rule.as_ref().map_or("", |rule| rule.label.as_str());
        // Only outcomes of a backend's answer belong to its series; refusals of the gateway belong to the rule.
        let route = candidate
            .filter(|_| ROUTE_OUTCOMES.contains(&self.outcome))
            .map(|candidate| &*candidate.metrics);
        metrics.ended(route, rule, self.outcome);
        if let (Some(candidate), Some(api)) = (candidate, self.api) {
            let call = candidate.metrics.call(api);
            call.duration
                .observe(now.saturating_duration_since(self.started).as_secs_f64());
            if let (Some(first), Some(last)) = (self.first_token, self.last_token) {
                call.ttft
                    .observe(first.saturating_duration_since(self.started).as_secs_f64());
                if let gaps @ 1.. = self.tokens.saturating_sub(1) {
                    let gaps = u32::try_from(gaps).unwrap_or(u32::MAX);
                    call.tpot
                        .observe((last.saturating_duration_since(first) / gaps).as_secs_f64());
                }
            }
            for usage in self.earlier.into_iter().chain(self.usage) {
                count_usage(metrics, candidate, api, usage);
            }
            self.sum_up(candidate);
        }
        if self.attempts > 1 {
            metrics
                .retries
                .inc_by(u64::try_from(self.attempts - 1).unwrap_or(0));
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let now = penstock_shell::clock::now();
        if !self.detached {
            self.watch.idle();
        }
        // It is the gateway that went.
        if self.outcome == CLIENT_GONE && self.worker.process.is_stopping() {
            self.outcome = STOPPING;
        }
        self.count(now);
        self.settle();
        if self.logged {
            self.log(now);
        }
        if let Some(decisions) = &self.decisions {
            decisions.tell(&self.id);
        }
    }
}
