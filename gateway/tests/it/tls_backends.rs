//! TLS with backends: whom the gateway believes, what it shows, what it says when it fails, and what changes while it
//! runs.

use std::collections::BTreeMap;

use penstock_core::config::{Condition, NameMatch, Protocol};
use penstock_gateway::source::{Credential, Credentials};

use crate::harness::*;

const NAME: &str = "engine.ns.svc";

fn values(pairs: &[(&str, &str)]) -> Credentials {
    let pairs = pairs.iter();
    let values = pairs.map(|(id, value)| ((*id).to_owned(), Credential::new(*value)));
    Credentials {
        values: values.collect::<BTreeMap<_, _>>(),
    }
}

fn of(authority: &Authority, shown: Option<&Signed>) -> Credentials {
    let mut all = values(&[("ca", &authority.pem)]);
    if let Some(shown) = shown {
        let pair = [("tls.crt", &shown.certificate), ("tls.key", &shown.key)];
        let pair = pair.map(|(id, value)| (id.to_owned(), Credential::new(value.as_str())));
        all.values.extend(pair);
    }
    all
}

/// A gateway in front of `upstreams`, in this order; only the first one speaks TLS.
async fn gateway(
    secured: &HyperUpstream,
    other: Option<&Upstream>,
    shown: bool,
    credentials: Credentials,
) -> Gateway {
    let mut plan = Plan::new().backend("a", &[secured.address], 1, 0);
    plan = plan.tls("a", NAME, "ca", shown);
    if let Some(other) = other {
        plan = plan.backend("b", &[other.address], 1, 1);
    }
    let gateway = Gateway::empty(settings()).await;
    gateway.set_credentials(credentials);
    gateway.apply(&plan).await;
    gateway
}

async fn ok(gateway: &Gateway, text: &str) {
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body), (200, completion(text)));
}

#[tokio::test]
async fn pods_are_asked_for_their_name_and_believed_by_their_authority() {
    let authority = Authority::new();
    let speaks = over_tls(&authority.sign(&[NAME]), None, &["http/1.1"]);
    let upstream = HyperUpstream::start(speaks, |_, _| served("x")).await;
    let gateway = gateway(&upstream, None, false, of(&authority, None)).await;
    for _ in 0..2 {
        ok(&gateway, "x").await;
    }
    let seen = upstream.requests();
    assert_eq!(seen[0].sni.as_deref(), Some(NAME));
    assert_eq!(seen[0].headers["host"], upstream.address.to_string());
    assert_eq!(upstream.connections(), 1, "connections are kept");
}

#[tokio::test]
async fn what_is_wrong_with_a_certificate_is_told_and_another_backend_answers() {
    let (authority, other) = (Authority::new(), Authority::new());
    for (signed, trusted, label, words) in [
        (
            other.sign(&[NAME]),
            &authority,
            "tls_unknown_issuer",
            "signed by nobody",
        ),
        (
            authority.sign(&["b.example"]),
            &authority,
            "tls_wrong_name",
            "for other names",
        ),
        (
            authority.sign_expired(&[NAME]),
            &authority,
            "tls_expired",
            "has expired",
        ),
    ] {
        let speaks = over_tls(&signed, None, &[]);
        let upstream = HyperUpstream::start(speaks, |_, _| served("never")).await;
        let next = Upstream::always(|| json_answer("next")).await;
        let gateway = gateway(&upstream, Some(&next), false, of(trusted, None)).await;
        let headers = "x-penstock-explain: 1\r\n";
        let answer = gateway.post_with(headers, &chat(false)).await;
        assert_eq!(
            (answer.status, &answer.body),
            (200, &completion("next")),
            "{label}"
        );
        let decision = answer.header("x-penstock-decision");
        assert!(decision.contains(label), "{decision}");
        let series = format!(
            "penstock_gateway_attempt_failures_total{{backend=\"ns/a\",reason=\"{label}\"}}"
        );
        gateway.metric_is(&series, 1.0).await;
        let mut client = Client::connect(gateway.admin).await;
        client.post_to("/explain", "", &chat(false)).await;
        let told = client.answer().await.body;
        assert!(told.contains(words), "{told}");
        // As connections that fail do, two of them send the endpoint away.
        gateway.post(&chat(false)).await;
        gateway
            .metric_is("penstock_gateway_ejections_total", 1.0)
            .await;
        assert_eq!(upstream.requests().len(), 0);
    }
}

#[tokio::test]
async fn alone_it_is_unreachable() {
    let authority = Authority::new();
    let speaks = over_tls(&authority.sign(&["b.example"]), None, &[]);
    let upstream = HyperUpstream::start(speaks, |_, _| served("never")).await;
    let gateway = gateway(&upstream, None, false, of(&authority, None)).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "upstream_unreachable")
    );
}

#[tokio::test]
async fn a_backend_that_asks_who_calls_is_shown_the_gateways_certificate() {
    let (authority, callers) = (Authority::new(), Authority::new());
    let speaks = over_tls(&authority.sign(&[NAME]), Some(&callers), &[]);
    let upstream = HyperUpstream::start(speaks, |_, _| served("x")).await;
    let next = Upstream::always(|| json_answer("next")).await;
    let shown = callers.sign(&["gateway"]);
    let with = gateway(&upstream, Some(&next), true, of(&authority, Some(&shown))).await;
    ok(&with, "x").await;
    assert_eq!(upstream.requests()[0].shown, Some(shown.der()));

    let without = gateway(&upstream, Some(&next), false, of(&authority, None)).await;
    ok(&without, "next").await;
    let reason = "backend=\"ns/a\",reason=\"tls_client_certificate\"";
    let series = format!("penstock_gateway_attempt_failures_total{{{reason}}}");
    without.metric_is(&series, 1.0).await;
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn over_http_2_a_refused_certificate_is_a_connection_that_cannot_be_made() {
    let (authority, callers, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let speaks = over_tls(&authority.sign(&[NAME]), Some(&callers), &["h2"]);
    let upstream = HyperUpstream::start(speaks, |_, _| served("never")).await;
    let next = Upstream::always(|| json_answer("next")).await;
    let shown = strangers.sign(&["gateway"]);
    for shown in [None, Some(&shown)] {
        let mut plan = Plan::new().backend("a", &[upstream.address], 1, 0);
        plan = plan.tls("a", NAME, "ca", shown.is_some());
        plan = plan.backend("b", &[next.address], 1, 1).rule(|rule| {
            rule.models.clear();
            let paths = vec![NameMatch::Prefix("/tools/".to_owned())];
            rule.conditions = vec![Condition::Paths(paths)];
        });
        plan = plan.speaking("a", Protocol::Http);
        plan = plan.speaking("b", Protocol::Http);
        let gateway = Gateway::empty(settings()).await;
        gateway.set_credentials(of(&authority, shown));
        gateway.apply(&plan).await;
        // A POST that may not be sent twice: nothing of it was sent.
        let mut client = gateway.client().await;
        client.post_to("/tools/x", "", "hi").await;
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.body), (200, completion("next")));
        let reason = "backend=\"ns/a\",reason=\"tls_client_certificate\"";
        let series = format!("penstock_gateway_attempt_failures_total{{{reason}}}");
        gateway.metric_is(&series, 1.0).await;
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_new_certificate_is_shown_on_new_connections_while_streams_go_on() {
    let (authority, callers) = (Authority::new(), Authority::new());
    let speaks = over_tls(&authority.sign(&[NAME]), Some(&callers), &["http/1.1"]);
    let (steps, stream) = streamed();
    let stream = std::sync::Mutex::new(Some(stream));
    let upstream = HyperUpstream::start(speaks, move |_, request| {
        let wants_stream = String::from_utf8_lossy(&request.body).contains("\"stream\":true");
        match wants_stream
            .then(|| stream.lock().unwrap().take())
            .flatten()
        {
            Some(stream) => stream,
            None => served("x"),
        }
    })
    .await;
    let (first, second) = (callers.sign(&["first"]), callers.sign(&["second"]));
    let gateway = gateway(&upstream, None, true, of(&authority, Some(&first))).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(word("one")).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&word("one")).await;
    // Leaves an idle connection behind.
    ok(&gateway, "x").await;

    gateway.set_credentials(of(&authority, Some(&second)));
    within("the new certificate is shown", async {
        loop {
            ok(&gateway, "x").await;
            if upstream.requests().last().unwrap().shown == Some(second.der()) {
                break;
            }
        }
    })
    .await;
    let before = upstream.connections();
    ok(&gateway, "x").await;
    assert_eq!(upstream.connections(), before, "the new connection is kept");
    steps.send(word("two") + DONE).unwrap();
    drop(steps);
    client.expect(&(word("two") + DONE)).await;
    assert_eq!(client.chunk().await, Ok(None));
}

#[tokio::test]
async fn what_cannot_be_used_leaves_the_last_good_form_in_force() {
    let authority = Authority::new();
    let speaks = over_tls(&authority.sign(&[NAME]), None, &["http/1.1"]);
    let upstream = HyperUpstream::start(speaks, |_, _| served("x")).await;
    let gateway = gateway(&upstream, None, false, of(&authority, None)).await;
    ok(&gateway, "x").await;
    let unsecured = "penstock_gateway_backends_unsecured";
    gateway.set_credentials(values(&[("ca", "nothing of the kind")]));
    gateway.metric_is(unsecured, 1.0).await;
    ok(&gateway, "x").await;
    gateway.set_credentials(of(&authority, None));
    gateway.metric_is(unsecured, 0.0).await;
    ok(&gateway, "x").await;
}

#[tokio::test]
async fn without_its_authorities_a_backend_waits_and_is_never_spoken_to_in_the_clear() {
    let authority = Authority::new();
    let speaks = over_tls(&authority.sign(&[NAME]), None, &[]);
    let upstream = HyperUpstream::start(speaks, |_, _| served("x")).await;
    let gateway = gateway(&upstream, None, false, Credentials::default()).await;
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &chat(false)).await;
    let told = client.answer().await.body;
    assert!(
        told.contains("TLS cannot be spoken with it: 'ca' has not arrived"),
        "{told}"
    );
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    gateway
        .metric_is("penstock_gateway_held_requests", 1.0)
        .await;
    assert_eq!(upstream.connections(), 0);
    gateway.set_credentials(of(&authority, None));
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.body), (200, completion("x")));
}
