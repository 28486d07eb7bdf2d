//! What one request took, as a line of JSON and as a log record of OpenTelemetry. Pure.

use penstock_core::config::Price;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::sums::{Row, Sums};

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Line {
    /// Of the request: the same line may come twice, and is known by it.
    pub(crate) id: String,
    /// When it was over, in Unix ms.
    pub(crate) at_ms: u64,
    /// What was asked for, as in `gen_ai.operation.name`.
    pub(crate) operation: String,
    #[serde(flatten)]
    pub(crate) row: Row,
    pub(crate) rule: String,
    pub(crate) status: u16,
    pub(crate) outcome: String,
    #[serde(flatten)]
    pub(crate) sums: Sums,
    /// What its backend cost then, in micro-USD a million tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) price: Option<Price>,
}

impl Line {
    /// With the line feed behind it.
    pub(crate) fn write(&self, to: &mut Vec<u8>) {
        let begin = to.len();
        match serde_json::to_writer(&mut *to, self) {
            Ok(()) => to.push(b'\n'),
            // Texts and integers always have a JSON form.
            Err(_) => to.truncate(begin),
        }
    }
}

/// The bodies of `POST /v1/logs` (OTLP 1.x, JSON) for these lines of the gateway replica `replica`, with at most `most`
/// records each.
pub(crate) fn logs(lines: &[u8], replica: &str, most: usize) -> Vec<Value> {
    let lines = lines.split(|byte| *byte == b'\n');
    let records: Vec<Value> = lines
        .filter_map(|line| serde_json::from_slice(line).ok())
        .map(|line: Line| record(&line))
        .collect();
    let resource = json!({ "attributes": [
        text("service.name", "penstock-gateway"), text("service.instance.id", replica),
    ]});
    let body = |records: &[Value]| {
        json!({ "resourceLogs": [{
            "resource": resource,
            "scopeLogs": [{ "scope": { "name": "penstock.usage" }, "logRecords": records }],
        }]})
    };
    records.chunks(most).map(body).collect()
}

/// Names as in the semantic conventions for generative AI, where they have one.
fn record(line: &Line) -> Value {
    let time = (u128::from(line.at_ms) * 1_000_000).to_string();
    let (row, sums) = (&line.row, &line.sums);
    let mut attributes = vec![
        text("http.request.header.x-request-id", &line.id),
        text("gen_ai.operation.name", &line.operation),
        text("gen_ai.request.model", &row.model),
        number("gen_ai.usage.input_tokens", sums.input_tokens),
        number("gen_ai.usage.cache_read.input_tokens", sums.cached_tokens),
        number("gen_ai.usage.output_tokens", sums.output_tokens),
        number("http.response.status_code", line.status.into()),
        text("penstock.backend", &row.backend),
        text("penstock.rule", &line.rule),
        text("penstock.outcome", &line.outcome),
        number("penstock.cost.pico_usd", sums.pico_usd),
        json!({ "key": "penstock.estimated", "value": { "boolValue": sums.estimated > 0 } }),
    ];
    let owner = [
        ("penstock.team", &row.team),
        ("user.id", &row.user),
        ("penstock.key", &row.key),
    ];
    let owner = owner.iter().filter(|(_, value)| !value.is_empty());
    attributes.extend(owner.map(|(key, value)| text(key, value)));
    json!({
        "timeUnixNano": time, "observedTimeUnixNano": time, "severityNumber": 9, "severityText": "INFO",
        "eventName": "penstock.usage", "body": { "stringValue": "usage" }, "attributes": attributes,
    })
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

/// 64-bit integers are texts in the JSON form of protocol buffers.
fn number(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::usage) fn line(id: &str) -> Line {
        Line {
            id: id.to_owned(),
            at_ms: 1_795_000_000_123,
            operation: "chat".to_owned(),
            row: Row {
                team: "search".to_owned(),
                user: String::new(),
                key: "ns/alice".to_owned(),
                model: "chat".to_owned(),
                backend: "ns/small".to_owned(),
            },
            rule: "ns/default/chat".to_owned(),
            status: 200,
            outcome: "ok".to_owned(),
            sums: Sums {
                requests: 1,
                estimated: 0,
                input_tokens: 10,
                cached_tokens: 4,
                output_tokens: 7,
                pico_usd: 31_000_000,
            },
            price: Some(Price {
                input: 1_000_000,
                cached_input: 1_000_000,
                output: 3_000_000,
            }),
        }
    }

    #[test]
    fn a_line_is_one_line_and_read_as_it_was_written() {
        let mut text = Vec::new();
        let odd = Line {
            rule: "two\nlines".to_owned(),
            ..line("a")
        };
        odd.write(&mut text);
        assert_eq!(text.split(|byte| *byte == b'\n').count(), 2);
        let read: Line = serde_json::from_slice(&text).unwrap();
        assert_eq!(read, odd);
        insta::assert_snapshot!(String::from_utf8(text).unwrap());
    }

    #[test]
    fn records_come_in_bodies_of_bounded_size() {
        let mut text = Vec::new();
        for number in 0..5 {
            line(&number.to_string()).write(&mut text);
        }
        let bodies = logs(&text, "pod-1", 2);
        let count = |body: &Value| {
            let records = body.pointer("/resourceLogs/0/scopeLogs/0/logRecords");
            records.unwrap().as_array().unwrap().len()
        };
        assert_eq!(bodies.iter().map(count).collect::<Vec<_>>(), [2, 2, 1]);
        insta::assert_json_snapshot!(bodies[2]);
    }
}
