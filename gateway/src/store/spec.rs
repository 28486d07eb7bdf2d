//! Which store: `file:PATH`, `redis://[USER@]HOST[:PORT][/DB]` or `redis-cluster://[USER@]HOST:PORT[,HOST:PORT…]`, both
//! with `rediss` for TLS. Text in, [`Spec`] out.

use std::path::PathBuf;
use std::str::FromStr;

/// Default of [`Spec::max_bytes`]: a few dozens of the largest files.
const MAX_BYTES: u64 = 4 << 30;

/// Which store, and how to get in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Where it is.
    pub target: Target,
    /// File with the server's password; read at start.
    pub password_file: Option<PathBuf>,
    /// What a file may hold. A server has a limit of its own (`maxmemory`).
    pub max_bytes: u64,
}

/// Where a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file of this process.
    File(PathBuf),
    /// URL of a server or a cluster.
    Redis(String),
}

/// A text that names no store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Another scheme, or nothing behind it.
    #[error(
        "must be file:PATH, redis://HOST:PORT or redis-cluster://HOST:PORT, with rediss for TLS"
    )]
    Form,
    /// A password would be in the process list and in manifests.
    #[error("must not hold a password: use a file")]
    Password,
}

impl Spec {
    /// A store at `target` without a password.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            password_file: None,
            max_bytes: MAX_BYTES,
        }
    }
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if let Some(path) = text.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(SpecError::Form);
            }
            return Ok(Self::new(Target::File(PathBuf::from(path))));
        }
        let (scheme, host) = text.split_once("://").ok_or(SpecError::Form)?;
        let is_cluster = match scheme {
            "redis" | "rediss" => false,
            "redis-cluster" | "rediss-cluster" => true,
            _ => return Err(SpecError::Form),
        };
        // A cluster has one database, and says itself where all of it is.
        if is_cluster && host.contains(['/', '?']) || !is_cluster && host.contains(',') {
            return Err(SpecError::Form);
        }
        let host = host.split(['/', '?']).next().unwrap_or_default();
        match host.rsplit_once('@') {
            Some((user, _)) if user.contains(':') => Err(SpecError::Password),
            Some((_, "")) => Err(SpecError::Form),
            _ if host.is_empty() || text.contains(char::is_whitespace) => Err(SpecError::Form),
            _ => Ok(Self::new(Target::Redis(text.to_owned()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_servers_are_stores() {
        let target = |text: &str| text.parse::<Spec>().map(|spec| spec.target);
        assert_eq!(target("file:a/b"), Ok(Target::File(PathBuf::from("a/b"))));
        assert_eq!(
            target("file:///a/b"),
            Ok(Target::File(PathBuf::from("/a/b")))
        );
        for url in [
            "redis://cache:6379",
            "rediss://user@cache:6380/2",
            "redis-cluster://user@a:6379,b:6379",
            "rediss-cluster://cache:6379",
        ] {
            assert_eq!(target(url), Ok(Target::Redis(url.to_owned())));
        }
        for wrong in [
            "",
            "file:",
            "redis://",
            "redis://user@",
            "http://a",
            "a b",
            "redis://a,b",
            "redis-cluster://a/1",
            "redis-cluster://",
        ] {
            assert_eq!(target(wrong), Err(SpecError::Form), "{wrong}");
        }
        assert_eq!(target("redis://:secret@cache"), Err(SpecError::Password));
    }
}
