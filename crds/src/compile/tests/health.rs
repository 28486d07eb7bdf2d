//! Health checks.

use penstock_core::config::HealthCheck;

use super::*;

fn checked(check: &str) -> Compiled {
    let spec = POOL.replacen('{', &format!("{{healthCheck: {check}, "), 1);
    let text = backend("chat", &spec) + &policy("p", &rule("r", "m", "chat"));
    compile(&objects(&text), &Facts::default())
}

#[test]
fn a_health_check_has_the_defaults_of_kubernetes() {
    let compiled = checked("{}");
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let backend = only(&compiled).backends.values().next().unwrap();
    assert_eq!(
        backend.profile.health_check,
        Some(HealthCheck {
            path: "/health".to_owned(),
            interval_ms: 10_000,
            timeout_ms: 1_000,
            unhealthy_threshold: 3,
            healthy_threshold: 1,
        })
    );
}

#[test]
fn checks_that_cannot_be_made_are_named() {
    for (check, path) in [
        ("{path: health}", ".path"),
        ("{path: '/a b'}", ".path"),
        ("{interval: 10ms}", ".interval"),
        ("{interval: 1h}", ".interval"),
        ("{interval: 2s, timeout: 3s}", ".timeout"),
        ("{timeout: 1ms}", ".timeout"),
        ("{unhealthyThreshold: 0}", ".unhealthyThreshold"),
        ("{healthyThreshold: 101}", ".healthyThreshold"),
    ] {
        let compiled = checked(check);
        let path = format!("spec.healthCheck{path}");
        let is_named = compiled.problems.iter().any(|problem| problem.path == path);
        assert!(is_named, "{check}: {:?}", messages(&compiled));
    }
}
