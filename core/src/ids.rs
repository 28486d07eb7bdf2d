//! Names of things that travel between processes: `namespace/name` identifiers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A namespaced name, written `namespace/name` wherever it is text: JSON keys, logs, metric labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes object name.
    pub name: String,
}

/// Identifies an `LLMBackend`.
pub type BackendId = Id;

impl Id {
    /// Makes an identifier from its two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Text that is not `namespace/name`.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not of the form namespace/name")]
pub struct ParseIdError(String);

impl FromStr for Id {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self::new(namespace, name))
            }
            _ => Err(ParseIdError(text.to_owned())),
        }
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_round_trips_as_text() {
        let id = Id::new("team-a", "chat");
        assert_eq!(id.to_string().parse::<Id>().unwrap(), id);
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"team-a/chat\"");
    }

    #[test]
    fn id_refuses_text_without_exactly_two_parts() {
        for text in ["", "a", "/a", "a/", "a/b/c"] {
            assert!(text.parse::<Id>().is_err(), "{text}");
        }
    }
}
