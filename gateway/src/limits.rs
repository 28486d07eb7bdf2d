//! `Limits`: what an endpoint said of its limits, by the model that is asked of it. A provider has limits for each of
//! its models, and who is over that of one may have room for another. Pure: headers and times come in. Bounded in
//! models.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::HeaderMap;

use crate::cooldown::Cooldown;
use crate::quota::{self, Mark, Quota};

/// Models that are remembered of one endpoint: more than a rule has for one, and a scan that costs nothing. Callers may
/// name as many as they like where a rule takes them all.
const MAX_MODELS: usize = 32;

/// How long others come first after an endpoint said that it does not have a model: it may be about to load it.
const ABSENT_MS: u64 = 10_000;

/// What one endpoint said, by model.
#[derive(Debug, Default)]
pub struct Limits {
    /// Whether it ever said anything, so that others cost nothing.
    known: AtomicBool,
    models: Mutex<Vec<Model>>,
}

/// What it said of one model.
#[derive(Debug)]
struct Model {
    name: Box<str>,
    heard_ms: u64,
    absent_until_ms: u64,
    /// Whether it asked last because it was not available, and not for a limit.
    is_outage: bool,
    cooldown: Cooldown,
    quota: Quota,
}

/// Why a model is closed, or should come later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It said so because of a limit.
    #[default]
    Limit,
    /// It is not there.
    Absence,
    /// It said that it is not available.
    Outage,
}

/// How a model stands at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// For how many ms nothing may be sent there.
    pub closed_ms: u64,
    /// Whether others should come first.
    pub is_aside: bool,
    /// Why either.
    pub cause: Cause,
    /// Whether little is left, whatever the request takes.
    pub is_scarce: bool,
    /// Which part of such requests it can still take, 0 to 1.
    pub share: f32,
}

impl Limit {
    /// Nothing is known that speaks against it.
    pub const NONE: Self = Self {
        closed_ms: 0,
        is_aside: false,
        cause: Cause::Limit,
        is_scarce: false,
        share: 1.0,
    };

    /// What speaks against either.
    fn or(self, other: Self) -> Self {
        Self {
            closed_ms: self.closed_ms.max(other.closed_ms),
            is_aside: self.is_aside || other.is_aside,
            cause: self.cause.max(other.cause),
            is_scarce: self.is_scarce || other.is_scarce,
            share: self.share.min(other.share),
        }
    }
}

impl Limits {
    /// How `model` stands for a request of `tokens`.
    pub fn of(&self, model: &str, now_ms: u64, tokens: u32) -> Limit {
        self.read(|models| {
            let known = models.iter().find(|known| *known.name == *model);
            known.map_or(Limit::NONE, |known| known.limit(now_ms, tokens))
        })
    }

    /// What speaks against any model, but for those that it does not have: callers may name what they like.
    pub fn of_any(&self, now_ms: u64) -> Limit {
        self.read(|models| {
            let limits = models.iter().map(|model| Limit {
                is_aside: model.cooldown.is_aside(now_ms),
                cause: model.asked(),
                ..model.limit(now_ms, 0)
            });
            limits.fold(Limit::NONE, Limit::or)
        })
    }

    /// A request of `tokens` is sent. What is sent before anything is known of a model is not counted.
    pub fn send(&self, model: &str, now_ms: u64, tokens: u32) -> Mark {
        let mut mark = Mark::at(now_ms);
        if self.known.load(Ordering::Relaxed) {
            let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = models.iter_mut().find(|known| *known.name == *model) {
                mark = known.quota.send(tokens, now_ms);
            }
        }
        mark
    }

    /// Takes in what an answer of `model` says to a request that was sent at `mark`.
    pub fn hear(
        &self,
        model: &str,
        headers: &HeaderMap,
        mark: Mark,
        now_ms: u64,
        since_epoch: Duration,
    ) {
        let found = quota::read(headers, mark, now_ms, since_epoch);
        if found.iter().any(Option::is_some) {
            self.change(model, now_ms, |model| model.quota.hear(found));
        }
    }

    /// It asked to be left alone because of a limit, for a time or without saying for how long.
    pub fn ask(&self, model: &str, wait: Option<Duration>, now_ms: u64) {
        self.change(model, now_ms, |model| {
            model.is_outage = false;
            model.cooldown.ask(wait, now_ms);
        });
    }

    /// The same because it is not available.
    pub fn fails(&self, model: &str, wait: Option<Duration>, now_ms: u64) {
        self.change(model, now_ms, |model| {
            model.is_outage = true;
            model.cooldown.ask(wait, now_ms);
        });
    }

    /// It does not have the model.
    pub fn lacks(&self, model: &str, now_ms: u64) {
        let until_ms = now_ms.saturating_add(ABSENT_MS);
        self.change(model, now_ms, |model| model.absent_until_ms = until_ms);
    }

    fn read(&self, of: impl FnOnce(&[Model]) -> Limit) -> Limit {
        if !self.known.load(Ordering::Relaxed) {
            return Limit::NONE;
        }
        of(&self.models.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, name: &str, now_ms: u64, change: impl FnOnce(&mut Model)) {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let known = models.iter().position(|model| *model.name == *name);
        let known = known.unwrap_or_else(|| {
            forget(&mut models, now_ms);
            models.push(Model::new(name));
            models.len() - 1
        });
        if let Some(model) = models.get_mut(known) {
            model.heard_ms = now_ms;
            change(model);
        }
        self.known.store(true, Ordering::Relaxed);
    }
}

/// Makes room for one more model: first goes one that nothing speaks against, then what was heard of longest ago.
fn forget(models: &mut Vec<Model>, now_ms: u64) {
    if models.len() < MAX_MODELS {
        return;
    }
    let places = models.iter().enumerate();
    let least = places.min_by_key(|(_, model)| {
        let is_in_force = model.limit(now_ms, 0) != Limit::NONE;
        (is_in_force, model.heard_ms)
    });
    if let Some((place, _)) = least {
        models.swap_remove(place);
    }
}

impl Model {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            heard_ms: 0,
            absent_until_ms: 0,
            is_outage: false,
            cooldown: Cooldown::default(),
            quota: Quota::default(),
        }
    }

    /// Why it asked last to be left alone.
    fn asked(&self) -> Cause {
        if self.is_outage {
            Cause::Outage
        } else {
            Cause::Limit
        }
    }

    fn limit(&self, now_ms: u64, tokens: u32) -> Limit {
        let is_absent = self.absent_until_ms > now_ms;
        let closed_ms = self.cooldown.closed_ms(now_ms);
        let is_aside = self.cooldown.is_aside(now_ms);
        Limit {
            closed_ms,
            is_aside: is_aside || is_absent,
            cause: if is_absent {
                Cause::Absence
            } else {
                self.asked()
            },
            is_scarce: self.quota.share(now_ms, 0) < 1.0,
            share: self.quota.share(now_ms, tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_model_does_not_speak_for_another() {
        let limits = Limits::default();
        assert_eq!(limits.of("a", 0, 9), Limit::NONE);
        limits.ask("a", Some(Duration::from_secs(3)), 0);
        limits.lacks("b", 0);
        assert_eq!(limits.of("a", 1_000, 9).closed_ms, 2_000);
        assert!(limits.of("b", 1_000, 9).is_aside && !limits.of("a", 1_000, 9).is_aside);
        assert_eq!(limits.of("c", 1_000, 9), Limit::NONE);
        let any = limits.of_any(1_000);
        assert!(any.closed_ms == 2_000 && !any.is_aside, "b is nowhere");
        assert_eq!(limits.of_any(20_000), Limit::NONE);
    }

    #[test]
    fn models_are_bounded_and_what_is_in_force_stays() {
        let limits = Limits::default();
        limits.ask("closed", Some(Duration::from_mins(1)), 0);
        for number in 0..10_000_u64 {
            limits.ask(&format!("m{number}"), None, number);
        }
        assert_eq!(limits.models.lock().unwrap().len(), MAX_MODELS);
        assert!(limits.of("m9999", 10_000, 0).is_aside);
        assert_eq!(limits.of("m1", 10_000, 0), Limit::NONE, "forgotten");
        for number in 0..10_000_u64 {
            limits.ask(&format!("n{number}"), None, 12_000 + 2_000 * number);
        }
        assert_eq!(limits.models.lock().unwrap().len(), MAX_MODELS);
    }
}
