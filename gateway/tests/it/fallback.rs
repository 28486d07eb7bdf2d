//! Backends that come after some failures only.

use penstock_core::config::{FailureClass, FanOut, FanOutMode, Hedge};

use crate::harness::*;

const TOO_LONG: &str = "This model's maximum context length is 4096 tokens";
const POLICY: &str = "flagged by our content_policy";

/// `a` answers by `of_a`; then come `b`, and `long` and `other` after refusals only.
struct Four {
    _a: Upstream,
    b: Upstream,
    long: Upstream,
    other: Upstream,
    gateway: Gateway,
}

impl Four {
    async fn start(of_a: impl Fn() -> Reply + Send + Sync + 'static) -> Self {
        let a = Upstream::always(of_a).await;
        let b = Upstream::always(|| json_answer("b")).await;
        let long = Upstream::always(|| json_answer("long")).await;
        let other = Upstream::always(|| json_answer("other")).await;
        let plan = Plan::chain(&[a.address, b.address])
            .after("long", &[long.address], 0, [FailureClass::ContextLength])
            .after("other", &[other.address], 0, [FailureClass::ContentPolicy]);
        let gateway = Gateway::start(&plan).await;
        Self {
            _a: a,
            b,
            long,
            other,
            gateway,
        }
    }

    /// Who answers, how many attempts it took, and how often `b`, `long` and `other` were asked.
    async fn ask(&self) -> (String, String, [usize; 3]) {
        let header = "x-penstock-explain: 1\r\n";
        let answer = self.gateway.post_with(header, &chat(false)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let counts = [self.b.count(), self.long.count(), self.other.count()];
        let backend = answer.header("x-penstock-backend").to_owned();
        let attempts = answer.header("x-penstock-attempts").to_owned();
        (backend, attempts, counts)
    }
}

#[tokio::test]
async fn a_refusal_with_status_200_is_one_too() {
    let told = format!(
        "{{\"error\":{{\"message\":\"{TOO_LONG}\",\"type\":\"BadRequestError\",\"code\":400}}}}"
    );
    let four = Four::start(move || Reply::Json(200, told.clone())).await;
    let expected = ("ns/long".to_owned(), "2".to_owned(), [0, 1, 0]);
    assert_eq!(four.ask().await, expected);
}

#[tokio::test]
async fn each_refusal_has_its_own_backend() {
    for (message, backend, counts) in [
        (TOO_LONG, "ns/long", [0, 1, 0]),
        (POLICY, "ns/other", [0, 0, 1]),
    ] {
        let four = Four::start(move || Reply::Json(400, shaped_error(message))).await;
        let expected = (backend.to_owned(), "2".to_owned(), counts);
        assert_eq!(four.ask().await, expected, "{message}");
    }
}

#[tokio::test]
async fn other_failures_go_to_those_without_conditions() {
    let four = Four::start(|| Reply::Json(500, shaped_error("down"))).await;
    let expected = ("ns/b".to_owned(), "2".to_owned(), [1, 0, 0]);
    assert_eq!(four.ask().await, expected);
    let four = Four::start(|| json_answer("a")).await;
    let expected = ("ns/a".to_owned(), "1".to_owned(), [0, 0, 0]);
    assert_eq!(four.ask().await, expected);
}

#[tokio::test]
async fn a_refusal_that_nobody_comes_after_is_the_answer() {
    let a = Upstream::always(|| Reply::Json(400, shaped_error(POLICY))).await;
    let long = Upstream::always(|| json_answer("long")).await;
    let plan =
        Plan::chain(&[a.address]).after("long", &[long.address], 1, [FailureClass::ContextLength]);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body), (400, shaped_error(POLICY)));
    assert_eq!((a.count(), long.count()), (1, 0));
}

#[tokio::test]
async fn who_is_too_short_is_not_asked_again_when_the_longer_one_fails() {
    let a = Upstream::always(|| Reply::Json(400, shaped_error(TOO_LONG))).await;
    let long = Upstream::always(|| Reply::Json(503, shaped_error("busy"))).await;
    let plan = Plan::chain(&[a.address])
        .after("long", &[long.address], 0, [FailureClass::ContextLength])
        .rule(|rule| rule.retry.attempts = 3);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 503);
    assert_eq!((a.count(), long.count()), (1, 2));
}

#[tokio::test]
async fn a_limit_that_is_known_is_not_found_out_once_more() {
    const USED_UP: &str = "x-ratelimit-limit-requests: 100\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 30m\r\n";
    for (status, headers, asked) in [(429, "retry-after: 30\r\n", 4), (200, USED_UP, 3)] {
        let reply = move || Reply::Headers(status, headers, completion("x"));
        let a = Upstream::always(reply).await;
        let vendor = Upstream::always(|| json_answer("vendor")).await;
        let plan = Plan::chain(&[a.address]).after(
            "vendor",
            &[vendor.address],
            0,
            [FailureClass::RateLimit],
        );
        let gateway = Gateway::start(&plan).await;
        for _ in 0..4 {
            assert_eq!(gateway.post(&chat(false)).await.status, 200);
        }
        assert_eq!((a.count(), vendor.count()), (1, asked), "{status}");
    }
}

#[tokio::test]
async fn a_hedge_asks_nobody_who_comes_after_failures() {
    let silent = Upstream::always(|| Reply::Silent).await;
    let vendor = Upstream::always(hello).await;
    let plan = Plan::chain(&[silent.address])
        .after("vendor", &[vendor.address], 0, [FailureClass::Timeout])
        .rule(|rule| {
            rule.timeouts.first_token_ms = 300;
            rule.hedge = Some(Hedge {
                after_ms: 50,
                extra_percent: 100,
            });
        });
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(answer.header("x-penstock-backend"), "ns/vendor");
    let failed =
        "penstock_gateway_attempt_failures_total{backend=\"ns/a\",reason=\"first_token_timeout\"}";
    gateway.metric_is(failed, 1.0).await;
    assert_eq!((silent.count(), vendor.count()), (1, 1));
}

#[tokio::test]
async fn a_fan_out_asks_those_who_come_after_failures_when_all_have_failed() {
    for (status, asked) in [(200, 0), (500, 1)] {
        let reply = move || Reply::Json(status, completion("x"));
        let (a, b) = (Upstream::always(reply).await, Upstream::always(reply).await);
        let vendor = Upstream::always(|| json_answer("vendor")).await;
        let plan = Plan::chain(&[a.address, b.address])
            .after("vendor", &[vendor.address], 0, [FailureClass::ServerError])
            .rule(|rule| {
                rule.fan_out = Some(FanOut {
                    mode: FanOutMode::First,
                    max: 8,
                    within_ms: 20_000,
                });
            });
        let gateway = Gateway::start(&plan).await;
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
        assert_eq!(vendor.count(), asked, "{status}");
    }
}

#[tokio::test]
async fn it_is_explained_why_such_a_backend_is_not_asked() {
    let four = Four::start(|| json_answer("a")).await;
    let mut client = Client::connect(four.gateway.admin).await;
    client.post_to("/explain", "", &chat(false)).await;
    let told: serde_json::Value = serde_json::from_str(&client.answer().await.body).unwrap();
    let candidates = told["candidates"].as_array().unwrap().iter();
    let dropped: Vec<_> = candidates
        .map(|one| (one["backend"].as_str().unwrap(), one["dropped"].as_str()))
        .collect();
    assert_eq!(
        dropped,
        [
            ("ns/a", None),
            ("ns/long", Some("only after: ContextLength")),
            ("ns/other", Some("only after: ContentPolicy")),
            ("ns/b", None),
        ]
    );
    assert_eq!(told["chosen"]["backend"], "ns/a");
}
