//! Command-line arguments of `penstock gateway`: text in, [`GatewayArgs`] out, all mistakes reported together.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;
use http::HeaderName;
use ipnet::IpNet;
use penstock_core::duration;
use penstock_core::ids::Id;
use penstock_core::names::{ADMIN_PORT, GATEWAY_PORT, GATEWAY_TLS_PORT};

use crate::certificates::TlsSettings;
use crate::origin::Origins;
use crate::settings::{JobLimits, Limits, Place, Settings};
use crate::source::cluster::ClusterSettings;
use crate::store::Spec;
use crate::usage;

/// Arguments of `penstock gateway`. Durations are written `500ms`, `10s`, `5m` or `1h`.
#[derive(ClapArgs, Clone, Debug)]
pub struct Args {
    /// Name of the gateway whose config is served (`spec.gateway` of its RoutingPolicies).
    #[arg(long, env = "PENSTOCK_GATEWAY", default_value = "default")]
    pub gateway: String,
    /// Region that this gateway is in, such as eu-west-1, for the strategy Region.
    #[arg(long, env = "PENSTOCK_REGION", default_value = "")]
    pub region: String,
    /// Zone of this gateway's node, for the same.
    #[arg(long, env = "PENSTOCK_ZONE", default_value = "")]
    pub zone: String,
    /// Header in which trusted proxies say which region a caller is in.
    #[arg(long, value_name = "NAME", requires = "trusted_proxies")]
    pub region_header: Option<HeaderName>,
    /// Addresses of proxies that are believed, such as 10.0.0.0/8. May be repeated, or a list with commas.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub trusted_proxies: Vec<IpNet>,
    /// Address for requests.
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], GATEWAY_PORT)))]
    pub listen: SocketAddr,
    /// Address for requests over TLS; used with --tls-dir.
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], GATEWAY_TLS_PORT)))]
    pub tls_listen: SocketAddr,
    /// Folder with `tls.crt` and `tls.key`, as a TLS Secret is mounted. May be repeated: the caller's server name
    /// chooses, and the first folder answers names that no certificate is for. Changes are followed.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Vec<PathBuf>,
    /// PEM file with certificate authorities: over TLS, only callers with a certificate of theirs are let in.
    #[arg(long, value_name = "FILE", requires = "tls_dir")]
    pub tls_client_ca: Option<PathBuf>,
    /// Address for /healthz, /readyz, /metrics, /config and /load.
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], ADMIN_PORT)))]
    pub admin_listen: SocketAddr,
    /// Folder for the last good config and the last seen endpoints (an emptyDir).
    #[arg(long, default_value = "/var/lib/penstock/state")]
    pub state_dir: PathBuf,
    /// Folder for the last seen credentials (an emptyDir of medium Memory).
    #[arg(long, default_value = "/var/lib/penstock/secrets")]
    pub secret_dir: PathBuf,
    /// Threads that carry requests. 0 takes one for each CPU.
    #[arg(long, default_value_t = 0)]
    pub workers: usize,
    /// How long new connections are accepted after SIGTERM. In a cluster preStop does this: keep 0s there.
    #[arg(long, default_value = "0s")]
    pub drain_delay: String,
    /// How long requests in flight may finish after that.
    #[arg(long, default_value = "10m")]
    pub drain_timeout: String,
    /// How long a request waits for a backend whose first endpoint is on its way, or may be woken, before 503.
    #[arg(long, default_value = "30s")]
    pub hold_timeout: String,
    /// Open client connections; further ones wait in the kernel's backlog.
    #[arg(long, default_value_t = Limits::default().connections)]
    pub max_connections: usize,
    /// Requests in progress; further ones are refused with 503.
    #[arg(long, default_value_t = Limits::default().requests)]
    pub max_requests: usize,
    /// Requests that may wait for a backend without a ready endpoint; further ones are refused with 503.
    #[arg(long, default_value_t = Limits::default().held)]
    pub max_held: usize,
    /// Largest body of a call, in bytes; larger ones are refused with 413. To agents and tools bodies pass at any size.
    #[arg(long, default_value_t = Limits::default().body_bytes)]
    pub max_body_bytes: usize,
    /// Request bodies held at one time, in bytes; beyond that requests are refused with 503. They count as callers sent
    /// them: what goes to backends of another protocol is held once more for each protocol.
    #[arg(long, default_value_t = Limits::default().total_body_bytes)]
    pub max_total_body_bytes: usize,
    /// Largest file that may be uploaded, in bytes; larger ones are refused with 413.
    #[arg(long, default_value_t = Limits::default().file_bytes)]
    pub max_file_bytes: usize,
    /// Files and background responses that one caller may have in the store, in bytes; more is refused with 403.
    #[arg(long, default_value_t = Limits::default().owner_bytes)]
    pub store_max_bytes_per_caller: u64,
    /// Request header names and values together, in bytes; more is refused with 431.
    #[arg(long, default_value_t = Limits::default().header_bytes)]
    pub max_header_bytes: usize,
    /// Number of request headers; more is refused with 431.
    #[arg(long, default_value_t = Limits::default().headers)]
    pub max_headers: usize,
    /// From a connection's first byte to the end of a request head.
    #[arg(long, default_value = "10s")]
    pub header_timeout: String,
    /// From the end of a request head to the end of its body.
    #[arg(long, default_value = "30s")]
    pub body_timeout: String,
    /// How long a client connection may idle between two requests.
    #[arg(long, default_value = "2m")]
    pub idle_timeout: String,
    /// How long a caller may leave a ready answer unread.
    #[arg(long, default_value = "1m")]
    pub write_timeout: String,
    /// Share of requests whose choices of endpoints go to the log (target `decision`) with all candidates and
    /// figures: 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    pub decision_log_share: f64,
    /// PEM file with certificate authorities for https backends, besides the public ones.
    #[arg(long)]
    pub upstream_ca: Option<PathBuf>,
    /// Where background responses, batches and files are kept: file:PATH for a single replica, or
    /// redis://[USER@]HOST:PORT[/DB] or redis-cluster://[USER@]HOST:PORT[,HOST:PORT…] (rediss with TLS) for any number.
    /// Without it they are refused.
    #[arg(long, env = "PENSTOCK_STORE")]
    pub store: Option<String>,
    /// File with the password of the store's server.
    #[arg(long)]
    pub store_password_file: Option<PathBuf>,
    /// What a store in a file may hold, in bytes.
    #[arg(long)]
    pub store_max_bytes: Option<u64>,
    /// Where a line for each request goes that says who took what: file:PATH, s3://BUCKET[/PREFIX] (with AWS_REGION,
    /// AWS_ENDPOINT and credentials as AWS's own tools read them) or otlp+http://HOST:PORT (otlp+https). Needs a store.
    #[arg(long, env = "PENSTOCK_USAGE_EXPORT", value_name = "URL")]
    pub usage_export: Option<usage::Target>,
    /// Calls of jobs at one time, for each endpoint that has room for jobs.
    #[arg(long, default_value_t = JobLimits::default().per_endpoint)]
    pub jobs_per_endpoint: usize,
    /// An endpoint with so many requests in progress has no room for jobs.
    #[arg(long, default_value_t = JobLimits::default().busy_at)]
    pub jobs_busy_at: usize,
    /// Namespace of this pod, and so of the gateway (downward API).
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub pod_namespace: String,
    /// Name of this pod (downward API).
    #[arg(long, env = "POD_NAME", default_value = "")]
    pub pod_name: String,
    /// UID of this pod (downward API): its key in the acks.
    #[arg(long, env = "POD_UID", default_value = "")]
    pub pod_uid: String,
}

/// What [`Args::settings`] makes.
#[derive(Clone, Debug)]
pub struct GatewayArgs {
    /// For [`crate::run`].
    pub settings: Settings,
    /// For [`crate::source::cluster::run`].
    pub cluster: ClusterSettings,
    /// Where to listen for requests (flag `--listen`).
    pub listen: SocketAddr,
    /// Where to listen for requests over TLS, if anywhere (flag `--tls-listen`).
    pub tls_listen: Option<SocketAddr>,
    /// Where to listen for the admin paths (flag `--admin-listen`).
    pub admin_listen: SocketAddr,
}

/// Every argument that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct ArgsError {
    /// One sentence each.
    pub problems: Vec<String>,
}

impl fmt::Display for ArgsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl Args {
    /// Checks all arguments and types them.
    #[expect(clippy::too_many_lines, reason = "one flag after another")]
    pub fn settings(self) -> Result<GatewayArgs, ArgsError> {
        let mut problems = Vec::new();
        let mut duration = |flag: &str, text: &str| {
            duration::parse(text).unwrap_or_else(|err| {
                problems.push(format!("{flag}: {err}"));
                Duration::ZERO
            })
        };
        let limits = Limits {
            connections: self.max_connections,
            requests: self.max_requests,
            body_bytes: self.max_body_bytes,
            file_bytes: self.max_file_bytes,
            owner_bytes: self.store_max_bytes_per_caller,
            total_body_bytes: self.max_total_body_bytes,
            header_bytes: self.max_header_bytes,
            headers: self.max_headers,
            held: self.max_held,
            header_timeout: duration("--header-timeout", &self.header_timeout),
            body_timeout: duration("--body-timeout", &self.body_timeout),
            idle_timeout: duration("--idle-timeout", &self.idle_timeout),
            write_timeout: duration("--write-timeout", &self.write_timeout),
        };
        let hold = duration("--hold-timeout", &self.hold_timeout);
        let drain_delay = duration("--drain-delay", &self.drain_delay);
        let drain = duration("--drain-timeout", &self.drain_timeout);
        for (flag, value) in [
            ("--max-connections", limits.connections),
            ("--max-requests", limits.requests),
            ("--max-body-bytes", limits.body_bytes),
            ("--max-total-body-bytes", limits.total_body_bytes),
            ("--max-file-bytes", limits.file_bytes),
            ("--jobs-per-endpoint", self.jobs_per_endpoint),
            ("--jobs-busy-at", self.jobs_busy_at),
            ("--max-header-bytes", limits.header_bytes),
            ("--max-headers", limits.headers),
        ] {
            if value == 0 {
                problems.push(format!("{flag}: must be above 0"));
            }
        }
        for (flag, value) in [
            ("--header-timeout", limits.header_timeout),
            ("--body-timeout", limits.body_timeout),
            ("--idle-timeout", limits.idle_timeout),
            ("--write-timeout", limits.write_timeout),
        ] {
            if value.is_zero() && !problems.iter().any(|problem| problem.starts_with(flag)) {
                problems.push(format!("{flag}: must be above 0s"));
            }
        }
        if !(0.0..=1.0).contains(&self.decision_log_share) {
            problems.push("--decision-log-share: must be 0 to 1, such as 0.01".to_owned());
        }
        if self.gateway.is_empty() {
            problems.push("--gateway: must not be empty".to_owned());
        }
        let mut store = None;
        match self.store.as_deref().map(str::parse::<Spec>) {
            Some(Ok(spec)) => {
                store = Some(Spec {
                    password_file: self.store_password_file,
                    max_bytes: self.store_max_bytes.unwrap_or(spec.max_bytes),
                    ..spec
                });
            }
            Some(Err(err)) => problems.push(format!("--store: {err}")),
            None if self.store_password_file.is_some() || self.store_max_bytes.is_some() => {
                problems.push(
                    "--store: must be there with --store-password-file or --store-max-bytes"
                        .to_owned(),
                );
            }
            None => {}
        }
        if self.usage_export.is_some() && store.is_none() {
            problems.push("--usage-export: needs --store".to_owned());
        }
        if !problems.is_empty() {
            return Err(ArgsError { problems });
        }
        let gateway = Id::new(self.pod_namespace, self.gateway);
        let mut settings = Settings::new(gateway.clone());
        if self.workers > 0 {
            settings.workers = self.workers;
        }
        settings.replica = if self.pod_name.is_empty() {
            self.listen.to_string()
        } else {
            self.pod_name
        };
        settings.limits = limits;
        settings.store = store;
        settings.usage_export = self.usage_export;
        settings.jobs = JobLimits {
            per_endpoint: self.jobs_per_endpoint,
            busy_at: self.jobs_busy_at,
        };
        settings.hold = hold;
        settings.drain_delay = drain_delay;
        settings.drain = drain;
        settings.decision_log_share = self.decision_log_share;
        settings.place = Place {
            region: Some(self.region).filter(|region| !region.is_empty()),
            zone: Some(self.zone).filter(|zone| !zone.is_empty()),
        };
        settings.origins = Origins {
            header: self.region_header,
            trusted: self.trusted_proxies,
        };
        settings.upstream_ca = self.upstream_ca;
        let tls_listen = (!self.tls_dir.is_empty()).then_some(self.tls_listen);
        settings.tls = TlsSettings {
            folders: self.tls_dir,
            client_ca: self.tls_client_ca,
        };
        let cluster = ClusterSettings {
            gateway,
            state_dir: self.state_dir,
            secret_dir: self.secret_dir,
            pod_uid: self.pod_uid,
        };
        Ok(GatewayArgs {
            settings,
            cluster,
            listen: self.listen,
            tls_listen,
            admin_listen: self.admin_listen,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn settings(arguments: &[&str]) -> Result<GatewayArgs, ArgsError> {
        let all = ["gateway"].iter().chain(arguments);
        Command::try_parse_from(all).unwrap().args.settings()
    }

    #[test]
    fn defaults_are_valid() {
        let args = settings(&[]).unwrap();
        assert_eq!(args.settings.drain, Duration::from_mins(10));
        assert_eq!(args.listen.port(), GATEWAY_PORT);
        assert!(args.settings.workers >= 1);
    }

    #[test]
    fn all_mistakes_are_reported_together() {
        let error =
            settings(&["--drain-timeout=5", "--hold-timeout=x", "--max-requests=0"]).unwrap_err();
        assert_eq!(error.problems.len(), 3, "{error}");
        assert!(error.to_string().contains("--drain-timeout: '5'"));
    }

    #[test]
    fn a_share_is_a_share() {
        for wrong in ["-0.1", "1.5", "NaN"] {
            let flag = format!("--decision-log-share={wrong}");
            assert!(settings(&[&flag]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_region_is_believed_of_those_who_are_named() {
        let named = [
            "--region-header=X-Region",
            "--trusted-proxies=10.0.0.0/8,::1/128",
        ];
        let origins = settings(&named).unwrap().settings.origins;
        assert_eq!(origins.header.unwrap(), "x-region");
        assert_eq!(origins.trusted.len(), 2);
        for refused in [&named[..1], &["--trusted-proxies=10.0.0"]] {
            let flags = ["gateway"].iter().chain(refused);
            assert!(Command::try_parse_from(flags).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn a_zero_timeout_is_refused_once() {
        let error = settings(&["--header-timeout=0s"]).unwrap_err();
        assert_eq!(error.problems, ["--header-timeout: must be above 0s"]);
    }
}
