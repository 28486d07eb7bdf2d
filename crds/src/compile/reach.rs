//! Which rules no request can reach, because earlier ones take all that they would.

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::config::{Condition, NameMatch, Rule};
use penstock_core::ids::Id;
use penstock_core::names::{CALL_PATHS, OPEN_CALL_PATHS};

use super::rule::Entry;
use crate::object::{Kind, ObjectRef};
use crate::problem::{Problem, Reason};

/// Patterns that find something in every text.
const ANY_TEXT: [&str; 2] = ["", ".*"];
/// Parts that are looked at: of more, a rule may be found to be reached that is not.
const MAX_CASES: usize = 4_096;
/// More tokens than any prompt has.
const MANY: u32 = u32::MAX;

/// What an earlier rule takes of a name's requests.
struct Taken {
    policy: Id,
    rule: String,
    conditions: Vec<Condition>,
}

/// Leaves out names whose requests earlier rules take already, and says so.
pub(super) fn drop_unreachable(
    entries: Vec<Entry>,
    list: &str,
    problems: &mut Vec<Problem>,
) -> Vec<Rule> {
    let mut taken: BTreeMap<NameMatch, Vec<Taken>> = BTreeMap::new();
    let mut rules = Vec::new();
    for ((_, _, _, policy, index), mut rule, positions) in entries {
        let mut kept = Vec::new();
        for (model, position) in std::mem::take(&mut rule.models).into_iter().zip(positions) {
            let before = taken.entry(model.clone()).or_default();
            let conditions = with_paths(&rule.conditions, list == "models");
            if let Some(by) = takes_all(before, &conditions) {
                let message = format!(
                    "rule '{}' of RoutingPolicy {} takes these requests already: \
                     remove the name here or there",
                    by.rule, by.policy
                );
                problems.push(Problem {
                    object: ObjectRef::new(Kind::RoutingPolicy, policy.clone()),
                    path: format!("spec.rules[{index}].match.{list}[{position}]"),
                    reason: Reason::UnreachableRule,
                    message,
                });
            } else {
                before.push(Taken {
                    policy: policy.clone(),
                    rule: rule.name.clone(),
                    conditions: rule.conditions.clone(),
                });
                kept.push(model);
            }
        }
        if !kept.is_empty() {
            rules.push(Rule {
                models: kept,
                ..rule
            });
        }
    }
    rules
}

/// A rule's conditions, with what a rule about models implies: it takes calls of models only.
fn with_paths(conditions: &[Condition], is_of_models: bool) -> Vec<Condition> {
    let mut conditions = conditions.to_vec();
    let is_of_paths = |condition: &Condition| matches!(condition, Condition::Paths(_));
    if is_of_models && !conditions.iter().any(is_of_paths) {
        let exact = CALL_PATHS.map(|path| NameMatch::Exact(path.to_owned()));
        let open = OPEN_CALL_PATHS.map(|path| NameMatch::Prefix(path.to_owned()));
        conditions.push(Condition::Paths(exact.into_iter().chain(open).collect()));
    }
    conditions
}

/// The last of the earlier rules that together take every request for which `conditions` hold: streams and others,
/// prompts and contexts of different lengths, paths and methods may be taken by several of them.
fn takes_all<'a>(before: &'a [Taken], conditions: &[Condition]) -> Option<&'a Taken> {
    let mut last = None;
    for case in cases(before, conditions) {
        let with = [conditions, &case].concat();
        let by = before.iter().position(|taken| {
            let mut needed = taken.conditions.iter();
            needed.all(|needed| with.iter().any(|has| implies(has, needed)))
        });
        last = last.max(Some(by?));
    }
    before.get(last?)
}

/// All requests for which `conditions` hold, in parts of which each may be taken by another rule.
fn cases(before: &[Taken], conditions: &[Condition]) -> Vec<Vec<Condition>> {
    let streams = [true, false].map(Condition::Stream);
    let streams = streams.into_iter().filter(|stream| {
        let Condition::Stream(stream) = stream else {
            return true;
        };
        !conditions.contains(&Condition::Stream(!stream))
    });
    let mut contexts = Length::Context.parts(before, conditions);
    // How long the context of a call would be is not always known: then no rule about that takes it.
    let says = |condition| Length::Context.of(condition).is_some();
    if !conditions.iter().any(says) {
        contexts.clear();
    }
    let (mut paths, mut methods) = (Vec::new(), Vec::new());
    for condition in conditions {
        match condition {
            Condition::Paths(own) => {
                paths.extend(own.iter().map(|path| Condition::Paths(vec![path.clone()])));
            }
            Condition::Methods(own) => methods.extend(
                own.iter()
                    .map(|method| Condition::Methods(BTreeSet::from([method.clone()]))),
            ),
            _ => {}
        }
    }
    let prompts = Length::Prompt.parts(before, conditions);
    let mut cases = vec![Vec::new()];
    for parts in [streams.collect(), prompts, paths, methods, contexts] {
        if !parts.is_empty() && cases.len() * parts.len() <= MAX_CASES {
            let with = |case: &Vec<Condition>, part: &Condition| {
                [&case[..], std::slice::from_ref(part)].concat()
            };
            let longer = cases
                .iter()
                .flat_map(|case| parts.iter().map(move |part| with(case, part)));
            cases = longer.collect();
        }
    }
    cases
}

/// What rules tell apart by how many tokens there are.
#[derive(Clone, Copy)]
enum Length {
    Prompt,
    Context,
}

impl Length {
    /// The least and the most, if the condition is about that.
    fn of(self, condition: &Condition) -> Option<(u32, u32)> {
        match (self, condition) {
            (Self::Prompt, Condition::PromptTokens { min, max })
            | (Self::Context, Condition::ContextTokens { min, max }) => {
                Some((min.unwrap_or(0), max.unwrap_or(MANY)))
            }
            _ => None,
        }
    }

    fn condition(self, min: u32, max: u32) -> Condition {
        let (min, max) = (Some(min), Some(max));
        match self {
            Self::Prompt => Condition::PromptTokens { min, max },
            Self::Context => Condition::ContextTokens { min, max },
        }
    }

    /// The lengths for which `conditions` may hold, in parts that no earlier rule divides.
    fn parts(self, before: &[Taken], conditions: &[Condition]) -> Vec<Condition> {
        let ranges = |conditions: &[Condition]| -> Vec<(u32, u32)> {
            let ranges = conditions.iter().filter_map(|condition| self.of(condition));
            ranges.collect()
        };
        let own = ranges(conditions);
        let least = own.iter().map(|(min, _)| *min).max().unwrap_or(0);
        let most = own.iter().map(|(_, max)| *max).min().unwrap_or(MANY);
        let of_others = before.iter().flat_map(|taken| ranges(&taken.conditions));
        let mut begins: Vec<u32> = of_others
            .flat_map(|(min, max)| [min, max.saturating_add(1)])
            .filter(|begin| (least..=most).contains(begin))
            .chain([least])
            .collect();
        begins.sort_unstable();
        begins.dedup();
        let ends = begins.iter().skip(1).map(|begin| begin - 1);
        let ends: Vec<u32> = ends.chain([most]).collect();
        let parts = begins.into_iter().zip(ends);
        parts.map(|(min, max)| self.condition(min, max)).collect()
    }
}

/// Whether `needed` holds wherever `has` does.
fn implies(has: &Condition, needed: &Condition) -> bool {
    use Condition::{
        Attribute, ContextTokens, Header, Methods, Needs, Paths, PromptTokens, Region, Team, Text,
        User,
    };
    match (has, needed) {
        (Paths(has), Paths(needed)) => {
            let within = |path: &NameMatch| needed.iter().any(|needed| covers(needed, path));
            has.iter().all(within)
        }
        (Methods(has), Methods(needed)) => has.is_subset(needed),
        (Header(name, has), Header(other, needed)) => name == other && covers(needed, has),
        (
            PromptTokens { min, max },
            PromptTokens {
                min: least,
                max: most,
            },
        )
        | (
            ContextTokens { min, max },
            ContextTokens {
                min: least,
                max: most,
            },
        ) => min.unwrap_or(0) >= least.unwrap_or(0) && max.unwrap_or(MANY) <= most.unwrap_or(MANY),
        (Needs(has), Needs(needed)) => has.is_superset(needed),
        (Region(has), Region(needed)) | (Team(has), Team(needed)) | (User(has), User(needed)) => {
            covers(needed, has)
        }
        (Attribute(name, has), Attribute(other, needed)) => name == other && covers(needed, has),
        (Text(has), Text(needed)) => has == needed || ANY_TEXT.contains(&needed.as_str()),
        (has, needed) => has == needed,
    }
}

/// Whether `wide` matches every name that `narrow` does.
fn covers(wide: &NameMatch, narrow: &NameMatch) -> bool {
    match narrow {
        NameMatch::Exact(name) => wide.matches(name),
        NameMatch::Prefix(prefix) => {
            matches!(wide, NameMatch::Prefix(wide) if prefix.starts_with(wide.as_str()))
        }
    }
}
