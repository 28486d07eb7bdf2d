//! The endpoint that is predicted to serve a stream best, by a small model for each endpoint that learns from every
//! stream. Pure: what a request found and how it went come in.
//!
//! Two linear models, of the logarithms of the time to the first token and of the time between tokens (see
//! `least_squares`). The first one begins as `PeakEwma`'s formula and learns where that is wrong: what a queue, running
//! sequences, a full KV cache and a known prefix really mean at this endpoint. It decides only while it is right more
//! often than `PeakEwma`, which otherwise decides (decision 0019).

use std::sync::{Mutex, MutexGuard, PoisonError};

use rand::Rng;

use super::least_squares::LeastSquares;
use super::peak_ewma::{REQUEST_TOKENS, STEP_TOKENS, Work};
use super::{latency, power_of_two};

/// Samples before a model decides: five for each of its weights.
const ENOUGH: u32 = 30;
/// Without a sample for so long a model is old: `PeakEwma`'s average has faded to a twentieth.
const FRESH_MS: u64 = 30_000;
/// What the last comparison counts in the mean errors: about the last 20 count.
const ERROR_SHARE: f32 = 0.05;
/// Without a target a stream's tokens come soon enough when they are at most this far apart, in ms: people read 250
/// words a minute, which are 5 or 6 tokens a second, and skim twice as fast.
const READING_MS: f32 = 100.0;
/// Times are at least this, in ms, so that they have logarithms.
const LEAST_MS: f32 = 0.01;
/// A prediction is at most this, in ms: a day.
const MOST_MS: f32 = 86_400_000.0;

/// What a request finds at an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// What is to be done there before its first token.
    pub work: Work,
    /// Tokens at the beginning of its prompt that the endpoint was sent before.
    pub cached_tokens: u32,
    /// Fill of the KV cache, 0 to 1; 0 where that is not known.
    pub kv_use: f32,
}

impl Situation {
    /// What the time to the first token is told by: the logarithm of `PeakEwma`'s work; which parts of it are the own
    /// prompt and running sequences; the fill; what is left of the work where the known prefix costs nothing.
    #[expect(clippy::cast_precision_loss, reason = "rough figures")]
    fn before(&self) -> [f64; 6] {
        let work = self.work.until_first_token();
        let part = |tokens: f32| tokens / STEP_TOKENS / work;
        let own = part(self.work.prompt_tokens as f32);
        let cached = self.cached_tokens.min(self.work.prompt_tokens);
        let left = 1.0 - part(cached as f32);
        let inputs = [
            1.0,
            work.ln(),
            own,
            part(REQUEST_TOKENS * self.work.in_flight as f32),
            self.kv_use,
            left.max(f32::EPSILON).ln(),
        ];
        inputs.map(f64::from)
    }

    /// What the time between tokens is told by: the batch and the fill.
    #[expect(clippy::cast_precision_loss, reason = "a rough figure")]
    fn between(&self) -> [f64; 3] {
        [1.0, (self.work.in_flight as f32).ln_1p(), self.kv_use].map(f64::from)
    }
}

/// What was predicted of a stream when its endpoint was chosen.
#[derive(Clone, Copy, Debug)]
pub struct Foreseen {
    /// What it found.
    pub situation: Situation,
    /// Time to the first token by the model, in ms; 0 where nothing is known.
    pub ttft_ms: f32,
    /// The same by `PeakEwma`.
    pub peak_ms: f32,
}

/// Mean errors of predictions: 0.7 is a factor of two.
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors {
    /// Of the model.
    pub model: f32,
    /// Of `PeakEwma`.
    pub peak: f32,
    compared: u16,
}

impl Errors {
    fn compare(&mut self, foreseen: &Foreseen, took_ms: f32) {
        if foreseen.ttft_ms <= 0.0 || foreseen.peak_ms <= 0.0 {
            return;
        }
        self.compared = self.compared.saturating_add(1);
        let share = (1.0 / f32::from(self.compared)).max(ERROR_SHARE);
        let error = |foreseen_ms: f32| (bounded(took_ms) / bounded(foreseen_ms)).ln().abs();
        self.model += (error(foreseen.ttft_ms) - self.model) * share;
        self.peak += (error(foreseen.peak_ms) - self.peak) * share;
    }
}

/// One endpoint's models. 552 bytes, however many samples there were.
#[derive(Debug)]
pub struct Adaptive(Mutex<Models>);

#[derive(Debug)]
struct Models {
    before: LeastSquares<6>,
    between: LeastSquares<3>,
    errors: Errors,
    /// When the last stream began.
    at_ms: u64,
}

/// How much a model's prediction counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It decides.
    Full,
    /// It would, but its last sample is long ago.
    Old,
    /// It has seen too little, or `PeakEwma` is right more often.
    None,
}

/// What an endpoint's models say.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    /// Time to the first token, in ms; 0 where nothing is known.
    pub ttft_ms: f32,
    /// Time between tokens, in ms; 0 where nothing is known.
    pub itl_ms: f32,
    /// How wrong it was lately.
    pub errors: Errors,
    /// How much it counts.
    pub trust: Trust,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self(Mutex::new(Models {
            before: LeastSquares::new([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
            between: LeastSquares::new([0.0; 3]),
            errors: Errors::default(),
            at_ms: 0,
        }))
    }
}

impl Adaptive {
    /// A stream began after `took_ms`, of which this was `foreseen`.
    pub fn begun(&self, foreseen: &Foreseen, took_ms: f32, now_ms: u64) {
        let mut models = self.models();
        models.errors.compare(foreseen, took_ms);
        let inputs = foreseen.situation.before();
        models.before.learn(&inputs, logarithm(took_ms));
        models.at_ms = models.at_ms.max(now_ms);
    }

    /// The stream's tokens came `itl_ms` apart.
    pub fn written(&self, foreseen: &Foreseen, itl_ms: f32) {
        let inputs = foreseen.situation.between();
        self.models().between.learn(&inputs, logarithm(itl_ms));
    }

    /// What is to be expected of a stream that finds this.
    pub fn predict(&self, situation: &Situation, now_ms: u64) -> Prediction {
        let (before, between) = (situation.before(), situation.between());
        let models = self.models();
        let itl_is_known = models.between.samples() >= ENOUGH;
        let errs = models.errors.model > models.errors.peak;
        let trust = match now_ms.saturating_sub(models.at_ms) > FRESH_MS {
            _ if errs || models.before.samples() < ENOUGH => Trust::None,
            true => Trust::Old,
            false => Trust::Full,
        };
        let ttft_ms = match models.before.samples() {
            0 => 0.0,
            _ => power(models.before.predict(&before)),
        };
        Prediction {
            ttft_ms,
            itl_ms: if itl_is_known {
                power(models.between.predict(&between))
            } else {
                0.0
            },
            errors: models.errors,
            trust,
        }
    }

    fn models(&self) -> MutexGuard<'_, Models> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn logarithm(ms: f32) -> f64 {
    f64::from(bounded(ms)).ln()
}

fn bounded(ms: f32) -> f32 {
    if ms.is_nan() {
        LEAST_MS
    } else {
        ms.clamp(LEAST_MS, MOST_MS)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "at most a day")]
fn power(logarithm: f64) -> f32 {
    logarithm.exp().min(f64::from(MOST_MS)) as f32
}

/// What is wanted of an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Tokens that are expected of the answer.
    pub answer_tokens: f32,
    /// The rule's target for the time to the first token, in ms.
    pub ttft_ms: Option<f32>,
    /// That for the time between tokens.
    pub tpot_ms: Option<f32>,
}

impl Aim {
    /// What is to be kept small. With targets it is how much of them is used up, of the one that is nearer to being
    /// missed: a request counts only if it meets both. Without, it is for how long a reader waits: for the first token,
    /// and for later ones that come slower than they are read.
    fn cost(self, ttft_ms: f32, itl_ms: f32) -> f32 {
        if self.ttft_ms.is_none() && self.tpot_ms.is_none() {
            return ttft_ms + self.answer_tokens * (itl_ms - READING_MS).max(0.0);
        }
        let used = |ms: f32, target: Option<f32>| target.map_or(0.0, |target| ms / target.max(1.0));
        used(ttft_ms, self.ttft_ms).max(used(itl_ms, self.tpot_ms))
    }
}

/// An endpoint, as this strategy sees it.
#[derive(Clone, Copy, Debug)]
pub struct Forecast {
    /// What its models say.
    pub model: Prediction,
    /// When `PeakEwma` expects the first token, in ms; 0 where nothing is known and nothing is under way.
    pub peak_ms: f32,
    /// That per share of the traffic.
    pub peak_cost_ms: f32,
    /// Whether requests are under way there.
    pub is_busy: bool,
    /// Its backend's weight.
    pub weight: f32,
}

impl Forecast {
    fn ttft_ms(&self) -> f32 {
        match self.model.trust {
            Trust::Full => self.model.ttft_ms,
            // One request sees whether it still holds; until then it does.
            Trust::Old if self.is_busy => self.model.ttft_ms.max(self.peak_ms),
            Trust::Old | Trust::None => self.peak_ms,
        }
    }
}

/// The one that costs least per weight, but for [`latency::PROBE_SHARE`] of the requests, which go anywhere by weight.
/// While no endpoint's model is trusted, the one that `PeakEwma` takes. `cumulative` holds the sums of the shares up to
/// and with each forecast.
pub fn pick(
    forecasts: &[Forecast],
    aim: Aim,
    cumulative: &[f32],
    rng: &mut impl Rng,
) -> Option<usize> {
    let trusted = || {
        forecasts
            .iter()
            .filter(|one| one.model.trust == Trust::Full)
    };
    if trusted().next().is_none() {
        let cost = |index: usize| {
            let forecast = forecasts.get(index);
            forecast.map_or(f32::INFINITY, |forecast| forecast.peak_cost_ms)
        };
        return power_of_two::pick(cumulative, rng, |_| true, cost);
    }
    // Who writes how fast is unknown of some: neither for nor against them.
    let (sum, count) = trusted()
        .filter(|one| one.model.itl_ms > 0.0)
        .fold((0.0, 0.0_f32), |(sum, count), one| {
            (sum + one.model.itl_ms, count + 1.0)
        });
    let usual_ms = sum / count.max(1.0);
    let costs: Vec<f32> = forecasts
        .iter()
        .map(|one| {
            let is_known = one.model.trust == Trust::Full && one.model.itl_ms > 0.0;
            let itl_ms = if is_known { one.model.itl_ms } else { usual_ms };
            aim.cost(one.ttft_ms(), itl_ms) / one.weight
        })
        .collect();
    latency::pick(&costs, cumulative, rng)
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "small figures"
)]
mod tests;
