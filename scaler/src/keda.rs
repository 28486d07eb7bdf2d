//! KEDA's own arithmetic for one ScaledObject: how it turns a scaler's answer into a metric for the HPA, and how it
//! moves a target between zero and its minimum, which the HPA does not.
//!
//! Follows KEDA v2.21.0 `pkg/scaling/executor/scale_scaledobjects.go`, `pkg/scalers/scaler.go` and
//! `apis/keda/v1alpha1/scaledobject_types.go`. Not modelled: `fallback`, pausing, forced activation.

use std::time::Duration;

/// Seconds between two looks, when `pollingInterval` is not given.
pub const DEFAULT_POLLING_INTERVAL: Duration = Duration::from_secs(30);
/// Seconds without activity before zero, when `cooldownPeriod` is not given.
pub const DEFAULT_COOLDOWN: Duration = Duration::from_mins(5);
/// `maxReplicaCount` when it is not given.
pub const DEFAULT_MAX: i32 = 100;

/// The fields of a ScaledObject that decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaledObject {
    /// `minReplicaCount`; KEDA's default is 0.
    pub min: i32,
    /// `maxReplicaCount`.
    pub max: i32,
    /// `idleReplicaCount`; KEDA allows only 0.
    pub idle: Option<i32>,
    /// `cooldownPeriod`.
    pub cooldown: Duration,
    /// `initialCooldownPeriod`; KEDA's default is 0.
    pub initial_cooldown: Duration,
}

impl Default for ScaledObject {
    fn default() -> Self {
        Self {
            min: 0,
            max: DEFAULT_MAX,
            idle: None,
            cooldown: DEFAULT_COOLDOWN,
            initial_cooldown: Duration::ZERO,
        }
    }
}

/// KEDA's memory of one ScaledObject.
#[derive(Clone, Debug)]
pub struct Keda {
    object: ScaledObject,
    created_ms: u64,
    last_active_ms: Option<u64>,
}

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// `.spec.replicas` of the target.
    pub replicas: i32,
    /// Whether a trigger is active: IsActive, or a `true` on StreamIsActive.
    pub active: bool,
    /// Whether a trigger answered with an error.
    pub error: bool,
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Keda {
    /// A ScaledObject created at `now_ms`.
    pub fn new(object: ScaledObject, now_ms: u64) -> Self {
        Self {
            object,
            created_ms: now_ms,
            last_active_ms: None,
        }
    }

    /// Changes the spec; what is remembered stays.
    pub fn set_object(&mut self, object: ScaledObject) {
        self.object = object;
    }

    /// `minReplicas` and `maxReplicas` of the HPA that KEDA creates.
    pub fn hpa_bounds(&self) -> (i32, i32) {
        let min = if self.object.min > 0 {
            self.object.min
        } else {
            1
        };
        (min, self.object.max)
    }

    /// One look of the polling loop, or a push. Some(n): KEDA writes n as `.spec.replicas`.
    pub fn look(&mut self, now_ms: u64, look: Look) -> Option<i32> {
        let Look {
            replicas,
            active,
            error,
        } = look;
        let ScaledObject { min, idle, .. } = self.object;
        if active {
            if (idle.is_some() && replicas < min) || replicas == 0 {
                self.last_active_ms = Some(now_ms);
                return Some(if min > 0 { min } else { 1 });
            }
            if !error {
                self.last_active_ms = Some(now_ms);
            }
            return None;
        }
        if error {
            return None;
        }
        if idle.is_some_and(|idle| replicas > idle) || (replicas > 0 && min == 0) {
            return self.is_cool(now_ms).then(|| idle.unwrap_or(min));
        }
        (idle.is_none() && replicas < min).then_some(min)
    }

    /// Never active: only the initial cooldown counts, from the creation on.
    fn is_cool(&self, now_ms: u64) -> bool {
        match self.last_active_ms {
            None => {
                self.created_ms
                    .saturating_add(ms(self.object.initial_cooldown))
                    < now_ms
            }
            Some(last) => last.saturating_add(ms(self.object.cooldown)) < now_ms,
        }
    }
}

/// The metric's value in thousandths that the HPA gets for a scaler's answer: the float if it is above 0, else the
/// integer; printed with three decimals; nothing below zero, infinite or not a number.
pub fn metric_milli(value_float: f64, value: i64) -> i64 {
    if value_float > 0.0 && value_float.is_finite() {
        let text = format!("{value_float:.3}").replace('.', "");
        return text.parse().unwrap_or(i64::MAX);
    }
    if value_float > 0.0 {
        0
    } else {
        value.max(0).saturating_mul(1000)
    }
}

/// The target in thousandths of a scaler's metric spec, by the same rule.
pub fn target_milli(target_size_float: f64, target_size: i64) -> i64 {
    metric_milli(target_size_float, target_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Look = Look {
        replicas: 1,
        active: false,
        error: false,
    };

    fn keda(min: i32, idle: Option<i32>) -> Keda {
        Keda::new(
            ScaledObject {
                min,
                idle,
                ..ScaledObject::default()
            },
            0,
        )
    }

    #[test]
    fn activity_wakes_to_the_minimum_or_one_never_to_more() {
        let wake = Look {
            replicas: 0,
            active: true,
            error: false,
        };
        assert_eq!(keda(0, None).look(1, wake), Some(1));
        assert_eq!(keda(3, None).look(1, wake), Some(3));
        assert_eq!(keda(3, Some(0)).look(1, wake), Some(3));
        assert_eq!(
            keda(3, Some(0)).look(
                1,
                Look {
                    replicas: 2,
                    ..wake
                }
            ),
            Some(3)
        );
        assert_eq!(
            keda(0, None).look(
                1,
                Look {
                    replicas: 5,
                    ..wake
                }
            ),
            None
        );
        assert_eq!(
            keda(0, None).look(
                1,
                Look {
                    error: true,
                    ..wake
                }
            ),
            Some(1),
            "another trigger's error does not matter"
        );
    }

    #[test]
    fn zero_comes_only_after_the_cooldown() {
        let mut keda = keda(0, None);
        keda.look(
            1_000,
            Look {
                active: true,
                ..IDLE
            },
        );
        assert_eq!(keda.look(301_000, IDLE), None, "not yet over");
        assert_eq!(keda.look(301_001, IDLE), Some(0));
    }

    #[test]
    fn target_that_was_never_active_goes_to_zero_without_cooldown() {
        assert_eq!(keda(0, None).look(1, IDLE), Some(0));
        let object = ScaledObject {
            initial_cooldown: Duration::from_mins(1),
            ..ScaledObject::default()
        };
        let mut patient = Keda::new(object, 0);
        assert_eq!(patient.look(60_000, IDLE), None);
        assert_eq!(patient.look(60_001, IDLE), Some(0));
    }

    #[test]
    fn minimum_above_zero_is_restored_and_never_left() {
        assert_eq!(
            keda(2, None).look(
                1,
                Look {
                    replicas: 1,
                    ..IDLE
                }
            ),
            Some(2)
        );
        assert_eq!(
            keda(2, None).look(
                9_999_999,
                Look {
                    replicas: 5,
                    ..IDLE
                }
            ),
            None
        );
        assert_eq!(
            keda(2, Some(0)).look(
                9_999_999,
                Look {
                    replicas: 5,
                    ..IDLE
                }
            ),
            Some(0)
        );
    }

    #[test]
    fn error_leaves_replicas_alone() {
        assert_eq!(
            keda(0, None).look(
                9_999_999,
                Look {
                    error: true,
                    ..IDLE
                }
            ),
            None
        );
        assert_eq!(
            keda(2, None).look(
                1,
                Look {
                    replicas: 1,
                    active: false,
                    error: true
                }
            ),
            None
        );
    }

    #[test]
    fn hpa_never_gets_a_minimum_of_zero() {
        assert_eq!(keda(0, None).hpa_bounds(), (1, 100));
        assert_eq!(keda(2, None).hpa_bounds(), (2, 100));
    }

    #[test]
    fn values_travel_in_thousandths_and_nonsense_becomes_zero() {
        assert_eq!(metric_milli(12.101, 13), 12_101);
        assert_eq!(metric_milli(2.000_4, 0), 2_000);
        assert_eq!(
            metric_milli(0.0, 7),
            7_000,
            "the integer counts where the float is not above 0"
        );
        assert_eq!(metric_milli(-1.0, 7), 7_000);
        assert_eq!(metric_milli(f64::NAN, -7), 0);
        assert_eq!(metric_milli(f64::INFINITY, 7), 0);
        assert_eq!(target_milli(1.0, 1), 1_000);
    }
}
