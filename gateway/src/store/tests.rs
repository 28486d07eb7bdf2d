//! What every store does alike.

use std::time::Duration;

use super::*;

const HOUR: Duration = Duration::from_hours(1);
const SHORT: Duration = Duration::from_millis(1);

/// Fails if `store` does not do what [`Store`] says.
pub(crate) async fn contract(store: &Store) {
    values_have_versions(store).await;
    logs_have_numbered_pieces(store).await;
    lists_are_read_in_pages(store).await;
    jobs_are_leased(store).await;
    leases_end(store).await;
    shares_are_counted_until_their_ends(store).await;
    store.settle().await.unwrap();
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// What has an end is gone some time after it.
async fn gone(mut is_there: impl AsyncFnMut() -> bool) {
    let wait = async {
        while is_there().await {
            tokio::time::sleep(SHORT).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(20), wait).await;
    assert!(in_time.is_ok(), "still there");
}

async fn values_have_versions(store: &Store) {
    let key = Key::new("job-1", "state");
    assert_eq!(store.get(&key).await.unwrap(), None);
    let first = store
        .put(&key, bytes("a"), Expect::Any, HOUR)
        .await
        .unwrap();
    let first = first.unwrap();
    let read = store.get(&key).await.unwrap().unwrap();
    assert_eq!((read.version, &read.value[..]), (first, &b"a"[..]));
    let second = store
        .put(&key, bytes("b\0\u{ff}"), Expect::Version(first), HOUR)
        .await
        .unwrap();
    assert!(second > Some(first));
    let stale = store
        .put(&key, bytes("c"), Expect::Version(first), HOUR)
        .await
        .unwrap();
    assert_eq!(stale, None, "another one wrote in between");
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, "b\0\u{ff}");
    let (found, at_ms) = store.get_at(&key).await.unwrap();
    assert_eq!(found, store.get(&key).await.unwrap());
    assert!(at_ms.abs_diff(penstock_shell::clock::unix_ms()) < 60_000);
    let new = Key::new("job-2", "state");
    let put = async |value| {
        store
            .put(&new, bytes(value), Expect::Version(0), HOUR)
            .await
    };
    assert!(put("a").await.unwrap().is_some(), "it is not there");
    assert_eq!(put("b").await.unwrap(), None, "it is");
    store.remove("job-2", &["state"]).await.unwrap();
    let large = Bytes::from(vec![0; MAX_VALUE_BYTES + 1]);
    let refused = store.put(&key, large, Expect::Any, HOUR).await;
    assert!(matches!(refused, Err(Error::TooLarge)));
    store.remove("job-1", &["state", "other"]).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), None);
    store
        .put(&key, bytes("d"), Expect::Any, SHORT)
        .await
        .unwrap();
    gone(async || store.get(&key).await.unwrap().is_some()).await;
}

async fn logs_have_numbered_pieces(store: &Store) {
    let log = Key::new("job-2", "events");
    let some = (0..5).map(|number| (number * 2, bytes(&format!("p{number}"))));
    store.write(&log, some.collect(), HOUR).await.unwrap();
    store
        .write(&log, vec![(4, bytes("again"))], HOUR)
        .await
        .unwrap();
    let read = store.pieces(&log, 2, 5).await.unwrap();
    let expected = [(2, bytes("p1")), (4, bytes("again")), (6, bytes("p3"))];
    assert_eq!(read, expected);
    assert_eq!(store.pieces(&log, 9, 100).await.unwrap(), []);
    store.remove("job-2", &["events"]).await.unwrap();
    assert_eq!(store.pieces(&log, 0, 100).await.unwrap(), []);
    store
        .write(&log, vec![(0, bytes("x"))], SHORT)
        .await
        .unwrap();
    gone(async || !store.pieces(&log, 0, 1).await.unwrap().is_empty()).await;
}

async fn lists_are_read_in_pages(store: &Store) {
    let list = Key::new("owner", "files");
    for (at_ms, member) in [(1_000, "a"), (3_000, "c"), (2_000, "b"), (3_000, "d")] {
        store.enlist(&list, member, at_ms, HOUR).await.unwrap();
    }
    let listed =
        async |after, newest, most| store.listed(&list, after, newest, most).await.unwrap();
    assert_eq!(listed(None, true, 10).await, ["d", "c", "b", "a"]);
    assert_eq!(listed(None, true, 2).await, ["d", "c"]);
    assert_eq!(listed(Some("c"), true, 1).await, ["b"]);
    assert_eq!(listed(Some("b"), false, 10).await, ["c", "d"]);
    assert!(listed(Some("nobody"), false, 10).await.is_empty());
    store.unlist(&list, "c").await.unwrap();
    let hour_ms = u64::try_from(HOUR.as_millis()).unwrap();
    store
        .enlist(&list, "e", 2_500 + hour_ms, HOUR)
        .await
        .unwrap();
    assert_eq!(listed(None, false, 10).await, ["d", "e"]);
    assert!(listed(Some("b"), false, 10).await.is_empty());
}

async fn jobs_are_leased(store: &Store) {
    for (class, job) in [("m", "first"), ("n", "other")] {
        store.enqueue(class, job, 3).await.unwrap();
    }
    // Those that come in one millisecond come in any order.
    tokio::time::sleep(SHORT * 2).await;
    store.enqueue("m", "second", 3).await.unwrap();
    let full = store.enqueue("m", "third", 3).await;
    assert!(matches!(full, Err(Error::Full)), "{full:?}");
    let mut classes = store.classes().await.unwrap();
    classes.sort();
    assert_eq!(classes, ["m", "n"]);
    let lease = async |class, owner| store.lease(class, owner, HOUR).await.unwrap();
    let leased = |job: &str, attempt| {
        Some(Leased {
            job: job.to_owned(),
            attempt,
        })
    };
    assert_eq!(lease("m", "A").await, leased("first", 1));
    assert_eq!(lease("m", "B").await, leased("second", 1));
    assert_eq!(lease("m", "B").await, None, "all are taken");
    assert!(store.renew("m", "first", "A", HOUR).await.unwrap());
    assert!(!store.renew("m", "first", "B", HOUR).await.unwrap());
    let now = Duration::ZERO;
    store.release("m", "first", "B", now, true).await.unwrap();
    assert_eq!(lease("m", "B").await, None, "it is not B's");
    store.release("m", "first", "A", now, true).await.unwrap();
    assert_eq!(lease("m", "B").await, leased("first", 2));
    store.release("m", "first", "B", now, false).await.unwrap();
    assert_eq!(lease("m", "B").await, leased("first", 2));
    assert!(store.withdraw("m", "first").await.unwrap());
    assert!(!store.withdraw("m", "first").await.unwrap());
    assert!(!store.renew("m", "first", "B", HOUR).await.unwrap());
    store.release("m", "first", "B", now, true).await.unwrap();
    store.release("m", "second", "B", HOUR, true).await.unwrap();
    assert_eq!(lease("m", "A").await, None, "one is gone, one comes later");
    for (class, job) in [("m", "second"), ("n", "other")] {
        store.withdraw(class, job).await.unwrap();
        assert_eq!(lease(class, "A").await, None);
    }
    assert!(store.classes().await.unwrap().is_empty());
}

async fn leases_end(store: &Store) {
    store.enqueue("m", "job", 10).await.unwrap();
    store.lease("m", "dead", SHORT).await.unwrap().unwrap();
    let mut found = None;
    gone(async || {
        found = store.lease("m", "alive", HOUR).await.unwrap();
        found.is_none()
    })
    .await;
    assert_eq!(found.unwrap().attempt, 2);
    assert!(!store.renew("m", "job", "dead", HOUR).await.unwrap());
    store.withdraw("m", "job").await.unwrap();
}

async fn shares_are_counted_until_their_ends(store: &Store) {
    let (share, other) = (Key::new("alice", "bytes"), Key::new("bob", "bytes"));
    let hour_ms = u64::try_from(HOUR.as_millis()).unwrap();
    let now_ms = penstock_shell::clock::unix_ms();
    let (soon, later) = (now_ms + hour_ms, now_ms + 700 * hour_ms);
    let claim =
        async |share, amount, ends_ms| store.claim(share, amount, ends_ms, 10).await.unwrap();
    assert!(claim(&share, 4, soon).await && claim(&share, 4, later).await);
    assert!(!claim(&share, 3, soon).await, "it would be 11");
    assert!(claim(&share, 2, soon).await && claim(&other, 10, soon).await);
    store.unclaim(&share, 4, later).await.unwrap();
    assert!(claim(&share, 4, soon).await && !claim(&share, 1, soon).await);
    store.unclaim(&share, 100, soon).await.unwrap();
    store.unclaim(&share, 100, later).await.unwrap();
    // What is over counts no more.
    assert!(claim(&share, 10, now_ms - hour_ms).await);
    assert!(claim(&share, 10, soon).await);
    assert!(store.claim(&share, 5, soon, u64::MAX).await.unwrap());
    assert!(!claim(&share, 0, soon).await, "more than it may be");
    store.unclaim(&share, 15, soon).await.unwrap();
    store.unclaim(&other, 10, soon).await.unwrap();
}
