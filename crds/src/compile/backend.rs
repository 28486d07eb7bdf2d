//! One `LLMBackend` → one `config::Backend`, or problems.

use std::collections::BTreeSet;
use std::time::Duration;

use penstock_core::config::{
    Backend, CallerCredentials, CredentialRef, Profile, Protocol, Target, Transport,
};
use penstock_core::endpoints::ServicePort;
use penstock_core::ids::Id;
use penstock_core::names;

use super::{Facts, profile, tls};
use crate::backend::{
    CallerCredentialsSpec, External, LLMBackendSpec, Pool, ProtocolSpec, ProviderProtocol, Scaling,
    SecretKey, ServiceTarget,
};
use crate::object::{Kind, ObjectRef};
use crate::problem::{Problem, Reason};
use crate::text::DurationText;

/// Kubernetes object names that become a label value or Service name end here.
const MAX_CHILD_NAME: usize = 63;
/// The HPA's own bound for a stabilization window.
const MAX_SCALE_DOWN_DELAY: Duration = Duration::from_hours(1);
/// The scaler's own bound: beyond it none of its windows could hold evidence.
const MAX_TTFT: Duration = Duration::from_mins(1);
const MAX_DRAIN: Duration = Duration::from_hours(24);

pub(super) struct Check<'a> {
    object: ObjectRef,
    problems: &'a mut Vec<Problem>,
    ok: bool,
}

impl Check<'_> {
    pub(super) fn refuse(&mut self, path: &str, reason: Reason, message: String) {
        // A Service or Secret that is missing may appear later: the backend stays routable, as the data plane then
        // sees no endpoints or waits for the credential.
        self.ok &= reason.is_reference();
        self.problems.push(Problem {
            object: self.object.clone(),
            path: path.to_owned(),
            reason,
            message,
        });
    }

    pub(super) fn duration(
        &mut self,
        path: &str,
        text: &DurationText,
        least: Duration,
        most: Duration,
    ) {
        match text.parse() {
            Ok(value) if value < least || value > most => {
                let range = format!("use {}ms to {}s", least.as_millis(), most.as_secs());
                self.refuse(
                    path,
                    Reason::InvalidValue,
                    format!("{} is out of range: {range}", text.0),
                );
            }
            Ok(_) => {}
            Err(err) => self.refuse(path, Reason::InvalidValue, err.to_string()),
        }
    }

    pub(super) fn within(&mut self, path: &str, value: i32, least: i32, most: i32) {
        if !(least..=most).contains(&value) {
            let message = format!("{value} is out of range: use {least} to {most}");
            self.refuse(path, Reason::InvalidValue, message);
        }
    }
}

/// `None` when the backend cannot be used at all; problems say why.
pub(super) fn compile(
    id: &Id,
    spec: &LLMBackendSpec,
    gateways: &BTreeSet<Id>,
    facts: &Facts,
    problems: &mut Vec<Problem>,
) -> Option<Backend> {
    let object = ObjectRef::new(Kind::LLMBackend, id.clone());
    let mut check = Check {
        object,
        problems,
        ok: true,
    };
    let backend = match (&spec.pool, &spec.service, &spec.external) {
        (Some(pool), None, None) => Some(compile_pool(id, pool, &mut check)),
        (None, Some(service), None) => compile_service(id, service, gateways, facts, &mut check),
        (None, None, Some(external)) => compile_external(id, external, gateways, facts, &mut check),
        _ => {
            let message = "set exactly one of pool, service and external".to_owned();
            check.refuse("spec", Reason::InvalidValue, message);
            None
        }
    };
    let profile = profile::compile(spec, &mut check);
    let transport = tls::compile(id, spec, facts, &mut check);
    backend.filter(|_| check.ok).map(|backend| Backend {
        profile,
        transport,
        ..backend
    })
}

fn compile_pool(id: &Id, pool: &Pool, check: &mut Check<'_>) -> Backend {
    let service = names::pool_object(&id.name);
    if service.len() > MAX_CHILD_NAME {
        let most = MAX_CHILD_NAME - (service.len() - id.name.len());
        let message = format!(
            "the name of a pool has at most {most} characters, this one has {}",
            id.name.len()
        );
        check.refuse("metadata.name", Reason::InvalidValue, message);
    }
    if pool.model.is_empty() {
        check.refuse(
            "spec.pool.model",
            Reason::InvalidValue,
            "name the model that the engine loads".to_owned(),
        );
    }
    if let Some(drain) = &pool.drain {
        check.duration("spec.pool.drain", drain, Duration::ZERO, MAX_DRAIN);
    }
    if let Some(replicas) = pool.replicas {
        check.within("spec.pool.replicas", replicas, 0, 10_000);
    }
    if let Some(accelerator) = &pool.accelerator {
        check.within("spec.pool.accelerator.count", accelerator.count, 1, 64);
    }
    let resources = pool.resources.iter();
    for (list, quantities) in
        resources.flat_map(|r| [("requests", &r.requests), ("limits", &r.limits)])
    {
        for (name, quantity) in quantities
            .iter()
            .filter(|(_, quantity)| !quantity.is_valid())
        {
            let message = format!(
                "'{}' is not a quantity: write one such as 4, 500m or 16Gi",
                quantity.0
            );
            check.refuse(
                &format!("spec.pool.resources.{list}.{name}"),
                Reason::InvalidValue,
                message,
            );
        }
    }
    if let Some(scaling) = &pool.scaling {
        if pool.replicas.is_some() {
            let message = "set replicas or scaling, not both: with scaling, the autoscaler owns the number of replicas";
            check.refuse("spec.pool", Reason::InvalidValue, message.to_owned());
        }
        check_scaling(scaling, check);
    }
    Backend {
        target: Target::Endpoints {
            service_port: ServicePort {
                service: Id::new(&id.namespace, service),
                port: names::ENGINE_PORT,
            },
            port_name: Some("http".to_owned()),
            may_sleep: false,
        },
        protocol: Protocol::OpenAi,
        model: Some(id.name.clone()),
        api_version: None,
        region: None,
        credential: None,
        profile: Profile::default(),
        caller_credentials: CallerCredentials::Dropped,
        transport: Transport::default(),
    }
}

fn check_scaling(scaling: &Scaling, check: &mut Check<'_>) {
    check.within(
        "spec.pool.scaling.minReplicas",
        scaling.min_replicas,
        1,
        10_000,
    );
    check.within(
        "spec.pool.scaling.maxReplicas",
        scaling.max_replicas,
        1,
        10_000,
    );
    if scaling.min_replicas > scaling.max_replicas {
        let message = format!(
            "minReplicas {} is above maxReplicas {}: lower one or raise the other",
            scaling.min_replicas, scaling.max_replicas
        );
        check.refuse("spec.pool.scaling", Reason::InvalidValue, message);
    }
    check.within(
        "spec.pool.scaling.kvCacheUtilizationPercent",
        scaling.kv_cache_utilization_percent,
        1,
        100,
    );
    let least = Duration::from_millis(1);
    check.duration(
        "spec.pool.scaling.ttftP90",
        &scaling.ttft_p90,
        least,
        MAX_TTFT,
    );
    let delay = &scaling.scale_down_delay;
    check.duration(
        "spec.pool.scaling.scaleDownDelay",
        delay,
        Duration::ZERO,
        MAX_SCALE_DOWN_DELAY,
    );
}

fn compile_service(
    id: &Id,
    service: &ServiceTarget,
    gateways: &BTreeSet<Id>,
    facts: &Facts,
    check: &mut Check<'_>,
) -> Option<Backend> {
    let target = Id::new(&id.namespace, &service.name);
    let port = u16::try_from(service.port).ok().filter(|port| *port > 0);
    if port.is_none() {
        let message = format!("{} is out of range: use 1 to 65535", service.port);
        check.refuse("spec.service.port", Reason::InvalidValue, message);
    }
    let found = facts
        .services
        .as_ref()
        .map(|services| services.get(&target));
    let selects_gateway = found
        .flatten()
        .is_some_and(|service| service.selector.contains_key(names::GATEWAY_LABEL));
    if is_gateway_service(&target.namespace, &target.name, gateways) || selects_gateway {
        refuse_loop("spec.service.name", &target.to_string(), check);
    } else if let Some(None) = found {
        let message = format!("Service {target} does not exist: create it or correct the name");
        check.refuse("spec.service.name", Reason::ServiceNotFound, message);
    } else if let (Some(Some(found)), Some(port)) = (found, port)
        && !found.ports.contains_key(&port)
    {
        let ports: Vec<String> = found.ports.keys().map(u16::to_string).collect();
        let message = format!(
            "Service {target} has no port {port}; it has {}",
            ports.join(", ")
        );
        check.refuse("spec.service.port", Reason::ServiceNotFound, message);
    }
    check_model(service, check);
    let caller_credentials = caller_credentials(service, check);
    let port = port?;
    Some(Backend {
        target: Target::Endpoints {
            service_port: ServicePort {
                service: target,
                port,
            },
            port_name: found
                .flatten()
                .and_then(|service| service.ports.get(&port).cloned().flatten()),
            may_sleep: true,
        },
        protocol: protocol(service.protocol),
        model: service.model.clone(),
        api_version: None,
        region: None,
        credential: compile_credential(
            id,
            "spec.service",
            service.credential.as_ref(),
            facts,
            check,
        ),
        profile: Profile::default(),
        caller_credentials,
        transport: Transport::default(),
    })
}

fn compile_external(
    id: &Id,
    external: &External,
    gateways: &BTreeSet<Id>,
    facts: &Facts,
    check: &mut Check<'_>,
) -> Option<Backend> {
    let Some(host) = url_host(&external.url) else {
        let message = format!(
            "'{}' is not a base URL: write http:// or https://, a host and a path, such as \
             https://api.example.com/v1, without user, query and fragment",
            external.url
        );
        check.refuse("spec.external.url", Reason::InvalidValue, message);
        return None;
    };
    check_provider(external, check);
    let mut labels = host.split('.');
    let name = labels.next().unwrap_or_default();
    let namespace = labels.next().unwrap_or(&id.namespace);
    if is_gateway_service(namespace, name, gateways) {
        refuse_loop("spec.external.url", host, check);
    }
    Some(Backend {
        target: Target::Url(external.url.trim_end_matches('/').to_owned()),
        protocol: provider_protocol(external.protocol),
        model: external.model.clone(),
        api_version: external.api_version.clone(),
        region: external.region.clone(),
        credential: compile_credential(
            id,
            "spec.external",
            external.credential.as_ref(),
            facts,
            check,
        ),
        profile: Profile::default(),
        caller_credentials: CallerCredentials::Dropped,
        transport: Transport::default(),
    })
}

fn protocol(spec: ProtocolSpec) -> Protocol {
    match spec {
        ProtocolSpec::OpenAI => Protocol::OpenAi,
        ProtocolSpec::Anthropic => Protocol::Anthropic,
        ProtocolSpec::HTTP => Protocol::Http,
    }
}

fn check_model(service: &ServiceTarget, check: &mut Check<'_>) {
    if service.protocol == ProtocolSpec::HTTP && service.model.is_some() {
        let message = "requests to a backend that speaks HTTP name no model: leave it out";
        check.refuse(
            "spec.service.model",
            Reason::InvalidValue,
            message.to_owned(),
        );
    }
}

fn caller_credentials(service: &ServiceTarget, check: &mut Check<'_>) -> CallerCredentials {
    let path = "spec.service.callerCredentials";
    let passes = service.caller_credentials == Some(CallerCredentialsSpec::Pass);
    if service.caller_credentials.is_some() && service.protocol != ProtocolSpec::HTTP {
        let message = "has no effect without protocol: HTTP".to_owned();
        check.refuse(path, Reason::InvalidValue, message);
    } else if passes && service.credential.is_some() {
        let message =
            "set credential or callerCredentials: Pass, not both: one Authorization goes upstream";
        check.refuse(path, Reason::InvalidValue, message.to_owned());
    }
    if passes {
        CallerCredentials::Passed
    } else {
        CallerCredentials::Dropped
    }
}

fn provider_protocol(spec: ProviderProtocol) -> Protocol {
    match spec {
        ProviderProtocol::OpenAI => Protocol::OpenAi,
        ProviderProtocol::Anthropic => Protocol::Anthropic,
        ProviderProtocol::AzureOpenAI => Protocol::AzureOpenAi,
        ProviderProtocol::Gemini => Protocol::Gemini,
        ProviderProtocol::Bedrock => Protocol::Bedrock,
    }
}

/// What only one protocol has.
fn check_provider(external: &External, check: &mut Check<'_>) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let is_name = |text: &str| !text.is_empty() && text.chars().all(is_word);
    let version = match &external.api_version {
        Some(_) if external.protocol != ProviderProtocol::AzureOpenAI => {
            Some("only protocol AzureOpenAI has an apiVersion: leave it out".to_owned())
        }
        Some(version) if !is_name(version) => Some(format!(
            "'{version}' is not a version: write one such as 2024-10-21"
        )),
        _ => None,
    };
    let is_bedrock = external.protocol == ProviderProtocol::Bedrock;
    let region = match &external.region {
        Some(_) if !is_bedrock => {
            Some("only protocol Bedrock has a region: leave it out".to_owned())
        }
        None if is_bedrock => {
            Some("name the region that is asked, such as eu-central-1".to_owned())
        }
        Some(region) if !is_name(region) => Some(format!(
            "'{region}' is not a region: write one such as eu-central-1"
        )),
        _ => None,
    };
    for (field, problem) in [("apiVersion", version), ("region", region)] {
        if let Some(message) = problem {
            let path = format!("spec.external.{field}");
            check.refuse(&path, Reason::InvalidValue, message);
        }
    }
}

fn is_gateway_service(namespace: &str, service: &str, gateways: &BTreeSet<Id>) -> bool {
    gateways.iter().any(|gateway| {
        gateway.namespace == namespace && names::gateway_object(&gateway.name) == service
    })
}

fn refuse_loop(path: &str, target: &str, check: &mut Check<'_>) {
    let message =
        format!("{target} leads back to a Penstock gateway: name the Service of the engine itself");
    check.refuse(path, Reason::RoutingLoop, message);
}

fn compile_credential(
    id: &Id,
    parent: &str,
    key: Option<&SecretKey>,
    facts: &Facts,
    check: &mut Check<'_>,
) -> Option<CredentialRef> {
    let path = format!("{parent}.credential");
    let value = key?.value();
    Some(tls::compile_value(id, &path, value, facts, check))
}

/// The host of an absolute http(s) URL without user information, query and fragment.
pub(super) fn url_host(url: &str) -> Option<&str> {
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"))?;
    let forbidden =
        |c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#' | '@' | '\\');
    if rest.contains(forbidden) {
        return None;
    }
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    (!host.is_empty()).then_some(host)
}
