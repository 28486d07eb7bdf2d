//! (IO) `Decisions`: what the decision log tells of one request, each choice of an endpoint as it was made: of first
//! attempts, later ones, hedges, fan-outs and rescues. One line at the end of a request that is in the sample. Bounded
//! in endpoints of a choice and in bytes.

use std::collections::BTreeSet;

use http::HeaderValue;
use penstock_core::config::Protocol;
use rand::RngExt as _;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::choose::{Choice, Nowhere, Tried};
use crate::explain::{About, Look, Looked, about};
use crate::job::Job;
use crate::process::Process;
use crate::provider::Misfit;
use crate::snapshot::Rule;
use crate::wish::Unfit;

/// Endpoints of one choice that are told of, shared out among its candidates; each candidate has at least one, and
/// those that were chosen or tried are told of in any case.
const MAX_ENDPOINTS: usize = 32;
/// All choices of a line. One with the most candidates and endpoints takes about half of it, a usual one 1 to 4 KiB;
/// what fits no more is counted.
const MAX_BYTES: usize = 64 << 10;

/// What is told of one request.
#[derive(Default)]
pub(crate) struct Decisions {
    about: Option<About>,
    attempts: Vec<Box<RawValue>>,
    bytes: usize,
    left_out: usize,
}

/// What an endpoint is looked for for.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Purpose {
    /// The request's first attempt.
    First,
    /// Another one in its place.
    Retry,
    /// One beside it whose first token is slow to come.
    Hedge,
    /// One beside it, as its rule says.
    FanOut,
    /// The rest of a stream that was cut.
    Rescue,
}

/// One choice.
pub(crate) struct Made<'a> {
    pub(crate) purpose: Purpose,
    pub(crate) unfit: &'a Unfit,
    pub(crate) tried: &'a [Tried],
    pub(crate) found: Result<&'a Choice, Nowhere>,
    /// See [`About::changes`].
    pub(crate) changes: &'a [String],
}

#[derive(Serialize)]
struct Attempt {
    purpose: Purpose,
    #[serde(flatten)]
    look: Look,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    #[serde(flatten)]
    about: &'a About,
    attempts: &'a [Box<RawValue>],
    /// Choices that were made and fit no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts_left_out: Option<usize>,
}

impl Decisions {
    /// For one request in so many.
    pub(crate) fn sampled(process: &Process) -> Option<Box<Self>> {
        let share = process.settings.decision_log_share;
        (share > 0.0 && rand::rng().random::<f64>() < share).then(Box::default)
    }

    /// A choice was made, and nothing follows from it yet.
    pub(crate) fn note(&mut self, job: &Job<'_>, rule: &Rule, made: &Made<'_>) {
        let wish = job.wish(penstock_shell::clock::now(), made.unfit);
        if self.about.is_none() {
            self.about = Some(about(rule, wish, made.changes));
        }
        let looked = Looked {
            rule,
            wish,
            misfits: &misfits(job, rule),
            tried: made.tried,
            found: made.found,
            most_endpoints: (MAX_ENDPOINTS / rule.candidates().count().max(1)).max(1),
        };
        self.push(&Attempt {
            purpose: made.purpose,
            look: looked.look(),
        });
    }

    fn push(&mut self, attempt: &Attempt) {
        match serde_json::value::to_raw_value(attempt) {
            Ok(text) if self.bytes + text.get().len() <= MAX_BYTES => {
                self.bytes += text.get().len();
                self.attempts.push(text);
            }
            _ => self.left_out += 1,
        }
    }

    /// The line; `None` if nothing was to be chosen.
    fn line(&self) -> Option<String> {
        let line = Line {
            about: self.about.as_ref()?,
            attempts: &self.attempts,
            attempts_left_out: Some(self.left_out).filter(|count| *count > 0),
        };
        serde_json::to_string(&line).ok()
    }

    /// Writes the line.
    pub(crate) fn tell(&self, id: &HeaderValue) {
        if let Some(decision) = self.line() {
            // One text: a log's field holds no structure.
            let id = id.to_str().unwrap_or("");
            tracing::info!(target: "decision", { request.id = id, decision }, "decision");
        }
    }
}

/// Which of the rule's protocols cannot carry the request, and why.
fn misfits(job: &Job<'_>, rule: &Rule) -> Vec<(Protocol, Misfit)> {
    let candidates = rule.candidates();
    let protocols: BTreeSet<Protocol> = candidates
        .map(|candidate| candidate.backend.protocol)
        .collect();
    let misfits = protocols
        .into_iter()
        .filter_map(|protocol| Some((protocol, job.route(protocol, rule.rest).err()?)));
    misfits.collect()
}

#[cfg(test)]
mod tests {
    use penstock_core::config::{NameMatch, Strategy};
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::choose::choose;
    use crate::snapshot::tests::{build, config, endpoints, rule, rule_of};
    use crate::source::Credentials;
    use crate::wish::Wish;

    #[test]
    fn a_line_is_bounded_however_large_pools_are_and_however_often_it_is_tried() {
        let names: Vec<String> = (10..26)
            .map(|at| format!("{}{at}", "n".repeat(250)))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let backends: Vec<_> = names.iter().map(|name| (*name, 1, 0)).collect();
        let ports: Vec<u16> = (1..=200).collect();
        let services: Vec<_> = names.iter().map(|name| (*name, &ports[..])).collect();
        let mut wide = rule("r", &[NameMatch::Exact("m".to_owned())], &backends);
        wide.strategy = Strategy::KvAware;
        let config = config(&names, vec![wide]);
        let snapshot = build(config, &endpoints(&services), &Credentials::default(), None);
        let rule = rule_of(&snapshot, "m").unwrap();
        let (unfit, mut tried) = (Unfit::default(), Vec::new());
        let wish = Wish {
            now_ms: 0,
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
        let mut decisions = Decisions {
            about: Some(about(&rule, wish, &[])),
            ..Decisions::default()
        };
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..10 {
            let choice = choose(&rule, &tried, wish, &mut rng).ok().unwrap();
            let looked = Looked {
                rule: &rule,
                wish,
                misfits: &[],
                tried: &tried,
                found: Ok(&choice),
                most_endpoints: MAX_ENDPOINTS / 16,
            };
            decisions.push(&Attempt {
                purpose: Purpose::Retry,
                look: looked.look(),
            });
            tried.push(choice.failed("status_5xx", false));
        }
        let line = decisions.line().unwrap();
        assert!(line.len() < MAX_BYTES + 1_000, "{}", line.len());
        let told: serde_json::Value = serde_json::from_str(&line).unwrap();
        let attempts = told["attempts"].as_array().unwrap();
        let left_out = told["attemptsLeftOut"].as_u64().unwrap();
        assert!(!attempts.is_empty() && left_out > 0);
        assert_eq!(attempts.len() + usize::try_from(left_out).unwrap(), 10);
        for (number, attempt) in attempts.iter().enumerate() {
            let candidates = attempt["candidates"].as_array().unwrap();
            let all: Vec<_> = candidates
                .iter()
                .flat_map(|candidate| candidate["endpoints"].as_array().unwrap())
                .collect();
            let more = |candidate: &serde_json::Value| candidate["moreEndpoints"].as_u64().unwrap();
            let more: u64 = candidates.iter().map(more).sum();
            assert_eq!(all.len() + usize::try_from(more).unwrap(), 16 * 200);
            let is_chosen = |one: &&&serde_json::Value| {
                one["address"] == attempt["chosen"]["address"] && one["tried"].is_null()
            };
            assert!(all.iter().any(|one| is_chosen(&one)), "{attempt}");
            let tried = all.iter().filter(|one| one["tried"] == "status_5xx");
            assert_eq!(tried.count(), number);
        }
    }
}
