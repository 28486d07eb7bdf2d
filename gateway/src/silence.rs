//! Whether everybody who could answer is known to answer nothing: no request, or not even who connects. Pure.
//!
//! Silence alone refuses nobody: an engine may compute a long prompt. It is as good as certain once it has lasted for
//! longer than the rule lets anybody wait for a first token, or than callers do as far as that is known. One more
//! request would then wait for nothing, and its caller is told so at once.

use std::time::Duration;

use crate::choose::{Choice, Nowhere, Pass};
use crate::outlier::Wait;
use crate::pick::has_credential;
use crate::pulse::{PROBE_MS, SILENT_MS};
use crate::snapshot::{EndpointLive, Rule};
use crate::wish::Wish;

/// A silence that is not waited out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// How long a first token or a connection was waited for, at least.
    pub waited: Duration,
    /// When the next request may see whether it is over, in ms from now.
    pub back_ms: u64,
}

/// Turns away a request whose first attempt would go to endpoints of which all are given up.
pub fn heeded(
    found: Result<Choice, Nowhere>,
    rule: &Rule,
    wish: Wish<'_>,
) -> Result<Choice, Nowhere> {
    match found {
        Ok(choice) if may_be_silent(&choice, wish) => match of_all(rule, wish) {
            Some(silence) => Err(Nowhere::Silent(silence)),
            None => Ok(choice),
        },
        found => found,
    }
}

/// Whether it is worth a look. Of a backend with many endpoints not all are left out, whatever they do.
fn may_be_silent(choice: &Choice, wish: Wish<'_>) -> bool {
    let outlier = &choice.endpoint.live.outlier;
    choice.pass == Pass::Failing || outlier.silence(wish.now_ms).is_some()
}

/// The shortest silence, if all who could take the request are given up.
fn of_all(rule: &Rule, wish: Wish<'_>) -> Option<Silence> {
    let fitting = rule
        .candidates()
        .filter(|candidate| wish.fits(candidate) && has_credential(candidate));
    let mut least: Option<Silence> = None;
    for endpoint in fitting.flat_map(|candidate| &candidate.backend.endpoints) {
        let one = of(rule, &endpoint.live, wish.now_ms)?;
        let before = least.unwrap_or(one);
        least = Some(Silence {
            waited: before.waited.min(one.waited),
            back_ms: before.back_ms.min(one.back_ms),
        });
    }
    least
}

fn of(rule: &Rule, live: &EndpointLive, now_ms: u64) -> Option<Silence> {
    let patience = rule.patience.known(now_ms);
    let patience = patience.or_else(|| live.patience.known(now_ms));
    let waited = patience.map_or(rule.first_token, |known| known.min(rule.first_token));
    let waited = waited.max(Duration::from_millis(SILENT_MS));
    if Duration::from_millis(live.pulse.silence_ms(now_ms)) > waited {
        return Some(Silence {
            waited,
            back_ms: PROBE_MS,
        });
    }
    // Answers that are not streamed leave no other trace, and connections that are not made.
    let (wait, back_ms) = live.outlier.silence(now_ms)?;
    Some(Silence {
        waited: match wait {
            Wait::Connection => rule.connect,
            Wait::FirstToken => rule.first_token,
        },
        back_ms,
    })
}

#[cfg(test)]
mod tests {
    use penstock_core::config::{NameMatch, Strategy};
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::choose::choose;
    use crate::outlier::FAILURES;
    use crate::snapshot::tests::{build, config, endpoints, rule, rule_of};
    use crate::source::Credentials;
    use crate::wish::Unfit;

    /// What a request meets at `now_ms` where a first token is waited for `first_token_ms`, once `tell` has told
    /// something of the endpoints of two backends at 0 ms.
    fn met(
        first_token_ms: u64,
        now_ms: u64,
        tell: impl Fn(&Rule, &[&EndpointLive]),
    ) -> Result<Pass, Nowhere> {
        let wanted = [("a", 1, 0), ("b", 1, 1)];
        let mut rule = rule("r", &[NameMatch::Exact("m".to_owned())], &wanted);
        rule.strategy = Strategy::PeakEwma;
        rule.timeouts.first_token_ms = first_token_ms;
        let endpoints = endpoints(&[("a", &[1]), ("b", &[2])]);
        let config = config(&["a", "b"], vec![rule]);
        let snapshot = build(config, &endpoints, &Credentials::default(), None);
        let rule = rule_of(&snapshot, "m").unwrap();
        let endpoints = rule.candidates().flat_map(|one| &one.backend.endpoints);
        let lives: Vec<&EndpointLive> = endpoints.map(|endpoint| &*endpoint.live).collect();
        tell(&rule, &lives);
        let unfit = Unfit::default();
        let wish = Wish {
            now_ms,
            stream: true,
            model: "m",
            prompt_tokens: 100,
            limit_tokens: 100,
            answer_tokens: 100,
            blocks: &[],
            key: None,
            region: None,
            unfit: &unfit,
        };
        let found = choose(&rule, &[], wish, &mut StdRng::seed_from_u64(7));
        heeded(found, &rule, wish).map(|choice| choice.pass)
    }

    fn all_silent(_: &Rule, lives: &[&EndpointLive]) {
        for live in lives {
            live.pulse.enter(1);
        }
    }

    #[test]
    fn who_is_silent_for_longer_than_anybody_waits_gets_nothing() {
        let silence = |waited_ms| {
            Err(Nowhere::Silent(Silence {
                waited: Duration::from_millis(waited_ms),
                back_ms: PROBE_MS,
            }))
        };
        assert_eq!(met(60_000, 60_001, all_silent), Ok(Pass::Failing));
        assert_eq!(met(60_000, 60_002, all_silent), silence(60_000));
        // A long prompt takes some seconds, however little the rule waits.
        assert_eq!(met(100, QUIET, all_silent), Ok(Pass::Fresh));
        assert_eq!(met(100, SILENT_MS + 2, all_silent), silence(SILENT_MS));
        let impatient = |rule: &Rule, lives: &[&EndpointLive]| {
            all_silent(rule, lives);
            (0..40).for_each(|_| rule.patience.left(Duration::from_secs(20), 15_000));
        };
        assert_eq!(met(60_000, 20_002, impatient), silence(20_000));
    }

    const QUIET: u64 = SILENT_MS - 1;

    #[test]
    fn one_that_is_heard_or_looked_at_is_enough() {
        let one_talks = |rule: &Rule, lives: &[&EndpointLive]| {
            all_silent(rule, lives);
            lives[1].pulse.hear(69_000);
        };
        assert_eq!(met(60_000, 70_000, one_talks), Ok(Pass::Fresh));
        let one_fails = |_: &Rule, lives: &[&EndpointLive]| {
            lives[0].pulse.enter(1);
            lives[1].outlier.failed(FAILURES, 69_000, 0, 1);
        };
        assert_eq!(met(60_000, 70_000, one_fails), Ok(Pass::Failing));
        let all_left = |rule: &Rule, lives: &[&EndpointLive]| {
            all_silent(rule, lives);
            lives[0].pulse.leave(61_000);
        };
        assert_eq!(met(60_000, 70_000, all_left), Ok(Pass::Fresh), "a look");
    }

    #[test]
    fn connections_that_are_not_made_tell_too_even_where_nobody_is_left_out() {
        let unreached = |_: &Rule, lives: &[&EndpointLive]| {
            for live in lives {
                (0..2).for_each(|_| live.outlier.waited(Some(Wait::Connection), 0));
            }
        };
        let told = met(100, 1_000, unreached);
        assert!(
            matches!(told, Err(Nowhere::Silent(Silence { back_ms: 4_000, .. }))),
            "{told:?}"
        );
        let one_answers = |rule: &Rule, lives: &[&EndpointLive]| {
            unreached(rule, lives);
            lives[1].outlier.waited(None, 0);
        };
        assert_eq!(met(100, 1_000, one_answers), Ok(Pass::Fresh));
    }

    #[test]
    fn answers_that_are_not_streamed_tell_by_their_timeouts() {
        let timed_out = |count: u32| {
            move |_: &Rule, lives: &[&EndpointLive]| {
                for live in lives {
                    (0..count).for_each(|_| live.outlier.waited(Some(Wait::FirstToken), 0));
                    live.outlier.failed(FAILURES, 0, 0, 1);
                }
            }
        };
        assert_eq!(met(100, 1_000, timed_out(4)), Ok(Pass::Failing));
        let silence = Silence {
            waited: Duration::from_millis(100),
            back_ms: 4_000,
        };
        let expected = Err(Nowhere::Silent(silence));
        assert_eq!(met(100, 1_000, timed_out(5)), expected);
        assert_eq!(met(100, 5_000, timed_out(5)), Ok(Pass::Fresh), "a trial");
    }
}
