//! TLS towards a backend, by the names of Gateway API's `BackendTLSPolicy`; and what of Secrets and ConfigMaps a
//! backend refers to.

use penstock_core::names;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::{LLMBackendSpec, SecretKey};

/// Key of authorities in a ConfigMap or Secret, as Gateway API and cert-manager have it.
pub const CA_KEY: &str = "ca.crt";
/// Key of the certificate in a Secret of type `kubernetes.io/tls`.
pub const CERTIFICATE_KEY: &str = "tls.crt";
/// Key of the private key in a Secret of type `kubernetes.io/tls`.
pub const PRIVATE_KEY_KEY: &str = "tls.key";

/// TLS towards a backend. Its certificate is always verified: no field turns that off.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackendTlsSpec {
    /// The name that is asked for (SNI) and that the certificate must be for. Default: the URL's host, or for a Service
    /// `<name>.<namespace>.svc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub hostname: Option<String>,
    /// Authorities under the key `ca.crt`, in PEM form: one of them must have signed, and no other counts. Default:
    /// the public ones and those of the gateway's `--upstream-ca`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub ca_certificate_refs: Vec<CaCertificateRef>,
    /// What the gateway shows of itself (mTLS).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate_ref: Option<ClientCertificateRef>,
}

/// What pods speak in the clear, by the names of a Service's `appProtocol`. Over TLS, HTTP/2 is spoken if they offer
/// it. Default `http`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AppProtocol {
    /// HTTP/1.1.
    #[serde(rename = "http")]
    Http,
    /// HTTP/2 in the clear, without asking first ("prior knowledge").
    #[serde(rename = "kubernetes.io/h2c")]
    H2c,
}

/// Where authorities are, in the backend's namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CaCertificateRef {
    /// Default `ConfigMap`.
    #[serde(default)]
    pub kind: SourceKind,
    /// The object's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A Secret of type `kubernetes.io/tls` in the backend's namespace: `tls.crt` and `tls.key`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClientCertificateRef {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What holds a value.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum SourceKind {
    /// A ConfigMap.
    #[default]
    ConfigMap,
    /// A Secret.
    Secret,
}

impl SourceKind {
    /// As in YAML.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        }
    }
}

/// One key of a Secret or ConfigMap in the backend's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueRef<'a> {
    /// What holds it.
    pub kind: SourceKind,
    /// The object's name.
    pub name: &'a str,
    /// The key in its `data`.
    pub key: &'a str,
}

impl ValueRef<'_> {
    /// What the value is called in a gateway's config.
    pub fn id(&self) -> String {
        match self.kind {
            SourceKind::ConfigMap => names::config_map_value_id(self.name, self.key),
            SourceKind::Secret => names::credential_id(self.name, self.key),
        }
    }
}

impl SecretKey {
    /// As any value.
    pub fn value(&self) -> ValueRef<'_> {
        ValueRef {
            kind: SourceKind::Secret,
            name: &self.secret,
            key: &self.key,
        }
    }
}

impl CaCertificateRef {
    /// As any value.
    pub fn value(&self) -> ValueRef<'_> {
        ValueRef {
            kind: self.kind,
            name: &self.name,
            key: CA_KEY,
        }
    }
}

impl ClientCertificateRef {
    /// Certificate and key.
    pub fn values(&self) -> [ValueRef<'_>; 2] {
        [CERTIFICATE_KEY, PRIVATE_KEY_KEY].map(|key| ValueRef {
            kind: SourceKind::Secret,
            name: &self.name,
            key,
        })
    }
}

impl LLMBackendSpec {
    /// TLS towards it, as far as it is said.
    pub fn tls(&self) -> Option<&BackendTlsSpec> {
        let service = self.service.as_ref();
        let service = service.and_then(|service| service.tls.as_ref());
        service.or_else(|| self.external.as_ref()?.tls.as_ref())
    }

    /// Everything in Secrets and ConfigMaps that it refers to.
    pub fn values(&self) -> impl Iterator<Item = ValueRef<'_>> {
        let service = self.service.as_ref();
        let service = service.and_then(|service| service.credential.as_ref());
        let external = self.external.as_ref();
        let external = external.and_then(|external| external.credential.as_ref());
        let credentials = service.into_iter().chain(external).map(SecretKey::value);
        let tls = self.tls().into_iter().flat_map(|tls| {
            let authorities = tls.ca_certificate_refs.iter().map(CaCertificateRef::value);
            let shown = tls.client_certificate_ref.iter();
            authorities.chain(shown.flat_map(ClientCertificateRef::values))
        });
        credentials.chain(tls)
    }
}
