//! Which gateway replicas serve which state of an object. Pure.
//!
//! An object is programmed when at least one replica of each gateway that carries it is ready, and every ready one that
//! is not leaving has accepted some config with this very state of the object. An edit elsewhere changes the digest,
//! not the object's hash, so it changes nothing here.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use penstock_core::acks::Ack;

use crate::pod::PodFacts;

/// Hashes by `Kind/namespace/name`.
pub(crate) type Hashes = BTreeMap<String, String>;

/// Digests whose hashes are remembered per gateway. Replicas take a new config within a second; this many edits in a
/// row may be under way.
pub(crate) const MAX_RECENT: usize = 32;

/// A replica that has been ready for less than this and has not acked is not counted yet: its ack is on the way.
const ACK_GRACE_S: i64 = 5;

/// Clock readings of a process and of its node's container runtime may differ by the runtime's own delay.
const START_SLACK_S: i64 = 1;

/// The last configs of one gateway: digest → hashes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent(VecDeque<(String, Arc<Hashes>)>);

impl Recent {
    /// Remembers a config; the oldest one is forgotten.
    pub(crate) fn note(&mut self, digest: &str, hashes: impl FnOnce() -> Hashes) {
        if self.get(digest).is_some() {
            return;
        }
        if self.0.len() == MAX_RECENT {
            self.0.pop_front();
        }
        self.0.push_back((digest.to_owned(), Arc::new(hashes())));
    }

    /// Whether a digest is known.
    pub(crate) fn knows(&self, digest: &str) -> bool {
        self.get(digest).is_some()
    }

    fn get(&self, digest: &str) -> Option<&Arc<Hashes>> {
        self.0
            .iter()
            .find(|(known, _)| known == digest)
            .map(|(_, hashes)| hashes)
    }
}

/// One gateway's replicas that count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fleet {
    replicas: Vec<Replica>,
    /// A replica's grace ends after this many seconds: look again then.
    pub(crate) again_s: Option<u64>,
}

#[derive(Clone, Debug)]
struct Replica {
    pod: String,
    /// `None`: no valid ack.
    ack: Option<Accepted>,
}

#[derive(Clone, Debug)]
struct Accepted {
    /// `None`: a digest that is not remembered.
    hashes: Option<Arc<Hashes>>,
    rejected: Vec<String>,
}

/// One object's state in one gateway.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Programmed {
    /// Every replica that counts serves it.
    Yes,
    /// A replica acked a config that this process does not remember (it has restarted): nothing can be said.
    Unknown,
    /// A replica has not taken it yet.
    Pending,
    /// This replica refused it and serves the last good state.
    Rejected(String),
    /// No replica is ready.
    NoReplica,
}

impl Fleet {
    /// Reads pods and acks. `now_s` in Unix seconds.
    pub(crate) fn new<'a>(
        pods: impl Iterator<Item = &'a PodFacts>,
        acks: &BTreeMap<String, Ack>,
        recent: &Recent,
        now_s: i64,
    ) -> Self {
        let mut fleet = Self::default();
        for pod in pods.filter(|pod| pod.is_ready()) {
            let valid = |ack: &&Ack| {
                let start = i64::try_from(ack.process_start).unwrap_or(i64::MAX);
                pod.started
                    .is_none_or(|started| start.saturating_add(START_SLACK_S) >= started)
            };
            let ack = acks.get(&pod.uid).filter(valid);
            let age_s = now_s.saturating_sub(pod.ready_since.unwrap_or(now_s));
            if ack.is_none() && (0..ACK_GRACE_S).contains(&age_s) {
                let left = u64::try_from(ACK_GRACE_S - age_s).unwrap_or(0);
                fleet.again_s = Some(fleet.again_s.map_or(left, |again| again.min(left)));
                continue;
            }
            fleet.replicas.push(Replica {
                pod: pod.name.clone(),
                ack: ack.map(|ack| Accepted {
                    hashes: recent.get(&ack.digest).cloned(),
                    rejected: ack.rejected.clone(),
                }),
            });
        }
        fleet
    }

    /// The state of `object` (`Kind/namespace/name`), whose current hash is `hash`.
    pub(crate) fn state(&self, object: &str, hash: &str) -> Programmed {
        if self.replicas.is_empty() {
            // A replica within its grace is ready but cannot be judged yet.
            return if self.again_s.is_some() {
                Programmed::Pending
            } else {
                Programmed::NoReplica
            };
        }
        let of = |replica: &Replica| match &replica.ack {
            None => Programmed::Pending,
            Some(ack) if ack.rejected.iter().any(|rejected| rejected == object) => {
                Programmed::Rejected(replica.pod.clone())
            }
            Some(Accepted { hashes: None, .. }) => Programmed::Unknown,
            Some(Accepted {
                hashes: Some(hashes),
                ..
            }) if hashes.get(object).is_some_and(|known| known == hash) => Programmed::Yes,
            Some(_) => Programmed::Pending,
        };
        self.replicas
            .iter()
            .map(of)
            .max()
            .unwrap_or(Programmed::NoReplica)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Owner;

    const OBJECT: &str = "LLMBackend/ns/blue";

    fn pod(uid: &str, ready_since: Option<i64>) -> PodFacts {
        PodFacts {
            owner: Owner::Gateway("g".into()),
            uid: uid.into(),
            name: format!("g-{uid}"),
            template: None,
            ready_since,
            leaving: false,
            started: Some(100),
            trouble: None,
        }
    }

    fn ack(digest: &str, process_start: u64) -> Ack {
        Ack {
            digest: digest.into(),
            process_start,
            rejected: Vec::new(),
            limits: Vec::new(),
        }
    }

    fn recent() -> Recent {
        let mut recent = Recent::default();
        for (digest, hash, other) in [("old", "1", "1"), ("new", "2", "1"), ("newer", "2", "2")] {
            recent.note(digest, || {
                Hashes::from([
                    (OBJECT.into(), hash.into()),
                    ("LLMBackend/ns/other".into(), other.into()),
                ])
            });
        }
        recent
    }

    fn state(pods: &[PodFacts], acks: &[(&str, Ack)], now_s: i64) -> Programmed {
        let acks = acks
            .iter()
            .map(|(uid, ack)| ((*uid).to_owned(), ack.clone()))
            .collect();
        Fleet::new(pods.iter(), &acks, &recent(), now_s).state(OBJECT, "2")
    }

    #[test]
    fn every_ready_replica_must_have_taken_this_state() {
        let pods = [pod("a", Some(100)), pod("b", Some(100))];
        assert_eq!(
            state(
                &pods,
                &[("a", ack("new", 100)), ("b", ack("new", 100))],
                200
            ),
            Programmed::Yes
        );
        assert_eq!(
            state(
                &pods,
                &[("a", ack("new", 100)), ("b", ack("old", 100))],
                200
            ),
            Programmed::Pending
        );
        assert_eq!(
            state(&pods, &[("a", ack("new", 100))], 200),
            Programmed::Pending
        );
    }

    #[test]
    fn edit_of_another_object_changes_nothing() {
        let pods = [pod("a", Some(100)), pod("b", Some(100))];
        assert_eq!(
            state(
                &pods,
                &[("a", ack("new", 100)), ("b", ack("newer", 100))],
                200
            ),
            Programmed::Yes
        );
    }

    #[test]
    fn no_ready_replica_means_not_programmed() {
        assert_eq!(state(&[], &[], 200), Programmed::NoReplica);
        let mut leaving = pod("a", Some(100));
        leaving.leaving = true;
        assert_eq!(
            state(&[pod("b", None), leaving], &[("a", ack("new", 100))], 200),
            Programmed::NoReplica
        );
    }

    #[test]
    fn ack_from_before_the_containers_start_is_ignored() {
        let pods = [pod("a", Some(100))];
        assert_eq!(
            state(&pods, &[("a", ack("new", 98))], 200),
            Programmed::Pending
        );
        assert_eq!(state(&pods, &[("a", ack("new", 99))], 200), Programmed::Yes);
    }

    #[test]
    fn new_replica_has_a_moment_to_ack_and_then_counts() {
        let pods = [pod("a", Some(100)), pod("b", Some(198))];
        let acks = [("a", ack("new", 100))];
        assert_eq!(state(&pods, &acks, 200), Programmed::Yes);
        assert_eq!(state(&pods, &acks, 203), Programmed::Pending);
        let known = BTreeMap::from([("a".to_owned(), ack("new", 100))]);
        assert_eq!(
            Fleet::new(pods.iter(), &known, &recent(), 200).again_s,
            Some(3)
        );
    }

    #[test]
    fn lone_new_replica_is_pending_not_absent() {
        assert_eq!(state(&[pod("a", Some(199))], &[], 200), Programmed::Pending);
    }

    #[test]
    fn refusal_names_the_replica_and_wins_over_pending() {
        let pods = [pod("a", Some(100)), pod("b", Some(100))];
        let refused = Ack {
            rejected: vec![OBJECT.into()],
            ..ack("new", 100)
        };
        assert_eq!(
            state(&pods, &[("a", refused)], 200),
            Programmed::Rejected("g-a".into())
        );
    }

    #[test]
    fn digest_from_before_a_restart_is_unknown() {
        assert_eq!(
            state(&[pod("a", Some(100))], &[("a", ack("forgotten", 100))], 200),
            Programmed::Unknown
        );
    }

    #[test]
    fn only_the_last_configs_are_remembered() {
        let mut recent = Recent::default();
        for number in 0..=MAX_RECENT {
            recent.note(&number.to_string(), Hashes::new);
        }
        assert!(!recent.knows("0"));
        assert!(recent.knows("1") && recent.knows(&MAX_RECENT.to_string()));
    }
}
