//! Budgets: which limits a request has, what it may take of each, and what it took in the end. How much is left is the
//! ledger's to know.
//!
//! A request reserves in each of its limits before an attempt goes upstream, and settles when that ends: [`bound`] says
//! how much it may take, [`reservation`] what becomes of it, [`account`] asks the store, [`books`] has the accounts.

pub(crate) mod account;
pub(crate) mod books;
pub(crate) mod bound;
pub(crate) mod call;
pub(crate) mod metrics;
pub(crate) mod reservation;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use penstock_core::config::{self, Enforcement, NameMatch, Per, Price, Unit};
use penstock_core::ids::{BackendId, Id};
use xxhash_rust::xxh3::xxh3_128;

use crate::ledger::record::Terms;
use crate::ledger::span::Span;
use crate::meter::Usage;
use crate::principal::Principal;
use crate::reject::Reject;
use crate::store::Key;

/// How long a record is kept after its window is over: longer than any gateway remembers it.
const KEPT: Duration = Duration::from_hours(1);
/// The longest month and an hour for each of its days.
const LONGEST_PERIOD: Duration = Duration::from_hours(31 * 25);

/// All budgets of a config.
#[derive(Debug, Default)]
pub(crate) struct Budgets(Vec<Arc<Budget>>);

/// One of them.
#[derive(Debug)]
pub(crate) struct Budget {
    /// The TokenBudget's name.
    pub(crate) name: String,
    selects: config::Selects,
    per: Per,
    pub(crate) limits: Vec<Arc<Limit>>,
    pub(crate) enforcement: Enforcement,
    pub(crate) max_output_tokens: u32,
    unpriced_micro_usd: Option<u64>,
    pub(crate) cache_hit_percent: u32,
    /// It lets nothing through.
    pub(crate) is_broken: bool,
}

/// One limit of one of them.
#[derive(Debug)]
pub(crate) struct Limit {
    /// The TokenBudget.
    pub(crate) budget: Id,
    /// Its name there.
    pub(crate) name: String,
    pub(crate) unit: Unit,
    pub(crate) terms: Terms,
    /// Whether it must never be exceeded.
    pub(crate) is_hard: bool,
    /// How long its records are kept.
    pub(crate) kept: Duration,
    /// What its records are found by, with those whose limit it is.
    hash: u128,
}

impl Limit {
    fn new(budget: &Id, is_hard: bool, limit: &config::Limit) -> Self {
        // Amounts of another unit are not compared with what was spent in this one.
        let name = format!("{budget}/{}/{}", limit.name, limit.unit.name());
        let span = Span::of(limit.window.as_ref());
        let kept = match &span {
            Span::Held => KEPT,
            Span::Sliding { ms } => KEPT + Duration::from_millis(*ms).saturating_mul(2),
            Span::Calendar { .. } => KEPT + LONGEST_PERIOD,
        };
        Self {
            budget: budget.clone(),
            name: limit.name.clone(),
            unit: limit.unit,
            terms: Terms {
                cap: limit.max,
                span,
            },
            is_hard,
            kept,
            hash: xxh3_128(name.as_bytes()),
        }
    }

    /// Where the store has the record of those whose limit it is.
    pub(crate) fn key(&self, of: &str) -> Key {
        Key::vital(
            format!("budget:{:032x}{:032x}", self.hash, xxh3_128(of.as_bytes())),
            "record",
        )
    }

    /// What accounts are told apart by.
    fn account(&self, of: &str) -> (u128, u128) {
        (self.hash, xxh3_128(of.as_bytes()))
    }
}

/// A budget that a request counts in, and whose it is there: one of those who have limits of their own; empty where all
/// share them.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    pub(crate) budget: Arc<Budget>,
    pub(crate) of: String,
}

impl Budgets {
    /// Those of a config, always in the same order: so no two gateways wait for what the other one has.
    pub(crate) fn new(budgets: &BTreeMap<Id, config::Budget>) -> Self {
        let budgets = budgets.iter().map(|(id, spec)| {
            let is_hard = spec.enforcement == Enforcement::Hard;
            let limits = spec.limits.iter();
            let limits = limits.map(|limit| Arc::new(Limit::new(id, is_hard, limit)));
            Arc::new(Budget {
                name: id.name.clone(),
                selects: spec.selects.clone(),
                per: spec.per,
                limits: limits.collect(),
                enforcement: spec.enforcement,
                max_output_tokens: spec.max_output_tokens,
                unpriced_micro_usd: spec.unpriced_micro_usd,
                cache_hit_percent: spec.cache_hit_percent,
                is_broken: spec.is_broken,
            })
        });
        Self(budgets.collect())
    }

    /// Those that a request counts in, whichever backend answers it. `model` is `None` where it is no call of one.
    pub(crate) fn of(&self, principal: Option<&Principal>, model: Option<&str>) -> Vec<Share> {
        let selected = self
            .0
            .iter()
            .filter(|budget| budget.selects_request(principal, model));
        let shares = selected.map(|budget| Share {
            budget: Arc::clone(budget),
            of: budget.owner(principal),
        });
        shares.collect()
    }

    /// All limits.
    pub(crate) fn limits(&self) -> impl Iterator<Item = &Arc<Limit>> {
        self.0.iter().flat_map(|budget| &budget.limits)
    }
}

impl Budget {
    fn selects_request(&self, principal: Option<&Principal>, model: Option<&str>) -> bool {
        let selects = &self.selects;
        let is_among = |names: &[NameMatch], name: Option<&str>| {
            names.is_empty() || name.is_some_and(|name| names.iter().any(|own| own.matches(name)))
        };
        is_among(&selects.teams, principal.map(|of| of.team.as_str()))
            && is_among(&selects.users, principal.and_then(|of| of.user.as_deref()))
            && is_among(&selects.models, model)
            && (selects.keys.is_empty()
                || principal.is_some_and(|of| selects.keys.contains(&of.id)))
    }

    /// Whether what this backend answers counts.
    pub(crate) fn selects_backend(&self, backend: &BackendId) -> bool {
        self.selects.backends.is_empty() || self.selects.backends.contains(backend)
    }

    /// Whose limit it is for a caller. Those whom the gateway does not know are one.
    fn owner(&self, principal: Option<&Principal>) -> String {
        match (self.per, principal) {
            (Per::Budget, _) => String::new(),
            // No team is called that.
            (_, None) => "(anonymous)".to_owned(),
            (Per::Team, Some(of)) => of.team.clone(),
            (Per::User, Some(of)) => {
                // No slash of a team is the one before the user.
                let team = of.team.replace('%', "%25").replace('/', "%2F");
                format!("{team}/{}", of.user.as_deref().unwrap_or(""))
            }
            (Per::Key, Some(of)) => of.name(),
        }
    }

    /// A hard budget with a mistake lets nothing through: what it was to bound is not known.
    pub(crate) fn may_be_used(&self) -> Result<(), Reject> {
        if self.is_broken {
            let budget = self.name.clone();
            return Err(Reject::BudgetBroken { budget });
        }
        Ok(())
    }

    /// Whether room is reserved for the longest answer.
    pub(crate) fn bounds_answers(&self) -> bool {
        self.enforcement == Enforcement::Hard
            && self.limits.iter().any(|limit| limit.unit.is_of_tokens())
    }

    /// What a request counts in one of its limits that takes so much at a backend with this price; `None` where that
    /// is not known.
    pub(crate) fn amount(&self, unit: Unit, took: Took, price: Option<Price>) -> Option<u64> {
        let money = || match price {
            Some(price) => {
                let pico = price.of(took.input, took.cached, took.output);
                u64::try_from(pico.div_ceil(1_000_000)).ok()
            }
            None => self.unpriced_micro_usd,
        };
        match unit {
            Unit::Requests | Unit::Concurrency => Some(1),
            Unit::Tokens => Some(took.input.saturating_add(took.output)),
            Unit::InputTokens => Some(took.input),
            Unit::OutputTokens => Some(took.output),
            Unit::MicroUsd => money(),
        }
    }
}

/// What a request takes, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Took {
    pub(crate) input: u64,
    /// What of that costs less.
    pub(crate) cached: u64,
    pub(crate) output: u64,
}

impl Took {
    /// What a backend counted.
    fn of(usage: Usage) -> Self {
        Self {
            input: usage.prompt_tokens,
            cached: usage.cached_tokens,
            output: usage.completion_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use penstock_core::config::{Selects, Window};

    use super::*;

    fn budget(change: impl FnOnce(&mut config::Budget)) -> Budgets {
        let mut spec = config::Budget {
            selects: Selects::default(),
            per: Per::Budget,
            limits: vec![config::Limit {
                name: "hour".to_owned(),
                unit: Unit::Tokens,
                max: 1_000,
                window: Some(Window::SlidingMs(3_600_000)),
            }],
            enforcement: Enforcement::Hard,
            max_output_tokens: 100,
            unpriced_micro_usd: None,
            cache_hit_percent: 0,
            is_broken: false,
        };
        change(&mut spec);
        Budgets::new(&BTreeMap::from([(Id::new("ns", "b"), spec)]))
    }

    fn alice() -> Principal {
        Principal::named(Id::new("ns", "alice-laptop"), "search", Some("alice"))
    }

    #[test]
    fn requests_count_where_everything_holds_that_is_said() {
        let (alice, exact) = (alice(), |name: &str| {
            vec![NameMatch::Exact(name.to_owned())]
        });
        let counts =
            |budgets: &Budgets, who: Option<&Principal>, model| !budgets.of(who, model).is_empty();
        let all = budget(|_| {});
        assert!(counts(&all, None, None) && counts(&all, Some(&alice), Some("chat")));
        let team = budget(|spec| spec.selects.teams = exact("search"));
        assert!(counts(&team, Some(&alice), None) && !counts(&team, None, None));
        let other = budget(|spec| {
            spec.selects.teams = exact("search");
            spec.selects.users = exact("bob");
        });
        assert!(!counts(&other, Some(&alice), None));
        let model = budget(|spec| spec.selects.models = vec![NameMatch::Prefix("gpt-".to_owned())]);
        assert!(counts(&model, None, Some("gpt-5")));
        assert!(!counts(&model, None, Some("chat")) && !counts(&model, None, None));
        let key =
            budget(|spec| spec.selects.keys = BTreeSet::from([Id::new("ns", "alice-laptop")]));
        assert!(counts(&key, Some(&alice), None) && !counts(&key, None, None));
    }

    #[test]
    fn limits_are_of_those_who_have_them_alone() {
        let of = |per, who: Option<&Principal>| {
            let budgets = budget(|spec| spec.per = per);
            budgets.of(who, None).remove(0).of
        };
        let alice = alice();
        assert_eq!(of(Per::Budget, Some(&alice)), "");
        assert_eq!(of(Per::Team, Some(&alice)), "search");
        assert_eq!(of(Per::User, Some(&alice)), "search/alice");
        let slashed = Principal::named(Id::new("ns", "k"), "search/eu", Some("alice"));
        assert_eq!(of(Per::User, Some(&slashed)), "search%2Feu/alice");
        assert_eq!(of(Per::Key, Some(&alice)), "ns/alice-laptop");
        assert_eq!(of(Per::Team, None), "(anonymous)");
    }

    #[test]
    fn records_are_told_apart_by_unit_and_owner_and_not_by_the_rest() {
        let key = |change: &dyn Fn(&mut config::Budget), of: &str| {
            let budgets = budget(change);
            let limit = budgets.limits().next().map(Arc::clone);
            limit.unwrap().key(of)
        };
        let plain = key(&|_| {}, "a");
        assert_eq!(key(&|spec| spec.limits[0].max = 7, "a"), plain);
        assert_ne!(key(&|_| {}, "b"), plain);
        assert_ne!(
            key(&|spec| spec.limits[0].unit = Unit::Requests, "a"),
            plain
        );
    }

    #[test]
    fn what_a_request_takes_is_counted_in_the_unit_of_the_limit() {
        let budgets = budget(|_| {});
        let took = Took {
            input: 1_000,
            cached: 400,
            output: 100,
        };
        let price = Price {
            input: 2_500_000,
            cached_input: 1_250_000,
            output: 10_000_000,
        };
        for (unit, amount) in [
            (Unit::Requests, 1),
            (Unit::Concurrency, 1),
            (Unit::Tokens, 1_100),
            (Unit::InputTokens, 1_000),
            (Unit::OutputTokens, 100),
            (Unit::MicroUsd, 3_000),
        ] {
            assert_eq!(
                budgets.0[0].amount(unit, took, Some(price)),
                Some(amount),
                "{unit:?}"
            );
        }
        assert_eq!(budgets.0[0].amount(Unit::MicroUsd, took, None), None);
        let flat = budget(|spec| spec.unpriced_micro_usd = Some(7));
        assert_eq!(flat.0[0].amount(Unit::MicroUsd, took, None), Some(7));
        // A part of a micro-USD counts as one.
        let tiny = Took {
            input: 1,
            ..Took::default()
        };
        assert_eq!(
            budgets.0[0].amount(Unit::MicroUsd, tiny, Some(price)),
            Some(3)
        );
    }
}
