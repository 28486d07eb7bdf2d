//! How a backend is connected to.

use serde::{Deserialize, Serialize};

use super::{CredentialRef, is_default};

/// How a backend is connected to. All of it is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Transport {
    /// Whom to believe, and whom to be. `None`: a Service is spoken to in the clear, an `https` URL is believed if the
    /// authorities say so that gateways trust anyway.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tls: Option<BackendTls>,
    /// HTTP/2 is spoken in the clear, without asking first ("prior knowledge").
    #[serde(skip_serializing_if = "is_default", default)]
    pub h2c: bool,
}

/// TLS towards a backend. Its certificate is always verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct BackendTls {
    /// The name that is asked for (SNI) and that its certificate must be for. `None`: the URL's host.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hostname: Option<String>,
    /// Authorities in PEM form, any of which may have signed. Empty: those that gateways trust anyway.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub authorities: Vec<CredentialRef>,
    /// What the gateway shows of itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub client_certificate: Option<ClientCertificate>,
}

/// A certificate and its key, in PEM form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClientCertificate {
    /// The certificate, then its intermediates.
    pub certificate: CredentialRef,
    /// Its private key.
    pub key: CredentialRef,
}

impl Transport {
    /// Every value that it refers to.
    pub fn values(&self) -> impl Iterator<Item = &CredentialRef> {
        let tls = self.tls.iter();
        tls.flat_map(|tls| {
            let pair = tls.client_certificate.iter();
            let pair = pair.flat_map(|pair| [&pair.certificate, &pair.key]);
            tls.authorities.iter().chain(pair)
        })
    }
}
