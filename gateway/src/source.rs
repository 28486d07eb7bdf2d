//! Where a gateway learns what to serve: three watch channels in, one out. [`channel`] joins a producer (a cluster,
//! a folder, a test) with [`crate::run`]; neither knows the other.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use penstock_core::acks::LimitStand;
use penstock_core::config::{GatewayConfig, sha256_hex};
use penstock_core::endpoints::Endpoints;
use tokio::sync::watch;

pub mod cluster;
pub mod directory;
pub mod slices;
pub mod state;

/// Length of a credential's version: this many hexadecimal digits of its SHA-256.
const VERSION_DIGITS: usize = 16;

/// A secret text. `Debug` never shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(String);

impl SecretText {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value: for a header or the state folder, never for a log.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One credential value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// First 16 hexadecimal digits of the value's SHA-256.
    pub version: String,
    /// The value.
    pub value: SecretText,
}

impl Credential {
    /// Wraps a value and computes its version.
    pub fn new(value: impl Into<String>) -> Self {
        let value = value.into();
        let mut version = sha256_hex(value.as_bytes());
        version.truncate(VERSION_DIGITS);
        Self {
            version,
            value: SecretText(value),
        }
    }
}

/// Credential id → value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// By `CredentialRef::id`.
    pub values: BTreeMap<String, Credential>,
}

/// What the gateway serves now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the config.
    pub digest: String,
    /// Objects (`kind/namespace/name`) that are served in an older form, or not at all.
    pub rejected: Vec<String>,
    /// How limits stand that callers asked for.
    pub limits: Vec<LimitStand>,
}

/// The gateway's end.
#[derive(Debug)]
pub struct Sources {
    /// The newest config; `None` until one has arrived.
    pub config: watch::Receiver<Option<Arc<GatewayConfig>>>,
    /// The newest endpoints.
    pub endpoints: watch::Receiver<Arc<Endpoints>>,
    /// The newest credentials.
    pub credentials: watch::Receiver<Arc<Credentials>>,
    /// What the gateway says back.
    pub applied: watch::Sender<Option<Applied>>,
}

/// The producer's end.
#[derive(Debug)]
pub struct Publisher {
    /// The newest config.
    pub config: watch::Sender<Option<Arc<GatewayConfig>>>,
    /// The newest endpoints.
    pub endpoints: watch::Sender<Arc<Endpoints>>,
    /// The newest credentials.
    pub credentials: watch::Sender<Arc<Credentials>>,
    /// What the gateway serves; `None` until it has a config.
    pub applied: watch::Receiver<Option<Applied>>,
}

/// Both ends, with nothing published yet.
pub fn channel() -> (Publisher, Sources) {
    let (config, config_rx) = watch::channel(None);
    let (endpoints, endpoints_rx) = watch::channel(Arc::default());
    let (credentials, credentials_rx) = watch::channel(Arc::default());
    let (applied, applied_rx) = watch::channel(None);
    (
        Publisher {
            config,
            endpoints,
            credentials,
            applied: applied_rx,
        },
        Sources {
            config: config_rx,
            endpoints: endpoints_rx,
            credentials: credentials_rx,
            applied,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_never_shows_a_credential() {
        let credentials = Credentials {
            values: BTreeMap::from([("a.b.c".to_owned(), Credential::new("sk-canary"))]),
        };
        let shown = format!("{credentials:?} {credentials:#?}");
        assert!(shown.contains("***") && !shown.contains("canary"));
    }

    #[test]
    fn version_is_the_beginning_of_the_hash() {
        assert_eq!(Credential::new("abc").version, "ba7816bf8f01cfea");
    }
}
