//! `Settings`: everything that a running gateway can be told, typed and with a default. `args` makes it from the
//! command line; an embedded gateway starts from [`Settings::new`].

use std::path::PathBuf;
use std::time::Duration;

use penstock_core::ids::Id;

use crate::balance::region::Distance;
use crate::certificates::TlsSettings;
use crate::origin::Origins;
use crate::store;
use crate::usage;

/// What a gateway is told at start. Nothing here changes while it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The gateway whose config is served; also its name in the `Via` header of the loop guard.
    pub gateway: Id,
    /// What this replica calls itself in `GET /load`: its pod name, or `host:port` without a cluster.
    pub replica: String,
    /// Threads that carry requests, each with its own sockets and connection pools. At least 1.
    pub workers: usize,
    /// Bounds of what callers may use.
    pub limits: Limits,
    /// How long a request waits for a backend that has no ready endpoint.
    pub hold: Duration,
    /// After the shutdown signal new connections are still accepted for this long.
    pub drain_delay: Duration,
    /// After that, requests in flight may finish for this long.
    pub drain: Duration,
    /// Share of requests whose choice goes to the log with all candidates and figures, 0 to 1.
    pub decision_log_share: f64,
    /// Where this gateway is.
    pub place: Place,
    /// Who may say where callers are.
    pub origins: Origins,
    /// PEM file with certificate authorities that https backends may be signed by, besides the public ones.
    pub upstream_ca: Option<PathBuf>,
    /// Certificates of the listener with TLS, if there is one.
    pub tls: TlsSettings,
    /// Where jobs and files are kept; without one there are none.
    pub store: Option<store::Spec>,
    /// Where a line for each request goes; needs a store.
    pub usage_export: Option<usage::Target>,
    /// How much jobs may take of what callers leave.
    pub jobs: JobLimits,
}

/// How much jobs may take of what callers leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobLimits {
    /// Calls of jobs in progress, times the endpoints that have room.
    pub per_endpoint: usize,
    /// An endpoint with so many requests in progress, callers' and jobs', has no room for jobs.
    pub busy_at: usize,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            // A quarter of what keeps a GPU busy without making callers wait; engines batch up to 256.
            per_endpoint: 8,
            busy_at: 32,
        }
    }
}

/// Where a gateway is, and so the callers that come to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Such as `eu-west-1`.
    pub region: Option<String>,
    /// The zone of its node, such as `eu-west-1a`.
    pub zone: Option<String>,
}

impl Place {
    /// How far a backend of `region` is from a caller that came from the region `from`, which is not this one.
    pub fn between(from: &str, region: Option<&str>) -> Distance {
        if region.is_some_and(|region| region != from) {
            Distance::Elsewhere
        } else {
            Distance::Region
        }
    }

    /// How far a backend of `region` is, or an endpoint of it in `zone`. Nobody is far who does not say where.
    pub fn to(&self, region: Option<&str>, zone: Option<&str>) -> Distance {
        let differ = |own: &Option<String>, other: Option<&str>| {
            own.as_deref()
                .zip(other)
                .is_some_and(|(own, other)| own != other)
        };
        if differ(&self.region, region) {
            Distance::Elsewhere
        } else if self.zone.is_some() && self.zone.as_deref() == zone {
            Distance::Zone
        } else {
            Distance::Region
        }
    }
}

/// Bounds of what callers may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open client connections. At the limit, further ones wait in the kernel's backlog.
    pub connections: usize,
    /// Requests in progress. At the limit, further ones are refused with 503.
    pub requests: usize,
    /// Bytes of one request body.
    pub body_bytes: usize,
    /// Bytes of one uploaded file.
    pub file_bytes: usize,
    /// Bytes of files and background responses that one caller may have in the store.
    pub owner_bytes: u64,
    /// Bytes of all request bodies that are held at one time.
    pub total_body_bytes: usize,
    /// Bytes of a request's header names and values together.
    pub header_bytes: usize,
    /// Number of request headers.
    pub headers: usize,
    /// Requests that wait for a backend without a ready endpoint.
    pub held: usize,
    /// From a connection's first byte to the end of a request head.
    pub header_timeout: Duration,
    /// From the end of a request head to the end of its body.
    pub body_timeout: Duration,
    /// A connection between two requests.
    pub idle_timeout: Duration,
    /// A caller that reads nothing of an answer that is ready to be sent.
    pub write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Two descriptors a connection (its own and one upstream) stay below the usual 20,000.
            connections: 8192,
            requests: 4096,
            // Images travel as base64 inside the body: providers take up to about 50 MB in a request, few use more
            // than 20.
            body_bytes: 32 << 20,
            // OpenAI's is 200 MB.
            file_bytes: 100 << 20,
            // A quarter of a store of the default size.
            owner_bytes: 1 << 30,
            total_body_bytes: 512 << 20,
            // Twice what browsers and SDKs send with large bearer tokens.
            header_bytes: 32 << 10,
            headers: 100,
            held: 1024,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            // Longer than the keep-alive of common clients (Go 90 s), so that they close first.
            idle_timeout: Duration::from_mins(2),
            write_timeout: Duration::from_mins(1),
        }
    }
}

impl Settings {
    /// Defaults for one gateway.
    pub fn new(gateway: Id) -> Self {
        Self {
            replica: gateway.name.clone(),
            gateway,
            workers: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            limits: Limits::default(),
            hold: Duration::from_secs(30),
            drain_delay: Duration::ZERO,
            drain: Duration::from_mins(10),
            decision_log_share: 0.0,
            place: Place::default(),
            origins: Origins::default(),
            upstream_ca: None,
            tls: TlsSettings::default(),
            store: None,
            usage_export: None,
            jobs: JobLimits::default(),
        }
    }
}
