//! Whether a child must be written. Pure. A child is left alone when its stamp says that exactly this object was
//! applied and everything that was applied is still there; what others added does not count. So nothing is written at
//! rest, a hand edit is healed, and a value that the API server rewrites (`1000m` → `1`) does not become a loop.

use std::time::{Duration, Instant};

use penstock_core::config::sha256_hex;
use serde_json::{Map, Value};

/// Annotation on every child: hash of the object as it was planned.
pub(crate) const APPLIED_ANNOTATION: &str = "penstock.dev/applied";

/// Somebody who keeps undoing what we apply is answered at most this often.
const HEAL_BACKOFF_MAX: Duration = Duration::from_mins(5);
/// A second heal within this time counts as a fight.
const HEAL_WINDOW: Duration = Duration::from_secs(30);

/// What is remembered of the last write of one child.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    /// Stamp of the planned object.
    pub(crate) stamp: String,
    /// Hash of the live values at the planned paths, right after the write.
    pub(crate) projection: String,
    /// When it was written.
    pub(crate) at: Instant,
    /// Writes of the same plan in close succession.
    pub(crate) streak: u32,
}

/// What to do with one child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is as planned.
    Keep,
    /// Write it now.
    Write,
    /// Somebody undoes our writes; try again after this time.
    Wait(Duration),
}

/// The planned object with its stamp in its annotations.
pub(crate) fn stamped(mut object: Value) -> Value {
    let stamp = Value::String(stamp(&object));
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let annotations = metadata
            .entry("annotations")
            .or_insert_with(|| Value::Object(Map::new()));
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.insert(APPLIED_ANNOTATION.to_owned(), stamp);
        }
    }
    object
}

fn stamp(object: &Value) -> String {
    // Without `preserve_order`, serde_json's maps are sorted: equal objects have equal text.
    sha256_hex(object.to_string().as_bytes())[..32].to_owned()
}

/// The stamp of a planned or live object.
pub(crate) fn stamp_of(object: &Value) -> Option<&str> {
    object
        .get("metadata")?
        .get("annotations")?
        .get(APPLIED_ANNOTATION)?
        .as_str()
}

/// Decides about one child: `planned` is stamped, `live` is what the API server has, `written` our last write of it.
pub(crate) fn decide(
    planned: &Value,
    live: Option<&Value>,
    written: Option<&Written>,
    now: Instant,
) -> Verdict {
    let Some(live) = live else {
        return Verdict::Write;
    };
    let stamp = stamp_of(planned);
    if stamp_of(live) == stamp {
        if covers_all(live, planned) {
            return Verdict::Keep;
        }
        if let Some(written) = written
            && Some(written.stamp.as_str()) == stamp
            && written.projection == projection(live, planned)
        {
            return Verdict::Keep;
        }
    }
    match written {
        Some(written) if Some(written.stamp.as_str()) == stamp && written.streak > 1 => {
            let wait = Duration::from_secs(1 << written.streak.min(10)).min(HEAL_BACKOFF_MAX);
            let elapsed = now.saturating_duration_since(written.at);
            if elapsed >= wait {
                Verdict::Write
            } else {
                Verdict::Wait(wait.saturating_sub(elapsed))
            }
        }
        _ => Verdict::Write,
    }
}

/// What to remember after `planned` was written and the API server answered with `live`.
pub(crate) fn remember(
    planned: &Value,
    live: &Value,
    before: Option<&Written>,
    now: Instant,
) -> Written {
    let stamp = stamp_of(planned).unwrap_or_default().to_owned();
    let streak = match before {
        Some(before) if before.stamp == stamp => {
            let pause = Duration::from_secs(1 << before.streak.min(10)).min(HEAL_BACKOFF_MAX);
            if now.saturating_duration_since(before.at) < HEAL_WINDOW + pause {
                before.streak + 1
            } else {
                1
            }
        }
        _ => 1,
    };
    Written {
        stamp,
        projection: projection(live, planned),
        at: now,
        streak,
    }
}

/// [`covers`] for whole objects. Items of a list say neither their kind nor its version.
fn covers_all(live: &Value, planned: &Value) -> bool {
    planned.as_object().is_some_and(|fields| {
        fields
            .iter()
            .filter(|(key, _)| !matches!(key.as_str(), "apiVersion" | "kind"))
            .all(|(key, planned)| match live.get(key) {
                Some(live) => covers(live, planned),
                None => is_empty(planned),
            })
    })
}

/// Whether everything in `planned` is in `live`; more may be there.
fn covers(live: &Value, planned: &Value) -> bool {
    match (planned, live) {
        (Value::Object(planned), Value::Object(live)) => {
            planned.iter().all(|(key, planned)| match live.get(key) {
                Some(live) => covers(live, planned),
                None => is_empty(planned),
            })
        }
        (Value::Array(planned), Value::Array(live)) => pair(planned, live)
            .is_some_and(|pairs| pairs.iter().all(|(planned, live)| covers(live, planned))),
        _ => planned == live,
    }
}

/// Hash of the values in `live` that stand where `planned` has some.
fn projection(live: &Value, planned: &Value) -> String {
    sha256_hex(project(live, planned).to_string().as_bytes())[..32].to_owned()
}

fn project(live: &Value, planned: &Value) -> Value {
    match (planned, live) {
        (Value::Object(planned), Value::Object(live)) => Value::Object(
            planned
                .iter()
                .filter_map(|(key, planned)| Some((key.clone(), project(live.get(key)?, planned))))
                .collect(),
        ),
        (Value::Array(planned), Value::Array(all)) => match pair(planned, all) {
            Some(pairs) => pairs
                .iter()
                .map(|(planned, live)| project(live, planned))
                .collect(),
            None => live.clone(),
        },
        _ => live.clone(),
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// Planned items with their live counterparts: by merge key where the items have one, else one by one. `None` when an
/// item is missing.
fn pair<'a>(planned: &'a [Value], live: &'a [Value]) -> Option<Vec<(&'a Value, &'a Value)>> {
    if let Some(key) = merge_key(planned) {
        return planned
            .iter()
            .map(|item| {
                Some((
                    item,
                    live.iter().find(|other| other.get(key) == item.get(key))?,
                ))
            })
            .collect();
    }
    (planned.len() == live.len()).then(|| planned.iter().zip(live).collect())
}

/// The merge keys that Kubernetes uses for the lists that children have.
fn merge_key(items: &[Value]) -> Option<&'static str> {
    ["uid", "mountPath", "name"].into_iter().find(|key| {
        !items.is_empty()
            && items.iter().all(|item| item.get(key).is_some())
            && items
                .iter()
                .enumerate()
                .all(|(i, item)| items[..i].iter().all(|other| other[key] != item[key]))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[expect(
        clippy::disallowed_methods,
        reason = "a test needs some instant to count from"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    fn planned() -> Value {
        stamped(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "x", "labels": {"a": "1"}},
            "spec": {"containers": [{"name": "c", "args": ["-v"], "resources": {"limits": {"cpu": "1000m"}}}]},
        }))
    }

    fn with(mut value: Value, path: &str, new: Value) -> Value {
        *value.pointer_mut(path).unwrap() = new;
        value
    }

    #[test]
    fn equal_object_with_foreign_additions_is_kept() {
        let planned = planned();
        let mut live = planned.clone();
        // As in a list.
        live.as_object_mut()
            .unwrap()
            .retain(|key, _| key != "kind" && key != "apiVersion");
        live["metadata"]["labels"]["team"] = json!("blue");
        live["metadata"]["annotations"]["other"] = json!("x");
        live["spec"]["containers"]
            .as_array_mut()
            .unwrap()
            .insert(0, json!({"name": "sidecar"}));
        live["spec"]["dnsPolicy"] = json!("ClusterFirst");
        assert_eq!(decide(&planned, Some(&live), None, start()), Verdict::Keep);
    }

    #[test]
    fn hand_edited_field_is_written_again() {
        let planned = planned();
        let live = with(planned.clone(), "/spec/containers/0/args", json!(["-q"]));
        assert_eq!(decide(&planned, Some(&live), None, start()), Verdict::Write);
    }

    #[test]
    fn removed_field_is_written_though_the_rest_is_there() {
        let live = planned();
        let mut smaller = planned();
        smaller["spec"]["containers"][0]
            .as_object_mut()
            .unwrap()
            .remove("args");
        assert_eq!(
            decide(&stamped(smaller), Some(&live), None, start()),
            Verdict::Write
        );
    }

    #[test]
    fn value_that_the_server_rewrites_is_written_once() {
        let (planned, now) = (planned(), start());
        let live = with(
            planned.clone(),
            "/spec/containers/0/resources/limits/cpu",
            json!("1"),
        );
        assert_eq!(decide(&planned, Some(&live), None, now), Verdict::Write);
        let written = remember(&planned, &live, None, now);
        assert_eq!(
            decide(&planned, Some(&live), Some(&written), now),
            Verdict::Keep
        );
        let edited = with(live, "/spec/containers/0/args", json!([]));
        assert_eq!(
            decide(&planned, Some(&edited), Some(&written), now),
            Verdict::Write
        );
    }

    #[test]
    fn fight_over_a_field_slows_down_and_ends_at_the_bound() {
        let (planned, mut now) = (planned(), start());
        let edited = with(planned.clone(), "/metadata/labels/a", json!("2"));
        let (mut written, mut waits) = (None, Vec::new());
        for _ in 0..12 {
            match decide(&planned, Some(&edited), written.as_ref(), now) {
                Verdict::Wait(wait) => {
                    waits.push(wait.as_secs());
                    now += wait;
                }
                Verdict::Write => waits.push(0),
                Verdict::Keep => panic!("the edit must be seen"),
            }
            assert_eq!(
                decide(&planned, Some(&edited), written.as_ref(), now),
                Verdict::Write
            );
            written = Some(remember(&planned, &planned, written.as_ref(), now));
        }
        assert_eq!(waits[..5], [0, 0, 4, 8, 16]);
        assert_eq!(waits[11], HEAL_BACKOFF_MAX.as_secs());
    }

    #[test]
    fn empty_map_may_be_absent() {
        assert!(covers(&json!({"a": 1}), &json!({"a": 1, "limits": {}})));
        assert!(!covers(
            &json!({"a": 1}),
            &json!({"a": 1, "limits": {"cpu": "1"}})
        ));
    }

    #[test]
    fn lists_without_merge_key_must_be_equal_in_length() {
        assert!(!covers(&json!(["a", "b"]), &json!(["a"])));
        assert!(!covers(
            &json!([{"verbs": ["get"]}, {"verbs": ["list"]}]),
            &json!([{"verbs": ["get"]}])
        ));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i8>().prop_map(Value::from),
            "[ab]".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-d]|name", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn object_that_was_applied_is_kept(spec in any_json()) {
            let planned = stamped(json!({"metadata": {"name": "x"}, "spec": spec}));
            prop_assert_eq!(decide(&planned, Some(&planned), None, start()), Verdict::Keep);
        }

        #[test]
        fn whatever_the_server_answers_is_kept_after_the_write(spec in any_json(), answer in any_json()) {
            let planned = stamped(json!({"metadata": {"name": "x"}, "spec": spec}));
            let mut live = planned.clone();
            live["spec"] = answer;
            let written = remember(&planned, &live, None, start());
            prop_assert_eq!(decide(&planned, Some(&live), Some(&written), start()), Verdict::Keep);
        }

        #[test]
        fn stamp_tells_objects_apart(a in any_json(), b in any_json()) {
            let object = |spec: &Value| stamped(json!({"metadata": {"name": "x"}, "spec": spec}));
            let (first, second) = (object(&a), object(&b));
            prop_assert_eq!(a == b, stamp_of(&first) == stamp_of(&second));
        }
    }
}
