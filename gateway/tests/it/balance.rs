//! Shares of backends and endpoints, seen from behind them.

use std::sync::Mutex;
use std::time::Duration;

use penstock_core::config::Strategy;
use penstock_gateway::pulse::QUIET_MS;

use crate::harness::*;

#[tokio::test]
async fn round_robin_follows_weights_exactly() {
    let heavy = Upstream::always(|| json_answer("x")).await;
    let light = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::new()
        .backend("a", &[heavy.address], 3, 0)
        .backend("b", &[light.address], 1, 0)
        .rule(|rule| rule.strategy = Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..40 {
        gateway.post(&chat(false)).await;
    }
    assert_eq!((heavy.count(), light.count()), (30, 10));
}

#[tokio::test]
async fn round_robin_goes_round_the_endpoints_of_a_backend() {
    let (upstreams, addresses) = Upstream::several(3, || json_answer("x")).await;
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.strategy = Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..12 {
        gateway.post(&chat(false)).await;
    }
    assert_eq!(
        upstreams.iter().map(Upstream::count).collect::<Vec<_>>(),
        [4, 4, 4]
    );
}

#[tokio::test]
async fn least_requests_avoids_the_busy_endpoint() {
    let slow = Upstream::always(|| Reply::Silent).await;
    let quick = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::new().backend("a", &[slow.address, quick.address], 1, 0);
    let gateway = Gateway::start(&plan).await;
    // Requests go there in turn until one is stuck at the slow endpoint; all others go where nothing is in flight.
    let mut stuck = gateway.client().await;
    for number in 1.. {
        stuck.post("", &chat(false)).await;
        until("the request is upstream", || {
            slow.count() + quick.count() == number
        })
        .await;
        if slow.count() == 1 {
            break;
        }
        assert_eq!(stuck.answer().await.status, 200);
    }
    let before = quick.count();
    for _ in 0..20 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!((slow.count(), quick.count()), (1, before + 20));
    drop(stuck);
    until("the slow endpoint is free", || slow.gone() == 1).await;
    within("it takes its turn again", async {
        while slow.count() == 1 {
            let before = quick.count();
            let mut client = gateway.client().await;
            client.post("", &chat(false)).await;
            until("upstream", || slow.count() == 2 || quick.count() > before).await;
        }
    })
    .await;
}

#[tokio::test]
async fn least_requests_fills_backends_by_weight() {
    let heavy = Upstream::always(|| Reply::Silent).await;
    let light = Upstream::always(|| Reply::Silent).await;
    let plan =
        Plan::new()
            .backend("a", &[heavy.address], 3, 0)
            .backend("b", &[light.address], 1, 0);
    let gateway = Gateway::start(&plan).await;
    let mut clients = Vec::new();
    for number in 1..=12 {
        let mut client = gateway.client().await;
        client.post("", &chat(true)).await;
        clients.push(client);
        until("the request is upstream", || {
            heavy.count() + light.count() == number
        })
        .await;
    }
    assert_eq!((heavy.count(), light.count()), (9, 3));
}

#[tokio::test]
async fn endpoints_that_come_share_at_once_and_those_that_go_get_nothing() {
    let (upstreams, addresses) = Upstream::several(3, || json_answer("x")).await;
    let mut plan = Plan::new()
        .backend("a", &addresses[..1], 1, 0)
        .rule(|rule| rule.strategy = Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    let mut before = vec![0; 3];
    for (number, (here, shares)) in [
        (&addresses[..1], [6, 0, 0]),
        (&addresses[..], [2, 2, 2]),
        (&addresses[1..], [0, 3, 3]),
    ]
    .into_iter()
    .enumerate()
    {
        plan.set_endpoints("a", here);
        // Another digest, so that the moment when the endpoints are in force is known.
        plan.config.rules[0].retry.attempts = 1 + u32::try_from(number).unwrap();
        gateway.apply(&plan).await;
        for _ in 0..6 {
            assert_eq!(gateway.post(&chat(false)).await.status, 200);
        }
        let now: Vec<usize> = upstreams.iter().map(Upstream::count).collect();
        let got: Vec<usize> = now
            .iter()
            .zip(&before)
            .map(|(now, before)| now - before)
            .collect();
        assert_eq!(got, shares);
        before = now;
    }
}

#[tokio::test]
async fn peak_ewma_leaves_a_slow_endpoint_aside() {
    let quick = Upstream::always(|| json_answer("x")).await;
    let late = || Reply::Late(Duration::from_millis(300), "{}".to_owned());
    let slow = Upstream::always(late).await;
    let plan = Plan::new()
        .backend("a", &[slow.address, quick.address], 1, 0)
        .rule(|rule| rule.strategy = Strategy::PeakEwma);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..60 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    // One to get to know it; nothing says that more are needed.
    assert!(slow.count() <= 2, "{}", slow.count());
}

#[tokio::test]
async fn prefix_affinity_sends_what_begins_alike_to_one_endpoint() {
    let (upstreams, addresses) = Upstream::several(3, || json_answer("x")).await;
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.strategy = Strategy::PrefixAffinity);
    let gateway = Gateway::start(&plan).await;
    for tenant in ["red", "green", "blue", "white"] {
        let before: Vec<_> = upstreams.iter().map(Upstream::count).collect();
        let manual = tenant.repeat(200);
        for turn in 0..5 {
            let body = format!(
                r#"{{"model":"chat","messages":[{{"role":"system","content":"{manual}"}},{{"role":"user","content":"{turn}"}}]}}"#
            );
            assert_eq!(gateway.post(&body).await.status, 200);
        }
        let of_tenant: Vec<_> = upstreams
            .iter()
            .zip(before)
            .map(|(upstream, before)| upstream.count() - before)
            .collect();
        assert!(of_tenant.contains(&5), "{of_tenant:?}");
    }
}

#[tokio::test]
async fn an_endpoint_that_has_fallen_silent_comes_last_until_it_is_heard() {
    let (steps, frozen_reply) = driven();
    let frozen_reply = Mutex::new(Some(frozen_reply));
    let frozen = Upstream::start(move |_, _| match frozen_reply.lock().unwrap().take() {
        Some(reply) => reply,
        None => json_answer("x"),
    })
    .await;
    let quick = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::new()
        .backend("a", &[frozen.address, quick.address], 1, 0)
        .rule(|rule| rule.strategy = Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    let mut stuck = gateway.client().await;
    stuck.post("", &chat(true)).await;
    until("the stream is upstream", || {
        frozen.count() + quick.count() == 1
    })
    .await;
    if frozen.count() == 0 {
        stuck = gateway.client().await;
        stuck.post("", &chat(true)).await;
        until("the stream is at the frozen one", || frozen.count() == 1).await;
    }
    tokio::time::sleep(Duration::from_millis(QUIET_MS + 200)).await;
    let before = quick.count();
    for _ in 0..10 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!((frozen.count(), quick.count()), (1, before + 10));

    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    assert_eq!(stuck.head().await.0, 200);
    stuck.expect(&word("one")).await;
    for _ in 0..10 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(frozen.count(), 6, "it takes its turns again");
    finish(&mut stuck, &steps).await;
}

#[tokio::test]
async fn an_endpoint_that_is_slower_than_its_peers_gets_little_whatever_the_strategy() {
    let (peers, mut addresses) = Upstream::several(2, || Reply::Json(200, completion("x"))).await;
    let late = || Reply::Late(Duration::from_millis(60), completion("x"));
    let slow = Upstream::always(late).await;
    addresses.push(slow.address);
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.strategy = Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    within("the slow one gets one request in fifty", async {
        let mut client = gateway.client().await;
        loop {
            let before = slow.count();
            for _ in 0..60 {
                client.post("", &chat(false)).await;
                assert_eq!(client.answer().await.status, 200);
            }
            if slow.count() - before <= 2 {
                break;
            }
        }
    })
    .await;
    assert!(peers.iter().all(|peer| peer.count() > slow.count()));
}

#[tokio::test]
async fn an_endpoint_whose_streams_end_in_errors_of_its_own_gets_little() {
    let (peers, mut addresses) = Upstream::several(2, hello).await;
    let error = "data: {\"error\":{\"message\":\"x\",\"type\":\"server_error\"}}\n\n";
    let failing = move || Reply::Sse(vec![role(), word("x"), error.to_owned()]);
    let failing = Upstream::always(failing).await;
    addresses.push(failing.address);
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.strategy = Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    within("the failing one gets one request in fifty", async {
        loop {
            let before = failing.count();
            for _ in 0..60 {
                assert_eq!(gateway.post(&chat(true)).await.status, 200);
            }
            if failing.count() - before <= 2 {
                break;
            }
        }
    })
    .await;
    assert!(peers.iter().all(|peer| peer.count() > failing.count()));
}

#[tokio::test]
async fn a_backend_of_one_endpoint_that_cuts_its_streams_is_left_out() {
    let cut = Upstream::always(|| Reply::Sse(vec![role(), word("x")])).await;
    let good = Upstream::always(hello).await;
    for strategy in [Strategy::PeakEwma, Strategy::RoundRobin] {
        let plan = Plan::new()
            .backend("a", &[cut.address], 1, 0)
            .backend("b", &[good.address], 1, 0)
            .rule(|rule| rule.strategy = strategy);
        let gateway = Gateway::start(&plan).await;
        let before = cut.count();
        for _ in 0..60 {
            assert_eq!(gateway.post(&chat(true)).await.status, 200);
        }
        let count = cut.count() - before;
        assert!((1..=5).contains(&count), "{strategy:?}: {count}");
    }
}

#[tokio::test]
async fn an_endpoint_without_the_prompt_in_its_cache_is_not_taken_for_a_bad_one() {
    let (_peers, mut addresses) = Upstream::several(2, || Reply::Json(200, completion("x"))).await;
    let late = || Reply::Late(Duration::from_millis(20), completion("x"));
    let cold = Upstream::always(late).await;
    addresses.push(cold.address);
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.strategy = Strategy::Hash);
    let gateway = Gateway::start(&plan).await;
    let ask = async |user: usize| {
        let body = format!("{{\"model\":\"chat\",\"user\":\"u{user}\"}}");
        assert_eq!(gateway.post(&body).await.status, 200);
    };
    for user in 0..60 {
        ask(user).await;
    }
    // Two comparisons, at least one a second, lie behind.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let before = cold.count();
    for user in 0..60 {
        ask(user).await;
    }
    assert!(
        before > 5 && cold.count() - before == before,
        "the same keys go there"
    );
}
