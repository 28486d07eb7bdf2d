//! Which failures let a candidate with `after` in, and whom they shut out. Pure.
//!
//! Failures of a request's own attempts count, and before the first one what is known of everybody who would be asked
//! first: a request is not spent on finding out once more that a provider is over its limit.

use std::collections::BTreeSet;

use penstock_core::config::FailureClass;
use rand::Rng;

use crate::capability::Lack;
use crate::choose::{Choice, Nowhere, Pass, Standing, Tried, choose};
use crate::limits::Cause;
use crate::snapshot::{Candidate, Rule};
use crate::wish::{Unfit, Wish};

/// How a request has failed so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failed {
    classes: BTreeSet<FailureClass>,
    /// One of them is followed by those alone that name it.
    is_special: bool,
}

impl Failed {
    /// In no way.
    pub const NOTHING: Self = Self {
        classes: BTreeSet::new(),
        is_special: false,
    };

    /// In what lets this candidate in.
    pub fn before(candidate: &Candidate) -> Self {
        Self {
            classes: candidate.after.clone(),
            is_special: false,
        }
    }

    /// Once more.
    pub fn add(&mut self, class: FailureClass, rule: &Rule) {
        self.is_special |= !rule.retry_on.contains(&class);
        self.classes.insert(class);
    }

    /// Whether a candidate may be asked now.
    pub fn lets(&self, candidate: &Candidate) -> bool {
        if candidate.is_fallback() {
            !candidate.after.is_disjoint(&self.classes)
        } else {
            !self.is_special
        }
    }
}

/// Who is asked in place of those that would be asked first, if what is known of these is a failure that lets others
/// in: each of them is over a limit, silent, failing, too short for the request or without an endpoint. `found` is what
/// there is among these.
pub fn in_place(
    found: &Result<Choice, Nowhere>,
    rule: &Rule,
    tried: &[Tried],
    wish: Wish<'_>,
    rng: &mut impl Rng,
) -> Option<(Choice, Failed)> {
    let is_busy = matches!(found, Err(Nowhere::Full));
    let is_good = matches!(found, Ok(choice) if choice.pass == Pass::Fresh);
    if is_busy || is_good || !rule.candidates().any(Candidate::is_fallback) {
        return None;
    }
    let mut unfit: Unfit = wish.unfit.clone();
    for class in known(rule, wish) {
        unfit.failed.add(class, rule);
    }
    let wish = Wish {
        unfit: &unfit,
        ..wish
    };
    let choice = choose(rule, tried, wish, rng).ok();
    let choice = choice.filter(|choice| choice.pass == Pass::Fresh)?;
    Some((choice, unfit.failed))
}

/// What speaks against those that would be asked first, as classes of failures.
fn known(rule: &Rule, wish: Wish<'_>) -> BTreeSet<FailureClass> {
    let mut classes = BTreeSet::new();
    for candidate in rule.candidates().filter(|one| !one.is_fallback()) {
        match wish.unfit.needed.lack_of(candidate) {
            Some(Lack::Context { .. }) => classes.extend([FailureClass::ContextLength]),
            Some(Lack::Feature(_) | Lack::Count) => {}
            None if !candidate.has_endpoint() => classes.extend([FailureClass::Connection]),
            None => classes.extend(candidate.backend.endpoints.iter().flat_map(|endpoint| {
                let limit = wish.limit_at(candidate, endpoint);
                match Standing::of(&endpoint.live, limit, wish.now_ms) {
                    Standing::Aside | Standing::Closed if limit.cause != Cause::Limit => {
                        &[FailureClass::ServerError][..]
                    }
                    // Less is left than it takes.
                    Standing::Scarce if limit.share <= 0.0 => &[FailureClass::RateLimit][..],
                    standing => classes_of(standing),
                }
            })),
        }
    }
    classes
}

fn classes_of(standing: Standing) -> &'static [FailureClass] {
    use FailureClass::{Connection, RateLimit, ServerError, Timeout};
    match standing {
        Standing::Closed | Standing::Aside => &[RateLimit],
        Standing::Silent => &[Timeout],
        Standing::Down => &[Connection],
        // Any of these, five times in a row.
        Standing::Failing => &[Connection, Timeout, ServerError],
        Standing::Good | Standing::Worse | Standing::Scarce | Standing::Quiet | Standing::Full => {
            &[]
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use penstock_core::config::{NameMatch, Strategy, usual_failures};
    use penstock_core::ids::Id;
    use proptest::prelude::*;
    use proptest::strategy::Strategy as _;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::outlier::FAILURES;
    use crate::pulse::SILENT_MS;
    use crate::snapshot::tests::{build, config, endpoints, rule, rule_of};
    use crate::snapshot::{EndpointLive, Snapshot};
    use crate::source::Credentials;

    /// `a` is asked first, `b` after these.
    fn snapshot(after: &[FailureClass], ports: &[u16], strategy: Strategy) -> Snapshot {
        let backends = [("a", 1, 1), ("b", 1, 0)];
        let mut rule = rule("r", &[NameMatch::Exact("m".to_owned())], &backends);
        rule.strategy = strategy;
        rule.backends[1].after = after.iter().copied().collect();
        let endpoints = endpoints(&[("a", ports), ("b", &[9])]);
        let mut config = config(&["a", "b"], vec![rule]);
        let a = config.backends.get_mut(&Id::new("ns", "a")).unwrap();
        a.profile.capabilities.context_tokens = Some(1_000);
        build(config, &endpoints, &Credentials::default(), None)
    }

    fn wish(unfit: &Unfit, now_ms: u64) -> Wish<'_> {
        Wish {
            now_ms,
            stream: true,
            model: "m",
            prompt_tokens: 100,
            limit_tokens: 100,
            answer_tokens: 100,
            blocks: &[],
            key: None,
            region: None,
            unfit,
        }
    }

    fn name(rule: &Rule, choice: &Choice) -> String {
        let candidate = &rule.tiers[choice.tier].candidates[choice.candidate];
        candidate.backend.id.name.clone()
    }

    /// Who is asked in place of `a`, of which `tell` tells something at 0 ms.
    fn instead(
        after: FailureClass,
        ports: &[u16],
        now_ms: u64,
        tell: impl Fn(&EndpointLive),
    ) -> Option<String> {
        let rule = rule_of(&snapshot(&[after], ports, Strategy::PeakEwma), "m").unwrap();
        let of_a = rule.candidates().find(|one| !one.is_fallback()).unwrap();
        for endpoint in &of_a.backend.endpoints {
            tell(&endpoint.live);
        }
        let unfit = Unfit::default();
        let (wish, mut rng) = (wish(&unfit, now_ms), StdRng::seed_from_u64(7));
        let found = choose(&rule, &[], wish, &mut rng);
        let other = in_place(&found, &rule, &[], wish, &mut rng);
        other.map(|(choice, _)| name(&rule, &choice))
    }

    #[test]
    fn what_is_known_before_counts_as_the_failure_that_it_would_be() {
        use FailureClass::{Connection, ContentPolicy, RateLimit, ServerError, Timeout};
        let b = Some("b".to_owned());
        let closed = |live: &EndpointLive| live.limits.ask("m", Some(Duration::from_secs(9)), 0);
        assert_eq!(instead(RateLimit, &[1, 2], 1, closed), b);
        assert_eq!(instead(Timeout, &[1, 2], 1, closed), None);
        let absent = |live: &EndpointLive| live.limits.lacks("m", 0);
        assert_eq!(instead(ServerError, &[1, 2], 1, absent), b);
        assert_eq!(instead(RateLimit, &[1, 2], 1, absent), None);
        let silent = |live: &EndpointLive| live.pulse.enter(0);
        assert_eq!(instead(Timeout, &[1], SILENT_MS + 2, silent), b);
        assert_eq!(instead(Timeout, &[1], SILENT_MS - 2, silent), None);
        let failing = |live: &EndpointLive| {
            live.outlier.failed(FAILURES, 0, 0, 1);
        };
        assert_eq!(instead(Connection, &[1], 1, failing), b);
        assert_eq!(instead(RateLimit, &[1], 1, failing), None);
        assert_eq!(instead(Connection, &[], 1, |_| {}), b);
        assert_eq!(instead(ContentPolicy, &[], 1, |_| {}), None);
        assert_eq!(instead(Connection, &[1], 1, |_| {}), None, "it works");
    }

    #[test]
    fn what_is_too_long_for_all_others_goes_to_who_comes_after_that() {
        let text = "x".repeat(8_000);
        let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#);
        let call = crate::openai::Call::parse(body.as_bytes()).unwrap();
        for (after, expected) in [
            (FailureClass::ContextLength, "b"),
            // Then the engine's own count decides.
            (FailureClass::ContentPolicy, "a"),
        ] {
            let rule = rule_of(&snapshot(&[after], &[1], Strategy::PeakEwma), "m").unwrap();
            let api = crate::openai::Api::Chat;
            let unfit = Unfit {
                needed: crate::capability::Needed::of(&rule, api, &call),
                ..Unfit::default()
            };
            let (wish, mut rng) = (wish(&unfit, 1), StdRng::seed_from_u64(7));
            let found = choose(&rule, &[], wish, &mut rng);
            let other = in_place(&found, &rule, &[], wish, &mut rng);
            let choice = other.map_or_else(|| found.ok(), |(choice, _)| Some(choice));
            assert_eq!(name(&rule, &choice.unwrap()), expected);
        }
    }

    fn classes() -> impl proptest::strategy::Strategy<Value = BTreeSet<FailureClass>> {
        use FailureClass::{
            Connection, ContentPolicy, ContextLength, RateLimit, ServerError, Timeout,
        };
        let all = vec![
            Connection,
            Timeout,
            RateLimit,
            ServerError,
            ContextLength,
            ContentPolicy,
        ];
        prop::sample::subsequence(all, 0..4).prop_map(|some| some.into_iter().collect())
    }

    proptest! {
        #[test]
        fn who_comes_after_is_asked_after_that_and_never_first(
            after in classes(),
            on in classes(),
            failed in classes(),
            strategy in prop::sample::select(vec![Strategy::RoundRobin, Strategy::LeastRequests, Strategy::Latency, Strategy::PeakEwma]),
        ) {
            let after: Vec<FailureClass> = after.into_iter().collect();
            let mut snapshot = snapshot(&after, &[1], strategy);
            let mut config = (*snapshot.config).clone();
            config.rules[0].retry.on = on.clone();
            let all = endpoints(&[("a", &[1]), ("b", &[9])]);
            snapshot = build(config, &all, &Credentials::default(), None);
            let rule = rule_of(&snapshot, "m").unwrap();
            let mut unfit = Unfit::default();
            for class in &failed {
                unfit.failed.add(*class, &rule);
            }
            let fits: BTreeMap<String, bool> = rule
                .candidates()
                .map(|one| (one.backend.id.name.clone(), wish(&unfit, 0).fits(one)))
                .collect();
            prop_assert_eq!(fits["a"], failed.is_subset(&on));
            if after.is_empty() {
                prop_assert_eq!(fits["b"], failed.is_subset(&on));
            } else {
                prop_assert_eq!(fits["b"], after.iter().any(|class| failed.contains(class)));
            }
            let choice = choose(&rule, &[], wish(&unfit, 0), &mut StdRng::seed_from_u64(7)).ok();
            prop_assert_eq!(choice.is_some(), fits["a"] || fits["b"]);
            if let Some(choice) = choice {
                prop_assert!(fits[&name(&rule, &choice)]);
            }
        }
    }

    #[test]
    fn what_a_backend_comes_after_is_what_its_rule_falls_back_on() {
        let after = [FailureClass::ContextLength];
        let rule = rule_of(&snapshot(&after, &[1], Strategy::PeakEwma), "m").unwrap();
        for class in usual_failures() {
            assert!(rule.falls_back_on(class));
        }
        assert!(rule.falls_back_on(FailureClass::ContextLength));
        assert!(!rule.falls_back_on(FailureClass::ContentPolicy));
        assert!(!rule.first_tier().unwrap().candidates[0].is_fallback());
    }
}
