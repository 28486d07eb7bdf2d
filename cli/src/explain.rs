//! (IO) `penstock explain`: where a request would go and why, asked of a running gateway without sending it.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request};
use http_body_util::Full;
use serde_json::Value;

use crate::admin;
use crate::table::aligned;

/// A thousand candidates stay below it.
const MAX_ANSWER_BYTES: usize = 8 << 20;

/// Asks a gateway where a request would go, and why. The request is not sent to any backend.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// File with the request's body; `-` for standard input. Requests to agents and tools may have none.
    #[arg(value_name = "FILE")]
    request: Option<PathBuf>,
    /// The path that the request would be sent to.
    #[arg(long, default_value = "/v1/chat/completions")]
    path: String,
    /// The method that it would have.
    #[arg(long, default_value_t = Method::POST)]
    method: Method,
    /// A header that the request would have, `name: value`; may be given several times.
    #[arg(long, value_name = "HEADER")]
    header: Vec<String>,
    /// The gateway's admin address: of `penstock up`, or of a port-forward to a gateway's port 9090.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9090")]
    admin: String,
    /// Print the gateway's answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Asks, and prints the answer.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let mut body = Vec::new();
    match &args.request {
        None => {}
        Some(file) if file.as_os_str() == "-" => {
            std::io::stdin().read_to_end(&mut body)?;
        }
        Some(file) => {
            body = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        }
    }
    ensure!(
        args.path.starts_with('/') && !args.path.contains(['?', '#', '&', ' ']),
        "--path '{}' is not a path such as /v1/chat/completions",
        args.path
    );
    let target = format!("/explain?path={}&method={}", args.path, args.method);
    let uri = admin::address(&args.admin, &target)?;
    let headers: anyhow::Result<Vec<_>> = args.header.iter().map(|text| header(text)).collect();
    let headers = HeaderMap::from_iter(headers?);
    let mut request = Request::post(uri).body(Full::new(Bytes::from(body)))?;
    *request.headers_mut() = headers;
    let (_, answer) = admin::ask(&args.admin, request, MAX_ANSWER_BYTES).await?;
    let value: Value = serde_json::from_slice(&answer).context("read the gateway's answer")?;
    if let Some(message) = value.pointer("/error/message").and_then(Value::as_str) {
        bail!("the gateway would refuse the request: {message}");
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
    } else {
        out.write_all(table(&value).as_bytes())?;
    }
    Ok(())
}

/// `name: value`.
fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let wrong = || format!("--header '{text}': write 'name: value'");
    let (name, value) = text.split_once(':').with_context(wrong)?;
    let name = HeaderName::try_from(name.trim()).with_context(wrong)?;
    let value = HeaderValue::try_from(value.trim()).with_context(wrong)?;
    Ok((name, value))
}

const HEADINGS: [&str; 10] = [
    "TIER",
    "BACKEND",
    "WEIGHT",
    "ENDPOINT",
    "STANDING",
    "IN FLIGHT",
    "WAITING",
    "AVERAGE",
    "COST",
    "STRATEGY",
];
/// Begins a cell that may run over the columns behind it.
const DROPPED: &str = "dropped: ";

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

/// The answer for people.
fn table(answer: &Value) -> String {
    let kind = if answer["stream"] == true {
        "a stream"
    } else {
        "a whole answer"
    };
    let chosen = &answer["chosen"];
    let chosen = if chosen.is_null() {
        let why = answer["nowhere"].as_str();
        let why = why.unwrap_or("it would be held until a replica is ready, or refused");
        format!("none: {why}")
    } else {
        format!(
            "{} {} ({})",
            text(&chosen["backend"]),
            text(&chosen["address"]),
            text(&chosen["pass"])
        )
    };
    let mut lines = vec![
        format!(
            "rule     {} (generation {}), {}",
            text(&answer["rule"]),
            answer["generation"],
            text(&answer["strategy"])
        ),
        format!(
            "request  {kind}, about {} prompt tokens",
            answer["promptTokens"]
        ),
        format!("chosen   {chosen}"),
    ];
    let changes = answer["changes"].as_array().into_iter().flatten();
    let changes: Vec<&str> = changes.map(text).collect();
    if !changes.is_empty() {
        lines.push(format!("set      {}", changes.join(", ")));
    }
    for limit in answer["budgets"].as_array().into_iter().flatten() {
        let of = match text(&limit["of"]) {
            "" => String::new(),
            of => format!(" of {of}"),
        };
        lines.push(format!(
            "budget   {}/{}{of}: {} left, {} spent",
            text(&limit["budget"]),
            text(&limit["limit"]),
            limit["remaining"],
            limit["spent"]
        ));
    }
    lines.push(String::new());
    let mut rows = vec![HEADINGS.map(str::to_owned).to_vec()];
    for candidate in answer["candidates"].as_array().into_iter().flatten() {
        rows.extend(rows_of(candidate));
    }
    lines.extend(aligned(&rows, Some(DROPPED)));
    lines.join("\n") + "\n"
}

fn rows_of(candidate: &Value) -> Vec<Vec<String>> {
    let start = [
        candidate["tier"].to_string(),
        text(&candidate["backend"]).to_owned(),
        candidate["weight"].to_string(),
    ];
    let row = |rest: &[String]| [&start, rest].concat();
    if let Some(why) = candidate["dropped"].as_str() {
        return vec![row(&["-".to_owned(), format!("{DROPPED}{why}")])];
    }
    let ms = |value: &Value| format!("{:.1} ms", value.as_f64().unwrap_or(0.0));
    let figures = |value: &Value| {
        let figures = value.as_object().into_iter().flatten();
        let figures: Vec<String> = figures
            .map(|(name, value)| format!("{name} {:.1}", value.as_f64().unwrap_or(0.0)))
            .collect();
        figures.join(", ")
    };
    let endpoints = candidate["endpoints"].as_array().into_iter().flatten();
    endpoints
        .map(|endpoint| {
            row(&[
                text(&endpoint["address"]).to_owned(),
                text(&endpoint["standing"]).to_owned(),
                endpoint["inFlight"].to_string(),
                endpoint["waitingTokens"].to_string(),
                ms(&endpoint["averageMs"]),
                ms(&endpoint["cost"]),
                figures(&endpoint["figures"]),
            ])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_says_why_a_request_goes_nowhere() {
        let answer = json!({"chosen": null, "nowhere": "nothing is left", "candidates": []});
        assert!(table(&answer).contains("\nchosen   none: nothing is left\n"));
    }

    #[test]
    fn the_table_says_what_speaks_against_a_candidate() {
        let answer = json!({"rule": "ns/p/chat", "generation": 3, "strategy": "PeakEwma", "stream": true, "promptTokens": 12, "changes": ["max_tokens", "top_p"],
            "chosen": {"backend": "ns/a", "address": "10.0.0.1:8000", "pass": "fresh"},
            "candidates": [
                {"backend": "ns/a", "tier": 0, "weight": 1, "endpoints": [
                    {"address": "10.0.0.1:8000", "standing": "good", "inFlight": 2, "waitingTokens": 30, "averageMs": 41.25, "cost": 90.5,
                     "figures": {"priceMicroUsd": 350, "ttftMs": 81.25}},
                    {"address": "10.0.0.2:8000", "standing": "failing", "inFlight": 0, "waitingTokens": 0, "averageMs": 0.0, "cost": 0.0}]},
                {"backend": "ns/long-name", "tier": 1, "weight": 10, "dropped": "its protocol cannot carry 'seed'", "endpoints": []}]});
        assert_eq!(
            table(&answer),
            "rule     ns/p/chat (generation 3), PeakEwma\n\
             request  a stream, about 12 prompt tokens\n\
             chosen   ns/a 10.0.0.1:8000 (fresh)\n\
             set      max_tokens, top_p\n\n\
             TIER  BACKEND       WEIGHT  ENDPOINT       STANDING  IN FLIGHT  WAITING  AVERAGE  COST     STRATEGY\n\
             0     ns/a          1       10.0.0.1:8000  good      2          30       41.2 ms  90.5 ms  priceMicroUsd 350.0, ttftMs 81.2\n\
             0     ns/a          1       10.0.0.2:8000  failing   0          0        0.0 ms   0.0 ms\n\
             1     ns/long-name  10      -              dropped: its protocol cannot carry 'seed'\n"
        );
    }
}
