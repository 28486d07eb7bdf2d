//! (IO) One call of a job: its head, whether there is room for it, and what to make of its answer.

use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use super::room::{self, Place};
use crate::behalf::Behalf;
use crate::classifier;
use crate::conditions::Asked;
use crate::openai::Call;
use crate::outbound::{self, REQUEST_ID};
use crate::own_call;
use crate::process::Worker;
use crate::reject::Reject;

/// Calls of a job that failed in a way that may pass.
pub(super) const MAX_ATTEMPTS: u32 = 4;
/// Before the second attempt; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Those headers of a caller that its job keeps: no credentials. Also what conditions of rules look at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Headers(Vec<(String, String)>);

impl Headers {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let kept = outbound::kept(headers);
        Self(
            kept.filter_map(|(name, value)| {
                Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
            })
            .collect(),
        )
    }
}

/// The head of a job's call.
pub(super) fn head(path: &str, headers: &Headers, id: &str) -> Parts {
    let mut head = own_call::head(path);
    for (name, value) in &headers.0 {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            head.headers.append(name, value);
        }
    }
    if let Ok(id) = HeaderValue::try_from(id) {
        head.headers.insert(REQUEST_ID, id);
    }
    head
}

/// A place at the rule that takes the call now; `None` while there is no room.
pub(super) async fn place(
    worker: &Arc<Worker>,
    head: &Parts,
    call: &Call<'_>,
    behalf: &Behalf,
) -> Result<Option<Place>, Reject> {
    let process = &worker.process;
    let who = behalf.who(process).await?;
    let asked = Asked {
        method: &http::Method::POST,
        path: head.uri.path(),
        headers: &head.headers,
        region: process.region_of(own_call::NOBODY, &head.headers),
        principal: who.principal(),
        call,
        tasks: &[],
    };
    let rule = classifier::rule(worker, &asked).await?;
    Ok(room::take(process, &rule))
}

/// What an answer means for the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the answer.
    Done,
    /// The backend failed: another attempt, a few times.
    Again,
    /// Nothing could take the call: later, as long as the job lives.
    Later,
    /// It would be refused again.
    Refused,
}

/// Reasons of the gateway that say nothing about the call.
const LATER: [&str; 7] = [
    "no_endpoint",
    "overloaded",
    "not_configured",
    "credential_missing",
    "upstream_busy",
    "upstream_unreachable",
    "saturated",
];

pub(super) fn verdict(status: u16, reason: Option<&str>) -> Verdict {
    match status {
        200..300 => Verdict::Done,
        // Its backends break off when they read it: once was too often.
        _ if reason == Some("ends_backends") => Verdict::Refused,
        _ if reason.is_some_and(|reason| LATER.contains(&reason)) => Verdict::Later,
        429 | 503 => Verdict::Later,
        408 | 500.. => Verdict::Again,
        _ => Verdict::Refused,
    }
}

/// How long to wait after an attempt that failed, from 1.
pub(super) fn pause(attempt: u32) -> Duration {
    let factor = 1_u32.checked_shl(attempt.saturating_sub(1));
    FIRST_PAUSE
        .saturating_mul(factor.unwrap_or(u32::MAX))
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_mean_done_again_later_or_never() {
        for (status, reason, expected) in [
            (200, None, Verdict::Done),
            (503, Some("no_endpoint"), Verdict::Later),
            (502, Some("upstream_unreachable"), Verdict::Later),
            (429, None, Verdict::Later),
            (502, Some("upstream_broken"), Verdict::Again),
            (504, Some("upstream_timeout"), Verdict::Again),
            (503, Some("ends_backends"), Verdict::Refused),
            (400, None, Verdict::Refused),
            (404, Some("model_not_found"), Verdict::Refused),
        ] {
            assert_eq!(verdict(status, reason), expected, "{status} {reason:?}");
        }
    }

    #[test]
    fn pauses_double_up_to_a_limit() {
        assert_eq!(pause(1), Duration::from_secs(1));
        assert_eq!(pause(3), Duration::from_secs(4));
        assert_eq!(pause(60), LONGEST_PAUSE);
    }

    #[test]
    fn a_job_keeps_no_credential() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "secret"),
            ("content-length", "7"),
            ("x-team", "red"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let kept = Headers::of(&headers);
        assert_eq!(kept.0, [("x-team".to_owned(), "red".to_owned())]);
    }
}
