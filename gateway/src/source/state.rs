//! (IO) What survives a restart of the container: the last good config, the last seen endpoints, the credentials.
//! Written whole and renamed into place, so that a crash leaves the older file. Files that cannot be read are as good
//! as absent: a gateway that starts without them waits for the API server.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use penstock_core::endpoints::Endpoints;
use serde::{Deserialize, Serialize};

use super::{Credential, Credentials};

const CONFIG_FILE: &str = "config.json.zst";
const ENDPOINTS_FILE: &str = "endpoints.json";
const CREDENTIALS_FILE: &str = "credentials.json";
/// Only the gateway's own user.
const SECRET_MODE: u32 = 0o600;
const STATE_MODE: u32 = 0o644;

/// The two folders.
#[derive(Clone, Debug)]
pub struct StateDir {
    state: PathBuf,
    secrets: PathBuf,
}

/// Endpoints and when they were seen.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SeenEndpoints {
    /// Unix ms.
    seen_at_ms: u64,
    endpoints: Endpoints,
}

impl StateDir {
    /// `state` for config and endpoints, `secrets` for credentials. Neither need exist.
    pub fn new(state: PathBuf, secrets: PathBuf) -> Self {
        Self { state, secrets }
    }

    /// The last good config as it came.
    pub fn config(&self) -> Option<Vec<u8>> {
        std::fs::read(self.state.join(CONFIG_FILE)).ok()
    }

    /// Keeps a config that was decoded without error.
    pub fn keep_config(&self, raw: &[u8]) {
        write(&self.state, CONFIG_FILE, STATE_MODE, raw);
    }

    /// The last seen endpoints, and when they were seen (Unix ms).
    pub fn endpoints(&self) -> Option<(Endpoints, u64)> {
        let text = std::fs::read(self.state.join(ENDPOINTS_FILE)).ok()?;
        let seen: SeenEndpoints = serde_json::from_slice(&text).ok()?;
        Some((seen.endpoints, seen.seen_at_ms))
    }

    /// Keeps endpoints seen at `at_ms` (Unix ms).
    pub fn keep_endpoints(&self, endpoints: &Endpoints, at_ms: u64) {
        let seen = SeenEndpoints {
            seen_at_ms: at_ms,
            endpoints: endpoints.clone(),
        };
        if let Ok(text) = serde_json::to_vec(&seen) {
            write(&self.state, ENDPOINTS_FILE, STATE_MODE, &text);
        }
    }

    /// The last seen credentials.
    pub fn credentials(&self) -> Option<Credentials> {
        let text = std::fs::read(self.secrets.join(CREDENTIALS_FILE)).ok()?;
        let values: BTreeMap<String, String> = serde_json::from_slice(&text).ok()?;
        Some(Credentials {
            values: values
                .into_iter()
                .map(|(id, value)| (id, Credential::new(value)))
                .collect(),
        })
    }

    /// Keeps credentials.
    pub fn keep_credentials(&self, credentials: &Credentials) {
        let values: BTreeMap<&str, &str> = credentials
            .values
            .iter()
            .map(|(id, credential)| (id.as_str(), credential.value.expose()))
            .collect();
        if let Ok(text) = serde_json::to_vec(&values) {
            write(&self.secrets, CREDENTIALS_FILE, SECRET_MODE, &text);
        }
    }
}

fn write(folder: &Path, name: &str, mode: u32, bytes: &[u8]) {
    if let Err(err) = try_write(folder, name, mode, bytes) {
        tracing::warn!(folder = %folder.display(), file = name, error = %err, "state could not be kept for a restart");
    }
}

fn try_write(folder: &Path, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let new = folder.join(format!("{name}.new"));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&new)?;
    io::Write::write_all(&mut file, bytes)?;
    std::fs::rename(new, folder.join(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_kept_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path().join("state"), folder.path().join("secrets"));
        assert!(
            state.config().is_none()
                && state.endpoints().is_none()
                && state.credentials().is_none()
        );
        let credentials = Credentials {
            values: BTreeMap::from([("a.b.c".to_owned(), Credential::new("v"))]),
        };
        state.keep_config(b"raw");
        state.keep_endpoints(&Endpoints::default(), 7);
        state.keep_credentials(&credentials);
        assert_eq!(state.config().unwrap(), b"raw");
        assert_eq!(state.endpoints().unwrap(), (Endpoints::default(), 7));
        assert_eq!(state.credentials().unwrap(), credentials);
        let mode = std::fs::metadata(folder.path().join("secrets/credentials.json"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, SECRET_MODE);
    }

    #[test]
    fn damaged_files_are_as_good_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path().to_owned(), folder.path().to_owned());
        std::fs::write(folder.path().join(ENDPOINTS_FILE), "{").unwrap();
        std::fs::write(folder.path().join(CREDENTIALS_FILE), "[]").unwrap();
        assert!(state.endpoints().is_none() && state.credentials().is_none());
    }

    #[test]
    fn a_folder_that_cannot_be_written_stops_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        StateDir::new(file.clone(), file).keep_config(b"raw");
    }
}
