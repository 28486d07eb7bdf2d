//! What a request took, and what it cost.

use super::{OK, Record};
use crate::meter::Usage;
use crate::metrics::Metrics;
use crate::openai::Api;
use crate::snapshot::Candidate;
use crate::usage::Taken;
use crate::usage::sums::Sums;

impl Record {
    /// Tokens that backends counted for it, those of all attempts that gave a part of the answer.
    pub(super) fn taken(&self) -> Option<Usage> {
        match (self.earlier, self.usage) {
            (Some(earlier), Some(usage)) => Some(earlier.and(usage)),
            (earlier, usage) => usage.or(earlier),
        }
    }

    /// What the answer cost, in pico-USD, if its backend has a price and said how many tokens there were.
    pub(super) fn cost(&self) -> Option<u128> {
        cost(self.candidate()?, self.taken()?)
    }

    /// What there is to say of what it takes of `candidate`, which answers it.
    pub(crate) fn taken_from<'a>(&'a self, candidate: &'a Candidate) -> Taken<'a> {
        Taken {
            id: self.id.to_str().unwrap_or(""),
            who: self.who.principal(),
            model: &self.model,
            api: self.api,
            rule: self.rule.as_ref().map_or("", |rule| rule.label.as_str()),
            candidate,
            status: 200,
            outcome: OK,
            sums: Sums::default(),
        }
    }

    /// Adds what the request took to the sums of the day.
    pub(super) fn sum_up(&self, candidate: &Candidate) {
        let is_answered = self.status < 400 && self.status > 0 || self.first_token.is_some();
        if !is_answered {
            return;
        }
        let counted = self.taken();
        let prompt_tokens = match self.api {
            // It is counted, and not read.
            Some(Api::CountTokens) => 0,
            _ => self.prompt_tokens,
        };
        let usage = counted.unwrap_or(Usage {
            prompt_tokens: prompt_tokens.into(),
            completion_tokens: self.tokens,
            ..Usage::default()
        });
        let took = Sums {
            estimated: u64::from(counted.is_none()),
            ..sums(candidate, usage)
        };
        if let Some(rule) = &self.rule {
            rule.lengths.note(took.output_tokens);
        }
        candidate
            .backend
            .ledger
            .count(took.input_tokens, took.output_tokens);
        self.worker.process.usage.note(&Taken {
            status: self.status,
            outcome: self.outcome,
            sums: took,
            ..self.taken_from(candidate)
        });
    }
}

/// What an answer takes that `candidate` gave.
pub(crate) fn sums(candidate: &Candidate, usage: Usage) -> Sums {
    Sums {
        requests: 1,
        estimated: 0,
        input_tokens: usage.prompt_tokens,
        cached_tokens: usage.cached_tokens,
        output_tokens: usage.completion_tokens,
        pico_usd: cost(candidate, usage).map_or(0, |pico| u64::try_from(pico).unwrap_or(u64::MAX)),
    }
}

fn cost(candidate: &Candidate, usage: Usage) -> Option<u128> {
    let price = candidate.backend.profile.price?;
    Some(price.of(
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
    ))
}

/// Counts what a backend says that an answer took.
pub(crate) fn count_usage(metrics: &Metrics, candidate: &Candidate, api: Api, usage: Usage) {
    let call = candidate.metrics.call(api);
    call.input_tokens.observe(approximate(usage.prompt_tokens));
    call.output_tokens
        .observe(approximate(usage.completion_tokens));
    if let Some(pico_usd) = cost(candidate, usage) {
        metrics.cost(&candidate.metrics, pico_usd);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "token counts stay far below 2^52"
)]
fn approximate(tokens: u64) -> f64 {
    tokens as f64
}
