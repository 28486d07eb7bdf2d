//! Configs under construction.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use penstock_core::config::{
    Backend, BackendTls, Cache, CallerCredentials, ClientCertificate, CredentialRef, FORMAT,
    FailureClass, GatewayConfig, NameMatch, OnUnsupported, Parameters, Profile, Protocol, Repeat,
    Retry, Rule, RuleBackend, Slo, Strategy, Streaming, Target, Timeouts, Transport, Urgency,
    usual_failures,
};
use penstock_core::endpoints::{Endpoint, Endpoints, ServicePort};
use penstock_core::ids::Id;

/// A config under construction: backends `a`, `b`, … behind upstream addresses, one rule for model `chat`.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) config: GatewayConfig,
    pub(crate) endpoints: Endpoints,
}

pub(crate) fn id(name: &str) -> Id {
    Id::new("ns", name)
}

pub(crate) fn service(name: &str) -> ServicePort {
    ServicePort {
        service: id(name),
        port: 8000,
    }
}

impl Plan {
    pub(crate) fn new() -> Self {
        let rule = Rule {
            policy: id("policy"),
            name: "chat".to_owned(),
            models: vec![NameMatch::Exact("chat".to_owned())],
            conditions: Vec::new(),
            anonymous: false,
            backends: Vec::new(),
            strategy: Strategy::LeastRequests,
            hash_on: None,
            region_penalty_ms: None,
            slo: Slo::default(),
            retry: Retry {
                attempts: 3,
                on: usual_failures(),
                repeat: Repeat::Safe,
                rescue_streams: false,
            },
            hedge: None,
            fan_out: None,
            timeouts: Timeouts {
                connect_ms: 2_000,
                first_token_ms: 20_000,
                whole_ms: None,
                idle_ms: 20_000,
                total_ms: 60_000,
            },
            parameters: Parameters::default(),
            prompt: None,
            on_unsupported: OnUnsupported::Refuse,
            streaming: Streaming::Passed,
            heartbeat_ms: None,
            resumable_ms: None,
            join_embeddings: None,
            urgency: Urgency::Normal,
            cache: None,
        };
        let config = GatewayConfig {
            format: FORMAT,
            gateway: id("gateway"),
            objects: BTreeMap::new(),
            backends: BTreeMap::new(),
            caches: BTreeMap::new(),
            prompts: BTreeMap::new(),
            tasks: BTreeMap::new(),
            callers: None,
            budgets: BTreeMap::new(),
            rules: vec![rule],
        };
        Self {
            config,
            endpoints: Endpoints::default(),
        }
    }

    /// A backend with these endpoints, in the rule with this weight and priority.
    pub(crate) fn backend(
        mut self,
        name: &str,
        addresses: &[SocketAddr],
        weight: u32,
        priority: u32,
    ) -> Self {
        let target = Target::Endpoints {
            service_port: service(name),
            port_name: None,
            may_sleep: false,
        };
        self.config.backends.insert(
            id(name),
            Backend {
                target,
                protocol: Protocol::OpenAi,
                model: None,
                api_version: None,
                region: None,
                credential: None,
                profile: Profile::default(),
                caller_credentials: CallerCredentials::Dropped,
                transport: Transport::default(),
            },
        );
        self.config.rules[0].backends.push(RuleBackend {
            backend: id(name),
            weight,
            priority,
            model_override: None,
            after: BTreeSet::new(),
        });
        self.set_endpoints(name, addresses);
        self
    }

    /// A backend that comes only after one of these failures.
    pub(crate) fn after<const N: usize>(
        self,
        name: &str,
        addresses: &[SocketAddr],
        priority: u32,
        classes: [FailureClass; N],
    ) -> Self {
        let mut plan = self.backend(name, addresses, 1, priority);
        let candidate = plan.config.rules[0].backends.last_mut().unwrap();
        candidate.after = classes.into();
        plan
    }

    /// Backends of rising priority number, one endpoint each.
    pub(crate) fn chain(addresses: &[SocketAddr]) -> Self {
        let names = ["a", "b", "c", "d", "e"];
        names
            .iter()
            .zip(addresses)
            .zip(0..)
            .fold(Self::new(), |plan, ((name, address), priority)| {
                plan.backend(name, &[*address], 1, priority)
            })
    }

    /// A backend behind a base URL.
    pub(crate) fn url(mut self, name: &str, url: &str) -> Self {
        self = self.backend(name, &[], 1, 0);
        let backend = self.config.backends.get_mut(&id(name)).unwrap();
        backend.target = Target::Url(url.to_owned());
        self
    }

    pub(crate) fn speaking(mut self, name: &str, protocol: Protocol) -> Self {
        self.config.backends.get_mut(&id(name)).unwrap().protocol = protocol;
        self
    }

    /// What a backend is like.
    pub(crate) fn profile(mut self, name: &str, change: impl FnOnce(&mut Profile)) -> Self {
        change(&mut self.config.backends.get_mut(&id(name)).unwrap().profile);
        self
    }

    /// A backend that is spoken to over TLS, with the authorities, and perhaps the certificate, of these names.
    pub(crate) fn tls(mut self, name: &str, hostname: &str, ca: &str, shown: bool) -> Self {
        let value = |id: &str| CredentialRef {
            id: id.to_owned(),
            version: String::new(),
        };
        let backend = self.config.backends.get_mut(&id(name)).unwrap();
        backend.transport.tls = Some(BackendTls {
            hostname: Some(hostname.to_owned()),
            authorities: vec![value(ca)],
            client_certificate: shown.then(|| ClientCertificate {
                certificate: value("tls.crt"),
                key: value("tls.key"),
            }),
        });
        self
    }

    pub(crate) fn credential(mut self, name: &str, credential: &str) -> Self {
        let backend = self.config.backends.get_mut(&id(name)).unwrap();
        backend.credential = Some(CredentialRef {
            id: credential.to_owned(),
            version: String::new(),
        });
        self
    }

    pub(crate) fn set_endpoints(&mut self, name: &str, addresses: &[SocketAddr]) {
        let endpoints = addresses
            .iter()
            .map(|address| Endpoint {
                address: *address,
                ready: true,
                zone: None,
                revision: None,
            })
            .collect();
        self.endpoints.services.insert(service(name), endpoints);
    }

    /// What the pods of a backend's endpoints were made from.
    pub(crate) fn revisions(mut self, name: &str, revisions: &[&str]) -> Self {
        let endpoints = self.endpoints.services.get_mut(&service(name)).unwrap();
        for (endpoint, revision) in endpoints.iter_mut().zip(revisions) {
            endpoint.revision = Some((*revision).to_owned());
        }
        self
    }

    pub(crate) fn rule(mut self, change: impl FnOnce(&mut Rule)) -> Self {
        change(&mut self.config.rules[0]);
        self
    }

    pub(crate) fn cached(self, ttl_ms: u64) -> Self {
        self.cached_up_to(ttl_ms, 1 << 20)
    }

    pub(crate) fn cached_up_to(mut self, ttl_ms: u64, max_bytes: u64) -> Self {
        self.config
            .caches
            .insert(id("cache"), Cache { ttl_ms, max_bytes });
        self.config.rules[0].cache = Some(id("cache"));
        self
    }
}
