//! The core scenarios with one worker and with four.

use tokio::sync::mpsc::UnboundedSender;

use crate::harness::*;
use crate::report::{listen, report_where};

/// More than workers, so that each has some.
const CALLERS: usize = 8;

async fn start(workers: usize, plan: &Plan) -> Gateway {
    let mut settings = settings();
    settings.workers = workers;
    Gateway::start_with(plan, settings).await
}

/// An upstream that gives each request to a driver, and the drivers.
async fn driven_upstream() -> (Vec<UnboundedSender<Step>>, Upstream) {
    let (drivers, replies) = (0..CALLERS).map(|_| driven()).unzip();
    (drivers, Upstream::replies(replies).await)
}

/// Streams that have begun, each with its driver.
async fn streams(
    gateway: &Gateway,
    drivers: Vec<UnboundedSender<Step>>,
) -> Vec<(Client, UnboundedSender<Step>)> {
    let mut streams = Vec::new();
    for steps in drivers {
        streams.push((gateway.begun(&steps).await, steps));
    }
    streams
}

async fn each_goes_on(streams: &mut [(Client, UnboundedSender<Step>)], text: &str) {
    for (client, steps) in streams.iter_mut() {
        steps.send(Step::Chunk(word(text))).unwrap();
        client.expect(&word(text)).await;
    }
}

#[tokio::test]
async fn every_worker_repeats_elsewhere_what_failed() {
    for workers in [1, 4] {
        let busy = Upstream::always(|| Reply::Json(429, shaped_error("busy"))).await;
        let closing = Upstream::always(|| Reply::Raw(sse_head())).await;
        let good = Upstream::always(hello).await;
        let addresses = [busy.address, closing.address, good.address];
        let plan = Plan::chain(&addresses);
        let gateway = start(workers, &plan).await;
        // Connections stay open, so that each worker has some.
        let mut clients = Vec::new();
        for _ in 0..CALLERS {
            let mut client = gateway.client().await;
            client.post("", &chat(true)).await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.status, answer.header("x-penstock-backend")),
                (200, "ns/c")
            );
            clients.push(client);
        }
        assert_eq!(good.count(), CALLERS);
        // After a 429 others come first for a second.
        assert!((1..CALLERS).contains(&busy.count()), "{}", busy.count());
        // It is left out after its fifth failure.
        assert_eq!(closing.count(), 5);
    }
}

#[tokio::test]
async fn every_worker_carries_streams_across_a_reload_and_a_drain() {
    for workers in [1, 4] {
        let (drivers, old) = driven_upstream().await;
        let new = Upstream::always(hello).await;
        let mut gateway = start(workers, &Plan::chain(&[old.address])).await;
        let mut streams = streams(&gateway, drivers).await;
        let idle = {
            let mut idle = Vec::new();
            for _ in 0..CALLERS {
                idle.push(gateway.client().await);
            }
            idle
        };
        for number in 0..10 {
            each_goes_on(&mut streams, &number.to_string()).await;
        }
        gateway
            .apply(&Plan::new().backend("b", &[new.address], 1, 0))
            .await;
        for mut client in idle {
            client.post("", &chat(true)).await;
            assert_eq!(client.answer().await.header("x-penstock-backend"), "ns/b");
        }
        each_goes_on(&mut streams, "reloaded").await;
        gateway.shutdown.cancel();
        each_goes_on(&mut streams, "draining").await;
        for (client, steps) in &mut streams {
            finish(client, steps).await;
            assert!(client.closed().await);
        }
        gateway.ended().await.unwrap();
        assert_eq!(
            (old.count(), old.gone(), new.count()),
            (CALLERS, 0, CALLERS)
        );
    }
}

#[tokio::test]
async fn every_worker_closes_upstream_what_a_caller_left() {
    for workers in [1, 4] {
        let (drivers, upstream) = driven_upstream().await;
        let gateway = start(workers, &Plan::chain(&[upstream.address])).await;
        let streams = streams(&gateway, drivers).await;
        let mut lines = listen(&gateway).await;
        let all = u64::try_from(CALLERS).unwrap();
        report_where(&mut lines, "all in flight", |load| load.in_flight == all).await;
        // The drivers stay: it is not the upstream that ends.
        let (clients, _drivers): (Vec<_>, Vec<_>) = streams.into_iter().unzip();
        drop(clients);
        until("upstream is closed", || upstream.gone() == CALLERS).await;
        let report = report_where(&mut lines, "the end", |load| load.in_flight == 0).await;
        let load = &report.backends[&id("a")];
        assert_eq!(
            (load.arrivals, load.waiting, load.ttft.count()),
            (all, 0, all)
        );
    }
}

#[tokio::test]
async fn many_callers_are_answered_and_counted_exactly() {
    for workers in [1, 4] {
        let upstream = Upstream::always(hello).await;
        let mut settings = settings();
        settings.workers = workers;
        let plan = Plan::new().backend("a", &[upstream.address, nobody()], 1, 0);
        let gateway = Gateway::start_with(&plan, settings).await;
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..12 {
            let address = gateway.address;
            clients.spawn(async move {
                let mut client = Client::connect(address).await;
                for _ in 0..10 {
                    client.post("", &chat(true)).await;
                    let answer = client.answer().await;
                    assert_eq!(
                        (answer.status, answer.complete),
                        (200, true),
                        "{}",
                        answer.body
                    );
                    assert!(answer.body.ends_with(DONE));
                }
            });
        }
        while let Some(ended) = clients.join_next().await {
            ended.unwrap();
        }
        assert_eq!(upstream.count(), 120);
        let series = "penstock_gateway_requests_total{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"ok\"}";
        gateway.metric_is(series, 120.0).await;
        let mut lines = listen(&gateway).await;
        let report = report_where(&mut lines, "the end", |load| load.in_flight == 0).await;
        let load = &report.backends[&id("a")];
        assert_eq!((load.in_flight, load.waiting, load.held), (0, 0, 0));
        assert_eq!(load.ttft.count(), 120);
    }
}
