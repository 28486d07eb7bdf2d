//! Flags of `penstock scaler`, and the typed settings that they become.

use std::net::SocketAddr;

use clap::Args as ClapArgs;

use crate::fleet::Limits;

/// `penstock scaler`: tells KEDA how many replicas each pool needs.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Where KEDA asks (gRPC, no TLS).
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:6000")]
    pub listen: SocketAddr,
    /// Where `/healthz`, `/readyz`, `/metrics`, `/decisions` and `/state` are served.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:9090")]
    pub admin_listen: SocketAddr,
    /// A Prometheus server that ScaledObjects may name, as a base URL; repeat for more. Default: none, so that nobody
    /// who can write a ScaledObject can make the scaler send requests anywhere.
    #[arg(long, value_name = "URL")]
    pub allowed_prometheus: Vec<String>,
    /// Host and admin port under which DNS lists the other replicas (a headless Service): a starting replica copies
    /// their windows. Default: none.
    #[arg(long, value_name = "HOST:PORT")]
    pub peers: Option<String>,
    /// Most targets (triggers of ScaledObjects); asking about one more is RESOURCE_EXHAUSTED.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub max_targets: usize,
    /// Most pods that are scraped per target, by name; the others are taken to be like these.
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    pub max_pods_per_target: usize,
    /// Most pods that are kept from the whole cluster (about 1 KiB each).
    #[arg(long, value_name = "COUNT", default_value_t = 50_000)]
    pub max_pods: usize,
    /// Most gateway replicas that are followed; with more, no target is scaled in.
    #[arg(long, value_name = "COUNT", default_value_t = 128)]
    pub max_gateways: usize,
    /// Most scrapes under way at once; each takes at most 1 s.
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    pub max_concurrent_scrapes: usize,
}

/// What [`crate::run()`] needs. Listeners are bound by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Base URLs without a trailing slash.
    pub allowed_prometheus: Vec<String>,
    /// `host:port` of the other replicas' admin ports.
    pub peers: Option<String>,
    /// Bounds of what is kept per target.
    pub limits: Limits,
    /// Most pods kept from the cluster.
    pub max_pods: usize,
    /// Most gateways followed.
    pub max_gateways: usize,
    /// Most scrapes under way at once.
    pub max_concurrent_scrapes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            allowed_prometheus: Vec::new(),
            peers: None,
            limits: Limits {
                targets: 1000,
                pods_per_target: 256,
            },
            max_pods: 50_000,
            max_gateways: 128,
            max_concurrent_scrapes: 256,
        }
    }
}

/// What is wrong with the flags, all of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct SettingsError(Vec<String>);

impl Args {
    /// Checks every flag and reports all problems together.
    pub fn settings(self) -> Result<Settings, SettingsError> {
        let mut problems = Vec::new();
        let mut allowed_prometheus = Vec::new();
        for url in &self.allowed_prometheus {
            match base_url(url) {
                Ok(url) => allowed_prometheus.push(url),
                Err(problem) => problems.push(format!("--allowed-prometheus {url}: {problem}")),
            }
        }
        if let Some(peers) = &self.peers
            && !peers
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        {
            problems.push(format!(
                "--peers {peers}: write host:port, such as penstock-scaler-peers:9090"
            ));
        }
        for (flag, count) in [
            ("--max-targets", self.max_targets),
            ("--max-pods-per-target", self.max_pods_per_target),
            ("--max-pods", self.max_pods),
            ("--max-gateways", self.max_gateways),
            ("--max-concurrent-scrapes", self.max_concurrent_scrapes),
        ] {
            if count == 0 {
                problems.push(format!("{flag} must be at least 1"));
            }
        }
        if !problems.is_empty() {
            return Err(SettingsError(problems));
        }
        Ok(Settings {
            allowed_prometheus,
            peers: self.peers,
            limits: Limits {
                targets: self.max_targets,
                pods_per_target: self.max_pods_per_target,
            },
            max_pods: self.max_pods,
            max_gateways: self.max_gateways,
            max_concurrent_scrapes: self.max_concurrent_scrapes,
        })
    }
}

fn base_url(text: &str) -> Result<String, String> {
    let url = reqwest::Url::parse(text).map_err(|err| err.to_string())?;
    if url.scheme() != "http" {
        return Err("only http:// is built in".to_owned());
    }
    if url.host().is_none()
        || url.query().is_some()
        || url.fragment().is_some()
        || !url.username().is_empty()
    {
        return Err("write a base URL, such as http://prometheus.monitoring:9090".to_owned());
    }
    Ok(text.trim_end_matches('/').to_owned())
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

    fn settings(flags: &[&str]) -> Result<Settings, String> {
        let flags = ["scaler"].iter().chain(flags);
        Cli::parse_from(flags)
            .args
            .settings()
            .map_err(|err| err.to_string())
    }

    #[test]
    fn flags_default_to_the_default_settings() {
        assert_eq!(settings(&[]), Ok(Settings::default()));
    }

    #[test]
    fn every_bad_flag_is_reported_at_once() {
        let error = settings(&[
            "--allowed-prometheus=https://prometheus",
            "--allowed-prometheus=nonsense",
            "--peers=host",
            "--max-targets=0",
        ])
        .unwrap_err();
        for part in [
            "https://prometheus: only http://",
            "nonsense:",
            "--peers host:",
            "--max-targets must be",
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn trailing_slash_of_an_allowed_server_does_not_matter() {
        let settings = settings(&["--allowed-prometheus=http://prometheus:9090/"]).unwrap();
        assert_eq!(settings.allowed_prometheus, ["http://prometheus:9090"]);
    }
}
