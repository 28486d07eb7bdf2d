//! Which endpoint gets the next attempt of a request. Pure but for the balancer's counters, which are passed in with
//! the rule; time and randomness come in.
//!
//! Order: lower priority numbers first; within one priority by the rule's strategy (see `pick`). Endpoints that were
//! tried for this request, or that keep failing, come after all others.

use std::cell::Cell;
use std::sync::Arc;

use rand::{Rng, RngExt as _};

use crate::balance::{hash, slow_start};
use crate::limits::{Cause, Limit};
use crate::pick::{has_credential, pick};
use crate::pulse::{QUIET_MS, SILENT_MS};
use crate::silence::Silence;
use crate::snapshot::{Candidate, Endpoint, EndpointLive, Rule};
use crate::wish::Wish;

/// Why nothing was sent to a candidate that was chosen: it cannot carry the request.
pub const UNSUPPORTED: &str = "unsupported";

/// An attempt that failed.
#[derive(Clone)]
pub struct Tried {
    /// Position of the tier in the rule.
    pub tier: usize,
    /// Position of the candidate in the tier.
    pub candidate: usize,
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Why it failed, for the log.
    pub reason: &'static str,
    /// Whether the same endpoint may be asked again when no other is left.
    pub again: bool,
}

impl Tried {
    /// Whether it was made there.
    pub fn is_at(&self, tier: usize, candidate: usize, endpoint: &Endpoint) -> bool {
        (self.tier, self.candidate) == (tier, candidate)
            && Arc::ptr_eq(&self.endpoint.live, &endpoint.live)
    }
}

/// Where to go.
pub struct Choice {
    /// Position of the tier in the rule.
    pub tier: usize,
    /// Position of the candidate in the tier.
    pub candidate: usize,
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Which pass found it.
    pub pass: Pass,
}

impl Choice {
    /// As an attempt that failed.
    pub fn failed(&self, reason: &'static str, again: bool) -> Tried {
        Tried {
            tier: self.tier,
            candidate: self.candidate,
            endpoint: Arc::clone(&self.endpoint),
            reason,
            again,
        }
    }
}

/// What an endpoint may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Not tried, and nothing speaks against it.
    Fresh,
    /// Not tried, but failing, silent or over a limit lately: better than none.
    Failing,
    /// Tried already: nothing else is left.
    Again,
}

impl Pass {
    /// For the log.
    pub fn label(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Failing => "failing",
            Self::Again => "again",
        }
    }
}

/// Why there is nowhere to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nowhere {
    /// No candidate's protocol can carry the request.
    Unfit,
    /// No candidate has a ready endpoint.
    NoEndpoint,
    /// Those that have one miss their credential.
    NoCredential,
    /// All endpoints asked to be left alone; the first one for this many more ms.
    Closed(u64),
    /// The same because none of them is available.
    Unavailable(u64),
    /// All that could answer have more to do than they answer in time.
    Full,
    /// All endpoints are known to take requests and to answer none.
    Silent(Silence),
    /// Every endpoint was tried and may not be asked again.
    Spent,
}

impl Nowhere {
    /// For the log.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unfit => "no candidate can carry the request",
            Self::NoEndpoint => "no candidate has a ready endpoint",
            Self::NoCredential => "credentials have not arrived",
            Self::Closed(_) => "all ask to be left alone for a while",
            Self::Unavailable(_) => "all say that they are not available for a while",
            Self::Full => "all have more to do than they answer in time",
            Self::Silent(_) => "all take requests and answer none",
            Self::Spent => "no attempt is left, or nothing to try",
        }
    }
}

/// Chooses the next endpoint.
pub fn choose(
    rule: &Rule,
    tried: &[Tried],
    wish: Wish<'_>,
    rng: &mut impl Rng,
) -> Result<Choice, Nowhere> {
    // Of sessions always the same ones leave an endpoint that is to get less.
    let draw = match wish.key {
        Some(key) => hash::drawn(key),
        None => rng.random(),
    };
    let full = Cell::new(false);
    let passes: &[Pass] = if tried.is_empty() {
        &[Pass::Fresh, Pass::Failing]
    } else {
        &[Pass::Fresh, Pass::Failing, Pass::Again]
    };
    for &pass in passes {
        // Better to wait for one that works than to ask one that does not.
        if pass != Pass::Fresh && full.get() {
            return Err(Nowhere::Full);
        }
        for (tier, group) in rule.tiers.iter().enumerate() {
            // Within a tier those that say nothing come last.
            let quiet_too: &[bool] = if pass == Pass::Fresh {
                &[false, true]
            } else {
                &[true]
            };
            for &quiet_too in quiet_too {
                let fits = |candidate: usize, endpoint: &Arc<Endpoint>| {
                    let carries = group.candidates.get(candidate);
                    let Some(carries) = carries.filter(|carries| {
                        wish.fits(carries) && wish.unfit.takes(tier, candidate, endpoint)
                    }) else {
                        return false;
                    };
                    let before = tried
                        .iter()
                        .rfind(|tried| tried.is_at(tier, candidate, endpoint));
                    let live = &endpoint.live;
                    let limit = wish.limit_at(carries, endpoint);
                    let standing = Standing::of(live, limit, wish.now_ms);
                    full.set(full.get() || (standing == Standing::Full && before.is_none()));
                    let share = live.vitals.share();
                    let may = quiet_too || draw < warm(carries, live, wish.now_ms);
                    may && fits(pass, quiet_too, before, standing, share, limit.share, draw)
                };
                if let Some((candidate, endpoint)) = pick(rule, group, wish, rng, fits) {
                    return Ok(Choice {
                        tier,
                        candidate,
                        endpoint,
                        pass,
                    });
                }
            }
        }
    }
    if full.get() {
        return Err(Nowhere::Full);
    }
    Err(nowhere(rule, wish))
}

/// How an endpoint stands, whatever this request did there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing speaks against it.
    Good,
    /// It does worse than its peers: for most requests after them.
    Worse,
    /// Little is left of its limits: for many requests after all others.
    Scarce,
    /// It has streams and said nothing for a while: after its peers.
    Quiet,
    /// For longer: after all others.
    Silent,
    /// It failed several times in a row: after all others.
    Failing,
    /// It fails its health check: after all others.
    Down,
    /// It is over a limit, or does not have the model: after all others for a moment.
    Aside,
    /// More wait there than it answers in time: never, others are waited for.
    Full,
    /// It asked to be left alone until a time: never.
    Closed,
}

impl Standing {
    /// How an endpoint stands at `now_ms`, whose model stands at `limit`.
    pub fn of(live: &EndpointLive, limit: Limit, now_ms: u64) -> Self {
        let silence_ms = live.pulse.silence_ms(now_ms);
        if limit.closed_ms > 0 {
            Self::Closed
        } else if live.outlier.is_away(now_ms) {
            Self::Failing
        } else if live.health.is_down() {
            Self::Down
        } else if limit.is_aside {
            Self::Aside
        } else if silence_ms > SILENT_MS {
            Self::Silent
        } else if !live.has_room(now_ms) {
            Self::Full
        } else if silence_ms > QUIET_MS {
            Self::Quiet
        } else if limit.is_scarce {
            Self::Scarce
        } else if live.vitals.share() < 1.0 {
            Self::Worse
        } else {
            Self::Good
        }
    }

    /// In a word.
    pub fn label(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Worse => "worse than its peers",
            Self::Scarce => "nearly at its limits",
            Self::Quiet => "quiet",
            Self::Silent => "silent",
            Self::Failing => "failing",
            Self::Down => "failing its health check",
            Self::Aside => "over a limit, or without the model",
            Self::Full => "full",
            Self::Closed => "closed by its Retry-After",
        }
    }
}

/// Which part of its share an endpoint gets that may have just come.
fn warm(candidate: &Candidate, live: &EndpointLive, now_ms: u64) -> f32 {
    let window_ms = candidate.backend.profile.slow_start_ms;
    slow_start::share(live.ready_for_ms(now_ms), window_ms)
}

/// Whether an endpoint may be chosen in this pass; `before` is its last attempt for this request, `draw` the request's
/// luck, 0 to 1, against which the shares of those count that do worse than their peers.
fn fits(
    pass: Pass,
    quiet_too: bool,
    before: Option<&Tried>,
    standing: Standing,
    share: f32,
    left: f32,
    draw: f32,
) -> bool {
    match (pass, before, standing) {
        (_, _, Standing::Closed | Standing::Full) => false,
        (Pass::Fresh, None, _) if left <= draw && left < 1.0 => false,
        (Pass::Failing, None, _) if left < 1.0 => true,
        (Pass::Fresh, None, Standing::Good | Standing::Scarce)
        | (Pass::Again, Some(Tried { again: true, .. }), _) => true,
        (Pass::Fresh, None, Standing::Worse) => quiet_too || draw < share,
        (Pass::Fresh, None, Standing::Quiet) => quiet_too,
        (
            Pass::Failing,
            None,
            Standing::Silent | Standing::Failing | Standing::Down | Standing::Aside,
        ) => true,
        _ => false,
    }
}

fn nowhere(rule: &Rule, wish: Wish<'_>) -> Nowhere {
    let with_endpoint = || {
        rule.candidates()
            .filter(|candidate| candidate.has_endpoint() && wish.fits(candidate))
    };
    if !rule.candidates().any(|candidate| wish.fits(candidate)) {
        Nowhere::Unfit
    } else if with_endpoint().next().is_none() {
        Nowhere::NoEndpoint
    } else if with_endpoint().all(|candidate| !has_credential(candidate)) {
        Nowhere::NoCredential
    } else {
        let usable = with_endpoint().filter(|candidate| has_credential(candidate));
        let limits = usable.flat_map(|candidate| {
            let endpoints = &candidate.backend.endpoints;
            let limits = endpoints.iter();
            limits.map(move |endpoint| wish.limit_at(candidate, endpoint))
        });
        let limits = limits.map(|limit| (limit.closed_ms, limit.cause == Cause::Outage));
        let of_all = |one: (u64, bool), other: (u64, bool)| (one.0.min(other.0), one.1 && other.1);
        match limits.reduce(of_all) {
            Some((ms @ 1.., true)) => Nowhere::Unavailable(ms),
            Some((ms @ 1.., false)) => Nowhere::Closed(ms),
            _ => Nowhere::Spent,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use penstock_core::config::{NameMatch, Strategy};
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::capability::Needed;
    use crate::fallback::Failed;
    use crate::outlier::FAILURES;
    use crate::snapshot::Snapshot;
    use crate::snapshot::tests::{build, config, endpoints, rule, rule_of};
    use crate::source::Credentials;
    use crate::wish::Unfit;

    fn snapshot(
        backends: &[(&str, u32, u32)],
        services: &[(&str, &[u16])],
        strategy: Strategy,
    ) -> Snapshot {
        let names: Vec<&str> = backends.iter().map(|backend| backend.0).collect();
        let mut rule = rule("r", &[NameMatch::Exact("m".to_owned())], backends);
        rule.strategy = strategy;
        build(
            config(&names, vec![rule]),
            &endpoints(services),
            &Credentials::default(),
            None,
        )
    }

    static NOBODY: Unfit = Unfit {
        protocols: Vec::new(),
        models: Vec::new(),
        needed: Needed::NOTHING,
        only: None,
        trial: None,
        failed: Failed::NOTHING,
    };

    const WISH: Wish<'_> = Wish {
        now_ms: 0,
        stream: true,
        model: "m",
        prompt_tokens: 100,
        limit_tokens: 100,
        answer_tokens: 100,
        blocks: &[],
        key: None,
        region: None,
        unfit: &NOBODY,
    };

    fn rng() -> StdRng {
        StdRng::seed_from_u64(7)
    }

    fn all(snapshot: &Snapshot, again: bool, attempts: usize) -> Vec<(usize, usize, String, Pass)> {
        let rule = &rule_of(snapshot, "m").unwrap();
        let mut failed = Vec::new();
        let mut order = Vec::new();
        for _ in 0..attempts {
            let Ok(choice) = choose(rule, &failed, WISH, &mut rng()) else {
                break;
            };
            order.push((
                choice.tier,
                choice.candidate,
                choice.endpoint.address.to_string(),
                choice.pass,
            ));
            failed.push(choice.failed("x", again));
        }
        order
    }

    #[test]
    fn priorities_are_exhausted_in_order_and_nothing_is_tried_twice_before() {
        let snapshot = snapshot(
            &[("a", 1, 0), ("b", 1, 1)],
            &[("a", &[1, 2]), ("b", &[3])],
            Strategy::LeastRequests,
        );
        let order = all(&snapshot, true, 4);
        assert_eq!(
            order.iter().map(|step| step.0).collect::<Vec<_>>(),
            [0, 0, 1, 0]
        );
        assert_ne!(order[0].2, order[1].2);
        assert_eq!(order[3].3, Pass::Again);
        assert_eq!(all(&snapshot, false, 9).len(), 3, "none may be asked again");
    }

    #[test]
    fn a_failing_endpoint_comes_after_lower_priorities() {
        let snapshot = snapshot(
            &[("a", 1, 0), ("b", 1, 1)],
            &[("a", &[1]), ("b", &[3])],
            Strategy::RoundRobin,
        );
        let rule = &rule_of(&snapshot, "m").unwrap();
        rule.tiers[0].candidates[0].backend.endpoints[0]
            .live
            .outlier
            .failed(FAILURES, 0, 0, 1);
        let order = all(&snapshot, false, 9);
        assert_eq!(
            order
                .iter()
                .map(|step| (step.0, step.3))
                .collect::<Vec<_>>(),
            [(1, Pass::Fresh), (0, Pass::Failing)]
        );
    }

    #[test]
    fn a_slow_endpoint_gets_little_and_is_tried_again_when_that_is_long_ago() {
        let snapshot = snapshot(&[("a", 1, 0)], &[("a", &[1, 2, 3])], Strategy::PeakEwma);
        let rule = &rule_of(&snapshot, "m").unwrap();
        let endpoints = &rule.tiers[0].candidates[0].backend.endpoints;
        for (endpoint, ms) in endpoints.iter().zip([100.0, 100.0, 1_000.0]) {
            endpoint.live.latency(true).observe(ms, 1);
        }
        let mut rng = rng();
        let mut share_of_slow = |wish: Wish<'_>| {
            let slow = |choice: Choice| Arc::ptr_eq(&choice.endpoint, &endpoints[2]);
            let picks = (0..300).map(|_| slow(choose(rule, &[], wish, &mut rng).ok().unwrap()));
            picks.filter(|slow| *slow).count()
        };
        assert_eq!(share_of_slow(WISH), 0);
        let whole = Wish {
            stream: false,
            ..WISH
        };
        assert!(
            share_of_slow(whole) > 50,
            "of answers that are not streamed nothing is known"
        );
        let later = Wish {
            now_ms: 300_000,
            ..WISH
        };
        assert!(share_of_slow(later) > 50);
    }

    #[test]
    fn a_prompt_stays_where_it_is_known_until_that_is_much_slower() {
        let snapshot = snapshot(&[("a", 1, 0)], &[("a", &[1, 2, 3])], Strategy::PeakEwma);
        let rule = &rule_of(&snapshot, "m").unwrap();
        let tier = &rule.tiers[0];
        let endpoints = &tier.candidates[0].backend.endpoints;
        let blocks = [1, 2, 3, 4];
        let wish = Wish {
            now_ms: 1,
            prompt_tokens: 300,
            limit_tokens: 300,
            blocks: &blocks,
            ..WISH
        };
        let mut rng = rng();
        let mut at_last = |wish: Wish<'_>| {
            let last = |choice: Choice| Arc::ptr_eq(&choice.endpoint, &endpoints[2]);
            let picks = (0..100).map(|_| last(choose(rule, &[], wish, &mut rng).ok().unwrap()));
            picks.filter(|last| *last).count()
        };
        for endpoint in endpoints {
            endpoint.live.latency(true).observe(100.0, 1);
        }
        let spread = at_last(wish);
        assert!((15..55).contains(&spread), "nobody knows it: {spread}");
        tier.prefixes.learn(&blocks[..2], endpoints[2].live.id);
        assert!(at_last(wish) < 55, "half of it is not enough");
        tier.prefixes.learn(&blocks, endpoints[2].live.id);
        assert_eq!(at_last(wish), 100);
        endpoints[2].live.latency(true).observe(300.0, 1);
        assert_eq!(at_last(wish), 100, "a little slower");
        assert_eq!(
            at_last(Wish {
                blocks: &[],
                ..wish
            }),
            0,
            "other prompts"
        );
        endpoints[2].live.latency(true).observe(1_000.0, 1);
        assert_eq!(at_last(wish), 0);
    }

    #[test]
    fn an_endpoint_that_has_just_come_gets_little() {
        let rule = rule("r", &[NameMatch::Exact("m".to_owned())], &[("a", 1, 0)]);
        let mut config = config(&["a"], vec![rule]);
        config.rules[0].strategy = Strategy::RoundRobin;
        let backend = config.backends.values_mut().next().unwrap();
        backend.profile.slow_start_ms = Some(10_000);
        let endpoints = endpoints(&[("a", &[1, 2])]);
        let snapshot = build(config, &endpoints, &Credentials::default(), None);
        let rule = &rule_of(&snapshot, "m").unwrap();
        let live = |index: usize| &rule.tiers[0].candidates[0].backend.endpoints[index].live;
        let mut rng = rng();
        let mut of_the_second = |now_ms: u64| {
            let wish = Wish { now_ms, ..WISH };
            let picks = (0..1_000).map(|_| choose(rule, &[], wish, &mut rng).ok().unwrap());
            picks
                .filter(|choice| Arc::ptr_eq(&choice.endpoint.live, live(1)))
                .count()
        };
        assert!(of_the_second(0).abs_diff(500) < 60, "both have just come");
        live(1).ready_ms.store(100_000, Ordering::Relaxed);
        // Half of the tenth that may go there.
        assert!(of_the_second(100_000).abs_diff(50) < 30);
        assert!(of_the_second(105_000).abs_diff(275) < 60);
        assert!(of_the_second(110_000).abs_diff(500) < 60);
    }

    #[test]
    fn who_asked_to_be_left_alone_is() {
        let snapshot = snapshot(
            &[("a", 1, 0), ("b", 1, 1)],
            &[("a", &[1]), ("b", &[2])],
            Strategy::PeakEwma,
        );
        let rule = &rule_of(&snapshot, "m").unwrap();
        let limits = |tier: usize| {
            &rule.tiers[tier].candidates[0].backend.endpoints[0]
                .live
                .limits
        };
        let first = |now_ms: u64| {
            choose(rule, &[], Wish { now_ms, ..WISH }, &mut rng()).map(|choice| choice.tier)
        };
        limits(0).ask("m", None, 0);
        assert_eq!(first(1).ok(), Some(1), "aside: others first");
        limits(1).ask("m", Some(Duration::from_secs(3)), 0);
        assert_eq!(first(1).ok(), Some(0), "better than none");
        limits(0).ask("m", Some(Duration::from_secs(2)), 0);
        assert_eq!(first(500).err(), Some(Nowhere::Closed(1_500)));
        assert_eq!(first(2_000).ok(), Some(0));
        limits(0).fails("m", Some(Duration::from_secs(9)), 0);
        assert_eq!(first(500).err(), Some(Nowhere::Closed(2_500)));
        limits(1).fails("m", Some(Duration::from_secs(9)), 0);
        assert_eq!(first(500).err(), Some(Nowhere::Unavailable(8_500)));
    }

    #[test]
    fn the_quiet_come_after_their_peers_and_the_silent_after_all() {
        let snapshot = snapshot(
            &[("a", 1, 0), ("b", 1, 1)],
            &[("a", &[1, 2]), ("b", &[3])],
            Strategy::PeakEwma,
        );
        let rule = &rule_of(&snapshot, "m").unwrap();
        let first = |now_ms: u64| {
            let choice = choose(rule, &[], Wish { now_ms, ..WISH }, &mut rng())
                .ok()
                .unwrap();
            choice.endpoint.address.to_string()
        };
        let pulse = |index: usize| {
            &rule.tiers[0].candidates[0].backend.endpoints[index]
                .live
                .pulse
        };
        let others = [first(0), first(1)];
        assert!(others.iter().all(|address| !address.ends_with(":3")));
        pulse(0).enter(0);
        assert!(first(QUIET_MS + 2).ends_with(":2"));
        pulse(1).enter(0);
        assert!(
            !first(QUIET_MS + 2).ends_with(":3"),
            "equals in silence stay before a lower priority"
        );
        assert!(first(SILENT_MS + 2).ends_with(":3"));
    }

    #[test]
    fn backends_without_endpoints_are_passed_over() {
        let snapshot = snapshot(
            &[("a", 100, 0), ("b", 1, 0)],
            &[("b", &[3])],
            Strategy::RoundRobin,
        );
        assert_eq!(all(&snapshot, false, 1)[0].1, 1);
    }

    #[test]
    fn nowhere_says_why() {
        let rule_of = |snapshot: &Snapshot| rule_of(snapshot, "m").unwrap();
        let empty = snapshot(&[("a", 1, 0)], &[], Strategy::RoundRobin);
        assert_eq!(
            choose(&rule_of(&empty), &[], WISH, &mut rng()).err(),
            Some(Nowhere::NoEndpoint)
        );
        let one = snapshot(&[("a", 1, 0)], &[("a", &[1])], Strategy::RoundRobin);
        let choice = choose(&rule_of(&one), &[], WISH, &mut rng()).ok().unwrap();
        assert_eq!(
            choose(
                &rule_of(&one),
                &[choice.failed("x", false)],
                WISH,
                &mut rng()
            )
            .err(),
            Some(Nowhere::Spent)
        );
    }

    proptest! {
        #[test]
        fn round_robin_shares_follow_weights(weights in prop::collection::vec(1_u32..20, 1..5)) {
            let names = ["a", "b", "c", "d"];
            let backends: Vec<_> = weights.iter().zip(names).map(|(weight, name)| (name, *weight, 0)).collect();
            let services: Vec<(&str, &[u16])> = names.iter().map(|name| (*name, &[1, 2][..])).collect();
            let snapshot = snapshot(&backends, &services, Strategy::RoundRobin);
            let rule = &rule_of(&snapshot, "m").unwrap();
            let mut counts = vec![0; weights.len()];
            for _ in 0..weights.iter().sum::<u32>() {
                counts[choose(rule, &[], WISH, &mut rng()).ok().unwrap().candidate] += 1;
            }
            prop_assert_eq!(counts, weights);
        }

        #[test]
        fn every_endpoint_is_tried_before_any_is_tried_again(
            a in 0_u16..4,
            b in 0_u16..4,
            priority in 0_u32..2,
            strategy in prop::sample::select(vec![Strategy::RoundRobin, Strategy::LeastRequests, Strategy::PrefixAffinity, Strategy::PeakEwma]),
        ) {
            let ports = |from: u16, count: u16| (from..from + count).collect::<Vec<_>>();
            let (first, second) = (ports(1, a), ports(100, b));
            let snapshot = snapshot(&[("a", 1, 0), ("b", 2, priority)], &[("a", &first), ("b", &second)], strategy);
            let order = all(&snapshot, true, usize::from(a + b));
            let distinct: std::collections::BTreeSet<_> = order.iter().map(|step| step.2.clone()).collect();
            prop_assert_eq!(distinct.len(), usize::from(a + b));
        }
    }
}
