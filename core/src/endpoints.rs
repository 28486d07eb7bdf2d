//! `Endpoints`: which addresses stand behind a Service right now. Its own artefact, apart from the config, because
//! it changes with every pod.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::Id;

/// A port of a Service, written `namespace/service:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePort {
    /// The Service.
    pub service: Id,
    /// The Service's port number (not the pod's).
    pub port: u16,
}

/// One address that may answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Pod address and target port.
    pub address: SocketAddr,
    /// Ready and not terminating: new requests may go there.
    pub ready: bool,
    /// The zone of its node, where that is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub zone: Option<String>,
    /// What its pod was made from; pods of one text have one template. `None` where there is no pod: such addresses
    /// are taken to be alike.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub revision: Option<String>,
}

/// All known endpoints. A Service that is absent is not known yet; one with an empty list has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Endpoints {
    /// Service port → addresses, sorted.
    pub services: BTreeMap<ServicePort, Vec<Endpoint>>,
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// Text that is not `namespace/service:port`.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not of the form namespace/service:port")]
pub struct ParseServicePortError(String);

impl FromStr for ServicePort {
    type Err = ParseServicePortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (service, port) = text.rsplit_once(':')?;
            Some(Self {
                service: service.parse().ok()?,
                port: port.parse().ok()?,
            })
        };
        parse().ok_or_else(|| ParseServicePortError(text.to_owned()))
    }
}

impl Serialize for ServicePort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServicePort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_port_is_a_json_key() {
        let mut endpoints = Endpoints::default();
        let port = ServicePort {
            service: Id::new("a", "chat"),
            port: 8000,
        };
        let endpoint = Endpoint {
            address: "10.0.0.1:8000".parse().unwrap(),
            ready: true,
            zone: None,
            revision: None,
        };
        endpoints.services.insert(port, vec![endpoint]);
        let text = serde_json::to_string(&endpoints).unwrap();
        assert_eq!(
            text,
            r#"{"a/chat:8000":[{"address":"10.0.0.1:8000","ready":true}]}"#
        );
        assert_eq!(serde_json::from_str::<Endpoints>(&text).unwrap(), endpoints);
    }

    #[test]
    fn service_port_refuses_other_text() {
        for text in ["", "a/b", "a:1", "a/b:70000", "a/b:"] {
            assert!(text.parse::<ServicePort>().is_err(), "{text}");
        }
    }
}
