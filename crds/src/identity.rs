//! `IdentityProvider`: callers that somebody else vouches for, and what they may do.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use penstock_core::config::Algorithm;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::policy::default_gateway;
use crate::text::DurationText;

/// Callers with tokens of an OpenID provider, or with client certificates.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "penstock.dev",
    version = "v1alpha1",
    kind = "IdentityProvider",
    plural = "identityproviders",
    shortname = "idp",
    category = "penstock",
    namespaced,
    status = "IdentityProviderStatus",
    derive = "PartialEq",
    doc = "Callers that somebody else vouches for: an OpenID provider with tokens (JWT), or an authority with client certificates. Like with a VirtualKey, a gateway with at least one knows its callers, and refuses others except where a RoutingPolicy takes anonymous ones.",
    printcolumn = r#"{"name":"Gateway","type":"string","jsonPath":".spec.gateway"}"#,
    printcolumn = r#"{"name":"Issuer","type":"string","jsonPath":".spec.jwt.issuer"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.jwt) != has(self.certificate)",
    "write either jwt or certificate"
))]
#[x_kube(validation = (
    "has(self.jwt) || has(self.team.value)",
    "certificates have no claims: write team.value"
))]
#[x_kube(validation = (
    "has(self.jwt) || (!has(self.user) && !has(self.attributes))",
    "certificates have no claims: leave user and attributes out"
))]
#[x_kube(validation = (
    "has(self.jwt) || !has(self.access) || self.access.all(of, !has(of.scopes))",
    "certificates have no scopes: leave them out of access"
))]
pub struct IdentityProviderSpec {
    /// The gateway that knows it: the `gateway` of RoutingPolicies. Default `default`.
    #[serde(default = "default_gateway")]
    #[schemars(
        length(min = 1, max = 40),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub gateway: String,
    /// Callers show a token in `Authorization: Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt: Option<JwtSpec>,
    /// Callers show a client certificate: over TLS, at a gateway with `--tls-client-ca`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateSpec>,
    /// Whose they are. Rules may ask for it (`match.team`).
    pub team: TeamSpec,
    /// The claim with who they are within the team, by name (`email`) or JSON pointer (`/profile/email`). Rules may ask
    /// for it (`match.user`). Default `sub`; of a certificate its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub user: Option<String>,
    /// What else rules may ask for (`match.attributes`), and the claim with it. A token without the claim lacks the
    /// attribute.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub attributes: BTreeMap<String, String>,
    /// What they may do: what any entry allows that they have the scopes of. Who has those of none may do nothing.
    /// Default: everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub access: Vec<AccessSpec>,
}

/// Which tokens are good.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JwtSpec {
    /// Their `iss`, to the letter, such as `https://login.example.com/realms/main`.
    #[schemars(length(min = 1, max = 1024))]
    pub issuer: String,
    /// One of these must be in their `aud`.
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 1024)))]
    pub audiences: Vec<String>,
    /// Where the keys are that they are signed with. Default: where the issuer says
    /// (`<issuer>/.well-known/openid-configuration`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks: Option<JwksSpec>,
    /// What they may be signed with. Default `[RS256, ES256, EdDSA]`.
    #[serde(default = "usual_algorithms")]
    #[schemars(length(min = 1, max = 9))]
    pub algorithms: Vec<AlgorithmSpec>,
    /// How far the clocks of issuer and gateway may be apart, `0s` to `5m`. Default `30s`.
    #[serde(default = "usual_skew")]
    pub clock_skew: DurationText,
}

fn usual_algorithms() -> Vec<AlgorithmSpec> {
    vec![
        AlgorithmSpec::RS256,
        AlgorithmSpec::ES256,
        AlgorithmSpec::EdDSA,
    ]
}

fn usual_skew() -> DurationText {
    "30s".into()
}

fn usual_refresh() -> DurationText {
    "5m".into()
}

/// Where the keys are that tokens are signed with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "!(has(self.uri) && has(self.inline))",
    "write either uri or inline"
))]
pub struct JwksSpec {
    /// The URL of a JWK set, `https`; `http` for names within the cluster (`.svc`) and this machine only. Default: the
    /// one that the issuer names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub uri: Option<String>,
    /// The JWK set itself, where gateways cannot reach the issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 65_536))]
    pub inline: Option<String>,
    /// How often gateways look at the URL, `10s` to `24h`; besides, when a token has a key that they do not know.
    /// Default `5m`.
    #[serde(default = "usual_refresh")]
    pub refresh: DurationText,
}

impl Default for JwksSpec {
    fn default() -> Self {
        Self {
            uri: None,
            inline: None,
            refresh: usual_refresh(),
        }
    }
}

/// What a token is signed with, as JOSE spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "RFC 7518 and RFC 8037 name them")]
pub enum AlgorithmSpec {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl AlgorithmSpec {
    /// As configs have it.
    pub fn algorithm(self) -> Algorithm {
        match self {
            Self::RS256 => Algorithm::Rs256,
            Self::RS384 => Algorithm::Rs384,
            Self::RS512 => Algorithm::Rs512,
            Self::PS256 => Algorithm::Ps256,
            Self::PS384 => Algorithm::Ps384,
            Self::PS512 => Algorithm::Ps512,
            Self::ES256 => Algorithm::Es256,
            Self::ES384 => Algorithm::Es384,
            Self::EdDSA => Algorithm::EdDsa,
        }
    }
}

/// Which certificates are meant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CertificateSpec {
    /// Names that they are for (subject alternative names, URI or DNS): exact
    /// (`spiffe://example.com/ns/search/sa/indexer`), or by prefix (`spiffe://example.com/ns/search/*`).
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 1024)))]
    pub names: Vec<String>,
}

/// Whose callers are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.value) != has(self.claim)",
    "write either value or claim"
))]
pub struct TeamSpec {
    /// All of them this team's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = "^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
    )]
    pub value: Option<String>,
    /// The claim with the team, by name (`team`) or JSON pointer (`/groups/0`). Tokens without it are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub claim: Option<String>,
}

/// What some callers may do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessSpec {
    /// Those who have all of these scopes: in `scope` (RFC 8693) or `scp`. Default: everybody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)))]
    pub scopes: Vec<String>,
    /// The models that they may ask for: exact (`chat`), by prefix (`gpt-*`), or any (`*`). Default: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub models: Vec<String>,
    /// The RoutingPolicies of its namespace whose rules they may use. Default: all of its gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253)))]
    pub policies: Vec<String>,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityProviderStatus {
    /// `Accepted`, `ResolvedRefs`, `Programmed`, `Ready`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
