//! Callers that the gateway knows by their keys.

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::config::{
    CallerCredentials, Callers, Condition, CredentialRef, Key, NameMatch, Protocol,
};
use penstock_core::ids::Id;
use penstock_core::key::{Hasher, hexadecimal};
use penstock_gateway::{Credential, Credentials};
use serde_json::{Value, json};

use crate::harness::*;
use crate::jobs::{Kept, value};

const PEPPER: &str = "gateway-pepper_pepper";
const ALICE: &str = "sk-penstock-alice-alice-alice";
const BOB: &str = "sk-penstock-bob-bob-bob-bob";

fn key(team: &str, key: &str) -> Key {
    let hash = Hasher::new(b"pepper").hash(key.as_bytes());
    Key {
        team: team.to_owned(),
        user: None,
        attributes: BTreeMap::new(),
        models: Vec::new(),
        policies: BTreeSet::new(),
        expires_s: None,
        suspended: false,
        hashes: BTreeMap::from([(hexadecimal(&hash), None)]),
    }
}

/// Alice of team `search` and Bob of team `ads`.
fn known(plan: Plan, change: impl FnOnce(&mut BTreeMap<Id, Key>)) -> Plan {
    let mut keys = BTreeMap::from([
        (id("alice"), key("search", ALICE)),
        (id("bob"), key("ads", BOB)),
    ]);
    change(&mut keys);
    let mut plan = plan;
    plan.config.callers = Some(Callers {
        pepper: CredentialRef {
            id: PEPPER.to_owned(),
            version: String::new(),
        },
        keys,
        admin: None,
        identities: BTreeMap::new(),
    });
    plan
}

fn give_pepper(gateway: &Gateway) {
    let values = BTreeMap::from([(PEPPER.to_owned(), Credential::new("pepper"))]);
    gateway.set_credentials(Credentials { values });
}

/// A gateway that knows its callers, and their pepper.
async fn gateway(plan: &Plan) -> Gateway {
    let gateway = Gateway::start(plan).await;
    give_pepper(&gateway);
    gateway.knows(ALICE).await;
    gateway
}

impl Gateway {
    /// Waits until a key is taken.
    async fn knows(&self, key: &str) {
        for _ in 0..500 {
            if self.lists(key).await.status == 200 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("the key is not taken");
    }

    async fn lists(&self, key: &str) -> Answer {
        self.call("GET", "/v1/models", &bearer(key), "").await
    }

    async fn post_as(&self, key: &str, body: &str) -> Answer {
        self.post_with(&bearer(key), body).await
    }
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

fn told(answer: &Answer) -> (u16, String) {
    (answer.status, answer.code())
}

fn refused(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

#[tokio::test]
async fn a_caller_needs_a_key_where_there_are_some() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = known(Plan::chain(&[upstream.address]), |_| {});
    let gateway = gateway(&plan).await;
    let nobody = gateway.post(&chat(false)).await;
    assert_eq!(told(&nobody), refused(401, "key_missing"));
    assert_eq!(nobody.header("www-authenticate"), "Bearer");
    for wrong in ["sk-penstock-nobody", "none"] {
        let answer = gateway.post_as(wrong, &chat(false)).await;
        assert_eq!(told(&answer), refused(401, "key_unknown"), "{wrong}");
    }
    assert_eq!(upstream.count(), 0);
    for headers in [
        bearer(ALICE),
        format!("x-api-key: {ALICE}\r\n"),
        format!("api-key: {BOB}\r\n"),
        format!("authorization: Bearer of-somebody-else\r\nx-penstock-key: {BOB}\r\n"),
    ] {
        assert_eq!(gateway.post_with(&headers, &chat(false)).await.status, 200);
    }
    for request in upstream.requests() {
        let all = format!("{:?}", request.headers);
        assert!(!all.contains("sk-penstock") && !all.contains("of-somebody-else"));
    }
}

#[tokio::test]
async fn a_stranger_for_whom_there_is_no_rule_is_told_to_show_a_key() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]).rule(|rule| {
        let team = NameMatch::Exact("search".to_owned());
        rule.conditions = vec![Condition::Team(team)];
    });
    let gateway = gateway(&known(plan, |_| {})).await;
    let told_to = async |headers: &str| told(&gateway.post_with(headers, &chat(false)).await);
    assert_eq!(told_to("").await, refused(401, "key_missing"));
    assert_eq!(told_to(&bearer(BOB)).await, refused(404, "no_rule"));
    assert_eq!(
        gateway.post_with(&bearer(ALICE), &chat(false)).await.status,
        200
    );
}

#[tokio::test]
async fn messages_callers_are_refused_in_their_own_shape() {
    let plan = known(Plan::chain(&[nobody()]), |_| {});
    let gateway = gateway(&plan).await;
    let body = r#"{"model":"chat","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
    let answer = gateway.call("POST", "/v1/messages", "", body).await;
    let told: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        (answer.status, &told["error"]["type"]),
        (401, &json!("authentication_error"))
    );
}

#[tokio::test]
async fn a_key_that_is_taken_back_is_refused_and_what_it_began_goes_on() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let plan = known(Plan::chain(&[upstream.address]), |_| {});
    let gateway = gateway(&plan).await;
    let mut client = gateway.client().await;
    client.post(&bearer(ALICE), &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&word("one")).await;
    let without = known(Plan::chain(&[upstream.address]), |keys| {
        keys.remove(&id("alice"));
        keys.get_mut(&id("bob")).unwrap().suspended = true;
    });
    gateway.apply(&without).await;
    let answer = gateway.post_as(ALICE, &chat(false)).await;
    assert_eq!(told(&answer), refused(401, "key_unknown"));
    let answer = gateway.post_as(BOB, &chat(false)).await;
    assert_eq!(told(&answer), refused(403, "key_suspended"));
    finish(&mut client, &steps).await;
}

#[tokio::test]
async fn without_the_pepper_nobody_gets_in() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = known(Plan::chain(&[upstream.address]), |_| {});
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post_as(ALICE, &chat(false)).await;
    assert_eq!(told(&answer), refused(503, "not_configured"));
    assert_eq!(upstream.count(), 0);
    give_pepper(&gateway);
    gateway.knows(ALICE).await;
}

#[tokio::test]
async fn a_gateway_may_be_closed_while_it_knows_nobody() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = known(Plan::chain(&[upstream.address]), BTreeMap::clear);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(told(&answer), refused(401, "key_missing"));
    let answer = gateway.post_as(ALICE, &chat(false)).await;
    assert_eq!(told(&answer), refused(401, "key_unknown"));
    let answer = gateway.call("GET", "/v1/models", "", "").await;
    assert_eq!(told(&answer), refused(401, "key_missing"));
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_key_is_for_its_models_and_policies() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut plan = Plan::chain(&[upstream.address]).rule(|rule| {
        let exact = |name: &str| NameMatch::Exact(name.to_owned());
        rule.models = vec![
            exact("chat"),
            exact("code"),
            NameMatch::Prefix("gpt-".to_owned()),
        ];
    });
    let mut open = plan.config.rules[0].clone();
    open.policy = id("open");
    open.name = "open".to_owned();
    open.anonymous = true;
    open.models = vec![NameMatch::Exact("demo".to_owned())];
    plan.config.rules.push(open);
    let plan = known(plan, |keys| {
        let alice = keys.get_mut(&id("alice")).unwrap();
        alice.models = vec![
            NameMatch::Exact("chat".to_owned()),
            NameMatch::Prefix("gpt-".to_owned()),
        ];
        let bob = keys.get_mut(&id("bob")).unwrap();
        bob.policies = BTreeSet::from([id("policy")]);
    });
    let gateway = gateway(&plan).await;
    let models = async |headers: &str| -> Vec<String> {
        let list: Value =
            serde_json::from_str(&gateway.call("GET", "/v1/models", headers, "").await.body)
                .unwrap();
        let data = list["data"].as_array().unwrap().iter();
        data.map(|one| one["id"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(models(&bearer(ALICE)).await, ["chat"]);
    assert_eq!(models(&bearer(BOB)).await, ["chat", "code"]);
    assert_eq!(models("").await, ["demo"]);
    let one = async |key: &str, model: &str| {
        let path = format!("/v1/models/{model}");
        gateway.call("GET", &path, &bearer(key), "").await.status
    };
    assert_eq!(
        (one(ALICE, "gpt-5").await, one(ALICE, "code").await),
        (200, 404)
    );
    assert_eq!((one(BOB, "code").await, one(BOB, "demo").await), (200, 404));
    let call = async |headers: &str, model: &str| {
        let answer = gateway
            .post_with(headers, &format!("{{\"model\":\"{model}\"}}"))
            .await;
        let code = if answer.status == 200 {
            String::new()
        } else {
            answer.code()
        };
        (answer.status, code)
    };
    let well = (200, String::new());
    assert_eq!(call(&bearer(ALICE), "gpt-5").await, well);
    assert_eq!(
        call(&bearer(ALICE), "code").await,
        refused(403, "model_not_allowed")
    );
    assert_eq!(call(&bearer(BOB), "code").await, well);
    assert_eq!(
        call(&bearer(BOB), "demo").await,
        refused(403, "policy_not_allowed")
    );
    assert_eq!(call("", "demo").await, well);
    assert_eq!(call("authorization: Bearer dummy\r\n", "demo").await, well);
    assert_eq!(call("", "chat").await, refused(401, "key_missing"));
}

#[tokio::test]
async fn rules_may_ask_who_calls() {
    let ads = Upstream::always(|| json_answer("for ads")).await;
    let others = Upstream::always(|| json_answer("for others")).await;
    let mut plan = Plan::chain(&[others.address]).backend("ads", &[ads.address], 1, 0);
    let of_ads = plan.config.rules[0].backends.pop().unwrap();
    let mut rule = plan.config.rules[0].clone();
    rule.name = "ads".to_owned();
    rule.conditions = vec![
        Condition::Team(NameMatch::Exact("ads".to_owned())),
        Condition::Attribute("tier".to_owned(), NameMatch::Prefix("go".to_owned())),
    ];
    rule.backends = vec![of_ads];
    plan.config.rules.insert(0, rule);
    let plan = known(plan, |keys| {
        let bob = keys.get_mut(&id("bob")).unwrap();
        bob.attributes.insert("tier".to_owned(), "gold".to_owned());
    });
    let gateway = gateway(&plan).await;
    for (key, text) in [(ALICE, "for others"), (BOB, "for ads")] {
        let answer = gateway.post_as(key, &chat(false)).await;
        assert!(answer.body.contains(text), "{}", answer.body);
    }
    // What a caller says of itself is not asked.
    let headers = format!("{}x-team: ads\r\ntier: gold\r\n", bearer(ALICE));
    let answer = gateway.post_with(&headers, &chat(false)).await;
    assert!(answer.body.contains("for others"));
}

#[tokio::test]
async fn what_one_team_was_answered_is_not_given_to_another() {
    let upstream = Upstream::start(|number, _| json_answer(&number.to_string())).await;
    let plan = known(Plan::chain(&[upstream.address]).cached(60_000), |keys| {
        keys.insert(id("carol"), key("ads", "sk-penstock-carol-carol"));
    });
    let gateway = gateway(&plan).await;
    let first = gateway.post_as(ALICE, &chat(false)).await;
    let other = gateway.post_as(BOB, &chat(false)).await;
    assert_eq!(other.header("x-penstock-cache"), "miss");
    assert_ne!(first.body, other.body);
    let same_team = gateway
        .post_as("sk-penstock-carol-carol", &chat(false))
        .await;
    assert_eq!(same_team.header("x-penstock-cache"), "hit");
    assert_eq!(same_team.body, other.body);
}

#[tokio::test]
async fn a_service_never_sees_a_key_and_may_see_what_is_its_own() {
    let upstream = Upstream::always(|| Reply::Json(200, "{}".to_owned())).await;
    let mut plan = Plan::chain(&[upstream.address]).rule(|rule| {
        rule.models.clear();
        rule.conditions = vec![Condition::Paths(vec![NameMatch::Prefix(
            "/tools/".to_owned(),
        )])];
    });
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    backend.protocol = Protocol::Http;
    backend.caller_credentials = CallerCredentials::Passed;
    let gateway = gateway(&known(plan, |_| {})).await;
    let call = async |headers: &str| gateway.call("POST", "/tools/x", headers, "{}").await;
    assert_eq!(told(&call("").await), refused(401, "key_missing"));
    let both = format!("authorization: Bearer of-the-tool\r\nx-penstock-key: {ALICE}\r\n");
    assert_eq!(call(&both).await.status, 200);
    assert_eq!(call(&bearer(ALICE)).await.status, 200);
    let requests = upstream.requests();
    assert_eq!(requests[0].headers["authorization"], "Bearer of-the-tool");
    assert!(!requests[1].headers.contains_key("authorization"));
    for request in &requests {
        assert!(!format!("{:?}", request.headers).contains("sk-penstock"));
    }
}

/// Who left a job owns it, whichever of its keys it shows, and it runs on that caller's behalf.
async fn jobs_belong_to_callers(kept: Kept) {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let only_search = |rule: &mut penstock_core::config::Rule| {
        rule.conditions = vec![Condition::Team(NameMatch::Exact("search".to_owned()))];
    };
    let base = Plan::chain(&[upstream.address]).rule(only_search);
    let plan = known(base.clone(), |_| {});
    let gateway = kept.gateway(&plan).await;
    give_pepper(&gateway);
    gateway.knows(ALICE).await;
    assert_eq!(
        told(&gateway.upload("", "x").await),
        refused(401, "key_missing")
    );
    let line = json!({
        "custom_id": "one", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "chat", "messages": [{"role": "user", "content": "hi"}]},
    });
    let file = value(&gateway.upload(&bearer(ALICE), &line.to_string()).await);
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    let get = async |key: &str, path: &str| gateway.call("GET", path, &bearer(key), "").await;
    assert_eq!(get(ALICE, &path).await.status, 200);
    assert_eq!(told(&get(BOB, &path).await), refused(404, "not_found"));
    let body = json!({
        "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
    });
    let body = body.to_string();
    let batch = gateway
        .call("POST", "/v1/batches", &bearer(ALICE), &body)
        .await;
    let path = format!("/v1/batches/{}", value(&batch)["id"].as_str().unwrap());
    let mut done = Value::Null;
    for _ in 0..1_000 {
        done = value(&get(ALICE, &path).await);
        if done["status"] == "completed" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(done["request_counts"]["completed"], 1, "{done}");
    // The next key of the same caller sees what the one before it made.
    let rotated = "sk-penstock-alice-the-second";
    gateway
        .apply(&known(base, |keys| {
            keys.insert(id("alice"), key("search", rotated));
        }))
        .await;
    assert_eq!(get(rotated, &path).await.status, 200);
    assert_eq!(told(&get(ALICE, &path).await), refused(401, "key_unknown"));
}

#[tokio::test]
async fn jobs_in_a_file_belong_to_callers() {
    jobs_belong_to_callers(Kept::file()).await;
}

#[tokio::test]
async fn jobs_in_redis_belong_to_callers() {
    if let Some(kept) = Kept::redis() {
        jobs_belong_to_callers(kept).await;
    }
}
