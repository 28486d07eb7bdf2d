//! (IO) Asks engines how busy they are, every second: those that rules with `KvAware` or `Adaptive` name, and those for
//! which jobs wait, at `/metrics` of the address that their requests go to. Bounded in time, bytes and pages at one
//! time; what is late or unreadable is no reading, and what was known ages (see `engine_load`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::StreamExt as _;
use http::{StatusCode, Uri};
use penstock_core::engine_page::{self, MAX_PAGE_BYTES, Sample};
use tokio::time::MissedTickBehavior;

use crate::process::Process;
use crate::snapshot::Endpoint;
use crate::upstream::{self, Tasks};

/// How often: as the scaler does.
const EVERY: Duration = Duration::from_secs(1);
/// A page that takes longer would say how it was, not how it is.
const LIMIT: Duration = Duration::from_millis(900);
/// Pages that are read at one time.
const AT_ONCE: usize = 32;

/// Runs until it is dropped.
pub(crate) async fn run(process: Arc<Process>) {
    let tasks = Tasks::default();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now_ms = process.ms(penstock_shell::clock::now());
        let engines: BTreeMap<u32, Arc<Endpoint>> = match process.snapshot.load().as_deref() {
            Some(snapshot) => snapshot
                .engines_to_read(now_ms)
                .map(|engine| (engine.live.id, Arc::clone(engine)))
                .collect(),
            None => BTreeMap::new(),
        };
        let pages = futures::stream::iter(engines.into_values());
        pages
            .for_each_concurrent(AT_ONCE, |engine| read(&process, &tasks, engine))
            .await;
    }
}

async fn read(process: &Process, tasks: &Tasks, engine: Arc<Endpoint>) {
    if let Ok(Some(sample)) = tokio::time::timeout(LIMIT, page(tasks, &engine)).await {
        let now_ms = process.ms(penstock_shell::clock::now());
        engine.live.engine.hear(&sample, now_ms);
    }
}

/// Reads a page; `None` if there is none, or one that says nothing of an engine.
async fn page(tasks: &Tasks, engine: &Arc<Endpoint>) -> Option<Sample> {
    let page = Uri::from_static("/metrics");
    let (head, mut exchange) = upstream::get(engine, page, tasks, LIMIT).await?;
    if head.status() != StatusCode::OK {
        return None;
    }
    let mut text = BytesMut::new();
    while let Some(bytes) = exchange.frame().await.ok()? {
        text.extend_from_slice(&bytes);
        if text.len() > MAX_PAGE_BYTES {
            return None;
        }
    }
    engine_page::parse(std::str::from_utf8(&text).ok()?).ok()
}
