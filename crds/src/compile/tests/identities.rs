use penstock_core::config::{Algorithm, KeySource, Proof, Team};

use super::*;

const JWT: &str = "jwt: {issuer: 'https://login.example.com', audiences: [penstock]}";

fn provider(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: penstock.dev/v1alpha1\nkind: IdentityProvider\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

fn compiled(providers: &[String]) -> Compiled {
    let base = backend("chat", POOL) + &policy("p", &rule("r", "chat", "chat"));
    compile(&objects(&(base + &providers.concat())), &Facts::default())
}

#[test]
fn a_provider_says_whom_to_believe_and_what_its_callers_may_do() {
    let spec = format!(
        "{JWT}, team: {{claim: /groups/0}}, user: email, attributes: {{tier: tier}}, \
         access: [{{scopes: [llm.small], models: ['small-*'], policies: [p]}}, {{models: ['*', x]}}]"
    );
    let compiled = compiled(&[provider("idp", &spec)]);
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let callers = only(&compiled).callers.as_ref().unwrap();
    let provider = &callers.identities[&Id::new("default", "idp")];
    let Proof::Jwt(jwt) = &provider.proof else {
        panic!("{provider:?}");
    };
    let usual = [Algorithm::Rs256, Algorithm::Es256, Algorithm::EdDsa];
    assert_eq!(jwt.algorithms, usual.into());
    assert_eq!(jwt.clock_skew_s, 30);
    let url = None;
    let refresh_s = 300;
    assert_eq!(jwt.keys, KeySource::Url { url, refresh_s });
    assert!(matches!(&provider.team, Team::Claimed(claim) if claim.0 == "/groups/0"));
    assert_eq!(
        provider.access[0].policies,
        [Id::new("default", "p")].into()
    );
    assert!(provider.access[1].models.is_empty(), "any");
    let name = "IdentityProvider/default/idp";
    assert!(only(&compiled).objects.contains_key(name));
}

#[test]
fn a_provider_with_a_mistake_lets_nobody_in() {
    let compiled = compiled(&[provider("idp", "team: {value: search}")]);
    let callers = only(&compiled).callers.as_ref();
    assert!(callers.is_some_and(|callers| callers.identities.is_empty()));
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn mistakes_are_named_with_their_place() {
    let team = "team: {value: search}";
    for (spec, path) in [
        (team.to_owned(), "spec"),
        (
            format!("{JWT}, certificate: {{names: [a]}}, {team}"),
            "spec",
        ),
        (format!("{JWT}, team: {{}}"), "spec.team"),
        (format!("{JWT}, team: {{value: a, claim: b}}"), "spec.team"),
        (format!("{JWT}, team: {{claim: /a~2}}"), "spec.team.claim"),
        (format!("{JWT}, {team}, user: ''"), "spec.user"),
        (
            format!("jwt: {{issuer: 'https://x', audiences: []}}, {team}"),
            "spec.jwt.audiences",
        ),
        (
            format!("jwt: {{issuer: login, audiences: [a]}}, {team}"),
            "spec.jwt.issuer",
        ),
        (
            format!("jwt: {{issuer: 'http://login.example.com', audiences: [a]}}, {team}"),
            "spec.jwt.issuer",
        ),
        (
            format!("jwt: {{issuer: x, audiences: [a], jwks: {{uri: 'http://x.y/keys'}}}}, {team}"),
            "spec.jwt.jwks.uri",
        ),
        (
            format!(
                "jwt: {{issuer: x, audiences: [a], jwks: {{uri: 'https://x', inline: '{{}}'}}}}, {team}"
            ),
            "spec.jwt.jwks",
        ),
        (
            format!("jwt: {{issuer: x, audiences: [a], jwks: {{inline: '{{}}'}}}}, {team}"),
            "spec.jwt.jwks.inline",
        ),
        (
            format!("jwt: {{issuer: 'https://x', audiences: [a], jwks: {{refresh: 1s}}}}, {team}"),
            "spec.jwt.jwks.refresh",
        ),
        (
            format!("jwt: {{issuer: 'https://x', audiences: [a], clockSkew: 6m}}, {team}"),
            "spec.jwt.clockSkew",
        ),
        (
            format!("{JWT}, {team}, access: [{{scopes: ['a b']}}]"),
            "spec.access[0].scopes",
        ),
        (
            format!("{JWT}, {team}, access: [{{models: ['a*b']}}]"),
            "spec.access[0].models[0]",
        ),
        (
            format!("{JWT}, {team}, access: [{{policies: [q]}}]"),
            "spec.access[0].policies[0]",
        ),
        (
            format!("certificate: {{names: []}}, {team}"),
            "spec.certificate.names",
        ),
        (
            "certificate: {names: [a]}, team: {claim: x}".to_owned(),
            "spec.team",
        ),
        (
            format!("certificate: {{names: [a]}}, {team}, user: x"),
            "spec.user",
        ),
        (
            format!("certificate: {{names: [a]}}, {team}, access: [{{scopes: [a]}}]"),
            "spec.access[0].scopes",
        ),
    ] {
        let compiled = compiled(&[provider("idp", &spec)]);
        let paths: Vec<&str> = compiled
            .problems
            .iter()
            .map(|problem| problem.path.as_str())
            .collect();
        assert_eq!(paths, [path], "{spec}");
    }
}

#[test]
fn mistakes_are_told_where_no_policy_makes_a_gateway_yet() {
    let alone = provider("idp", "certificate: {names: []}, team: {value: a}");
    let compiled = compile(&objects(&alone), &Facts::default());
    assert_eq!(compiled.problems[0].path, "spec.certificate.names");
    assert!(compiled.gateways.is_empty());
}

#[test]
fn names_in_the_cluster_and_queries_are_fine() {
    for uri in [
        "http://idp.auth.svc:8080/keys",
        "http://idp.auth.svc.cluster.local/keys",
        "http://127.0.0.1:9000/keys",
        "http://[::1]:9000/keys",
        "https://login.example.com/keys?appid=1",
    ] {
        let spec = format!(
            "jwt: {{issuer: x, audiences: [a], jwks: {{uri: '{uri}'}}}}, team: {{value: a}}"
        );
        let compiled = compiled(&[provider("idp", &spec)]);
        assert_eq!(messages(&compiled), [] as [&str; 0], "{uri}");
    }
}

#[test]
fn two_providers_do_not_vouch_for_the_same() {
    let team = "team: {value: search}";
    let of_tokens = format!("{JWT}, {team}");
    let of_names = format!("certificate: {{names: ['spiffe://x/*', y]}}, {team}");
    for (spec, path) in [
        (of_tokens, "spec.jwt.audiences"),
        (of_names, "spec.certificate.names"),
    ] {
        let compiled = compiled(&[provider("a", &spec), provider("b", &spec)]);
        let problem = &compiled.problems[0];
        assert_eq!(
            (problem.object.id.name.as_str(), problem.path.as_str()),
            ("b", path)
        );
        let callers = only(&compiled).callers.as_ref().unwrap();
        assert_eq!(callers.identities.len(), 1);
    }
    let other = format!("jwt: {{issuer: 'https://login.example.com', audiences: [other]}}, {team}");
    let both = [
        provider("a", &format!("{JWT}, {team}")),
        provider("b", &other),
    ];
    assert_eq!(messages(&compiled(&both)), [] as [&str; 0]);
}
