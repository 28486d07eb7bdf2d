//! (IO) Reads the `/metrics` page of each engine pod once a second, each pod at its own moment of the second.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Event;
use super::http::{self, HttpClient};
use crate::fleet::Scrape;
use crate::metrics::Metrics;
use penstock_core::engine_page::{self, MAX_PAGE_BYTES};

/// How often each pod is read.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long one read may take.
const DEADLINE: Duration = Duration::from_secs(1);

/// Reads pages until `shutdown`; `scrapes` says which. At most `concurrency` reads are under way.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub async fn scrape(
    client: HttpClient,
    scrapes: watch::Receiver<Arc<Vec<Scrape>>>,
    concurrency: usize,
    events: mpsc::Sender<Event>,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let order = RandomState::new();
    let mut round = tokio::time::interval(INTERVAL);
    round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = round.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let start = Instant::now();
        let pages = Arc::clone(&scrapes.borrow());
        let reads = futures::stream::iter(schedule(&pages, &order)).for_each_concurrent(
            concurrency,
            |(at, scrape)| {
                let (client, events, metrics) = (&client, &events, &metrics);
                async move {
                    tokio::time::sleep_until(start + at).await;
                    read(client, scrape, events, metrics).await;
                }
            },
        );
        tokio::select! {
            () = reads => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Spreads the pods over four fifths of the interval, always in the same place, so that the rest is left to finish in.
fn schedule<'a>(pages: &'a [Scrape], order: &RandomState) -> Vec<(Duration, &'a Scrape)> {
    let place = |scrape: &Scrape| {
        (INTERVAL * 4 / 5)
            .mul_f64(f64::from(u16::try_from(order.hash_one(scrape) % 1000).unwrap_or(0)) / 1000.0)
    };
    let mut scheduled: Vec<_> = pages.iter().map(|scrape| (place(scrape), scrape)).collect();
    scheduled.sort_by_key(|(at, _)| *at);
    scheduled
}

async fn read(
    client: &HttpClient,
    scrape: &Scrape,
    events: &mpsc::Sender<Event>,
    metrics: &Metrics,
) {
    let uri = http::url(scrape.address, "/metrics");
    let reason = match http::page(client, &uri, MAX_PAGE_BYTES, DEADLINE).await {
        Ok(page) => match engine_page::parse(&page) {
            Ok(sample) => {
                metrics.scraped();
                // Only a fleet that has stopped refuses it.
                let _stopped = events
                    .send(Event::Sample {
                        scrape: scrape.clone(),
                        sample,
                    })
                    .await;
                return;
            }
            Err(err) => {
                tracing::debug!(pod = %scrape.pod, address = %scrape.address, err = %err, "pod's metrics are of no use");
                "parse"
            }
        },
        Err(err) => {
            tracing::debug!(pod = %scrape.pod, address = %scrape.address, err = &err as &dyn std::error::Error, "pod not scraped");
            err.reason()
        }
    };
    metrics.scrape_failed(reason);
}
