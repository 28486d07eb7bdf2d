//! (IO) Asks Prometheus servers for the targets that name one. Only servers that the operator of the scaler allowed are
//! ever contacted; redirects are not followed and answers are bounded.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use prometheus_http_query::Client;
use prometheus_http_query::response::{Data, PromqlResult};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::Event;
use crate::fleet::{Answers, Ask};
use crate::metrics::Metrics;

/// How often each target's queries are asked. Prometheus scrapes more slowly than this, so faster brings nothing.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long one query may take.
const DEADLINE: Duration = Duration::from_secs(3);
/// Largest answer; one sample with long labels has a few hundred bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Most targets asked for at once.
const CONCURRENCY: usize = 16;

/// Why a query gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// No URL, or no answer.
    #[error("ask the server")]
    Ask(#[source] prometheus_http_query::Error),
    /// The answer broke off.
    #[error("read the answer")]
    Read(#[source] reqwest::Error),
    /// The client could not be made.
    #[error("make the HTTP client")]
    Client(#[source] reqwest::Error),
    /// Longer than allowed.
    #[error("the answer is longer than {MAX_ANSWER_BYTES} bytes")]
    TooLarge,
    /// Not what the HTTP API answers.
    #[error("the answer is not Prometheus's")]
    Format(#[source] serde_json::Error),
    /// The server refused the query.
    #[error("the server refused the query: {0}")]
    Refused(String),
    /// More than one sample.
    #[error("the query gives {0} samples; it must give one")]
    ManySamples(usize),
    /// A matrix, string or scalar.
    #[error("the query must give an instant vector or a scalar")]
    WrongType,
}

impl QueryError {
    /// For metric labels.
    fn reason(&self) -> &'static str {
        match self {
            Self::Ask(_) | Self::Client(_) => "connect",
            Self::Read(_) | Self::TooLarge => "body",
            Self::Format(_) => "parse",
            Self::Refused(_) => "refused",
            Self::ManySamples(_) | Self::WrongType => "shape",
        }
    }
}

/// Asks until `shutdown`; `asks` says what.
pub async fn ask(
    asks: watch::Receiver<Arc<Vec<Ask>>>,
    events: mpsc::Sender<Event>,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> Result<(), QueryError> {
    let http = reqwest::Client::builder()
        .timeout(DEADLINE)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
        .map_err(QueryError::Client)?;
    let mut round = tokio::time::interval(INTERVAL);
    round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut asks = asks;
    loop {
        tokio::select! {
            _ = round.tick() => {}
            // A new target does not wait for the round.
            changed = asks.changed() => if changed.is_err() { return Ok(()); },
            () = shutdown.cancelled() => return Ok(()),
        }
        let current = Arc::clone(&asks.borrow_and_update());
        let answered = futures::stream::iter(current.iter()).for_each_concurrent(CONCURRENCY, |ask| {
            let (http, events, metrics) = (&http, &events, &metrics);
            async move {
                match answers(http, ask).await {
                    Ok(answers) => {
                        // Only a fleet that has stopped refuses it.
                        let _stopped = events.send(Event::Answers { key: ask.key.clone(), answers }).await;
                    }
                    Err(err) => {
                        metrics.query_failed(err.reason());
                        tracing::warn!(scaled_object = %ask.key.object, server = %ask.server, err = &err as &dyn std::error::Error, "Prometheus query failed");
                    }
                }
            }
        });
        tokio::select! {
            () = answered => {}
            () = shutdown.cancelled() => return Ok(()),
        }
    }
}

async fn answers(http: &reqwest::Client, ask: &Ask) -> Result<Answers, QueryError> {
    let client = Client::from(http.clone(), &ask.server).map_err(QueryError::Ask)?;
    let queries = &ask.queries;
    Ok(Answers {
        kv_cache: number(&client, queries.kv_cache.as_deref()).await?,
        running: number(&client, queries.running.as_deref()).await?,
        waiting: number(&client, queries.waiting.as_deref()).await?,
        ttft_attainment: number(&client, queries.ttft_attainment.as_deref()).await?,
        ttft_p90_s: number(&client, queries.ttft_p90.as_deref()).await?,
    })
}

/// One query's number; none without a query, without a sample, or where the sample is not a number ≥ 0: `NaN` is what
/// `histogram_quantile` gives without traffic, and that is not zero.
async fn number(client: &Client, query: Option<&str>) -> Result<Option<f64>, QueryError> {
    let Some(query) = query else {
        return Ok(None);
    };
    let mut response = client
        .query(query)
        .post_raw()
        .await
        .map_err(QueryError::Ask)?;
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(QueryError::Read)? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(QueryError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    sample(&body)
}

/// The envelope of Prometheus's HTTP API.
#[derive(Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
enum Envelope {
    Success { data: PromqlResult },
    Error { error: String },
}

fn sample(body: &[u8]) -> Result<Option<f64>, QueryError> {
    let data = match serde_json::from_slice(body).map_err(QueryError::Format)? {
        Envelope::Success { data } => data.into_inner().0,
        Envelope::Error { error } => {
            return Err(QueryError::Refused(error.chars().take(256).collect()));
        }
    };
    let value = match data {
        Data::Vector(samples) => match samples.as_slice() {
            [] => return Ok(None),
            [one] => one.sample().value(),
            many => return Err(QueryError::ManySamples(many.len())),
        },
        Data::Scalar(sample) => sample.value(),
        Data::Matrix(_) => return Err(QueryError::WrongType),
    };
    Ok((value.is_finite() && value >= 0.0).then_some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(samples: &str) -> Result<Option<f64>, String> {
        let body = format!(
            r#"{{"status":"success","data":{{"resultType":"vector","result":[{samples}]}}}}"#
        );
        sample(body.as_bytes()).map_err(|err| err.to_string())
    }

    #[test]
    fn one_sample_is_the_number() {
        assert_eq!(
            vector(r#"{"metric":{"a":"b"},"value":[1700000000.1,"1.5"]}"#),
            Ok(Some(1.5))
        );
        let scalar =
            br#"{"status":"success","data":{"resultType":"scalar","result":[1700000000,"2"]}}"#;
        assert_eq!(sample(scalar).unwrap(), Some(2.0));
    }

    #[test]
    fn nothing_and_nan_are_absent_not_zero() {
        assert_eq!(vector(""), Ok(None));
        for text in ["NaN", "+Inf", "-1"] {
            assert_eq!(
                vector(&format!(r#"{{"metric":{{}},"value":[1,"{text}"]}}"#)),
                Ok(None),
                "{text}"
            );
        }
    }

    #[test]
    fn several_samples_and_refusals_are_errors() {
        let one = r#"{"metric":{},"value":[1,"1"]}"#;
        assert!(
            vector(&format!("{one},{one}"))
                .unwrap_err()
                .contains("2 samples")
        );
        let refused = br#"{"status":"error","errorType":"bad_data","error":"parse error"}"#;
        assert!(
            sample(refused)
                .unwrap_err()
                .to_string()
                .contains("parse error")
        );
        assert!(matches!(sample(b"<html>"), Err(QueryError::Format(_))));
    }
}
