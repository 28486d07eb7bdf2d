//! Keys of VirtualKeys: made once, changed when asked, known to gateways by their hashes.

use kube::api::{Patch, PatchParams};
use penstock_core::config::GatewayConfig;
use penstock_core::key::{Hasher, PREFIX, hexadecimal};
use serde_json::{Value, json};

use crate::cluster::cluster;
use crate::simulated;
use crate::world::{World, policy, until};

/// A value of a Secret, as text.
fn value(secret: &Value, key: &str) -> Option<String> {
    let encoded = secret.pointer(&format!("/data/{key}"))?;
    let bytes: k8s_openapi::ByteString = serde_json::from_value(encoded.clone()).unwrap();
    Some(String::from_utf8(bytes.0).unwrap())
}

impl World {
    async fn secret(&self, name: &str) -> Value {
        let secret = self.exists("v1", "Secret", name).await;
        serde_json::to_value(secret).unwrap()
    }

    /// The gateway's config, once `check` finds something in it.
    async fn config<T>(&self, what: &str, check: impl Fn(&GatewayConfig) -> Option<T>) -> T {
        until(what, async || {
            let map = self
                .api("v1", "ConfigMap")
                .get_opt("counter-config-f1")
                .await
                .unwrap()?;
            let packed: k8s_openapi::ByteString =
                serde_json::from_value(map.data["binaryData"]["config.json.zst"].clone()).ok()?;
            let json = zstd::decode_all(packed.0.as_slice()).unwrap();
            check(&GatewayConfig::from_json(&json).unwrap())
        })
        .await
    }

    async fn hash(&self, key: &str) -> String {
        let pepper = value(&self.secret("counter-pepper").await, "pepper").unwrap();
        hexadecimal(&Hasher::new(pepper.as_bytes()).hash(key.as_bytes()))
    }
}

/// The hashes that a config has for Alice, in order of their ends.
fn hashes(config: &GatewayConfig) -> Option<Vec<(String, Option<u64>)>> {
    let callers = config.callers.as_ref()?;
    let key = callers.keys.iter().find(|(id, _)| id.name == "alice")?.1;
    let mut hashes: Vec<_> = key.hashes.clone().into_iter().collect();
    hashes.sort_by_key(|(_, until)| *until);
    Some(hashes)
}

#[tokio::test]
async fn a_key_is_made_once_and_only_its_hash_travels() {
    let Some(world) = World::new(cluster(), "keys").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    let operator = world.operator("one").await;
    let spec = json!({"gateway": "counter", "team": "kitchen"});
    world.own("VirtualKey", "alice", spec.clone()).await;
    let secret = world.secret("alice-key").await;
    let key = value(&secret, "key").unwrap();
    assert!(key.starts_with(PREFIX) && key.len() == PREFIX.len() + 48);
    assert_eq!(
        secret["metadata"]["ownerReferences"][0]["kind"],
        "VirtualKey"
    );
    let hash = world.hash(&key).await;
    let known = world.config("the key in the config", hashes).await;
    assert_eq!(known, [(hash, None)]);
    let packed = world
        .config("the whole config", |config| config.to_json().ok())
        .await;
    assert!(!String::from_utf8(packed).unwrap().contains(&key));
    let credentials = world.secret("counter-credentials").await;
    assert!(value(&credentials, "counter-pepper_pepper").is_some());

    world.ready_pod("soup-pool", "engine").await;
    let uid = world.ready_pod("counter-gateway", "gateway").await;
    world.ack("counter", &uid).await;
    world
        .condition_is("VirtualKey", "alice", "Ready", "True", "Ready")
        .await;

    // At rest nothing is written, and another operator makes no second key.
    let written = world.settled().await;
    operator.stop().await;
    let operator = world.operator("two").await;
    let suspended = json!({"gateway": "counter", "team": "kitchen", "suspended": true});
    world.own("VirtualKey", "alice", suspended).await;
    world
        .condition_is("VirtualKey", "alice", "Programmed", "False", "Pending")
        .await;
    world.ack("counter", &uid).await;
    world
        .condition_is("VirtualKey", "alice", "Ready", "True", "Suspended")
        .await;
    assert_eq!(value(&world.secret("alice-key").await, "key").unwrap(), key);
    let made = |writes: &[String]| {
        let writes = writes.iter();
        writes
            .filter(|write| write.starts_with("create secrets"))
            .count()
    };
    assert_eq!((made(&written), made(&world.settled().await)), (2, 2));
    operator.stop().await;
}

#[tokio::test]
async fn a_rotation_makes_the_next_key_and_leaves_the_one_before_it_for_a_time() {
    let Some(world) = World::new(cluster(), "rotate").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    let operator = world.operator("one").await;
    let spec = |revision: u32| {
        json!({
            "gateway": "counter", "team": "kitchen", "rotation": {"revision": revision, "overlap": "2h"},
        })
    };
    world.own("VirtualKey", "alice", spec(1)).await;
    let first = value(&world.secret("alice-key").await, "key").unwrap();
    world.config("the first key", hashes).await;
    world.own("VirtualKey", "alice", spec(2)).await;
    let known = world
        .config("both keys", |config| {
            hashes(config).filter(|known| known.len() == 2)
        })
        .await;
    let secret = world.secret("alice-key").await;
    let second = value(&secret, "key").unwrap();
    assert_ne!(first, second);
    assert_eq!(value(&secret, "previous").unwrap(), first);
    assert_eq!(known[0], (world.hash(&second).await, None));
    assert_eq!(known[1].0, world.hash(&first).await);
    let until: u64 = value(&secret, "previous-until").unwrap().parse().unwrap();
    assert_eq!(known[1].1, Some(until));

    // A key that somebody puts there is taken as it is.
    let own = json!({"stringData": {"key": "a-key-of-alices-own-making", "revision": null}});
    world
        .api("v1", "Secret")
        .patch("alice-key", &PatchParams::default(), &Patch::Merge(&own))
        .await
        .unwrap();
    let hash = world.hash("a-key-of-alices-own-making").await;
    world
        .config("the foreign key", |config| {
            hashes(config).filter(|known| known.contains(&(hash.clone(), None)))
        })
        .await;
    world.delete("v1", "Secret", "alice-key").await;
    until_made_again(&world, &second).await;
    operator.stop().await;
}

async fn until_made_again(world: &World, before: &str) {
    until("a new key", async || {
        let secret = world
            .api("v1", "Secret")
            .get_opt("alice-key")
            .await
            .unwrap()?;
        let key = value(&serde_json::to_value(secret).unwrap(), "key")?;
        (key.starts_with(PREFIX) && key != before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_keeps_a_key_from_being_used_is_said() {
    let Some(world) = World::new(cluster(), "keyless").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    world
        .apply(json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "empty"}, "stringData": {"other": "x"},
        }))
        .await;
    let operator = world.operator("one").await;
    let spec = json!({"gateway": "counter", "team": "kitchen", "secretName": "empty"});
    world.own("VirtualKey", "alice", spec).await;
    let message = world
        .condition_is(
            "VirtualKey",
            "alice",
            "ResolvedRefs",
            "False",
            "SecretNotFound",
        )
        .await;
    assert!(message.contains("has no 'key'"), "{message}");
    let spec = json!({"gateway": "counter", "team": "kitchen", "policies": ["dinner"]});
    world.own("VirtualKey", "bob", spec).await;
    let message = world
        .condition_is(
            "VirtualKey",
            "bob",
            "ResolvedRefs",
            "False",
            "PolicyNotFound",
        )
        .await;
    assert!(message.contains("dinner"), "{message}");
    operator.stop().await;
}

#[tokio::test]
async fn a_key_of_another_one_is_not_rotated() {
    let Some(world) = World::new(cluster(), "others").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    let operator = world.operator("one").await;
    let spec = json!({"gateway": "counter", "team": "kitchen"});
    world.own("VirtualKey", "alice", spec).await;
    let first = value(&world.secret("alice-key").await, "key").unwrap();
    let spec = json!({
        "gateway": "counter", "team": "thieves", "secretName": "alice-key", "rotation": {"revision": 7},
    });
    world.own("VirtualKey", "bob", spec).await;
    // It is also told that the key is somebody else's.
    let message = world
        .condition_is("VirtualKey", "bob", "Accepted", "False", "InvalidValue")
        .await;
    assert!(message.contains("give it one of its own"), "{message}");
    let secret = world.secret("alice-key").await;
    assert_eq!(value(&secret, "key").unwrap(), first);
    operator.stop().await;
}
