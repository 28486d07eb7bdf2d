//! What only a server can do, before a real one.

use super::*;
use crate::store::tests::contract;
use crate::store::{Spec, Store};

#[path = "../../../tests/it/harness/redis.rs"]
mod server;
use server::{Cluster, Server};

const HOUR: Duration = Duration::from_hours(1);

fn open(server: &Server, space: &str) -> Store {
    open_at(&server.url(), space)
}

fn open_at(url: &str, space: &str) -> Store {
    Store::open(&url.parse::<Spec>().unwrap(), space).unwrap()
}

#[tokio::test]
async fn a_server_keeps_the_contract_and_gateways_apart() {
    let Some(server) = Server::start() else {
        return;
    };
    let (store, other) = (open(&server, "ns/a"), open(&server, "ns/b"));
    other.enqueue("m", "job", 10).await.unwrap();
    contract(&store).await;
    let leased = other.lease("m", "owner", HOUR).await.unwrap();
    assert_eq!(leased.unwrap().job, "job");
}

#[tokio::test]
async fn a_cluster_keeps_the_contract_and_settles_all_that_was_written() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let store = open_at(&cluster.url(), "ns/a");
    contract(&store).await;
    let Store::Redis(redis) = &store else {
        unreachable!()
    };
    let value = Bytes::from_static(b"x");
    let put = async |number: usize| {
        let key = Key::new(format!("tag-{number}"), "v");
        store.put(&key, value.clone(), Expect::Any, HOUR).await
    };
    for number in 0..10 {
        put(number).await.unwrap();
    }
    assert_eq!(redis.unsettled().len(), 10);
    // Whoever waits may leave.
    let mut settling = Box::pin(store.settle());
    assert!(futures::poll!(settling.as_mut()).is_pending());
    drop(settling);
    assert_eq!(redis.unsettled().len(), 10);
    assert_eq!(store.settle().await.unwrap(), Durability::Durable);
    assert!(redis.unsettled().is_empty());
    for number in 0..=MAX_UNSETTLED {
        put(number).await.unwrap();
    }
    assert!(redis.unsettled().is_empty(), "it is bounded");
}

#[tokio::test]
async fn what_is_settled_outlives_a_killed_server_and_calls_find_it_again() {
    let Some(mut server) = Server::start() else {
        return;
    };
    let store = open(&server, "ns/gateway");
    let key = Key::new("job", "state");
    let value = Bytes::from_static(b"kept");
    store
        .put(&key, value.clone(), Expect::Any, HOUR)
        .await
        .unwrap();
    store.enqueue("m", "job", 10).await.unwrap();
    assert_eq!(store.settle().await.unwrap(), Durability::Durable);
    server.kill();
    let away = store.get(&key).await;
    assert!(matches!(away, Err(Error::Away)), "{away:?}");
    server.restart();
    let again = async {
        loop {
            match store.get(&key).await {
                Ok(found) => break found,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(30), again).await;
    assert_eq!(found.unwrap().unwrap().value, value);
    let leased = store.lease("m", "owner", HOUR).await.unwrap();
    assert_eq!(leased.unwrap().job, "job");
}

#[tokio::test]
async fn everything_on_a_server_has_an_end() {
    let Some(server) = Server::start() else {
        return;
    };
    let store = open(&server, "ns/gateway");
    let value = Bytes::from_static(b"x");
    store
        .put(&Key::new("a", "v"), value.clone(), Expect::Any, HOUR)
        .await
        .unwrap();
    store
        .write(&Key::new("a", "l"), vec![(0, value)], HOUR)
        .await
        .unwrap();
    store
        .enlist(&Key::new("o", "files"), "a", 1, HOUR)
        .await
        .unwrap();
    store.enqueue("m", "job", 10).await.unwrap();
    store.lease("m", "owner", HOUR).await.unwrap();
    let in_an_hour = penstock_shell::clock::unix_ms() + ms(HOUR);
    let share = Key::new("o", "bytes");
    assert!(store.claim(&share, 1, in_an_hour, 10).await.unwrap());
    store.settle().await.unwrap();
    let client = redis::Client::open(server.url()).unwrap();
    let mut plain = client.get_connection().unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut plain).unwrap();
    assert_eq!(keys.len(), 8, "{keys:?}");
    for key in keys {
        assert!(key.starts_with("penstock:ns/gateway:{"), "{key}");
        let ttl: i64 = redis::cmd("PTTL").arg(&key).query(&mut plain).unwrap();
        assert!(ttl > 0, "{key} is kept for ever");
    }
}

/// With `everysec` an answer does not mean that the log is written: only a server that can be asked to wait is durable.
#[tokio::test]
async fn a_server_is_durable_if_it_can_be_waited_for_or_writes_before_it_answers() {
    let Some(server) = Server::start() else {
        return;
    };
    let store = open(&server, "ns/gateway");
    assert_eq!(store.settle().await.unwrap(), Durability::Durable);
    server.set("appendfsync", "everysec");
    let (one, other) = tokio::join!(store.settle(), store.settle());
    assert_eq!(one.unwrap(), other.unwrap());
    let client = redis::Client::open(server.url()).unwrap();
    let mut asked = client.get_connection().unwrap();
    let mut info = redis::cmd("COMMAND");
    let told: Vec<redis::Value> = info.arg("INFO").arg("WAITAOF").query(&mut asked).unwrap();
    let can_wait = told
        .first()
        .is_some_and(|value| *value != redis::Value::Nil);
    let expected = if can_wait {
        Durability::Durable
    } else {
        Durability::NotDurable
    };
    assert_eq!(store.settle().await.unwrap(), expected);
    server.set("appendonly", "no");
    assert_eq!(store.settle().await.unwrap(), Durability::NotDurable);
}

#[tokio::test]
async fn a_server_that_is_full_says_so() {
    let Some(server) = Server::start() else {
        return;
    };
    let store = open(&server, "ns/gateway");
    server.set("maxmemory", "1mb");
    let value = Bytes::from(vec![0; 1 << 20]);
    let key = Key::new("a", "v");
    let mut full = Ok(Some(0));
    for _ in 0..4 {
        full = store.put(&key, value.clone(), Expect::Any, HOUR).await;
    }
    assert!(matches!(full, Err(Error::Full)), "{full:?}");
}
