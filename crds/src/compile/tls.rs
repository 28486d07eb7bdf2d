//! TLS towards a backend → `config::BackendTls`, and references to values → `config::CredentialRef`.

use penstock_core::config::{BackendTls, ClientCertificate, CredentialRef, Transport};
use penstock_core::ids::Id;

use super::Facts;
use super::backend::Check;
use crate::backend::LLMBackendSpec;
use crate::problem::Reason;
use crate::tls::{AppProtocol, BackendTlsSpec, SourceKind, ValueRef};

/// References in one list; a chain of trust has one or two, and as many while one replaces another.
const MAX_AUTHORITIES: usize = 8;

pub(super) fn compile(
    id: &Id,
    spec: &LLMBackendSpec,
    facts: &Facts,
    check: &mut Check<'_>,
) -> Transport {
    let service = spec.service.as_ref();
    let tls = match (service, &spec.external) {
        (Some(service), _) => service.tls.as_ref().map(|tls| {
            let usual = format!("{}.{}.svc", service.name, id.namespace);
            compile_tls(id, "spec.service.tls", tls, Some(usual), facts, check)
        }),
        (None, Some(external)) => external.tls.as_ref().map(|tls| {
            if !external.url.starts_with("https://") {
                let message = "TLS is spoken with https:// URLs only: write one, or leave tls out";
                check.refuse(
                    "spec.external.tls",
                    Reason::InvalidValue,
                    message.to_owned(),
                );
            }
            compile_tls(id, "spec.external.tls", tls, None, facts, check)
        }),
        (None, None) => None,
    };
    let spoken = service.and_then(|service| service.app_protocol);
    if spoken.is_some() && tls.is_some() {
        let message = "over TLS what is spoken is agreed on: leave out appProtocol, or tls";
        check.refuse(
            "spec.service.appProtocol",
            Reason::InvalidValue,
            message.to_owned(),
        );
    }
    Transport {
        tls,
        h2c: spoken == Some(AppProtocol::H2c),
    }
}

fn compile_tls(
    id: &Id,
    path: &str,
    spec: &BackendTlsSpec,
    usual: Option<String>,
    facts: &Facts,
    check: &mut Check<'_>,
) -> BackendTls {
    if let Some(name) = spec.hostname.as_ref().filter(|name| !is_hostname(name)) {
        let message =
            format!("'{name}' is not a name of a host: write one such as llm.example.com");
        check.refuse(&format!("{path}.hostname"), Reason::InvalidValue, message);
    }
    if spec.ca_certificate_refs.len() > MAX_AUTHORITIES {
        let message = format!("more than {MAX_AUTHORITIES} references: join their certificates");
        check.refuse(
            &format!("{path}.caCertificateRefs"),
            Reason::InvalidValue,
            message,
        );
    }
    let authorities = spec.ca_certificate_refs.iter().enumerate();
    let authorities = authorities.map(|(index, reference)| {
        let path = format!("{path}.caCertificateRefs[{index}]");
        compile_value(id, &path, reference.value(), facts, check)
    });
    let authorities = authorities.collect();
    let shown = spec.client_certificate_ref.as_ref();
    BackendTls {
        hostname: spec.hostname.clone().or(usual),
        authorities,
        client_certificate: shown.map(|shown| {
            let path = format!("{path}.clientCertificateRef");
            let [certificate, key] = shown
                .values()
                .map(|value| compile_value(id, &path, value, facts, check));
            ClientCertificate { certificate, key }
        }),
    }
}

/// A reference to one value. One that leads nowhere is said, and stays: the value may come.
pub(super) fn compile_value(
    id: &Id,
    path: &str,
    value: ValueRef<'_>,
    facts: &Facts,
    check: &mut Check<'_>,
) -> CredentialRef {
    let ValueRef { kind, name, key } = value;
    let (known, reason) = match kind {
        SourceKind::ConfigMap => (&facts.config_maps, Reason::ConfigMapNotFound),
        SourceKind::Secret => (&facts.secrets, Reason::SecretNotFound),
    };
    let mut version = String::new();
    if let Some(known) = known {
        let found = known.get(&Id::new(&id.namespace, name));
        if let Some(known) = found.and_then(|keys| keys.get(key)) {
            version.clone_from(known);
        } else {
            let (kind, namespace) = (kind.name(), &id.namespace);
            let missing = match found {
                None => format!("{kind} {namespace}/{name} does not exist"),
                Some(_) => format!("{kind} {namespace}/{name} has no key '{key}'"),
            };
            let message = format!("{missing}: create it or correct the reference");
            check.refuse(path, reason, message);
        }
    }
    CredentialRef {
        id: value.id(),
        version,
    }
}

/// By RFC 1123, 2.1.
fn is_hostname(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::compile::{Compiled, compile as compile_all};
    use crate::manifest::{self, File};

    fn compiled(spec: &str, facts: &Facts) -> Compiled {
        let text = format!(
            "apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {{name: chat}}\nspec: {spec}\n---\n\
             apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {{name: p}}\n\
             spec: {{rules: [{{name: r, match: {{models: [chat]}}, backends: [{{name: chat}}]}}]}}\n"
        );
        let path = "test.yaml".to_owned();
        let (manifests, problems) = manifest::read(&[File { path, text }]);
        assert_eq!(problems, []);
        compile_all(&manifests.objects, facts)
    }

    fn transport(compiled: &Compiled) -> Transport {
        let config = &compiled.gateways[&Id::new("default", "default")];
        config.backends[&Id::new("default", "chat")]
            .transport
            .clone()
    }

    fn problems(compiled: &Compiled) -> Vec<(&str, &str)> {
        let problems = compiled.problems.iter();
        problems
            .filter(|problem| problem.object.to_string().starts_with("LLMBackend"))
            .map(|problem| (problem.path.as_str(), problem.reason.name()))
            .collect()
    }

    #[test]
    fn references_become_values_that_a_gateway_gets() {
        let spec = "{service: {name: engine, port: 8443, tls: {caCertificateRefs: [{name: ca}, {kind: Secret, name: ca}], \
                    clientCertificateRef: {name: me}}}}";
        let compiled = compiled(spec, &Facts::default());
        assert_eq!(problems(&compiled), []);
        let transport = transport(&compiled);
        let ids: Vec<&str> = transport.values().map(|value| value.id.as_str()).collect();
        assert_eq!(ids, ["_ca_ca.crt", "ca_ca.crt", "me_tls.crt", "me_tls.key"]);
        let tls = transport.tls.unwrap();
        assert_eq!(tls.hostname.as_deref(), Some("engine.default.svc"));
    }

    #[test]
    fn a_url_gives_the_name_unless_another_one_is_said() {
        let of = |tls: &str| {
            let spec = format!("{{external: {{url: 'https://a.example/v1', tls: {tls}}}}}");
            transport(&compiled(&spec, &Facts::default())).tls.unwrap()
        };
        assert_eq!(of("{}").hostname, None);
        assert_eq!(
            of("{hostname: b.example}").hostname.as_deref(),
            Some("b.example")
        );
        let spec = "{external: {url: 'https://a.example/v1'}}";
        assert_eq!(transport(&compiled(spec, &Facts::default())).tls, None);
    }

    #[test]
    fn what_cannot_be_says_where() {
        let path = "spec.external.tls";
        for (url, tls, at) in [
            ("http://a.example/v1", "{}", String::new()),
            (
                "https://a.example/v1",
                "{hostname: '*.example'}",
                ".hostname".to_owned(),
            ),
            (
                "https://a.example/v1",
                "{hostname: 'a b'}",
                ".hostname".to_owned(),
            ),
        ] {
            let spec = format!("{{external: {{url: '{url}', tls: {tls}}}}}");
            let compiled = compiled(&spec, &Facts::default());
            assert_eq!(
                problems(&compiled),
                [(format!("{path}{at}").as_str(), "InvalidValue")]
            );
        }
    }

    #[test]
    fn http2_in_the_clear_is_said_and_not_beside_tls() {
        let of = |fields: &str| {
            let spec = format!("{{service: {{name: engine, port: 80, {fields}}}}}");
            compiled(&spec, &Facts::default())
        };
        assert!(transport(&of("appProtocol: kubernetes.io/h2c")).h2c);
        assert!(!transport(&of("appProtocol: http")).h2c);
        assert_eq!(
            problems(&of("appProtocol: kubernetes.io/h2c, tls: {}")),
            [("spec.service.appProtocol", "InvalidValue")]
        );
    }

    #[test]
    fn values_that_are_not_there_are_missed_and_may_come() {
        let keys = BTreeMap::from([("tls.crt".to_owned(), "0123456789abcdef".to_owned())]);
        let facts = Facts {
            services: None,
            secrets: Some(BTreeMap::from([(Id::new("default", "me"), keys)])),
            config_maps: Some(BTreeMap::new()),
            keys: None,
        };
        let spec = "{external: {url: 'https://a.example/v1', tls: {caCertificateRefs: [{name: ca}], \
                    clientCertificateRef: {name: me}}}}";
        let compiled = compiled(spec, &facts);
        assert_eq!(
            problems(&compiled),
            [
                (
                    "spec.external.tls.caCertificateRefs[0]",
                    "ConfigMapNotFound"
                ),
                ("spec.external.tls.clientCertificateRef", "SecretNotFound"),
            ]
        );
        let shown = transport(&compiled)
            .tls
            .unwrap()
            .client_certificate
            .unwrap();
        assert_eq!(shown.certificate.version, "0123456789abcdef");
        assert_eq!(shown.key.version, "");
    }
}
