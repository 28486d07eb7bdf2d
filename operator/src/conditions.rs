//! Findings about one object → its status conditions. Pure. `lastTransitionTime` moves only when a status flips, so the
//! same findings give the same conditions and nothing is written.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use penstock_crds::condition::Condition;
use penstock_crds::problem::Problem;

use crate::pod::Trouble;
use crate::programmed::Programmed;

/// Problems listed in one message; the rest is counted.
const MAX_LISTED: usize = 5;
/// Longest message; the API server's own bound is 32 KiB.
const MAX_MESSAGE: usize = 2048;
/// Condition types that are ours; others on the object are left alone.
pub(crate) const TYPES: [&str; 5] = [
    "Accepted",
    "ResolvedRefs",
    "Programmed",
    "ScalingActive",
    "Ready",
];

/// Whether a pool answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// There is nothing of ours that runs: a `service` or `external` backend, or a cache.
    None,
    /// A replica of the current template answers.
    Answers,
    /// No replicas, by choice.
    Zero,
    /// Replicas of an older template answer while the new ones start.
    RollingOut,
    /// No replica answers yet.
    Starting,
    /// Something keeps replicas from answering.
    Trouble(Trouble),
}

/// Whether KEDA scales a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scaling {
    /// It does.
    pub(crate) active: bool,
    /// One CamelCase word.
    pub(crate) reason: String,
    /// What is the case.
    pub(crate) message: String,
}

/// What a pass found out about one object.
#[derive(Clone, Debug)]
pub(crate) struct Findings<'a> {
    /// Its problems.
    pub(crate) problems: Vec<&'a Problem>,
    /// The spec cannot be read: why.
    pub(crate) unreadable: Option<String>,
    /// Its newest state does not fit the gateway's config.
    pub(crate) too_large: bool,
    /// A child's name is taken by an object that is not ours.
    pub(crate) name_taken: Option<String>,
    /// The API server refused a child.
    pub(crate) refused: Option<String>,
    /// Its state in each gateway that carries it; empty when none does.
    pub(crate) programmed: Vec<(String, Programmed)>,
    /// Whether it runs.
    pub(crate) workload: Workload,
    /// What keeps the gateway from answering, if it does not.
    pub(crate) gateway_trouble: Option<Trouble>,
    /// Only for pools with `scaling`.
    pub(crate) scaling: Option<Scaling>,
    /// A key that gateways are to refuse.
    pub(crate) is_suspended: bool,
    /// When a key ends.
    pub(crate) ends: Option<Timestamp>,
    /// A budget, which gateways refuse that could forget what was spent.
    pub(crate) is_budget: bool,
}

impl Findings<'_> {
    /// Nothing found.
    pub(crate) fn new() -> Self {
        Self {
            problems: Vec::new(),
            unreadable: None,
            too_large: false,
            name_taken: None,
            refused: None,
            programmed: Vec::new(),
            workload: Workload::None,
            gateway_trouble: None,
            scaling: None,
            is_suspended: false,
            ends: None,
            is_budget: false,
        }
    }
}

/// A condition before its times are filled in.
#[derive(Clone, Debug)]
struct Draft {
    type_: &'static str,
    status: Status,
    reason: String,
    message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    True,
    False,
    Unknown,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

fn draft(type_: &'static str, status: Status, reason: &str, message: impl Into<String>) -> Draft {
    Draft {
        type_,
        status,
        reason: reason.to_owned(),
        message: message.into(),
    }
}

/// The object's conditions. `previous` are those it has, `generation` the one that the findings are about.
pub(crate) fn conditions(
    findings: &Findings<'_>,
    previous: &[Condition],
    generation: Option<i64>,
    now: &Time,
) -> Vec<Condition> {
    let accepted = accepted(findings);
    let resolved = resolved(findings);
    let held = previous.iter().any(|condition| {
        condition.type_ == "Programmed"
            && condition.status == Status::True.name()
            && condition.observed_generation == generation
    });
    let programmed = programmed(findings, &accepted, held);
    let ready = ready(findings, [&accepted, &resolved, &programmed], now.0);
    let scaling = findings.scaling.as_ref().map(|scaling| {
        let status = if scaling.active {
            Status::True
        } else {
            Status::False
        };
        draft(
            "ScalingActive",
            status,
            &scaling.reason,
            scaling.message.clone(),
        )
    });
    [
        Some(accepted),
        Some(resolved),
        Some(programmed),
        scaling,
        Some(ready),
    ]
    .into_iter()
    .flatten()
    .map(|draft| finish(draft, previous, generation, now))
    .collect()
}

fn finish(draft: Draft, previous: &[Condition], generation: Option<i64>, now: &Time) -> Condition {
    let status = draft.status.name();
    let before = previous
        .iter()
        .find(|condition| condition.type_ == draft.type_ && condition.status == status);
    Condition {
        type_: draft.type_.to_owned(),
        status: status.to_owned(),
        reason: draft.reason,
        message: shorten(draft.message),
        observed_generation: generation,
        last_transition_time: before
            .map_or_else(|| now.clone(), |before| before.last_transition_time.clone()),
    }
}

fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(MAX_MESSAGE) {
        text.truncate(end);
        text.push('…');
    }
    text
}

fn list(problems: &[&Problem]) -> String {
    let mut lines: Vec<String> = problems
        .iter()
        .take(MAX_LISTED)
        .map(|problem| format!("{}: {}", problem.path, problem.message))
        .collect();
    if problems.len() > MAX_LISTED {
        lines.push(format!("and {} more", problems.len() - MAX_LISTED));
    }
    lines.join("; ")
}

fn accepted(findings: &Findings<'_>) -> Draft {
    let refuse = |reason: &str, message: String| draft("Accepted", Status::False, reason, message);
    if let Some(message) = &findings.unreadable {
        return refuse(
            "InvalidValue",
            format!("the spec cannot be read: {message}"),
        );
    }
    let own: Vec<&Problem> = findings
        .problems
        .iter()
        .filter(|p| !p.reason.is_reference())
        .copied()
        .collect();
    if let Some(first) = own.first() {
        return refuse(first.reason.name(), list(&own));
    }
    if let Some(message) = &findings.name_taken {
        return refuse("NameTaken", message.clone());
    }
    if findings.too_large {
        let message = "with this object the gateway's configuration is larger than a ConfigMap may be, so the \
                       previous one is served: name fewer rules, or spread them over several gateways";
        return refuse("ConfigTooLarge", message.to_owned());
    }
    draft("Accepted", Status::True, "Accepted", "the spec is valid")
}

fn resolved(findings: &Findings<'_>) -> Draft {
    let references: Vec<&Problem> = findings
        .problems
        .iter()
        .filter(|p| p.reason.is_reference())
        .copied()
        .collect();
    match references.first() {
        Some(first) => draft(
            "ResolvedRefs",
            Status::False,
            first.reason.name(),
            list(&references),
        ),
        None => draft(
            "ResolvedRefs",
            Status::True,
            "ResolvedRefs",
            "everything that the spec names exists",
        ),
    }
}

fn programmed(findings: &Findings<'_>, accepted: &Draft, held: bool) -> Draft {
    let Some((gateway, worst)) = findings
        .programmed
        .iter()
        .max_by_key(|(_, state)| state.clone())
    else {
        if accepted.status == Status::False {
            let message = "gateways do not get an object that is not accepted";
            return draft("Programmed", Status::False, "NotAccepted", message);
        }
        let message = "no RoutingPolicy leads here";
        return draft("Programmed", Status::Unknown, "NotReferenced", message);
    };
    let serves = |message: &str| draft("Programmed", Status::True, "Programmed", message);
    let not = |reason: &str, message: String| draft("Programmed", Status::False, reason, message);
    match worst {
        Programmed::Yes => serves("every ready gateway replica serves this state"),
        Programmed::Unknown if held => serves("every ready gateway replica serves this state"),
        Programmed::Unknown | Programmed::Pending => not(
            "Pending",
            format!("not every ready replica of gateway {gateway} has taken this state yet"),
        ),
        Programmed::Rejected(pod) if findings.is_budget => not(
            "NotDurable",
            format!(
                "gateway replica {pod} has no store that keeps what is spent: give gateways one that writes a log to its disk (--gateway-store), or make the budget Soft"
            ),
        ),
        Programmed::Rejected(pod) => not(
            "Rejected",
            format!(
                "gateway replica {pod} refused this state and serves the last good one: see its log"
            ),
        ),
        Programmed::NoReplica => {
            let message = match &findings.gateway_trouble {
                Some(trouble) => {
                    format!(
                        "gateway {gateway} has no ready replica: {}: {}",
                        trouble.reason, trouble.message
                    )
                }
                None => format!("gateway {gateway} has no ready replica yet"),
            };
            not("GatewayNotReady", message)
        }
    }
}

fn ready(findings: &Findings<'_>, others: [&Draft; 3], now: Timestamp) -> Draft {
    let not = |reason: &str, message: String| draft("Ready", Status::False, reason, message);
    let [accepted, resolved, programmed] = others;
    for condition in [accepted, resolved] {
        if condition.status == Status::False {
            return not(&condition.reason, condition.message.clone());
        }
    }
    if let Some(message) = &findings.refused {
        return not("ChildRefused", message.clone());
    }
    match &findings.workload {
        Workload::Trouble(trouble) => return not(&trouble.reason, trouble.message.clone()),
        Workload::Starting => return not("Starting", "no replica answers yet".to_owned()),
        Workload::RollingOut => {
            let message = "replicas of the previous spec answer while those of this one start";
            return not("RollingOut", message.to_owned());
        }
        Workload::None | Workload::Answers | Workload::Zero => {}
    }
    if programmed.status == Status::False {
        let lifted = findings
            .gateway_trouble
            .as_ref()
            .filter(|_| programmed.reason == "GatewayNotReady");
        let reason = lifted.map_or(programmed.reason.as_str(), |trouble| {
            trouble.reason.as_str()
        });
        return not(reason, programmed.message.clone());
    }
    if findings.is_suspended {
        let message = "gateways refuse it, as the spec asks";
        return draft("Ready", Status::True, "Suspended", message);
    }
    if let Some(end) = findings.ends.filter(|end| *end <= now) {
        let message = format!("gateways refuse it: it ended at {end}, as the spec asks");
        return draft("Ready", Status::True, "Expired", message);
    }
    match findings.workload {
        Workload::Zero => draft(
            "Ready",
            Status::True,
            "ScaledToZero",
            "there are no replicas, as the spec asks",
        ),
        Workload::Answers => draft("Ready", Status::True, "Ready", "it answers"),
        // What Penstock does not run it does not look at either: whether that answers, requests show.
        _ => draft("Ready", Status::True, "Ready", "gateways use it"),
    }
}

/// Whether the object's conditions have to be written: ours differ, or one of ours is there that should not be.
pub(crate) fn differ(previous: &[Condition], wanted: &[Condition]) -> bool {
    let ours = |condition: &&Condition| TYPES.contains(&condition.type_.as_str());
    previous.iter().filter(ours).count() != wanted.len()
        || wanted
            .iter()
            .any(|wanted| !previous.iter().any(|condition| condition == wanted))
}

#[cfg(test)]
mod tests {
    use penstock_core::ids::Id;
    use penstock_crds::{Kind, ObjectRef, Reason};

    use super::*;

    fn time(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn problem(reason: Reason, path: &str) -> Problem {
        let object = ObjectRef::new(Kind::LLMBackend, Id::new("ns", "blue"));
        Problem {
            object,
            path: path.into(),
            reason,
            message: "mend it".into(),
        }
    }

    /// `Type=Status/Reason` of each.
    fn show(findings: &Findings<'_>) -> Vec<String> {
        conditions(findings, &[], Some(3), &time(1))
            .iter()
            .map(|c| format!("{}={}/{}", c.type_, c.status, c.reason))
            .collect()
    }

    fn fine() -> Findings<'static> {
        Findings {
            programmed: vec![("g".into(), Programmed::Yes)],
            ..Findings::new()
        }
    }

    #[test]
    fn everything_in_order() {
        assert_eq!(
            show(&fine()),
            [
                "Accepted=True/Accepted",
                "ResolvedRefs=True/ResolvedRefs",
                "Programmed=True/Programmed",
                "Ready=True/Ready"
            ]
        );
    }

    #[test]
    fn not_referenced_is_unknown_and_does_not_block_ready() {
        let findings = Findings::new();
        assert_eq!(
            show(&findings)[2..],
            ["Programmed=Unknown/NotReferenced", "Ready=True/Ready"]
        );
    }

    #[test]
    fn own_problem_and_reference_go_to_different_conditions() {
        let (own, reference) = (
            problem(Reason::InvalidValue, "spec.a"),
            problem(Reason::SecretNotFound, "spec.b"),
        );
        let findings = Findings {
            problems: vec![&own],
            ..Findings::new()
        };
        assert_eq!(
            show(&findings),
            [
                "Accepted=False/InvalidValue",
                "ResolvedRefs=True/ResolvedRefs",
                "Programmed=False/NotAccepted",
                "Ready=False/InvalidValue"
            ]
        );
        let findings = Findings {
            problems: vec![&reference],
            ..fine()
        };
        assert_eq!(
            show(&findings),
            [
                "Accepted=True/Accepted",
                "ResolvedRefs=False/SecretNotFound",
                "Programmed=True/Programmed",
                "Ready=False/SecretNotFound"
            ]
        );
        let all = conditions(&findings, &[], None, &time(1));
        assert_eq!(all[1].message, "spec.b: mend it");
    }

    #[test]
    fn ready_table() {
        let trouble = |reason: &str| Trouble {
            reason: reason.into(),
            message: "why".into(),
        };
        let with = |workload| Findings { workload, ..fine() };
        let programmed = |state| Findings {
            programmed: vec![("g".into(), state)],
            ..Findings::new()
        };
        let table = [
            (with(Workload::Answers), "True/Ready"),
            (with(Workload::Zero), "True/ScaledToZero"),
            (with(Workload::Starting), "False/Starting"),
            (with(Workload::RollingOut), "False/RollingOut"),
            (
                with(Workload::Trouble(trouble("OOMKilled"))),
                "False/OOMKilled",
            ),
            (
                Findings {
                    refused: Some("no".into()),
                    ..fine()
                },
                "False/ChildRefused",
            ),
            (
                Findings {
                    name_taken: Some("no".into()),
                    ..fine()
                },
                "False/NameTaken",
            ),
            (
                Findings {
                    too_large: true,
                    ..fine()
                },
                "False/ConfigTooLarge",
            ),
            (
                Findings {
                    unreadable: Some("no".into()),
                    ..fine()
                },
                "False/InvalidValue",
            ),
            (programmed(Programmed::Pending), "False/Pending"),
            (programmed(Programmed::Unknown), "False/Pending"),
            (
                programmed(Programmed::Rejected("p".into())),
                "False/Rejected",
            ),
            (programmed(Programmed::NoReplica), "False/GatewayNotReady"),
            (
                Findings {
                    gateway_trouble: Some(trouble("ImagePullBackOff")),
                    ..programmed(Programmed::NoReplica)
                },
                "False/ImagePullBackOff",
            ),
        ];
        for (findings, expected) in table {
            let shown = show(&findings);
            assert_eq!(
                shown.last().unwrap(),
                &format!("Ready={expected}"),
                "{findings:?}"
            );
        }
    }

    #[test]
    fn a_key_that_is_refused_is_ready_and_says_so() {
        let suspended = Findings {
            is_suspended: true,
            ..fine()
        };
        assert_eq!(show(&suspended).last().unwrap(), "Ready=True/Suspended");
        // They are shown at the first second.
        for (second, reason) in [(0, "Expired"), (1, "Expired"), (2, "Ready")] {
            let ending = Findings {
                ends: Some(time(second).0),
                ..fine()
            };
            let expected = format!("Ready=True/{reason}");
            assert_eq!(show(&ending).last().unwrap(), &expected);
        }
    }

    #[test]
    fn the_worst_gateway_decides() {
        let states = vec![
            ("a".into(), Programmed::Yes),
            ("b".into(), Programmed::Pending),
        ];
        let findings = Findings {
            programmed: states,
            ..Findings::new()
        };
        let all = conditions(&findings, &[], None, &time(1));
        assert!(all[2].message.contains("gateway b"), "{}", all[2].message);
    }

    #[test]
    fn unknown_ack_after_a_restart_keeps_what_was_true_for_this_generation() {
        let findings = Findings {
            programmed: vec![("g".into(), Programmed::Unknown)],
            ..Findings::new()
        };
        let previous = conditions(&fine(), &[], Some(3), &time(1));
        assert!(!differ(
            &previous,
            &conditions(&findings, &previous, Some(3), &time(9))
        ));
        assert_eq!(
            conditions(&findings, &previous, Some(4), &time(9))[2].status,
            "False"
        );
    }

    #[test]
    fn time_moves_only_when_a_status_flips() {
        let first = conditions(&fine(), &[], Some(1), &time(1));
        let again = conditions(&fine(), &first, Some(1), &time(2));
        assert!(!differ(&first, &again));
        let edited = conditions(&fine(), &first, Some(2), &time(3));
        assert!(differ(&first, &edited), "observedGeneration is news");
        assert_eq!(edited[0].last_transition_time, time(1));
        let starting = Findings {
            workload: Workload::Starting,
            ..fine()
        };
        let flipped = conditions(&starting, &edited, Some(2), &time(4));
        assert_eq!(flipped[3].last_transition_time, time(4));
        assert_eq!(flipped[0].last_transition_time, time(1));
    }

    #[test]
    fn condition_that_no_longer_applies_is_a_difference_and_a_foreign_one_is_not() {
        let scaling = Scaling {
            active: true,
            reason: "R".into(),
            message: "m".into(),
        };
        let scaled = conditions(
            &Findings {
                scaling: Some(scaling),
                ..fine()
            },
            &[],
            None,
            &time(1),
        );
        let plain = conditions(&fine(), &scaled, None, &time(1));
        assert!(differ(&scaled, &plain));
        let mut foreign = plain.clone();
        foreign.push(Condition {
            type_: "Other".into(),
            ..plain[0].clone()
        });
        assert!(!differ(&foreign, &plain));
    }

    #[test]
    fn long_list_of_problems_is_cut_and_counted() {
        let many: Vec<Problem> = (0..9)
            .map(|i| problem(Reason::InvalidValue, &format!("spec.rules[{i}]")))
            .collect();
        let findings = Findings {
            problems: many.iter().collect(),
            ..Findings::new()
        };
        let all = conditions(&findings, &[], None, &time(1));
        assert!(all[0].message.ends_with("and 4 more"), "{}", all[0].message);
    }
}
