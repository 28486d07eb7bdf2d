//! More requests than backends answer before callers give up.

use std::time::Duration;

use penstock_core::config::{NameMatch, Urgency};
use penstock_gateway::Settings;
use tokio::sync::mpsc::UnboundedSender;

use crate::harness::*;

/// How long the patient wait.
const LONG: Duration = Duration::from_mins(10);

/// Callers of whom none waits long enough.
async fn give_up(gateway: &Gateway, count: usize) {
    let mut callers = Vec::new();
    for _ in 0..count {
        let mut caller = gateway.client().await;
        caller.post("", &chat(true)).await;
        callers.push(caller);
    }
    let in_flight = "penstock_gateway_in_flight_requests";
    let all = f64::from(u8::try_from(count).unwrap());
    gateway.metric_is(in_flight, all).await;
    // Longer than what counts as patience.
    tokio::time::sleep(Duration::from_millis(400)).await;
    drop(callers);
    gateway.metric_is(in_flight, 0.0).await;
}

#[tokio::test]
async fn when_callers_give_up_in_masses_who_would_wait_too_long_is_refused_at_once() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    give_up(&gateway, 12).await;
    let asked = upstream.count();
    assert_eq!(asked, 12, "nobody is refused while nobody leaves");
    // Nothing was answered so far: a few may try all the same, and the rest hears at once.
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let mut caller = gateway.client().await;
        caller.post("", &chat(true)).await;
        waiting.push(caller);
    }
    until("the few are sent", || upstream.count() == asked + 4).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!((answer.status, answer.code().as_str()), (503, "saturated"));
    assert_eq!(answer.header("retry-after"), "1");
    assert_eq!(upstream.count(), asked + 4, "it was not sent");
}

#[tokio::test]
async fn a_request_that_waits_is_sent_as_soon_as_there_is_room_and_the_urgent_first() {
    let (steps, replies): (Vec<_>, Vec<_>) = (0..6).map(|_| driven()).unzip();
    let replies = std::sync::Mutex::new(replies.into_iter());
    let upstream = Upstream::start(move |number, _| {
        if number < 12 {
            Reply::Silent
        } else {
            replies.lock().unwrap().next().unwrap()
        }
    })
    .await;
    let mut plan = Plan::chain(&[upstream.address]);
    let mut urgent = plan.config.rules[0].clone();
    urgent.name = "urgent".to_owned();
    urgent.models = vec![penstock_core::config::NameMatch::Exact("urgent".to_owned())];
    urgent.urgency = Urgency::High;
    // Callers of this rule have shown no impatience: they wait for as long as the rule says.
    let mut patient = plan.config.rules[0].clone();
    patient.name = "patient".to_owned();
    patient.models = vec![penstock_core::config::NameMatch::Exact(
        "patient".to_owned(),
    )];
    plan.config.rules.extend([urgent, patient]);
    let gateway = Gateway::start(&plan).await;
    give_up(&gateway, 12).await;
    let mut sent = Vec::new();
    for _ in 0..4 {
        let mut caller = gateway.client().await;
        caller.post("", &chat(true)).await;
        sent.push(caller);
    }
    until("four are sent", || upstream.count() == 16).await;
    let mut patient = gateway.client().await;
    patient
        .post("", &chat(true).replace("\"chat\"", "\"patient\""))
        .await;
    gateway
        .metric_is("penstock_gateway_held_requests", 1.0)
        .await;
    let mut urgent = gateway.client().await;
    urgent
        .post("", &chat(true).replace("\"chat\"", "\"urgent\""))
        .await;
    gateway
        .metric_is("penstock_gateway_held_requests", 2.0)
        .await;
    assert_eq!(upstream.count(), 16, "both wait");
    let model = |number: usize| upstream.requests()[number].body.clone();
    for (room, expected) in [(0, "urgent"), (1, "patient")] {
        steps[room].send(Step::Write(sse_head())).unwrap();
        steps[room].send(Step::Chunk(role())).unwrap();
        steps[room].send(Step::Chunk(word("one"))).unwrap();
        let count = 17 + room;
        until("the next one is sent", || upstream.count() == count).await;
        let last = model(count - 1);
        assert!(last.contains(expected), "{last}");
    }
}

/// Whose calls were sent, in order; each stream that begins makes room for the next call.
async fn served(upstream: &Upstream, steps: &[UnboundedSender<Step>], count: usize) -> Vec<String> {
    let before = upstream.count();
    for (room, steps) in steps.iter().enumerate().take(count) {
        steps.send(Step::Write(sse_head())).unwrap();
        steps.send(Step::Chunk(role())).unwrap();
        steps.send(Step::Chunk(word("one"))).unwrap();
        until("the next one is sent", || upstream.count() > before + room).await;
    }
    let sent = upstream.requests().split_off(before);
    let whose = sent
        .iter()
        .map(|request| request.headers["x-whose"].clone());
    whose.collect()
}

/// A gateway of a saturated backend, whose callers of the model `patient` have shown no impatience: they wait for as
/// long as the rule says. Four requests are there already.
async fn saturated(
    settings: Settings,
    patience: Duration,
) -> (Vec<UnboundedSender<Step>>, Upstream, Gateway, Vec<Client>) {
    let (steps, replies): (Vec<_>, Vec<_>) = (0..20).map(|_| driven()).unzip();
    let replies = std::sync::Mutex::new(replies.into_iter());
    let upstream = Upstream::start(move |number, _| {
        if number < 12 {
            Reply::Silent
        } else {
            replies.lock().unwrap().next().unwrap()
        }
    })
    .await;
    let mut plan = Plan::chain(&[upstream.address]);
    let mut patient = plan.config.rules[0].clone();
    patient.name = "patient".to_owned();
    patient.models = vec![NameMatch::Exact("patient".to_owned())];
    let patience_ms = patience.as_millis().try_into().unwrap();
    (patient.timeouts.first_token_ms, patient.timeouts.total_ms) = (patience_ms, patience_ms);
    plan.config.rules.push(patient);
    let gateway = Gateway::start_with(&plan, settings).await;
    give_up(&gateway, 12).await;
    let mut callers = Vec::new();
    for _ in 0..4 {
        let mut caller = gateway.client().await;
        caller.post("", &chat(true)).await;
        callers.push(caller);
    }
    until("four are sent", || upstream.count() == 16).await;
    (steps, upstream, gateway, callers)
}

impl Gateway {
    /// A patient request of somebody, or of one who shows nothing.
    async fn patient(&self, whose: &str) -> Client {
        match whose {
            "none" => self.patient_of("", whose).await,
            whose => {
                let key = format!("authorization: Bearer {whose}\r\n");
                self.patient_of(&key, whose).await
            }
        }
    }

    /// The same of whoever shows this, with a name for the test.
    async fn patient_of(&self, key: &str, whose: &str) -> Client {
        let body = chat(true).replace("\"chat\"", "\"patient\"");
        let mut caller = self.client().await;
        let headers = format!("{key}x-whose: {whose}\r\n");
        caller.post(&headers, &body).await;
        caller
    }
}

#[tokio::test]
async fn who_floods_a_queue_that_is_full_gives_way_to_others() {
    let mut settings = settings();
    settings.limits.held = 4;
    let (steps, upstream, gateway, _callers) = saturated(settings, LONG).await;
    let mut flood = Vec::new();
    for held in 1_u8..=4 {
        flood.push(gateway.patient("flood").await);
        gateway
            .metric_is("penstock_gateway_held_requests", f64::from(held))
            .await;
    }
    let refused = gateway.patient("flood").await.answer().await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (503, "saturated")
    );
    let _few = gateway.patient("few").await;
    let refused = flood.pop().unwrap().answer().await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (503, "saturated")
    );
    let order = served(&upstream, &steps, 4).await;
    assert!(order.contains(&"few".to_owned()), "{order:?}");
}

#[tokio::test]
async fn who_floods_a_saturated_backend_waits_behind_itself() {
    let (steps, upstream, gateway, mut callers) = saturated(settings(), LONG).await;
    let flood = std::iter::repeat_n("flood", 10);
    let calls = flood.chain(["few", "few", "none", "few"]);
    for (held, whose) in (1_u8..).zip(calls) {
        callers.push(gateway.patient(whose).await);
        gateway
            .metric_is("penstock_gateway_held_requests", f64::from(held))
            .await;
    }
    assert_eq!(upstream.count(), 16, "all of them wait");
    let order = served(&upstream, &steps, 14).await;
    assert_eq!(order.len(), 14, "nothing is held back for nobody");
    // Three tenants take turns, so each of the few calls has at most so many others before it as there are in three
    // turns. In the order of their coming they would be the last four.
    let last_of_others = order.iter().rposition(|whose| whose != "flood").unwrap();
    assert!(last_of_others < 9, "{order:?}");
}

#[tokio::test]
async fn once_the_oldest_has_waited_for_half_of_its_time_the_newest_comes_first() {
    let patience = Duration::from_secs(10);
    let (steps, upstream, gateway, mut callers) = saturated(settings(), patience).await;
    for (held, name) in (1_u8..).zip(["first", "second", "third"]) {
        callers.push(gateway.patient_of("", name).await);
        gateway
            .metric_is("penstock_gateway_held_requests", f64::from(held))
            .await;
    }
    tokio::time::sleep(patience / 2).await;
    let order = served(&upstream, &steps, 3).await;
    assert_eq!(order, ["third", "second", "first"]);
}
