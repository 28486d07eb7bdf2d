//! Command line of `penstock operator`: raw text in, typed [`Settings`] or all mistakes together out.

use std::net::SocketAddr;

use ipnet::IpNet;

/// Turns LLMBackend, RoutingPolicy and SemanticCache objects into pools and gateways.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Namespace to look after; may be given several times or as a list with commas. Default: all namespaces.
    #[arg(long = "namespace", value_name = "NAME", value_delimiter = ',')]
    pub namespaces: Vec<String>,

    /// Where KEDA reaches Penstock's scaler, host:port. `<service>.<namespace>:<port>` lets the operator see whether
    /// the scaler is up before it hands a pool over to it.
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "penstock-scaler.penstock-system:6000"
    )]
    pub scaler_address: String,

    /// Image of gateways and of simulated engines: this program's own.
    #[arg(long, value_name = "IMAGE", default_value = concat!("penstock:", env!("CARGO_PKG_VERSION")))]
    pub self_image: String,

    /// Image of vLLM engines whose pool names none.
    #[arg(long, value_name = "IMAGE", default_value = "vllm/vllm-openai:v0.32.0")]
    pub vllm_image: String,

    /// Replicas of each gateway, 1 to 1000.
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    pub gateway_replicas: i32,

    /// Where gateways keep background responses, batches and files: redis://[USER@]HOST:PORT[/DB], or rediss:// with
    /// TLS. Default: nowhere, and they refuse them.
    #[arg(long, value_name = "URL")]
    pub gateway_store: Option<String>,

    /// Secret, in each gateway's namespace, whose key `password` is that of the store.
    #[arg(long, value_name = "NAME")]
    pub gateway_store_secret: Option<String>,

    /// Where gateways send a line for each request: s3://BUCKET[/PREFIX] or otlp+http://HOST:PORT (otlp+https). Default:
    /// nowhere. Needs --gateway-store.
    #[arg(long, value_name = "URL", requires = "gateway_store")]
    pub gateway_usage_export: Option<String>,

    /// Secret, in each gateway's namespace, with what they need for that as variables, such as AWS_ACCESS_KEY_ID,
    /// AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT.
    #[arg(long, value_name = "NAME", requires = "gateway_usage_export")]
    pub gateway_usage_export_secret: Option<String>,

    /// Region that gateways are in. Default: the label topology.kubernetes.io/region of their pods, which Kubernetes
    /// sets from 1.35 on.
    #[arg(long, value_name = "REGION", default_value = "")]
    pub gateway_region: String,

    /// Header in which trusted proxies tell gateways which region a caller is in.
    #[arg(long, value_name = "NAME", requires = "gateway_trusted_proxies")]
    pub gateway_region_header: Option<String>,

    /// Addresses of proxies that gateways believe, such as 10.0.0.0/8. May be repeated, or a list with commas.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub gateway_trusted_proxies: Vec<IpNet>,

    /// When nodes pull the images of gateways and engines: Always, IfNotPresent or Never.
    #[arg(long, value_name = "POLICY", default_value = "IfNotPresent")]
    pub image_pull_policy: String,

    /// Namespace of the Lease that decides which replica of the operator writes. Default: the one that the client's
    /// credentials name.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,

    /// This replica's name in the Lease and in events. Default: made from the process number.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub identity: Option<String>,

    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9090")]
    pub admin_listen: SocketAddr,
}

/// Checked settings of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Namespaces to look after; empty for all.
    pub namespaces: Vec<String>,
    /// Namespace of the Lease; `None` for the client's own.
    pub lease_namespace: Option<String>,
    /// This replica's name; `None` for one made from the process number.
    pub identity: Option<String>,
    /// Address of the admin port.
    pub admin_listen: SocketAddr,
    /// What plans need.
    pub plan: PlanSettings,
}

/// The settings that show in child objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanSettings {
    /// Where KEDA reaches the scaler, `host:port`.
    pub scaler_address: String,
    /// Image of gateways and simulated engines.
    pub self_image: String,
    /// Image of vLLM engines.
    pub vllm_image: String,
    /// Replicas of each gateway, 1..=1000.
    pub gateway_replicas: i32,
    /// Region that gateways are in; empty: what their pods' labels say.
    pub gateway_region: String,
    /// Header in which trusted proxies say which region a caller is in.
    pub gateway_region_header: Option<String>,
    /// Addresses of these proxies.
    pub gateway_trusted_proxies: Vec<IpNet>,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// Where gateways keep jobs.
    pub store: Option<StoreSettings>,
    /// Where they send a line for each request, and the Secret with what that needs as variables.
    pub usage_export: Option<(String, Option<String>)>,
}

/// A store that gateways share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSettings {
    /// `redis://…` or `rediss://…`, without a password.
    pub url: String,
    /// Secret with the password.
    pub secret: Option<String>,
}

/// Flags that cannot be used; every mistake is listed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct SettingsError(pub Vec<String>);

const MAX_GATEWAY_REPLICAS: i32 = 1000;

impl Args {
    /// Checks all flags and reports all mistakes together.
    pub fn settings(self) -> Result<Settings, SettingsError> {
        let mut mistakes = Vec::new();
        for name in self.namespaces.iter().chain(self.lease_namespace.as_ref()) {
            if !is_dns_label(name) {
                mistakes.push(format!(
                    "'{name}' is not a namespace name (--namespace, --lease-namespace)"
                ));
            }
        }
        if !is_host_port(&self.scaler_address) {
            mistakes.push(format!(
                "'{}' is not host:port (--scaler-address)",
                self.scaler_address
            ));
        }
        for (flag, image) in [
            ("--self-image", &self.self_image),
            ("--vllm-image", &self.vllm_image),
        ] {
            if image.is_empty() || image.contains(char::is_whitespace) {
                mistakes.push(format!("'{image}' is not an image ({flag})"));
            }
        }
        if !(1..=MAX_GATEWAY_REPLICAS).contains(&self.gateway_replicas) {
            mistakes.push(format!(
                "{} is out of range: use 1 to {MAX_GATEWAY_REPLICAS} (--gateway-replicas)",
                self.gateway_replicas
            ));
        }
        if !["Always", "IfNotPresent", "Never"].contains(&self.image_pull_policy.as_str()) {
            mistakes.push(format!(
                "'{}' is not Always, IfNotPresent or Never (--image-pull-policy)",
                self.image_pull_policy
            ));
        }
        let usage_export = self.gateway_usage_export;
        let is_known = |url: &String| {
            ["s3://", "otlp+http://", "otlp+https://"]
                .iter()
                .any(|scheme| url.starts_with(scheme))
        };
        if let Some(url) = usage_export.as_ref().filter(|url| !is_known(url)) {
            mistakes.push(format!(
                "'{url}' is not s3://BUCKET[/PREFIX], otlp+http://HOST:PORT or otlp+https://HOST:PORT (--gateway-usage-export)"
            ));
        }
        let store = store(self.gateway_store, self.gateway_store_secret, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(SettingsError(mistakes));
        }
        Ok(Settings {
            namespaces: self.namespaces,
            lease_namespace: self.lease_namespace,
            identity: self.identity,
            admin_listen: self.admin_listen,
            plan: PlanSettings {
                scaler_address: self.scaler_address,
                self_image: self.self_image,
                vllm_image: self.vllm_image,
                gateway_replicas: self.gateway_replicas,
                gateway_region: self.gateway_region,
                gateway_region_header: self.gateway_region_header,
                gateway_trusted_proxies: self.gateway_trusted_proxies,
                image_pull_policy: self.image_pull_policy,
                store,
                usage_export: usage_export.map(|url| (url, self.gateway_usage_export_secret)),
            },
        })
    }
}

/// Checks the flags of the gateways' store.
fn store(
    url: Option<String>,
    secret: Option<String>,
    mistakes: &mut Vec<String>,
) -> Option<StoreSettings> {
    let Some(url) = url else {
        if secret.is_some() {
            mistakes.push("--gateway-store-secret needs --gateway-store".to_owned());
        }
        return None;
    };
    let rest = url
        .strip_prefix("redis")
        .map(|rest| rest.strip_prefix('s').unwrap_or(rest));
    let host = rest
        .and_then(|rest| rest.strip_prefix("://"))
        .unwrap_or_default();
    let user = host.rsplit_once('@').map_or("", |(user, _)| user);
    if host.is_empty() || host.contains(char::is_whitespace) {
        mistakes.push(format!(
            "'{url}' is not redis://HOST:PORT or rediss://HOST:PORT (--gateway-store)"
        ));
    } else if user.contains(':') {
        mistakes.push(
            "a password must not stand in --gateway-store: use --gateway-store-secret".to_owned(),
        );
    }
    if let Some(name) = secret
        .iter()
        .find(|name| !name.split('.').all(is_dns_label))
    {
        mistakes.push(format!(
            "'{name}' is not a Secret's name (--gateway-store-secret)"
        ));
    }
    Some(StoreSettings { url, secret })
}

fn is_dns_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty()
        && text.len() <= 63
        && text.chars().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && !host.contains(char::is_whitespace)
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

impl PlanSettings {
    /// The scaler's Service as (namespace, name), if its address is of the form `<name>.<namespace>[.svc…]:<port>`.
    pub fn scaler_service(&self) -> Option<(&str, &str)> {
        let host = self.scaler_address.rsplit_once(':')?.0;
        if host.parse::<std::net::IpAddr>().is_ok() {
            return None;
        }
        let mut parts = host.split('.');
        let (name, namespace) = (parts.next()?, parts.next()?);
        let rest = parts.next();
        let in_cluster = rest.is_none() || rest == Some("svc");
        (in_cluster && is_dns_label(name) && is_dns_label(namespace)).then_some((namespace, name))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Args {
        Cli::parse_from([&["operator"], line].concat()).args
    }

    #[test]
    fn defaults_are_usable() {
        let settings = parse(&[]).settings().unwrap();
        assert_eq!(
            settings.plan.scaler_service(),
            Some(("penstock-system", "penstock-scaler"))
        );
        assert_eq!(settings.plan.gateway_replicas, 2);
        assert!(settings.namespaces.is_empty());
    }

    #[test]
    fn all_mistakes_are_reported_together() {
        let line = [
            "--namespace",
            "A,ok",
            "--scaler-address",
            "nowhere",
            "--gateway-replicas",
            "0",
        ];
        let line = [
            &line[..],
            &["--image-pull-policy", "Sometimes", "--vllm-image", ""],
        ]
        .concat();
        let SettingsError(mistakes) = parse(&line).settings().unwrap_err();
        assert_eq!(mistakes.len(), 5, "{mistakes:#?}");
    }

    #[test]
    fn proxies_are_addresses_as_the_gateway_takes_them() {
        let line = ["--gateway-trusted-proxies", "10.0.0.0/8,::1/128"];
        let settings = parse(&line).settings().unwrap();
        let proxies = settings.plan.gateway_trusted_proxies.iter();
        let proxies: Vec<String> = proxies.map(ToString::to_string).collect();
        assert_eq!(proxies, ["10.0.0.0/8", "::1/128"]);
        for wrong in ["10.0.0", "proxy.example", ""] {
            assert!(
                Cli::try_parse_from(["operator", "--gateway-trusted-proxies", wrong]).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn the_gateways_store_is_a_server_without_a_password_in_its_url() {
        let store = |line: &[&str]| parse(line).settings().map(|settings| settings.plan.store);
        assert_eq!(store(&[]).unwrap(), None);
        let line = [
            "--gateway-store",
            "rediss://jobs@cache.db:6380",
            "--gateway-store-secret",
            "cache",
        ];
        assert_eq!(
            store(&line).unwrap().unwrap().secret.as_deref(),
            Some("cache")
        );
        for line in [
            &["--gateway-store", "file:/tmp/x"][..],
            &["--gateway-store", "redis://:secret@cache:6379"],
            &[
                "--gateway-store",
                "redis://cache:6379",
                "--gateway-store-secret",
                "A",
            ],
            &["--gateway-store-secret", "cache"],
        ] {
            assert!(store(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn namespaces_are_a_list_or_repeated() {
        let settings = parse(&["--namespace", "a,b", "--namespace", "c"])
            .settings()
            .unwrap();
        assert_eq!(settings.namespaces, ["a", "b", "c"]);
    }

    #[test]
    fn scaler_service_is_known_only_for_names_in_the_cluster() {
        let service = |address: &str| {
            let mut plan = parse(&[]).settings().unwrap().plan;
            address.clone_into(&mut plan.scaler_address);
            plan.scaler_service()
                .map(|(namespace, name)| format!("{namespace}/{name}"))
        };
        assert_eq!(
            service("s.ns.svc.cluster.local:6000").as_deref(),
            Some("ns/s")
        );
        assert_eq!(service("s.ns.svc:6000").as_deref(), Some("ns/s"));
        assert_eq!(service("10.0.0.1:6000"), None);
        assert_eq!(service("scaler:6000"), None);
        assert_eq!(service("scaler.example.com:6000"), None);
    }
}
