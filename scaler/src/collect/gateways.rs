//! (IO) Follows `GET /load` of every gateway replica: one JSON line a second, and at once when demand begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use penstock_core::load::LoadReport;
use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Event;
use super::http::{self, FetchError, HttpClient};
use crate::metrics::Metrics;
use crate::world::{Gateway, World};

/// Longest line: 300 backends with a full list of ages and wide histograms, 16 KiB each, and room to spare.
const MAX_LINE_BYTES: usize = 8 * 1024 * 1024;
/// A stream that is silent this long is dead: five lines were lost.
const SILENCE: Duration = Duration::from_secs(5);
/// Pauses between attempts grow from the first to the last, halved at random so that replicas do not march in step.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("open the stream")]
    Open(#[source] FetchError),
    #[error("no line for {} s", SILENCE.as_secs())]
    Silent,
    #[error("the stream broke")]
    Broke(#[source] hyper::Error),
    #[error("the stream ended")]
    Ended,
    #[error("a line is longer than {MAX_LINE_BYTES} bytes")]
    LineTooLong,
    #[error("a line is not a load report")]
    NotAReport(#[source] serde_json::Error),
}

impl FollowError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Open(err) => err.reason(),
            Self::Silent => "silent",
            Self::Broke(_) | Self::Ended => "ended",
            Self::LineTooLong => "tooLong",
            Self::NotAReport(_) => "parse",
        }
    }
}

/// Follows the gateways of the world, at most `max`, until `shutdown`.
pub async fn follow(
    client: HttpClient,
    mut world: watch::Receiver<Arc<World>>,
    max: usize,
    events: mpsc::Sender<Event>,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let mut followed: BTreeMap<Gateway, CancellationToken> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut too_many = false;
    loop {
        let now = Arc::clone(&world.borrow_and_update());
        followed.retain(|gateway, stop| {
            let stays = now.gateways.contains(gateway);
            if !stays {
                stop.cancel();
            }
            stays
        });
        if now.gateways.len() > max && !too_many {
            tracing::warn!(
                gateways = now.gateways.len(),
                max,
                "more gateways than may be followed: what the others serve is not scaled in (--max-gateways)"
            );
        }
        too_many = now.gateways.len() > max;
        for gateway in &now.gateways {
            if followed.contains_key(gateway) {
                continue;
            }
            if followed.len() >= max {
                break;
            }
            let stop = shutdown.child_token();
            followed.insert(gateway.clone(), stop.clone());
            tasks.spawn(follow_one(
                client.clone(),
                gateway.clone(),
                events.clone(),
                metrics.clone(),
                stop,
            ));
        }
        while tasks.try_join_next().is_some() {}
        tokio::select! {
            changed = world.changed() => if changed.is_err() {
                shutdown.cancelled().await;
                break;
            },
            () = shutdown.cancelled() => break,
        }
    }
    tasks.join_all().await;
}

async fn follow_one(
    client: HttpClient,
    gateway: Gateway,
    events: mpsc::Sender<Event>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut lines = 0_u64;
        let ended = tokio::select! {
            ended = read(&client, &gateway, &events, &metrics, &mut lines) => ended,
            () = stop.cancelled() => return,
        };
        metrics.load_failed(ended.reason());
        tracing::debug!(gateway = %gateway.id, lines, err = &ended as &dyn std::error::Error, "gateway's load stream ended");
        if lines > 0 {
            pause = FIRST_PAUSE;
        }
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            () = stop.cancelled() => return,
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Reads lines until the stream fails.
async fn read(
    client: &HttpClient,
    gateway: &Gateway,
    events: &mpsc::Sender<Event>,
    metrics: &Metrics,
    lines: &mut u64,
) -> FollowError {
    let uri = http::url(gateway.admin, "/load");
    let mut body = match tokio::time::timeout(SILENCE, http::open(client, &uri)).await {
        Ok(Ok(body)) => body,
        Ok(Err(err)) => return FollowError::Open(err),
        Err(_) => return FollowError::Silent,
    };
    let mut splitter = Lines::default();
    loop {
        let frame = match tokio::time::timeout(SILENCE, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(err))) => return FollowError::Broke(err),
            Ok(None) => return FollowError::Ended,
            Err(_) => return FollowError::Silent,
        };
        let Some(data) = frame.data_ref() else {
            continue;
        };
        let Some(complete) = splitter.push(data, MAX_LINE_BYTES) else {
            return FollowError::LineTooLong;
        };
        for line in complete {
            let report: LoadReport = match serde_json::from_slice(&line) {
                Ok(report) => report,
                Err(err) => return FollowError::NotAReport(err),
            };
            *lines += 1;
            metrics.load_line();
            let event = Event::Load {
                gateway: gateway.id.clone(),
                report: Box::new(report),
            };
            if events.send(event).await.is_err() {
                return FollowError::Ended;
            }
        }
    }
}

/// Cuts a byte stream into lines.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The lines that `data` completes, without empty ones; none if one is longer than `max`.
    fn push(&mut self, data: &[u8], max: usize) -> Option<Vec<Vec<u8>>> {
        let mut complete = Vec::new();
        let mut data = data;
        while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
            if self.rest.len() + end > max {
                return None;
            }
            self.rest.extend_from_slice(&data[..end]);
            let line = std::mem::take(&mut self.rest);
            if !line.is_empty() {
                complete.push(line);
            }
            data = &data[end + 1..];
        }
        if self.rest.len() + data.len() > max {
            return None;
        }
        self.rest.extend_from_slice(data);
        Some(complete)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn line_longer_than_the_limit_ends_the_stream() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"1234", 4), Some(vec![]));
        assert_eq!(lines.push(b"\n5", 4), Some(vec![b"1234".to_vec()]));
        assert_eq!(lines.push(b"6789", 4), None);
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_stream_is_cut(text in "[a-c\n]{0,60}", cuts in prop::collection::vec(1_usize..9, 0..20)) {
            let mut whole = Lines::default();
            let expected = whole.push(text.as_bytes(), 100).unwrap();
            let mut cut = Lines::default();
            let (mut got, mut rest) = (Vec::new(), text.as_bytes());
            for size in cuts {
                let (head, tail) = rest.split_at(size.min(rest.len()));
                got.extend(cut.push(head, 100).unwrap());
                rest = tail;
            }
            got.extend(cut.push(rest, 100).unwrap());
            prop_assert_eq!(got, expected);
        }
    }
}
