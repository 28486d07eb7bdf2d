//! The arithmetic of the Kubernetes HorizontalPodAutoscaler for external metrics, for forms that run without a cluster.
//!
//! Follows kubernetes v1.34 `pkg/controller/podautoscaler` (`replica_calculator.go`, `horizontal.go`) and
//! `pkg/apis/autoscaling/v2/defaults.go` step by step, quirks included; tests reproduce upstream's own tables. Times
//! are ms of any clock that does not go back. Metric values are thousandths, as the API carries them.

use std::time::Duration;

/// How often the controller looks (`--horizontal-pod-autoscaler-sync-period`).
pub const SYNC_PERIOD: Duration = Duration::from_secs(15);
/// The controller's tolerance (`--horizontal-pod-autoscaler-tolerance`).
pub const DEFAULT_TOLERANCE: f64 = 0.1;
/// The controller's scale-down window (`--horizontal-pod-autoscaler-downscale-stabilization`), s.
pub const DEFAULT_DOWN_WINDOW_S: u32 = 300;
/// Recommendations and events kept: an hour, the longest window allowed, at a sync a second. The oldest go first.
const MAX_KEPT: usize = 3600;

/// How a policy counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// Pods.
    Pods,
    /// Percent of the replicas at the start of the period.
    Percent,
}

/// At most `value` of change in `period_s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How `value` counts.
    pub kind: PolicyKind,
    /// Pods or percent.
    pub value: i32,
    /// Seconds, 1..=1800.
    pub period_s: u32,
}

/// Which of several policies holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// The one that allows the largest change.
    Max,
    /// The one that allows the smallest change.
    Min,
    /// No change in this direction.
    Disabled,
}

/// Rules of one direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Stabilization window, s, 0..=3600.
    pub window_s: u32,
    /// Which policy holds.
    pub select: Select,
    /// Policies.
    pub policies: Vec<Policy>,
    /// Tolerance of this direction; none: the controller's. Only where the cluster has `HPAConfigurableTolerance`.
    pub tolerance: Option<f64>,
}

/// `spec.behavior`.
#[derive(Clone, Debug, PartialEq)]
pub struct Behavior {
    /// Rules for more replicas.
    pub up: Rules,
    /// Rules for fewer.
    pub down: Rules,
}

impl Default for Behavior {
    /// What the API server fills in when `behavior` is given without details.
    fn default() -> Self {
        let policy = |kind, value| Policy {
            kind,
            value,
            period_s: 15,
        };
        Self {
            up: Rules {
                window_s: 0,
                select: Select::Max,
                policies: vec![
                    policy(PolicyKind::Pods, 4),
                    policy(PolicyKind::Percent, 100),
                ],
                tolerance: None,
            },
            down: Rules {
                window_s: DEFAULT_DOWN_WINDOW_S,
                select: Select::Max,
                policies: vec![policy(PolicyKind::Percent, 100)],
                tolerance: None,
            },
        }
    }
}

/// What an HPA is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Least replicas; KEDA passes max(1, minReplicaCount).
    pub min: i32,
    /// Most replicas.
    pub max: i32,
    /// `spec.behavior`; none takes the controller's older rules, which differ in the scale-up limit.
    pub behavior: Option<Behavior>,
    /// The controller's tolerance.
    pub tolerance: f64,
}

/// What the target has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// `.spec.replicas`.
    pub spec_replicas: i32,
    /// `.status.replicas`: pods that exist, ready or not.
    pub status_replicas: i32,
    /// Pods that are running and ready.
    pub ready_pods: i32,
}

/// One external metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// What it is held against.
    pub target: Target,
    /// Its value in thousandths; none if it could not be had.
    pub value: Option<i64>,
}

/// A metric's target in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `AverageValue`: the value is divided by the number of replicas.
    AverageValue(i64),
    /// `Value`: the value as it is; the ratio multiplies the *ready* pods.
    Value(i64),
}

/// What kept the number from being what the metrics said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Nothing did.
    None,
    /// The scale-up rate.
    ScaleUpRate,
    /// The scale-down rate.
    ScaleDownRate,
    /// `max`.
    Max,
    /// `min`.
    Min,
}

/// What a sync ended in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// `.spec.replicas` is 0 and `min` is not: the HPA is off.
    Disabled,
    /// Metrics are missing: nothing is changed.
    NoMetrics,
    /// `.spec.replicas` should be `replicas`.
    Scale {
        /// The number, which may be the present one.
        replicas: i32,
        /// What the metrics said.
        wanted: i32,
        /// What kept it from that.
        limit: Limit,
    },
}

/// An HPA's memory.
#[derive(Clone, Debug)]
pub struct Hpa {
    spec: Spec,
    recommendations: Vec<(u64, i32)>,
    ups: Vec<(u64, i32)>,
    downs: Vec<(u64, i32)>,
}

#[derive(Clone, Copy, Debug)]
struct Tolerances {
    up: f64,
    down: f64,
}

impl Tolerances {
    fn hold(self, ratio: f64) -> bool {
        (1.0 - self.down) <= ratio && ratio <= (1.0 + self.up)
    }
}

#[expect(clippy::cast_precision_loss, reason = "as the controller converts")]
fn float(value: i64) -> f64 {
    value as f64
}

/// Like Go's conversion of a float in range; beyond the range it saturates.
#[expect(clippy::cast_possible_truncation, reason = "saturates")]
fn int(value: f64) -> i32 {
    value as i32
}

/// Replicas that one metric asks for.
fn proposal(target: Target, value: i64, scale: Scale, tolerances: Tolerances) -> i32 {
    match target {
        Target::AverageValue(target) => {
            let ratio = float(value) / (float(target) * f64::from(scale.status_replicas));
            if tolerances.hold(ratio) {
                return scale.status_replicas;
            }
            int((float(value) / float(target)).ceil())
        }
        Target::Value(target) => {
            let ratio = float(value) / float(target);
            if scale.spec_replicas == 0 {
                return int(ratio.ceil());
            }
            if tolerances.hold(ratio) {
                return scale.spec_replicas;
            }
            int((ratio * f64::from(scale.ready_pods)).ceil())
        }
    }
}

impl Hpa {
    /// A new HPA, which remembers nothing.
    pub fn new(spec: Spec) -> Self {
        Self {
            spec,
            recommendations: Vec::new(),
            ups: Vec::new(),
            downs: Vec::new(),
        }
    }

    /// Changes the spec; the memory stays, as it does in the controller.
    pub fn set_spec(&mut self, spec: Spec) {
        self.spec = spec;
    }

    /// One sync. The caller writes the number to the target; a change is remembered as made.
    pub fn sync(&mut self, now_ms: u64, scale: Scale, metrics: &[Metric]) -> Sync {
        let current = scale.spec_replicas;
        if self.recommendations.is_empty() {
            self.recommendations.push((now_ms, current));
        }
        if current == 0 && self.spec.min != 0 {
            return Sync::Disabled;
        }
        let outcome = if current > self.spec.max {
            Sync::Scale {
                replicas: self.spec.max,
                wanted: self.spec.max,
                limit: Limit::Max,
            }
        } else if current < self.spec.min {
            Sync::Scale {
                replicas: self.spec.min,
                wanted: self.spec.min,
                limit: Limit::Min,
            }
        } else {
            let Some(wanted) = self.wanted(scale, metrics) else {
                return Sync::NoMetrics;
            };
            let wanted = wanted.max(0);
            let (replicas, limit) = self.normalise(now_ms, current, wanted);
            Sync::Scale {
                replicas,
                wanted,
                limit,
            }
        };
        if let Sync::Scale { replicas, .. } = outcome {
            self.note_change(now_ms, current, replicas);
        }
        outcome
    }

    /// The largest proposal; with a metric missing, fewer replicas than now are not an answer.
    fn wanted(&self, scale: Scale, metrics: &[Metric]) -> Option<i32> {
        let tolerances = self.tolerances();
        let proposals = metrics
            .iter()
            .filter_map(|metric| Some(proposal(metric.target, metric.value?, scale, tolerances)));
        let wanted = proposals.max()?;
        let missing = metrics.iter().any(|metric| metric.value.is_none());
        (!missing || wanted >= scale.spec_replicas).then_some(wanted)
    }

    fn tolerances(&self) -> Tolerances {
        let of = |rules: Option<&Rules>| {
            rules
                .and_then(|rules| rules.tolerance)
                .unwrap_or(self.spec.tolerance)
        };
        let behavior = self.spec.behavior.as_ref();
        Tolerances {
            up: of(behavior.map(|both| &both.up)),
            down: of(behavior.map(|both| &both.down)),
        }
    }

    fn normalise(&mut self, now_ms: u64, current: i32, wanted: i32) -> (i32, Limit) {
        if let Some(behavior) = self.spec.behavior.clone() {
            let stable = self.stabilise(now_ms, current, wanted, &behavior);
            self.limit_rate(now_ms, current, stable, &behavior)
        } else {
            let stable = self.stabilise_down(now_ms, wanted);
            limit_plainly(current, stable, self.spec.min, self.spec.max)
        }
    }

    /// Between the least recommendation of the up window and the most of the down window.
    fn stabilise(&mut self, now_ms: u64, current: i32, wanted: i32, behavior: &Behavior) -> i32 {
        let within = |window_s: u32| {
            let window_ms = u64::from(window_s) * 1000;
            self.recommendations
                .iter()
                .filter(move |(at, _)| at + window_ms > now_ms)
                .map(|(_, replicas)| *replicas)
        };
        let up = within(behavior.up.window_s).fold(wanted, i32::min);
        let down = within(behavior.down.window_s).fold(wanted, i32::max);
        let longest_s = behavior.up.window_s.max(behavior.down.window_s);
        self.remember(now_ms, wanted, longest_s);
        current.max(up).min(down)
    }

    /// The rule without `behavior`: the most of the scale-down window.
    fn stabilise_down(&mut self, now_ms: u64, wanted: i32) -> i32 {
        let window_ms = u64::from(DEFAULT_DOWN_WINDOW_S) * 1000;
        let recent = self
            .recommendations
            .iter()
            .filter(|(at, _)| at + window_ms >= now_ms);
        let stable = recent.map(|(_, replicas)| *replicas).fold(wanted, i32::max);
        self.remember(now_ms, wanted, DEFAULT_DOWN_WINDOW_S);
        stable
    }

    fn remember(&mut self, now_ms: u64, wanted: i32, window_s: u32) {
        self.recommendations
            .retain(|(at, _)| at + u64::from(window_s) * 1000 >= now_ms);
        push_bounded(&mut self.recommendations, (now_ms, wanted));
    }

    fn limit_rate(
        &self,
        now_ms: u64,
        current: i32,
        wanted: i32,
        behavior: &Behavior,
    ) -> (i32, Limit) {
        if wanted > current {
            let rate = self
                .rate_limit(now_ms, current, &behavior.up, Direction::Up)
                .max(current);
            let (most, limit) = if self.spec.max > rate {
                (rate, Limit::ScaleUpRate)
            } else {
                (self.spec.max, Limit::Max)
            };
            if wanted > most {
                return (most, limit);
            }
        } else if wanted < current {
            let rate = self
                .rate_limit(now_ms, current, &behavior.down, Direction::Down)
                .min(current);
            let (least, limit) = if self.spec.min < rate {
                (rate, Limit::ScaleDownRate)
            } else {
                (self.spec.min, Limit::Min)
            };
            if wanted < least {
                return (least, limit);
            }
        }
        (wanted, Limit::None)
    }

    fn rate_limit(&self, now_ms: u64, current: i32, rules: &Rules, direction: Direction) -> i32 {
        let changed = |events: &[(u64, i32)], period_s: u32| -> i32 {
            let recent = events
                .iter()
                .filter(|(at, _)| at + u64::from(period_s) * 1000 > now_ms);
            recent
                .map(|(_, change)| *change)
                .fold(0, i32::saturating_add)
        };
        let allowed = rules.policies.iter().map(|policy| {
            let added = changed(&self.ups, policy.period_s);
            let removed = changed(&self.downs, policy.period_s);
            let start = current.saturating_sub(added).saturating_add(removed);
            let share = f64::from(policy.value) / 100.0;
            match (direction, policy.kind) {
                (Direction::Up, PolicyKind::Pods) => start.saturating_add(policy.value),
                // Rounded up: a change that rounds to none would never begin.
                (Direction::Up, PolicyKind::Percent) => {
                    int((f64::from(start) * (1.0 + share)).ceil())
                }
                (Direction::Down, PolicyKind::Pods) => start.saturating_sub(policy.value),
                (Direction::Down, PolicyKind::Percent) => int(f64::from(start) * (1.0 - share)),
            }
        });
        let largest_wins = match rules.select {
            Select::Disabled => return current,
            Select::Max => direction == Direction::Up,
            Select::Min => direction == Direction::Down,
        };
        // Without a policy upstream's fold leaves its neutral element.
        if largest_wins {
            allowed.fold(i32::MIN, i32::max)
        } else {
            allowed.fold(i32::MAX, i32::min)
        }
    }

    fn note_change(&mut self, now_ms: u64, before: i32, after: i32) {
        let Some(behavior) = self.spec.behavior.as_ref().filter(|_| before != after) else {
            return;
        };
        let (events, rules) = if after > before {
            (&mut self.ups, &behavior.up)
        } else {
            (&mut self.downs, &behavior.down)
        };
        let longest_s = rules
            .policies
            .iter()
            .map(|policy| policy.period_s)
            .max()
            .unwrap_or(0);
        events.retain(|(at, _)| at + u64::from(longest_s) * 1000 >= now_ms);
        push_bounded(
            events,
            (
                now_ms,
                after.abs_diff(before).try_into().unwrap_or(i32::MAX),
            ),
        );
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

fn push_bounded(kept: &mut Vec<(u64, i32)>, entry: (u64, i32)) {
    if kept.len() >= MAX_KEPT {
        kept.remove(0);
    }
    kept.push(entry);
}

/// The limits without `behavior`: at most twice the replicas, or 4, in one sync.
fn limit_plainly(current: i32, wanted: i32, min: i32, max: i32) -> (i32, Limit) {
    let rate = int((2.0 * f64::from(current)).max(4.0));
    let (most, limit) = if max > rate {
        (rate, Limit::ScaleUpRate)
    } else {
        (max, Limit::Max)
    };
    if wanted < min {
        (min, Limit::Min)
    } else if wanted > most {
        (most, limit)
    } else {
        (wanted, Limit::None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn spec(min: i32, max: i32) -> Spec {
        Spec {
            min,
            max,
            behavior: Some(Behavior::default()),
            tolerance: DEFAULT_TOLERANCE,
        }
    }

    fn scale(replicas: i32) -> Scale {
        Scale {
            spec_replicas: replicas,
            status_replicas: replicas,
            ready_pods: replicas,
        }
    }

    const EVEN: Tolerances = Tolerances {
        up: DEFAULT_TOLERANCE,
        down: DEFAULT_TOLERANCE,
    };

    #[test]
    fn proposals_are_those_of_upstreams_external_metric_tests() {
        let value = |ready, current, value, target| {
            proposal(
                Target::Value(target),
                value,
                Scale {
                    spec_replicas: current,
                    status_replicas: current,
                    ready_pods: ready,
                },
                EVEN,
            )
        };
        // TestReplicaCalcScaleUpCMExternal, …IgnoresUnreadyPods, ScaleDown, Tolerance.
        assert_eq!(value(1, 1, 8600, 4400), 2);
        assert_eq!(value(2, 3, 8600, 4400), 4);
        assert_eq!(value(5, 5, 8600, 14_334), 3);
        assert_eq!(value(3, 3, 8600, 8888), 3);
        let average = |current, value, target| {
            proposal(Target::AverageValue(target), value, scale(current), EVEN)
        };
        // …PerPodCMExternal: up, down, tolerance, overflow.
        assert_eq!(average(3, 8600, 2150), 4);
        assert_eq!(average(5, 8600, 2867), 3);
        assert_eq!(average(3, 8600, 2867), 3);
        assert_eq!(average(1, i64::from(i32::MAX) + 10, 1), i32::MAX);
    }

    #[test]
    fn desired_replicas_with_target_one_loses_small_steps_in_the_tolerance() {
        let wanted = |current, replicas: i64| {
            proposal(
                Target::AverageValue(1000),
                replicas * 1000,
                scale(current),
                EVEN,
            )
        };
        assert_eq!(wanted(10, 11), 10, "+1 at 10 is exactly 10 %");
        assert_eq!(wanted(11, 12), 11);
        assert_eq!(wanted(9, 10), 10, "+1 at 9 is 11 %");
        assert_eq!(wanted(10, 9), 10, "-1 at 10 is exactly 10 %");
        assert_eq!(wanted(9, 8), 8);
        let exact = Tolerances { up: 0.0, down: 0.0 };
        assert_eq!(
            proposal(Target::AverageValue(1000), 12_000, scale(11), exact),
            12
        );
    }

    #[test]
    fn value_multiplies_ready_pods_and_average_value_ignores_them() {
        let loading = Scale {
            spec_replicas: 4,
            status_replicas: 4,
            ready_pods: 1,
        };
        assert_eq!(
            proposal(Target::Value(500), 1500, loading, EVEN),
            3,
            "fewer than already ordered"
        );
        assert_eq!(proposal(Target::AverageValue(1000), 6000, loading, EVEN), 6);
        // A pool-average KV gauge under AverageValue 0.75 cannot ask for a third replica.
        assert_eq!(proposal(Target::AverageValue(750), 1000, scale(1), EVEN), 2);
        assert_eq!(proposal(Target::AverageValue(750), 1000, scale(2), EVEN), 2);
    }

    fn pods(value: i32, period_s: u32) -> Policy {
        Policy {
            kind: PolicyKind::Pods,
            value,
            period_s,
        }
    }

    fn percent(value: i32, period_s: u32) -> Policy {
        Policy {
            kind: PolicyKind::Percent,
            value,
            period_s,
        }
    }

    struct Case {
        current: i32,
        wanted: i32,
        bounds: (i32, i32),
        up: Option<Vec<Policy>>,
        down: Option<Vec<Policy>>,
        ups: Vec<i32>,
        downs: Vec<i32>,
        expected: (i32, Limit),
    }

    fn case(current: i32, wanted: i32, bounds: (i32, i32), expected: (i32, Limit)) -> Case {
        Case {
            current,
            wanted,
            bounds,
            up: None,
            down: None,
            ups: vec![],
            downs: vec![],
            expected,
        }
    }

    /// Upstream's TestScalingWithRules; events lie within the last 120 s.
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn upstream_cases() -> Vec<Case> {
        let up = |policies: Vec<Policy>, ups: Vec<i32>, downs: Vec<i32>, rest: Case| Case {
            up: Some(policies),
            ups,
            downs,
            ..rest
        };
        let down = |policies: Vec<Policy>, ups: Vec<i32>, downs: Vec<i32>, rest: Case| Case {
            down: Some(policies),
            ups,
            downs,
            ..rest
        };
        let wide = (1, 1000);
        vec![
            case(5, 7, (3, 8), (7, Limit::None)),
            case(3, 1, (2, 8), (2, Limit::Min)),
            case(1, 0, (0, 10), (0, Limit::None)),
            case(100, 1000, (100, 150), (150, Limit::Max)),
            case(10, 50, wide, (20, Limit::ScaleUpRate)),
            up(
                vec![percent(1, 60)],
                vec![],
                vec![],
                case(3, 1000, (1, 2000), (4, Limit::ScaleUpRate)),
            ),
            up(
                vec![pods(100, 60), percent(100, 60)],
                vec![],
                vec![],
                case(10, 500, wide, (110, Limit::ScaleUpRate)),
            ),
            up(
                vec![pods(2, 60), percent(100, 60)],
                vec![],
                vec![],
                case(10, 500, wide, (20, Limit::ScaleUpRate)),
            ),
            up(
                vec![pods(30, 60)],
                vec![],
                vec![],
                case(10, 50, wide, (40, Limit::ScaleUpRate)),
            ),
            up(
                vec![percent(200, 60)],
                vec![],
                vec![],
                case(10, 50, wide, (30, Limit::ScaleUpRate)),
            ),
            up(
                vec![pods(300, 60)],
                vec![1, 5, 9],
                vec![],
                case(100, 500, (1, 200), (200, Limit::Max)),
            ),
            up(
                vec![pods(5, 120)],
                vec![1, 5, 9],
                vec![],
                case(100, 500, wide, (100, Limit::ScaleUpRate)),
            ),
            up(
                vec![pods(150, 120)],
                vec![1, 5, 9],
                vec![],
                case(100, 500, wide, (235, Limit::ScaleUpRate)),
            ),
            up(
                vec![percent(200, 120)],
                vec![1, 5, 9],
                vec![],
                case(100, 500, wide, (255, Limit::ScaleUpRate)),
            ),
            up(
                vec![percent(300, 300)],
                vec![4],
                vec![2],
                case(6, 24, wide, (16, Limit::ScaleUpRate)),
            ),
            down(
                vec![pods(20, 60)],
                vec![],
                vec![],
                case(1000, 3, (3, 2000), (980, Limit::ScaleDownRate)),
            ),
            down(
                vec![pods(20, 60), percent(1, 60)],
                vec![],
                vec![],
                case(100, 2, wide, (80, Limit::ScaleDownRate)),
            ),
            down(
                vec![pods(2, 60), percent(1, 60)],
                vec![],
                vec![],
                case(100, 2, wide, (98, Limit::ScaleDownRate)),
            ),
            down(
                vec![pods(100, 60)],
                vec![],
                vec![],
                case(10, 0, wide, (1, Limit::Min)),
            ),
            down(
                vec![percent(100, 60)],
                vec![],
                vec![],
                case(10, 2, (5, 1000), (5, Limit::Min)),
            ),
            down(
                vec![pods(5, 60)],
                vec![],
                vec![],
                case(10, 2, wide, (5, Limit::ScaleDownRate)),
            ),
            down(
                vec![percent(50, 60)],
                vec![],
                vec![],
                case(10, 5, wide, (5, Limit::None)),
            ),
            case(10, 5, wide, (5, Limit::None)),
            down(
                vec![pods(115, 120)],
                vec![],
                vec![1, 5, 9],
                case(100, 0, wide, (1, Limit::Min)),
            ),
            down(
                vec![pods(5, 120)],
                vec![],
                vec![1, 5, 9],
                case(100, 2, wide, (100, Limit::ScaleDownRate)),
            ),
            down(
                vec![percent(50, 120)],
                vec![],
                vec![2, 4, 6],
                case(100, 0, wide, (56, Limit::ScaleDownRate)),
            ),
            down(
                vec![percent(50, 180)],
                vec![2],
                vec![4],
                case(10, 1, wide, (6, Limit::ScaleDownRate)),
            ),
            down(
                vec![percent(10, 120)],
                vec![],
                vec![10, 10, 10],
                case(100, 0, wide, (100, Limit::ScaleDownRate)),
            ),
            down(
                vec![percent(1000, 120)],
                vec![],
                vec![10, 10, 10],
                case(10, 5, wide, (5, Limit::None)),
            ),
        ]
    }

    #[test]
    fn rate_limits_are_those_of_upstreams_tests() {
        for (number, case) in upstream_cases().into_iter().enumerate() {
            let mut behavior = Behavior::default();
            behavior.up.policies = case.up.unwrap_or(behavior.up.policies);
            behavior.down.policies = case.down.unwrap_or(behavior.down.policies);
            let mut hpa = Hpa::new(Spec {
                behavior: Some(behavior.clone()),
                ..spec(case.bounds.0, case.bounds.1)
            });
            let events = |changes: Vec<i32>| {
                changes
                    .into_iter()
                    .map(|change| (NOW - 60_000, change))
                    .collect()
            };
            hpa.ups = events(case.ups);
            hpa.downs = events(case.downs);
            assert_eq!(
                hpa.limit_rate(NOW, case.current, case.wanted, &behavior),
                case.expected,
                "case {number}"
            );
        }
    }

    #[test]
    #[expect(clippy::type_complexity, reason = "a table")]
    fn stabilisation_is_that_of_upstreams_tests() {
        const MINUTE: u64 = 60_000;
        // Recommendations, current, wanted, up window, down window, expected
        // (TestNormalizeDesiredReplicasWithBehavior).
        let cases: [(&[(u64, i32)], i32, i32, u32, u32, i32); 8] = [
            (&[], 100, 5, 0, 0, 5),
            (&[(2, 4), (1, 5)], 100, 3, 0, 180, 5),
            (&[(2, 4), (1, 5)], 1, 7, 300, 0, 4),
            (&[(2, 1), (1, 2)], 100, 3, 300, 0, 3),
            (&[(10, 10), (1, 4), (2, 5), (9, 9)], 100, 3, 0, 180, 5),
            (&[(100, 10), (1, 6), (2, 5), (3, 9)], 1, 100, 300, 0, 5),
            (&[(100, 2), (3, 3)], 2, 1, 300, 300, 2),
            (&[(100, 2), (3, 1)], 2, 3, 300, 300, 2),
        ];
        for (number, (recommendations, current, wanted, up, down, expected)) in
            cases.into_iter().enumerate()
        {
            let mut behavior = Behavior::default();
            (behavior.up.window_s, behavior.down.window_s) = (up, down);
            let mut hpa = Hpa::new(Spec {
                behavior: Some(behavior.clone()),
                ..spec(1, 1000)
            });
            hpa.recommendations = recommendations
                .iter()
                .map(|(ago, replicas)| (NOW - ago * MINUTE, *replicas))
                .collect();
            assert_eq!(
                hpa.stabilise(NOW, current, wanted, &behavior),
                expected,
                "case {number}"
            );
        }
        // TestNormalizeDesiredReplicas: without behavior.
        let plain: [(&[(u64, i32)], i32, i32); 4] = [
            (&[], 5, 5),
            (&[(2, 4), (1, 5)], 3, 5),
            (&[(2, 1), (1, 2)], 3, 3),
            (&[(10, 10), (4, 4), (2, 5), (9, 9)], 3, 5),
        ];
        for (recommendations, wanted, expected) in plain {
            let mut hpa = Hpa::new(Spec {
                behavior: None,
                ..spec(1, 1000)
            });
            hpa.recommendations = recommendations
                .iter()
                .map(|(ago, replicas)| (NOW - ago * MINUTE, *replicas))
                .collect();
            assert_eq!(hpa.stabilise_down(NOW, wanted), expected);
        }
    }

    fn desired(replicas: i64) -> [Metric; 1] {
        [Metric {
            target: Target::AverageValue(1000),
            value: Some(replicas * 1000),
        }]
    }

    fn replicas(sync: Sync) -> i32 {
        match sync {
            Sync::Scale { replicas, .. } => replicas,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pool_grows_at_once_by_policy_and_shrinks_after_the_window() {
        let mut hpa = Hpa::new(spec(1, 10));
        assert_eq!(
            replicas(hpa.sync(NOW, scale(1), &desired(8))),
            5,
            "4 pods in 15 s"
        );
        assert_eq!(
            replicas(hpa.sync(NOW + 14_000, scale(5), &desired(8))),
            5,
            "the period is not over"
        );
        assert_eq!(replicas(hpa.sync(NOW + 15_000, scale(5), &desired(8))), 8);
        let calm = NOW + 30_000;
        for at in (0..285).step_by(15) {
            assert_eq!(
                replicas(hpa.sync(calm + at * 1000, scale(8), &desired(1))),
                8,
                "{at} s of calm"
            );
        }
        // 300 s after 8 was recommended for the last time.
        assert_eq!(replicas(hpa.sync(calm + 285_000, scale(8), &desired(1))), 1);
    }

    #[test]
    fn without_behavior_growth_is_limited_to_double_or_four() {
        let mut hpa = Hpa::new(Spec {
            behavior: None,
            ..spec(1, 100)
        });
        assert_eq!(replicas(hpa.sync(NOW, scale(1), &desired(50))), 4);
        assert_eq!(replicas(hpa.sync(NOW + 1, scale(4), &desired(50))), 8);
    }

    #[test]
    fn bounds_come_before_metrics_and_zero_disables() {
        let mut hpa = Hpa::new(spec(2, 4));
        assert_eq!(hpa.sync(NOW, scale(0), &desired(3)), Sync::Disabled);
        assert_eq!(replicas(hpa.sync(NOW, scale(9), &desired(9))), 4);
        assert_eq!(replicas(hpa.sync(NOW, scale(1), &[])), 2);
    }

    #[test]
    fn missing_metric_holds_and_never_shrinks() {
        let missing = Metric {
            target: Target::AverageValue(1000),
            value: None,
        };
        let mut hpa = Hpa::new(spec(1, 10));
        assert_eq!(hpa.sync(NOW, scale(5), &[missing]), Sync::NoMetrics);
        assert_eq!(
            hpa.sync(NOW, scale(5), &[missing, desired(2)[0]]),
            Sync::NoMetrics
        );
        assert_eq!(
            replicas(hpa.sync(NOW, scale(5), &[missing, desired(7)[0]])),
            7
        );
    }

    #[test]
    fn direction_with_disabled_policy_stands_still() {
        let mut behavior = Behavior::default();
        behavior.down = Rules {
            select: Select::Disabled,
            window_s: 0,
            ..behavior.down
        };
        let mut hpa = Hpa::new(Spec {
            behavior: Some(behavior),
            ..spec(1, 10)
        });
        assert_eq!(replicas(hpa.sync(NOW, scale(5), &desired(1))), 5);
        assert_eq!(replicas(hpa.sync(NOW, scale(5), &desired(8))), 8);
    }

    #[test]
    fn memory_is_bounded() {
        let mut behavior = Behavior::default();
        behavior.down.window_s = 3600;
        behavior.up.policies = vec![pods(100, 1800)];
        behavior.down.policies = vec![pods(100, 1800)];
        let mut hpa = Hpa::new(Spec {
            behavior: Some(behavior),
            ..spec(1, 10)
        });
        for step in 0..2 * MAX_KEPT as u64 {
            let now = if step % 2 == 0 { 1 } else { 9 };
            hpa.sync(NOW + step, scale(now), &desired(10 - i64::from(now)));
        }
        assert!(
            hpa.recommendations.len() <= MAX_KEPT
                && hpa.ups.len() <= MAX_KEPT
                && hpa.downs.len() <= MAX_KEPT
        );
    }

    proptest! {
        #[test]
        fn answer_stays_within_the_bounds(min in 1..5_i32, extra in 0..20_i32, start in 1..30_i32, values in prop::collection::vec(0..40_000_i64, 1..60), plain: bool) {
            let behavior = (!plain).then(Behavior::default);
            let mut hpa = Hpa::new(Spec { behavior, ..spec(min, min + extra) });
            let mut current = start;
            for (step, value) in (0_u64..).zip(values) {
                let metric = Metric { target: Target::AverageValue(1000), value: Some(value) };
                current = replicas(hpa.sync(NOW + step * 15_000, scale(current), &[metric]));
                prop_assert!((min..=min + extra).contains(&current));
            }
        }
    }
}
