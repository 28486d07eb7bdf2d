//! Who owns `spec.replicas` of a pool's Deployment, and what to write about it. Pure.
//!
//! Before an autoscaler works, the field manager `penstock-replicas` holds the number. When the HPA works, ownership
//! goes over without the number changing: first `penstock-handover` owns the live value too, then `penstock-replicas`
//! lets go. Had it let go first, the API server would have put the default, 1. Nothing applies the number after that.

use std::collections::BTreeSet;

/// Manager of everything else in children.
pub(crate) const OPERATOR: &str = "penstock-operator";
/// Manager that holds the number while no autoscaler does.
pub(crate) const REPLICAS: &str = "penstock-replicas";
/// Manager that owns the number between `penstock-replicas` and the autoscaler.
pub(crate) const HANDOVER: &str = "penstock-handover";

/// What the object asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// This many.
    Fixed(i32),
    /// As many as the autoscaler says.
    Scaled {
        /// Lower bound.
        min: i32,
        /// Upper bound.
        max: i32,
    },
}

/// What is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The Deployment's number and its owners; `None` when there is no Deployment.
    pub(crate) live: Option<(i32, BTreeSet<String>)>,
    /// Our ScaledObject exists, and whether KEDA calls it ready.
    pub(crate) scaled_object: Option<bool>,
    /// KEDA's HPA exists, and whether it works.
    pub(crate) own_hpa: Option<bool>,
    /// An HPA that is not KEDA's points at the Deployment.
    pub(crate) foreign_hpa: bool,
}

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Make the Deployment with this number.
    Create(i32),
    /// Apply this number as `penstock-replicas`.
    Hold(i32),
    /// Apply the live number as `penstock-replicas` before the ScaledObject goes.
    Adopt(i32),
    /// Apply the live number as `penstock-handover`, then drop it from `penstock-replicas`.
    HandOver(i32),
    /// Drop it from `penstock-replicas`: `penstock-handover` owns it already.
    Release,
    /// Write nothing.
    Leave,
}

/// The step to take now. Repeating it leads to a state in which it is [`Step::Leave`].
pub(crate) fn decide(wish: Wish, seen: &Seen) -> Step {
    let Some((live, owners)) = &seen.live else {
        return Step::Create(match wish {
            Wish::Fixed(count) => count,
            Wish::Scaled { min, .. } => floor(min),
        });
    };
    let held = owners.contains(REPLICAS);
    match wish {
        Wish::Fixed(_) if seen.scaled_object.is_some() || seen.own_hpa.is_some() => {
            if held {
                Step::Leave
            } else {
                Step::Adopt(*live)
            }
        }
        _ if seen.foreign_hpa => Step::Leave,
        Wish::Fixed(count) => hold(count, *live, held),
        Wish::Scaled { min, max } => {
            let others = owners
                .iter()
                .any(|owner| owner != OPERATOR && owner != REPLICAS);
            if !held && others {
                return Step::Leave;
            }
            if held && owners.contains(HANDOVER) {
                return Step::Release;
            }
            let at_zero = *live == 0 && seen.scaled_object == Some(true);
            if held && (seen.own_hpa == Some(true) || at_zero) {
                return Step::HandOver(*live);
            }
            // A pool that ran with more replicas than the minimum keeps them until somebody measures the load.
            hold((*live).clamp(floor(min), max.max(floor(min))), *live, held)
        }
    }
}

/// Whether the ScaledObject may be deleted: its last value has an owner.
pub(crate) fn may_remove_scaled_object(seen: &Seen) -> bool {
    seen.live
        .as_ref()
        .is_none_or(|(_, owners)| owners.contains(REPLICAS))
}

fn floor(min: i32) -> i32 {
    min.max(0)
}

fn hold(count: i32, live: i32, held: bool) -> Step {
    if held && live == count {
        Step::Leave
    } else {
        Step::Hold(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCALED: Wish = Wish::Scaled { min: 2, max: 8 };

    fn seen(live: i32, owners: &[&str]) -> Seen {
        let owners = owners.iter().map(|owner| (*owner).to_owned()).collect();
        Seen {
            live: Some((live, owners)),
            ..Seen::default()
        }
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn decision_table() {
        let hpa = |active, seen: Seen| Seen {
            own_hpa: Some(active),
            scaled_object: Some(true),
            ..seen
        };
        let foreign = |seen: Seen| Seen {
            foreign_hpa: true,
            ..seen
        };
        let scaled_object = |ready, seen: Seen| Seen {
            scaled_object: Some(ready),
            ..seen
        };
        let zero = Wish::Scaled { min: 0, max: 8 };
        let table = [
            (
                "absent, fixed",
                Wish::Fixed(3),
                Seen::default(),
                Step::Create(3),
            ),
            (
                "absent, fixed at 0",
                Wish::Fixed(0),
                Seen::default(),
                Step::Create(0),
            ),
            ("absent, scaled", SCALED, Seen::default(), Step::Create(2)),
            (
                "absent, scaled from 0",
                zero,
                Seen::default(),
                Step::Create(0),
            ),
            (
                "fixed and held",
                Wish::Fixed(3),
                seen(3, &[REPLICAS]),
                Step::Leave,
            ),
            (
                "fixed, edited by hand",
                Wish::Fixed(3),
                seen(5, &["kubectl"]),
                Step::Hold(3),
            ),
            (
                "fixed, right number, no owner",
                Wish::Fixed(1),
                seen(1, &[]),
                Step::Hold(1),
            ),
            (
                "fixed, a person's own HPA",
                Wish::Fixed(3),
                foreign(seen(5, &[REPLICAS])),
                Step::Leave,
            ),
            (
                "scaled, nobody measures yet",
                SCALED,
                seen(2, &[REPLICAS]),
                Step::Leave,
            ),
            (
                "scaled, created a moment ago",
                SCALED,
                seen(2, &[OPERATOR]),
                Step::Hold(2),
            ),
            (
                "scaling added to a larger pool",
                SCALED,
                seen(5, &[REPLICAS]),
                Step::Leave,
            ),
            (
                "scaling added above its maximum",
                SCALED,
                seen(9, &[REPLICAS]),
                Step::Hold(8),
            ),
            (
                "HPA is there, does not work",
                SCALED,
                hpa(false, seen(2, &[REPLICAS])),
                Step::Leave,
            ),
            (
                "HPA works",
                SCALED,
                hpa(true, seen(5, &[REPLICAS])),
                Step::HandOver(5),
            ),
            (
                "handed over by half",
                SCALED,
                hpa(true, seen(5, &[REPLICAS, HANDOVER])),
                Step::Release,
            ),
            (
                "handed over",
                SCALED,
                hpa(true, seen(5, &[HANDOVER])),
                Step::Leave,
            ),
            (
                "HPA has written",
                SCALED,
                hpa(true, seen(7, &["kube-controller-manager"])),
                Step::Leave,
            ),
            (
                "HPA stopped working later",
                SCALED,
                hpa(false, seen(7, &["kube-controller-manager"])),
                Step::Leave,
            ),
            (
                "at zero, KEDA ready",
                zero,
                scaled_object(true, seen(0, &[REPLICAS])),
                Step::HandOver(0),
            ),
            (
                "at zero, KEDA not ready",
                zero,
                scaled_object(false, seen(0, &[REPLICAS])),
                Step::Leave,
            ),
            (
                "second HPA",
                SCALED,
                foreign(seen(5, &[REPLICAS])),
                Step::Leave,
            ),
            (
                "scaling removed",
                Wish::Fixed(1),
                hpa(true, seen(7, &["kube-controller-manager"])),
                Step::Adopt(7),
            ),
            (
                "adopted, HPA not gone yet",
                Wish::Fixed(1),
                hpa(true, seen(7, &[REPLICAS])),
                Step::Leave,
            ),
            (
                "adopted, HPA gone",
                Wish::Fixed(1),
                seen(7, &[REPLICAS]),
                Step::Hold(1),
            ),
        ];
        for (case, wish, seen, step) in table {
            assert_eq!(decide(wish, &seen), step, "{case}");
        }
    }

    /// What the API server does with a step.
    fn carry_out(step: Step, seen: &mut Seen) {
        let own = |count: i32, owner: &str| Some((count, BTreeSet::from([owner.to_owned()])));
        match step {
            Step::Leave => {}
            Step::Create(count) => seen.live = own(count, OPERATOR),
            Step::Hold(count) | Step::Adopt(count) => seen.live = own(count, REPLICAS),
            Step::HandOver(count) => seen.live = own(count, HANDOVER),
            Step::Release => {
                if let Some((_, owners)) = &mut seen.live {
                    owners.remove(REPLICAS);
                }
            }
        }
    }

    fn any_wish() -> impl Strategy<Value = Wish> {
        prop_oneof![
            (0..9).prop_map(Wish::Fixed),
            (1..9, 0..9).prop_map(|(min, more)| Wish::Scaled {
                min,
                max: min + more
            }),
        ]
    }

    fn any_seen() -> impl Strategy<Value = Seen> {
        let owner = prop::sample::select(vec![
            OPERATOR,
            REPLICAS,
            HANDOVER,
            "kube-controller-manager",
            "kubectl",
        ]);
        let owners = prop::collection::btree_set(owner.prop_map(str::to_owned), 0..3);
        (
            prop::option::of((0..12, owners)),
            any::<Option<bool>>(),
            any::<Option<bool>>(),
            any::<bool>(),
        )
            .prop_map(|(live, scaled_object, own_hpa, foreign_hpa)| Seen {
                live,
                scaled_object,
                own_hpa,
                foreign_hpa,
            })
    }

    proptest! {
        #[test]
        fn steps_come_to_rest(wish in any_wish(), mut seen in any_seen()) {
            for _ in 0..4 {
                let step = decide(wish, &seen);
                carry_out(step, &mut seen);
            }
            prop_assert_eq!(decide(wish, &seen), Step::Leave);
        }

        #[test]
        fn handing_over_and_adopting_never_change_the_number(wish in any_wish(), seen in any_seen()) {
            if let (Step::HandOver(count) | Step::Adopt(count), Some((live, _))) = (decide(wish, &seen), &seen.live) {
                prop_assert_eq!(count, *live);
            }
        }

        #[test]
        fn number_of_a_working_autoscaler_is_never_touched(wish in any_wish(), live in 0..12, active: bool) {
            if let Wish::Scaled { .. } = wish {
                let seen = Seen { own_hpa: Some(active), ..seen(live, &["kube-controller-manager"]) };
                prop_assert_eq!(decide(wish, &seen), Step::Leave);
            }
        }
    }
}
