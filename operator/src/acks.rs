//! What gateway replicas wrote into `<gateway>-acks`, and whose entries can go. Pure.

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::acks::Ack;
use serde_json::Value;

use crate::live::Live;

/// Entries that are read of one ConfigMap; far above any number of replicas.
const MAX_ENTRIES: usize = 10_000;

/// Acks by pod UID. An entry that is not an ack counts as none.
pub(crate) fn read(live: Option<&Live>) -> BTreeMap<String, Ack> {
    let data = live
        .and_then(|live| live.object.get("data"))
        .and_then(Value::as_object);
    data.into_iter()
        .flatten()
        .take(MAX_ENTRIES)
        .filter_map(|(uid, text)| Some((uid.clone(), serde_json::from_str(text.as_str()?).ok()?)))
        .collect()
}

/// Keys in the ConfigMap that belong to no living pod.
pub(crate) fn orphans<'a>(live: Option<&'a Live>, pods: &BTreeSet<&str>) -> Vec<&'a str> {
    let data = live
        .and_then(|live| live.object.get("data"))
        .and_then(Value::as_object);
    data.into_iter()
        .flatten()
        .map(|(uid, _)| uid.as_str())
        .filter(|uid| !pods.contains(uid))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn live() -> Live {
        let ack = r#"{"digest":"d","processStart":7}"#;
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"},
            "data": {"one": ack, "two": "not an ack"},
        });
        Live::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn entry_that_is_no_ack_counts_as_none() {
        let acks = read(Some(&live()));
        assert_eq!(acks.keys().collect::<Vec<_>>(), ["one"]);
        assert_eq!(
            (acks["one"].digest.as_str(), acks["one"].process_start),
            ("d", 7)
        );
    }

    #[test]
    fn only_entries_of_gone_pods_are_orphans() {
        assert_eq!(orphans(Some(&live()), &BTreeSet::from(["one"])), ["two"]);
        assert!(orphans(None, &BTreeSet::new()).is_empty());
    }
}
