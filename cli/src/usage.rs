//! (IO) `penstock usage`: what callers took, summed up by what the asker wants to know.

use std::collections::BTreeMap;
use std::io::Write as _;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use serde_json::Value;

use crate::admin;
use crate::table::aligned;

/// A quarter of a year's sums of some hundred callers stay below it.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Sums up what callers of a gateway took: requests, tokens and money. Days are those of UTC; the newest requests are
/// counted within seconds.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// What to sum up by, in this order.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "team,model,day"
    )]
    by: Vec<By>,
    /// The first day, such as 2026-11-01; default: the first of this month.
    #[arg(long, value_name = "DAY")]
    from: Option<Date>,
    /// The last day; default: today. At most 93 days.
    #[arg(long, value_name = "DAY")]
    to: Option<Date>,
    /// The gateway's admin address: of `penstock up`, or of a port-forward to a gateway's port 9090.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9090")]
    admin: String,
    /// Print all sums as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum By {
    Day,
    Team,
    User,
    Key,
    Model,
    Backend,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Team => "team",
            Self::User => "user",
            Self::Key => "key",
            Self::Model => "model",
            Self::Backend => "backend",
        }
    }
}

/// Asks, sums up and prints.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let today = Zoned::new(Timestamp::now(), TimeZone::UTC).date();
    let from = args.from.unwrap_or(today.first_of_month());
    let to = args.to.unwrap_or(today);
    let uri = admin::address(&args.admin, &format!("/usage?from={from}&to={to}"))?;
    let request = Request::get(uri).body(Full::new(Bytes::new()))?;
    let (status, answer) = admin::ask(&args.admin, request, MAX_ANSWER_BYTES).await?;
    if !status.is_success() {
        bail!("{}", String::from_utf8_lossy(&answer).trim());
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        out.write_all(&answer)?;
        return Ok(());
    }
    let value: Value = serde_json::from_slice(&answer).context("read the gateway's answer")?;
    for line in table(&value, &args.by) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Requests, those that are estimated, tokens of prompts, those of a cache, tokens of answers, pico-USD.
const SUMS: [&str; 6] = [
    "requests",
    "estimated",
    "inputTokens",
    "cachedTokens",
    "outputTokens",
    "picoUsd",
];

fn table(answer: &Value, by: &[By]) -> Vec<String> {
    let mut groups: BTreeMap<Vec<String>, [u64; 6]> = BTreeMap::new();
    for row in answer["data"].as_array().into_iter().flatten() {
        let text = |by: &By| match row[by.name()].as_str() {
            None | Some("") => "-".to_owned(),
            Some(text) => text.to_owned(),
        };
        let sums = groups.entry(by.iter().map(text).collect()).or_default();
        for (sum, name) in sums.iter_mut().zip(SUMS) {
            *sum = sum.saturating_add(row[name].as_u64().unwrap_or(0));
        }
    }
    let head = by.iter().map(|by| by.name().to_uppercase());
    let figures = ["REQUESTS", "ESTIMATED", "INPUT", "CACHED", "OUTPUT", "USD"];
    let head = head.chain(figures.map(str::to_owned));
    let mut rows = vec![head.collect::<Vec<_>>()];
    for (group, sums) in groups {
        let [counts @ .., pico] = sums;
        let counts = counts.iter().map(u64::to_string);
        let all = group.into_iter().chain(counts).chain([usd(pico)]);
        rows.push(all.collect());
    }
    aligned(&rows, None)
}

/// To a micro-USD, rounded up: what was taken is never nothing.
fn usd(pico: u64) -> String {
    let micro = pico.div_ceil(1_000_000);
    format!("{}.{:06}", micro / 1_000_000, micro % 1_000_000)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_summed_up_by_what_is_asked() {
        let row = |team: &str, model: &str, input: u64| {
            json!({
                "day": "2026-11-23", "team": team, "user": "", "key": "ns/a", "model": model, "backend": "ns/b",
                "requests": 1, "estimated": 0, "inputTokens": input, "cachedTokens": 2, "outputTokens": 3,
                "picoUsd": 1_500_000,
            })
        };
        let answer = json!({"data": [row("search", "chat", 10), row("search", "other", 20), row("", "chat", 5)]});
        assert_eq!(
            table(&answer, &[By::Team]),
            [
                "TEAM    REQUESTS  ESTIMATED  INPUT  CACHED  OUTPUT  USD",
                "-       1         0          5      2       3       0.000002",
                "search  2         0          30     4       6       0.000003",
            ]
        );
        assert_eq!(table(&answer, &[By::Team, By::Model]).len(), 4);
    }
}
