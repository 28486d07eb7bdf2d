//! What only a file can do.

use super::*;
use crate::store::tests::contract;
use crate::store::{Spec, Store, Target};

#[tokio::test]
async fn a_file_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/store.redb");
    let store = Store::open(&Spec::new(Target::File(path)), "ns/gateway").unwrap();
    contract(&store).await;
}

#[tokio::test]
async fn a_file_that_is_full_says_so_and_takes_what_fits() {
    let folder = tempfile::tempdir().unwrap();
    let spec = Spec {
        max_bytes: 100,
        ..Spec::new(Target::File(folder.path().join("store.redb")))
    };
    let store = Store::open(&spec, "ns/gateway").unwrap();
    let hour = Duration::from_hours(1);
    let (log, value) = (Key::new("a", "log"), Bytes::from(vec![7; 80]));
    store
        .write(&log, vec![(0, value.clone())], hour)
        .await
        .unwrap();
    let more = store.write(&log, vec![(1, value.clone())], hour).await;
    assert!(matches!(more, Err(Error::Full)), "{more:?}");
    let more = store
        .put(&Key::new("b", "x"), value.clone(), Expect::Any, hour)
        .await;
    assert!(matches!(more, Err(Error::Full)), "{more:?}");
    store.remove("a", &["log"]).await.unwrap();
    store.write(&log, vec![(1, value)], hour).await.unwrap();
}

#[tokio::test]
async fn a_file_keeps_room_for_what_must_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let spec = Spec {
        max_bytes: 1_000,
        ..Spec::new(Target::File(folder.path().join("store.redb")))
    };
    let store = Store::open(&spec, "ns/gateway").unwrap();
    let hour = Duration::from_hours(1);
    let put = async |key, bytes| {
        store
            .put(&key, Bytes::from(vec![7; bytes]), Expect::Any, hour)
            .await
    };
    put(Key::new("a", "file"), 950).await.unwrap();
    let more = put(Key::new("b", "file"), 1).await;
    assert!(matches!(more, Err(Error::Full)), "{more:?}");
    put(Key::vital("c", "budget"), 50).await.unwrap();
    let more = put(Key::vital("d", "budget"), 1).await;
    assert!(matches!(more, Err(Error::Full)), "{more:?}");
}

#[tokio::test]
async fn one_process_at_a_time_has_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let spec = Spec::new(Target::File(folder.path().join("store.redb")));
    let first = Store::open(&spec, "ns/gateway").unwrap();
    let second = Store::open(&spec, "ns/gateway").err().unwrap();
    assert!(matches!(second, OpenError::File { .. }), "{second:?}");
    drop(first);
}

/// A disk that is full from a number of bytes on.
#[derive(Debug)]
struct SmallDisk {
    file: redb::backends::FileBackend,
    room: u64,
}

impl redb::StorageBackend for SmallDisk {
    fn len(&self) -> Result<u64, std::io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        if len > self.room {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<(), std::io::Error> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<(), std::io::Error> {
        self.file.close()
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_what_was_there_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let open = move || {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        let disk = SmallDisk {
            file: redb::backends::FileBackend::new(file)?,
            room: 8 << 20,
        };
        prepared(Database::builder().create_with_backend(disk)?)
    };
    let store = Store::Embedded(Embedded::start(open, "small", u64::MAX).unwrap());
    let (key, hour) = (Key::new("a", "value"), Duration::from_hours(1));
    let small = Bytes::from_static(b"kept");
    store
        .put(&key, small.clone(), Expect::Any, hour)
        .await
        .unwrap();
    store.settle().await.unwrap();
    let large = vec![(0, Bytes::from(vec![0; 20 << 20]))];
    let full = match store.write(&Key::new("b", "log"), large, hour).await {
        Ok(()) => store.settle().await.unwrap_err(),
        Err(err) => err,
    };
    assert!(matches!(full, Error::Full), "{full:?}");
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, small);
    store.settle().await.unwrap();
}
