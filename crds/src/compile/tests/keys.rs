use penstock_core::config::{Condition, Key};

use super::*;

fn key(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: penstock.dev/v1alpha1\nkind: VirtualKey\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

fn base() -> String {
    backend("chat", POOL) + &policy("p", &rule("r", "chat", "chat"))
}

fn compiled(text: &str, facts: &[(&str, &str)]) -> Compiled {
    let keys = facts.iter().map(|(name, hash)| {
        let hashes = BTreeMap::from([((*hash).to_owned(), None)]);
        let facts = KeyFacts {
            hashes,
            trouble: None,
        };
        (Id::new("default", *name), facts)
    });
    let facts = Facts {
        keys: Some(keys.collect()),
        ..Facts::default()
    };
    compile(&objects(text), &facts)
}

fn known<'a>(compiled: &'a Compiled, name: &str) -> &'a Key {
    let callers = only(compiled).callers.as_ref().unwrap();
    &callers.keys[&Id::new("default", name)]
}

#[test]
fn a_gateway_without_keys_takes_anybody() {
    assert_eq!(only(&compiled(&base(), &[])).callers, None);
    let of_another = base() + &key("alice", "{team: a, gateway: other}");
    let compiled = compiled(&of_another, &[]);
    assert_eq!(only(&compiled).callers, None);
    assert_eq!(messages(&compiled), [] as [&str; 0]);
}

#[test]
fn a_policy_may_close_a_gateway_that_has_no_key() {
    let closed = base().replace("spec: {rules", "spec: {anonymous: Refuse, rules");
    let compiled = compiled(&closed, &[]);
    let callers = only(&compiled).callers.as_ref().unwrap();
    assert!(callers.keys.is_empty());
    assert!(!only(&compiled).rules[0].anonymous);
}

#[test]
fn who_has_an_admin_token_has_keys_in_its_store() {
    let facts = |gateway: &str| {
        let secret = Id::new("default", format!("{gateway}-admin"));
        let values = BTreeMap::from([("token".to_owned(), "1".to_owned())]);
        Facts {
            secrets: Some(BTreeMap::from([(secret, values)])),
            ..Facts::default()
        }
    };
    let managed = compile(&objects(&base()), &facts("default"));
    let callers = only(&managed).callers.as_ref().unwrap();
    let admin = callers.admin.as_ref().unwrap();
    assert_eq!(
        (admin.id.as_str(), admin.version.as_str()),
        ("default-admin_token", "1")
    );
    assert!(callers.keys.is_empty() && !only(&managed).rules[0].anonymous);
    assert_eq!(
        only(&compile(&objects(&base()), &facts("other"))).callers,
        None
    );
}

#[test]
fn a_key_says_whose_it_is_and_what_it_may_do() {
    let spec = "{team: search, user: alice, attributes: {tier: gold}, models: ['chat', 'gpt-*'], policies: [p], \
                expiresAt: '2027-01-01T00:00:00Z', suspended: true}";
    let compiled = compiled(&(base() + &key("alice", spec)), &[("alice", "ab")]);
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let alice = known(&compiled, "alice");
    assert_eq!(
        (alice.team.as_str(), alice.user.as_deref()),
        ("search", Some("alice"))
    );
    assert_eq!(
        alice.models,
        [
            NameMatch::Exact("chat".into()),
            NameMatch::Prefix("gpt-".into())
        ]
    );
    assert_eq!(alice.expires_s, Some(1_798_761_600));
    assert!(alice.suspended && alice.policies.contains(&Id::new("default", "p")));
    assert_eq!(alice.hashes, BTreeMap::from([("ab".to_owned(), None)]));
    let callers = only(&compiled).callers.as_ref().unwrap();
    assert_eq!(callers.pepper.id, "default-pepper_pepper");
    assert!(
        only(&compiled)
            .objects
            .contains_key("VirtualKey/default/alice")
    );
    let object = ObjectRef::new(Kind::VirtualKey, Id::new("default", "alice"));
    assert_eq!(compiled.carried_by[&object].len(), 1);
}

#[test]
fn a_star_among_models_is_any() {
    let text = base() + &key("alice", "{team: a, models: [chat, '*']}");
    assert_eq!(known(&compiled(&text, &[]), "alice").models, []);
}

#[test]
fn mistakes_are_named_and_a_key_with_one_is_nobodys() {
    for (spec, problem) in [
        ("{team: a, models: ['a*b']}", "spec.models[0] InvalidValue"),
        ("{team: a, expiresAt: soon}", "spec.expiresAt InvalidValue"),
        ("{team: ''}", "spec.team InvalidValue"),
        (
            "{team: a, rotation: {revision: 0}}",
            "spec.rotation.revision InvalidValue",
        ),
        (
            "{team: a, rotation: {revision: 1, overlap: 721h}}",
            "spec.rotation.overlap InvalidValue",
        ),
        (
            "{team: a, rotation: {revision: 1, overlap: soon}}",
            "spec.rotation.overlap InvalidValue",
        ),
    ] {
        let compiled = compiled(&(base() + &key("alice", spec)), &[]);
        assert_eq!(
            messages(&compiled),
            [format!("VirtualKey/default/alice {problem}")],
            "{spec}"
        );
        // Its callers are refused, and so is everybody without a key.
        let callers = only(&compiled).callers.as_ref().unwrap();
        assert!(callers.keys.is_empty(), "{spec}");
    }
}

#[test]
fn a_policy_that_is_not_there_is_no_leave_to_use_all() {
    let text = base() + &key("alice", "{team: a, policies: [gone]}");
    let compiled = compiled(&text, &[]);
    assert_eq!(
        messages(&compiled),
        ["VirtualKey/default/alice spec.policies[0] PolicyNotFound"]
    );
    assert_eq!(known(&compiled, "alice").policies.len(), 1);
}

#[test]
fn two_objects_may_not_have_one_key() {
    let text = base() + &key("alice", "{team: a}") + &key("bob", "{team: b}");
    let compiled = compiled(&text, &[("alice", "ab"), ("bob", "ab")]);
    assert_eq!(
        messages(&compiled),
        ["VirtualKey/default/bob spec.secretName InvalidValue"]
    );
}

#[test]
fn rules_may_ask_who_calls_and_take_strangers() {
    let text = backend("chat", POOL)
        + "---\napiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {name: p}\nspec:\n  anonymous: Allow\n  \
           rules:\n  - {name: a, match: {models: [chat], team: 'search-*', user: alice, attributes: {tier: gold}}, \
           backends: [{name: chat}]}\n  - {name: b, match: {models: [chat]}, backends: [{name: chat}]}\n";
    let compiled = compiled(&text, &[]);
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let rules = &only(&compiled).rules;
    assert_eq!(
        rules[0].conditions,
        [
            Condition::Team(NameMatch::Prefix("search-".into())),
            Condition::User(NameMatch::Exact("alice".into())),
            Condition::Attribute("tier".into(), NameMatch::Exact("gold".into())),
        ]
    );
    assert!(rules.iter().all(|rule| rule.anonymous));
}

#[test]
fn a_rule_for_a_part_of_a_team_that_has_one_is_unreachable() {
    let rules = "{name: a, match: {models: [chat], team: '*'}, backends: [{name: chat}]}, \
                 {name: b, match: {models: [chat], team: x}, backends: [{name: chat}]}";
    let compiled = compiled(&(backend("chat", POOL) + &policy("p", rules)), &[]);
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/p spec.rules[1].match.models[0] UnreachableRule"]
    );
}

mod of_secrets {
    use penstock_core::key::{Hasher, hexadecimal};

    use super::*;

    const FIRST: &str = "sk-penstock-first-of-alice";
    const SECOND: &str = "sk-penstock-second-of-alice";

    fn facts(revision: i32, secret: &[(&str, &str)]) -> KeyFacts {
        let spec = format!("{{team: a, rotation: {{revision: {revision}}}}}");
        let objects = objects(&key("alice", &spec));
        let spec = &objects.keys[&Id::new("default", "alice")].spec;
        let secret = secret.iter();
        let secret = secret.map(|(key, value)| ((*key).to_owned(), value.as_bytes().to_vec()));
        KeyFacts::of(spec, "alice-key", &secret.collect(), b"p")
    }

    fn hash(key: &str) -> String {
        hexadecimal(&Hasher::new(b"p").hash(key.as_bytes()))
    }

    #[test]
    fn the_key_before_is_good_until_its_end() {
        let rotated = [
            ("key", SECOND),
            ("revision", "3"),
            ("previous", FIRST),
            ("previous-until", "77"),
        ];
        let facts = facts(3, &rotated);
        assert_eq!(
            facts.hashes,
            BTreeMap::from([(hash(FIRST), Some(77)), (hash(SECOND), None)])
        );
        assert_eq!(facts.trouble, None);
    }

    #[test]
    fn a_key_of_somebody_else_is_used_and_cannot_be_rotated_here() {
        let foreign = [("key", "somebody-elses-own-key\n")];
        let usable = BTreeMap::from([(hash("somebody-elses-own-key"), None)]);
        assert_eq!(facts(1, &foreign).hashes, usable);
        assert_eq!(facts(1, &foreign).trouble, None);
        assert_eq!(facts(2, &foreign).hashes, usable);
        assert!(
            facts(2, &foreign)
                .trouble
                .unwrap()
                .contains("not made by Penstock")
        );
    }

    #[test]
    fn a_secret_without_a_usable_key_is_said() {
        for (secret, said) in [
            ([("other", "x")], "has no 'key'"),
            ([("key", "short")], "has 5 bytes"),
        ] {
            let facts = facts(1, &secret);
            assert!(facts.hashes.is_empty());
            assert!(facts.trouble.unwrap().contains(said));
        }
    }
}
