//! Backends that speak plain HTTP: agents and tools.

use penstock_core::config::{CallerCredentials, Condition, NameMatch, Protocol, Repeat};
use penstock_gateway::{Credential, Credentials};

use crate::harness::*;

/// A chain of HTTP backends behind a rule for `/tools/*`.
fn plan(addresses: &[std::net::SocketAddr]) -> Plan {
    let mut plan = Plan::chain(addresses).rule(|rule| {
        rule.models.clear();
        let paths = vec![NameMatch::Prefix("/tools/".to_owned())];
        rule.conditions = vec![Condition::Paths(paths)];
    });
    for backend in plan.config.backends.values_mut() {
        backend.protocol = Protocol::Http;
    }
    plan
}

async fn send(gateway: &Gateway, request: &str) -> Answer {
    let mut client = gateway.client().await;
    client.send(request).await;
    client.answer().await
}

fn post(headers: &str) -> String {
    format!("POST /tools/x HTTP/1.1\r\nhost: gw\r\n{headers}content-length: 2\r\n\r\nhi")
}

fn ok(body: &str) -> Reply {
    Reply::Json(200, body.to_owned())
}

#[tokio::test]
async fn requests_pass_as_they_are_to_the_byte() {
    let upstream =
        Upstream::always(|| Reply::Headers(203, "x-tool: 1\r\nset-cookie: a\r\n", "{}".to_owned()))
            .await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    for (method, target, body) in [
        ("GET", "/tools/a%20b//c?q=%7B%7D&q=2&&x", ""),
        ("POST", "/tools/", "not json \u{0} at all"),
        ("PUT", "/tools/x?", "{}"),
        ("DELETE", "/tools/x;y=1", ""),
        ("PATCH", "/tools/x", "p"),
        ("OPTIONS", "/tools/x", ""),
        ("PROPFIND", "/tools/x", "<a/>"),
    ] {
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("content-length: {}\r\ncontent-encoding: x\r\n", body.len())
        };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nhost: gw\r\naccept-encoding: br\r\n{length}\r\n{body}"
        );
        let answer = send(&gateway, &request).await;
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (203, "{}"),
            "{method}"
        );
        assert_eq!(
            (answer.header("x-tool"), answer.header("set-cookie")),
            ("1", "")
        );
        assert_eq!(answer.header("x-penstock-backend"), "ns/a");
        let seen = upstream.requests().pop().unwrap();
        assert_eq!(seen.line, format!("{method} {target} HTTP/1.1"));
        assert_eq!(seen.body, body);
        assert_eq!(seen.headers["accept-encoding"], "br");
        assert_eq!(
            seen.headers.contains_key("content-length"),
            !body.is_empty(),
            "{method}"
        );
    }
    let series =
        "penstock_gateway_requests_total{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"ok\"}";
    gateway.metric_is(series, 7.0).await;
}

#[tokio::test]
async fn the_service_is_told_who_calls_and_not_with_what_credentials() {
    let upstream = Upstream::always(|| ok("{}")).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let headers = "authorization: Bearer mine\r\ncookie: a=b\r\nx-api-key: k\r\nconnection: x-hop\r\nx-hop: 1\r\n\
                   te: trailers\r\nx-forwarded-for: 10.0.0.9\r\nx-user: u\r\n";
    assert_eq!(send(&gateway, &post(headers)).await.status, 200);
    let seen = upstream.requests().pop().unwrap().headers;
    for absent in ["authorization", "cookie", "x-api-key", "x-hop"] {
        assert!(!seen.contains_key(absent), "{absent}");
    }
    // The gateway's own.
    assert_eq!(
        (seen["te"].as_str(), seen["connection"].as_str()),
        ("trailers", "te")
    );
    assert_eq!(seen["x-forwarded-for"], "10.0.0.9, 127.0.0.1");
    assert_eq!(
        (
            seen["x-forwarded-proto"].as_str(),
            seen["x-forwarded-host"].as_str()
        ),
        ("http", "gw")
    );
    assert_eq!(
        (seen["x-user"].as_str(), seen["host"].clone()),
        ("u", upstream.address.to_string())
    );
    assert!(seen["via"].contains("penstock-ns-gateway"));
}

#[tokio::test]
async fn credentials_of_callers_pass_where_the_backend_is_to_have_them() {
    let upstream =
        Upstream::always(|| Reply::Headers(200, "set-cookie: a\r\n", "{}".to_owned())).await;
    let mut plan = plan(&[upstream.address]);
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    backend.caller_credentials = CallerCredentials::Passed;
    let gateway = Gateway::start(&plan).await;
    let answer = send(
        &gateway,
        &post("authorization: Bearer mine\r\ncookie: a=b\r\n"),
    )
    .await;
    assert_eq!(answer.header("set-cookie"), "a");
    let seen = upstream.requests().pop().unwrap().headers;
    assert_eq!(
        (seen["authorization"].as_str(), seen["cookie"].as_str()),
        ("Bearer mine", "a=b")
    );
}

#[tokio::test]
async fn a_credential_of_the_backend_replaces_the_callers() {
    let upstream = Upstream::always(|| ok("{}")).await;
    let gateway = Gateway::empty(settings()).await;
    let credential = Credential::new("secret".to_owned());
    let credentials = Credentials {
        values: [("key".to_owned(), credential)].into(),
    };
    gateway.set_credentials(credentials);
    gateway
        .apply(&plan(&[upstream.address]).credential("a", "key"))
        .await;
    let answer = send(&gateway, &post("authorization: Bearer mine\r\n")).await;
    assert_eq!(answer.status, 200);
    let seen = upstream.requests().pop().unwrap().headers;
    assert_eq!(seen["authorization"], "Bearer secret");
}

#[tokio::test]
async fn an_answer_is_passed_on_from_its_head_on() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client
        .send("GET /tools/events HTTP/1.1\r\nhost: gw\r\n\r\n")
        .await;
    steps.send(Step::Write(sse_head())).unwrap();
    // Before there is any event.
    assert_eq!(client.head().await.0, 200);
    steps.send(Step::Chunk(": ping\n\n".to_owned())).unwrap();
    client.expect(": ping\n\n").await;
    steps
        .send(Step::Chunk(
            "data: {\"error\":{\"message\":\"no model said that\"}}\n\n".to_owned(),
        ))
        .unwrap();
    client
        .expect("data: {\"error\":{\"message\":\"no model said that\"}}\n\n")
        .await;
    steps.send(Step::End).unwrap();
    assert_eq!(
        client.chunk().await,
        Ok(None),
        "an end is an end, without [DONE] too"
    );
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_cut_and_a_caller_that_leaves_frees_the_service() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply, Reply::Silent]).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client
        .send("GET /tools/events HTTP/1.1\r\nhost: gw\r\n\r\n")
        .await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk("data: 1\n\n".to_owned())).unwrap();
    client.head().await;
    client.expect("data: 1\n\n").await;
    steps.send(Step::Reset).unwrap();
    assert!(client.chunk().await.is_err());

    let mut leaver = gateway.client().await;
    leaver.send(&post("")).await;
    until("it is upstream", || upstream.count() == 2).await;
    drop(leaver);
    until("it is gone", || upstream.gone() == 1).await;
}

#[tokio::test]
async fn answers_without_a_body_keep_their_length() {
    let upstream = Upstream::replies(vec![
        Reply::Raw("HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n".to_owned()),
        Reply::Raw("HTTP/1.1 204 No Content\r\n\r\n".to_owned()),
        Reply::Raw("HTTP/1.1 304 Not Modified\r\netag: x\r\ncontent-length: 77\r\n\r\n".to_owned()),
        Reply::Raw(
            "HTTP/1.1 302 Found\r\nlocation: /tools/y\r\ncontent-length: 0\r\n\r\n".to_owned(),
        ),
    ])
    .await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let mut client = gateway.client().await;
    let mut statuses = Vec::new();
    for method in ["HEAD", "GET", "GET", "GET"] {
        client
            .send(&format!("{method} /tools/x HTTP/1.1\r\nhost: gw\r\n\r\n"))
            .await;
        let (status, headers) = client.head().await;
        statuses.push(status);
        match status {
            200 => assert_eq!(headers["content-length"], "1234"),
            302 => assert_eq!(headers["location"], "/tools/y"),
            _ => {}
        }
    }
    assert_eq!(statuses, [200, 204, 304, 302]);
    gateway.metric_is("penstock_gateway_connections", 1.0).await;
}

#[tokio::test]
async fn what_the_service_says_of_a_failure_reaches_the_caller() {
    let failing = || Reply::Headers(503, "x-why: full\r\n", "<h1>no</h1>".to_owned());
    let (upstreams, addresses) = Upstream::several(2, failing).await;
    let gateway = Gateway::start(&plan(&addresses)).await;
    let get = "GET /tools/x HTTP/1.1\r\nhost: gw\r\n\r\n";
    for (request, attempts) in [(get.to_owned(), 3), (post(""), 1)] {
        let before: usize = upstreams.iter().map(Upstream::count).sum();
        let answer = send(&gateway, &request).await;
        assert_eq!(
            (answer.status, answer.body.as_str(), answer.header("x-why")),
            (503, "<h1>no</h1>", "full")
        );
        let after: usize = upstreams.iter().map(Upstream::count).sum();
        assert_eq!(after - before, attempts, "{request}");
    }
    for status in [400, 401, 404, 409, 429] {
        let upstream = Upstream::always(move || Reply::Json(status, "no".to_owned())).await;
        gateway.apply(&plan(&[upstream.address])).await;
        let answer = send(&gateway, get).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, "no"));
        assert_eq!(upstream.count(), 1);
    }
    let large = "x".repeat(200 << 10);
    let text = large.clone();
    let upstream = Upstream::always(move || Reply::Json(500, text.clone())).await;
    gateway.apply(&plan(&[upstream.address])).await;
    let answer = send(&gateway, get).await;
    assert_eq!((answer.status, answer.body), (500, large));
}

/// How often a request goes upstream whose first backend resets the connection once it has it all, and the status.
async fn sent(repeat: Repeat, request: &str) -> (usize, u16) {
    let broken = Upstream::always(|| Reply::Reset).await;
    let good = Upstream::always(|| ok("{}")).await;
    let plan = plan(&[broken.address, good.address]).rule(|rule| rule.retry.repeat = repeat);
    let gateway = Gateway::start(&plan).await;
    let answer = send(&gateway, request).await;
    (broken.count() + good.count(), answer.status)
}

#[tokio::test]
async fn what_may_have_been_carried_out_is_repeated_only_where_that_does_no_harm() {
    let get = "GET /tools/x HTTP/1.1\r\nhost: gw\r\n\r\n".to_owned();
    let delete = "DELETE /tools/x HTTP/1.1\r\nhost: gw\r\n\r\n".to_owned();
    let keyed = post("idempotency-key: 1\r\n");
    for (repeat, request, expected) in [
        (Repeat::Safe, &get, (2, 200)),
        (Repeat::Safe, &post(""), (1, 502)),
        (Repeat::Safe, &keyed, (1, 502)),
        (Repeat::Safe, &delete, (1, 502)),
        (Repeat::Keyed, &post(""), (1, 502)),
        (Repeat::Keyed, &keyed, (2, 200)),
        (Repeat::Always, &post(""), (2, 200)),
    ] {
        assert_eq!(
            sent(repeat, request).await,
            expected,
            "{repeat:?} {request:?}"
        );
    }
}

#[tokio::test]
async fn what_did_not_go_upstream_goes_elsewhere_whatever_it_is() {
    let good = Upstream::always(|| ok("{}")).await;
    let gateway = Gateway::start(&plan(&[nobody(), good.address])).await;
    assert_eq!(send(&gateway, &post("")).await.status, 200);
    let large = "x".repeat(3 << 20);
    let request = format!(
        "POST /tools/x HTTP/1.1\r\nhost: gw\r\ncontent-length: {}\r\n\r\n{large}",
        large.len()
    );
    assert_eq!(send(&gateway, &request).await.status, 200);
    assert_eq!(good.requests().pop().unwrap().body, large);
}

#[tokio::test]
async fn requests_that_broke_off_put_no_blame_on_others_with_the_same_body() {
    let (upstreams, addresses) = Upstream::several(2, || Reply::Reset).await;
    let gateway = Gateway::start(&plan(&addresses)).await;
    let get = "GET /tools/x HTTP/1.1\r\nhost: gw\r\n\r\n";
    let answer = send(&gateway, get).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "upstream_unreachable")
    );
    assert!(upstreams.iter().all(|upstream| upstream.count() > 0));
    let good = Upstream::always(|| ok("{}")).await;
    gateway.apply(&plan(&[good.address])).await;
    assert_eq!(send(&gateway, get).await.status, 200);
}

#[tokio::test]
async fn requests_are_spread_over_the_pods_of_a_service() {
    let (upstreams, addresses) = Upstream::several(3, || ok("{}")).await;
    let mut plan = plan(&addresses[..1]);
    plan.set_endpoints("a", &addresses);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..30 {
        assert_eq!(send(&gateway, &post("")).await.status, 200);
    }
    for upstream in &upstreams {
        assert_eq!(upstream.count(), 10);
    }
}

#[tokio::test]
async fn rules_match_by_path_method_and_header() {
    let (upstreams, addresses) = Upstream::several(2, || ok("{}")).await;
    let mut plan = plan(&addresses);
    let mut other = plan.config.rules[0].clone();
    plan.config.rules[0].backends.truncate(1);
    plan.config.rules[0].conditions.extend([
        Condition::Methods(["POST".to_owned()].into()),
        Condition::Header("x-tool".to_owned(), NameMatch::Exact("a".to_owned())),
    ]);
    other.name = "other".to_owned();
    other.backends.remove(0);
    plan.config.rules.push(other);
    let gateway = Gateway::start(&plan).await;
    for (request, backend) in [
        (post("x-tool: a\r\n"), "ns/a"),
        (post("x-tool: b\r\n"), "ns/b"),
        (
            "GET /tools/x HTTP/1.1\r\nhost: gw\r\nx-tool: a\r\n\r\n".to_owned(),
            "ns/b",
        ),
    ] {
        let answer = send(&gateway, &request).await;
        assert_eq!(
            (answer.status, answer.header("x-penstock-backend")),
            (200, backend),
            "{request}"
        );
    }
    assert_eq!((upstreams[0].count(), upstreams[1].count()), (1, 2));
}

#[tokio::test]
async fn what_cannot_pass_is_refused() {
    let upstream = Upstream::always(|| ok("{}")).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let get =
        |target: &str, headers: &str| format!("GET {target} HTTP/1.1\r\nhost: gw\r\n{headers}\r\n");
    let websocket = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n";
    for (request, status, code) in [
        (get("/other", ""), 404, "path_not_found"),
        (get("/tools", ""), 404, "path_not_found"),
        (get("/v1/models", ""), 200, ""),
        (get("/v1/chat/completions", ""), 405, "method_not_allowed"),
        (get("/tools/../admin", ""), 400, "dot_segments"),
        (get("/tools/%2e%2e/admin", ""), 400, "dot_segments"),
        (get("/tools/ws", websocket), 501, "upgrade_unsupported"),
        (
            get("/tools/x", "via: 1.1 penstock-ns-gateway\r\n"),
            508,
            "loop_detected",
        ),
    ] {
        let answer = send(&gateway, &request).await;
        assert_eq!(answer.status, status, "{request}");
        if !code.is_empty() {
            assert_eq!(answer.code(), code);
        }
    }
    assert_eq!(upstream.count(), 0);
    // An offer that may be left unanswered.
    let h2c = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: x\r\n";
    assert_eq!(send(&gateway, &get("/tools/x", h2c)).await.status, 200);
    let seen = upstream.requests().pop().unwrap().headers;
    assert!(!seen.contains_key("upgrade") && !seen.contains_key("http2-settings"));
}

#[tokio::test]
async fn models_and_services_share_a_gateway_and_http_2() {
    let tool = Upstream::always(|| ok("{\"tool\":1}")).await;
    let model = Upstream::always(|| json_answer("x")).await;
    let mut plan = plan(&[tool.address, model.address]);
    plan.config.backends.get_mut(&id("b")).unwrap().protocol = Protocol::OpenAi;
    let mut chat_rule = plan.config.rules[0].clone();
    plan.config.rules[0].backends.truncate(1);
    chat_rule.name = "models".to_owned();
    chat_rule.models = vec![NameMatch::Exact("chat".to_owned())];
    chat_rule.conditions.clear();
    chat_rule.backends.remove(0);
    plan.config.rules.push(chat_rule);
    let gateway = Gateway::start(&plan).await;
    let mut client = H2Client::connect(gateway.address).await;
    assert_eq!(
        client.post("/tools/call", "hi").await,
        (200, "{\"tool\":1}".to_owned())
    );
    assert_eq!(
        client.post("/v1/chat/completions", &chat(false)).await,
        (200, completion("x"))
    );
    let seen = tool.requests().pop().unwrap();
    assert_eq!(seen.line, "POST /tools/call HTTP/1.1");
    assert_eq!(seen.headers["x-forwarded-host"], "gateway");
}

#[tokio::test]
async fn where_a_request_to_a_tool_would_go_is_explained() {
    let upstream = Upstream::always(|| ok("{}")).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let mut client = Client::connect(gateway.admin).await;
    for (target, status) in [
        ("path=/tools/x&method=DELETE", 200),
        ("path=/tools/x", 200),
        ("path=/other", 404),
    ] {
        client.post_to(&format!("/explain?{target}"), "", "").await;
        let answer = client.answer().await;
        assert_eq!(answer.status, status, "{target}: {}", answer.body);
        assert!(
            status == 404 || answer.body.contains(r#""backend":"ns/a","pass":"fresh""#),
            "{}",
            answer.body
        );
    }
    assert_eq!(upstream.count(), 0, "nothing is sent");
}
