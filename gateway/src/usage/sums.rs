//! Sums of one day. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Rows of one day. What is beyond is summed up without its model, and then without its user and key.
const MAX_ROWS: usize = 20_000;

/// Whose, and of what.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// The team; empty: no key was shown.
    pub team: String,
    /// The user, if the key says so.
    pub user: String,
    /// The VirtualKey.
    pub key: String,
    /// The model, as callers call it.
    pub model: String,
    /// The LLMBackend that answered.
    pub backend: String,
}

impl Row {
    /// All that tells it from others, in order.
    pub fn feed(&self, mut part: impl FnMut(&str)) {
        for text in [
            &self.team,
            &self.user,
            &self.key,
            &self.model,
            &self.backend,
        ] {
            part(text);
            part("\0");
        }
    }
}

/// What was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sums {
    /// Requests that were answered, or begun to be.
    pub requests: u64,
    /// Attempts whose tokens their backends did not count: what came was counted, and the prompt estimated. Those that
    /// gave no answer are none of `requests`.
    pub estimated: u64,
    /// Tokens of prompts.
    pub input_tokens: u64,
    /// Those of them that a cache of the backend held.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub output_tokens: u64,
    /// What it cost, in pico-USD, at backends that had a price then.
    pub pico_usd: u64,
}

impl Sums {
    /// Both together.
    pub fn add(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.estimated = self.estimated.saturating_add(other.estimated);
        self.input_tokens = self.input_tokens.saturating_add(other.input_tokens);
        self.cached_tokens = self.cached_tokens.saturating_add(other.cached_tokens);
        self.output_tokens = self.output_tokens.saturating_add(other.output_tokens);
        self.pico_usd = self.pico_usd.saturating_add(other.pico_usd);
    }
}

/// One day.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(Row, Sums)>", into = "Vec<(Row, Sums)>")]
pub struct Day(BTreeMap<Row, Sums>);

impl From<Vec<(Row, Sums)>> for Day {
    fn from(rows: Vec<(Row, Sums)>) -> Self {
        let mut day = Self::default();
        for (row, sums) in rows {
            day.add(row, sums);
        }
        day
    }
}

impl From<Day> for Vec<(Row, Sums)> {
    fn from(day: Day) -> Self {
        day.0.into_iter().collect()
    }
}

impl Day {
    /// Adds to a row.
    pub fn add(&mut self, mut row: Row, sums: Sums) {
        if self.is_full_for(&row) {
            row.model.clear();
        }
        if self.is_full_for(&row) {
            row.user.clear();
            row.key.clear();
        }
        self.0.entry(row).or_default().add(sums);
    }

    fn is_full_for(&self, row: &Row) -> bool {
        self.0.len() >= MAX_ROWS && !self.0.contains_key(row)
    }

    /// Adds all rows of another one.
    pub fn extend(&mut self, other: &Self) {
        for (row, sums) in &other.0 {
            self.add(row.clone(), *sums);
        }
    }

    /// In order.
    pub fn into_rows(self) -> impl Iterator<Item = (Row, Sums)> {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(model: &str, key: &str) -> Row {
        Row {
            team: "search".to_owned(),
            key: key.to_owned(),
            model: model.to_owned(),
            ..Row::default()
        }
    }

    const ONE: Sums = Sums {
        requests: 1,
        estimated: 0,
        input_tokens: 10,
        cached_tokens: 4,
        output_tokens: 3,
        pico_usd: 7,
    };

    #[test]
    fn rows_are_summed_up_and_survive_being_stored() {
        let mut day = Day::default();
        day.add(row("chat", "a"), ONE);
        day.add(row("chat", "a"), ONE);
        let mut other = Day::default();
        other.add(row("chat", "b"), ONE);
        day.extend(&other);
        let stored = serde_json::to_vec(&day).unwrap();
        let rows: Vec<_> = serde_json::from_slice::<Day>(&stored)
            .unwrap()
            .into_rows()
            .collect();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].1.requests, rows[0].1.pico_usd), (2, 14));
        assert_eq!(rows[1], (row("chat", "b"), ONE));
    }

    #[test]
    fn a_day_has_so_many_rows_and_loses_no_token() {
        let mut day = Day::default();
        let most = u64::try_from(MAX_ROWS).unwrap();
        for number in 0..MAX_ROWS + 500 {
            day.add(row(&format!("model-{number}"), "a"), ONE);
        }
        let rows: Vec<_> = day.into_rows().collect();
        assert_eq!(rows.len(), MAX_ROWS + 1);
        let all: u64 = rows.iter().map(|(_, sums)| sums.requests).sum();
        assert_eq!(all, most + 500);
    }
}
