//! Which endpoint gets the next attempt of a request. Pure but for the balancer's counters, which are passed in with
//! the rule.
//!
//! Order: lower priority numbers first; within one priority a backend by the rule's strategy, within it an endpoint
//! by the same strategy. Endpoints that were tried for this request, or that keep failing, come after all others.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use penstock_core::config::Strategy;

use crate::balance;
use crate::snapshot::{Authorization, Candidate, Endpoint, Rule, Tier};

/// An attempt that failed.
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

/// What an endpoint may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Not tried, not failing.
    Fresh,
    /// Not tried, but failing lately: better than none.
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
    /// No candidate has a ready endpoint.
    NoEndpoint,
    /// Those that have one miss their credential.
    NoCredential,
    /// Every endpoint was tried and may not be asked again.
    Spent,
}

/// Chooses the next endpoint.
pub fn choose(rule: &Rule, tried: &[Tried], now_ms: u64) -> Result<Choice, Nowhere> {
    let passes: &[Pass] = if tried.is_empty() {
        &[Pass::Fresh, Pass::Failing]
    } else {
        &[Pass::Fresh, Pass::Failing, Pass::Again]
    };
    for &pass in passes {
        for (tier, group) in rule.tiers.iter().enumerate() {
            let fits = |candidate: usize, endpoint: &Arc<Endpoint>| {
                let before = tried.iter().rfind(|tried| {
                    tried.tier == tier
                        && tried.candidate == candidate
                        && Arc::ptr_eq(&tried.endpoint.live, &endpoint.live)
                });
                match (pass, before) {
                    (Pass::Fresh, None) => !endpoint.live.outlier.is_away(now_ms),
                    (Pass::Failing, None) => endpoint.live.outlier.is_away(now_ms),
                    (Pass::Again, Some(before)) => before.again,
                    _ => false,
                }
            };
            if let Some((candidate, endpoint)) = pick(rule.strategy, group, fits) {
                return Ok(Choice {
                    tier,
                    candidate,
                    endpoint,
                    pass,
                });
            }
        }
    }
    Err(nowhere(rule))
}

fn nowhere(rule: &Rule) -> Nowhere {
    let with_endpoint = || {
        rule.tiers
            .iter()
            .flat_map(|tier| &tier.candidates)
            .filter(|candidate| !candidate.backend.endpoints.is_empty())
    };
    if with_endpoint().next().is_none() {
        Nowhere::NoEndpoint
    } else if with_endpoint().all(|candidate| !has_credential(candidate)) {
        Nowhere::NoCredential
    } else {
        Nowhere::Spent
    }
}

fn has_credential(candidate: &Candidate) -> bool {
    !matches!(candidate.backend.authorization, Authorization::Missing)
}

fn pick(
    strategy: Strategy,
    tier: &Tier,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let eligible = |index: usize| {
        tier.candidates.get(index).is_some_and(|candidate| {
            has_credential(candidate)
                && candidate
                    .backend
                    .endpoints
                    .iter()
                    .any(|endpoint| fits(index, endpoint))
        })
    };
    let index = if tier.candidates.len() == 1 {
        Some(0).filter(|&only| eligible(only))
    } else {
        let mut wheel = tier.wheel.lock().unwrap_or_else(PoisonError::into_inner);
        match strategy {
            Strategy::RoundRobin => balance::smooth(&mut wheel, &tier.weights, eligible),
            Strategy::LeastConnections => {
                let in_flight = |index: usize| {
                    tier.candidates
                        .get(index)
                        .map_or(0, |candidate| candidate.backend.ledger.in_flight())
                };
                balance::least(&mut wheel, &tier.weights, in_flight, eligible)
            }
        }
    }?;
    let backend = &tier.candidates.get(index)?.backend;
    let turn = if backend.endpoints.len() > 1 {
        backend.turn.fetch_add(1, Ordering::Relaxed)
    } else {
        0
    };
    let load = |endpoint: usize| match strategy {
        Strategy::RoundRobin => 0,
        Strategy::LeastConnections => backend.endpoints.get(endpoint).map_or(0, |endpoint| {
            endpoint.live.in_flight.load(Ordering::Relaxed)
        }),
    };
    let fits = |endpoint: usize| {
        backend
            .endpoints
            .get(endpoint)
            .is_some_and(|endpoint| fits(index, endpoint))
    };
    let endpoint = balance::endpoint(backend.endpoints.len(), turn, load, fits)?;
    Some((index, Arc::clone(backend.endpoints.get(endpoint)?)))
}

#[cfg(test)]
mod tests {
    use penstock_core::config::{ModelMatch, Strategy};
    use proptest::prelude::*;

    use super::*;
    use crate::outlier::FAILURES;
    use crate::snapshot::Snapshot;
    use crate::snapshot::tests::{build, config, endpoints, rule};
    use crate::source::Credentials;

    fn snapshot(
        backends: &[(&str, u32, u32)],
        services: &[(&str, &[u16])],
        strategy: Strategy,
    ) -> Snapshot {
        let names: Vec<&str> = backends.iter().map(|backend| backend.0).collect();
        let mut rule = rule("r", &[ModelMatch::Exact("m".to_owned())], backends);
        rule.strategy = strategy;
        build(
            config(&names, vec![rule]),
            &endpoints(services),
            &Credentials::default(),
            None,
        )
    }

    fn tried(choice: &Choice, again: bool) -> Tried {
        let endpoint = Arc::clone(&choice.endpoint);
        Tried {
            tier: choice.tier,
            candidate: choice.candidate,
            endpoint,
            reason: "x",
            again,
        }
    }

    fn all(snapshot: &Snapshot, again: bool, attempts: usize) -> Vec<(usize, usize, String, Pass)> {
        let rule = snapshot.rule_for("m").unwrap();
        let mut failed = Vec::new();
        let mut order = Vec::new();
        for _ in 0..attempts {
            let Ok(choice) = choose(rule, &failed, 0) else {
                break;
            };
            order.push((
                choice.tier,
                choice.candidate,
                choice.endpoint.address.to_string(),
                choice.pass,
            ));
            failed.push(tried(&choice, again));
        }
        order
    }

    #[test]
    fn priorities_are_exhausted_in_order_and_nothing_is_tried_twice_before() {
        let snapshot = snapshot(
            &[("a", 1, 0), ("b", 1, 1)],
            &[("a", &[1, 2]), ("b", &[3])],
            Strategy::LeastConnections,
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
        let rule = snapshot.rule_for("m").unwrap();
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
        let rule_of = |snapshot: &Snapshot| Arc::clone(snapshot.rule_for("m").unwrap());
        let empty = snapshot(&[("a", 1, 0)], &[], Strategy::RoundRobin);
        assert_eq!(
            choose(&rule_of(&empty), &[], 0).err(),
            Some(Nowhere::NoEndpoint)
        );
        let one = snapshot(&[("a", 1, 0)], &[("a", &[1])], Strategy::RoundRobin);
        let choice = choose(&rule_of(&one), &[], 0).ok().unwrap();
        assert_eq!(
            choose(&rule_of(&one), &[tried(&choice, false)], 0).err(),
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
            let rule = snapshot.rule_for("m").unwrap();
            let mut counts = vec![0; weights.len()];
            for _ in 0..weights.iter().sum::<u32>() {
                counts[choose(rule, &[], 0).ok().unwrap().candidate] += 1;
            }
            prop_assert_eq!(counts, weights);
        }

        #[test]
        fn every_endpoint_is_tried_before_any_is_tried_again(a in 0_u16..4, b in 0_u16..4, priority in 0_u32..2) {
            let ports = |from: u16, count: u16| (from..from + count).collect::<Vec<_>>();
            let (first, second) = (ports(1, a), ports(100, b));
            let snapshot = snapshot(&[("a", 1, 0), ("b", 2, priority)], &[("a", &first), ("b", &second)], Strategy::LeastConnections);
            let order = all(&snapshot, true, usize::from(a + b));
            let distinct: std::collections::BTreeSet<_> = order.iter().map(|step| step.2.clone()).collect();
            prop_assert_eq!(distinct.len(), usize::from(a + b));
        }
    }
}
