//! (IO) The folder of objects, read again when its files change.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use penstock_core::config::GatewayConfig;
use penstock_core::endpoints::ServicePort;
use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::manifest::Manifests;
use penstock_gateway::source::directory;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::keyring::Keyring;
use super::narrator::say;
use crate::check;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The folder's content at one moment.
#[derive(Debug)]
pub(super) struct Folder {
    /// All objects.
    pub(super) manifests: Manifests,
    /// The config of the one gateway.
    pub(super) config: Arc<GatewayConfig>,
    /// One line each.
    pub(super) problems: Vec<String>,
}

impl Folder {
    /// A key that the gateway takes, for the example request.
    pub(super) fn first_key(&self) -> Option<String> {
        let callers = self.config.callers.as_ref()?;
        let id = callers.keys.keys().next()?;
        let name = self.manifests.objects.keys.get(id)?.spec.secret(&id.name);
        let secret = self.manifests.secrets.get(&Id::new(&id.namespace, name))?;
        String::from_utf8(secret.get(names::SECRET_KEY)?.clone()).ok()
    }
}

/// `--service NAMESPACE/NAME:PORT=ADDRESS:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceAddress {
    pub(super) service: ServicePort,
    pub(super) address: SocketAddr,
}

/// For clap.
pub(super) fn parse_service(text: &str) -> Result<ServiceAddress, String> {
    let (service, address) = text
        .split_once('=')
        .ok_or("write NAMESPACE/NAME:PORT=ADDRESS:PORT")?;
    Ok(ServiceAddress {
        service: service.parse().map_err(|err| format!("{err}"))?,
        address: address.parse().map_err(|_| {
            format!("'{address}' is not an address and port, such as 127.0.0.1:8000")
        })?,
    })
}

/// Reads and compiles. A folder that names no gateway, or several, is an error: one process is one gateway.
pub(super) fn load(path: &Path, keyring: &mut Keyring) -> anyhow::Result<Folder> {
    let checked = check::check_with(path, |manifests| {
        for line in keyring.complete(manifests) {
            say(&line);
        }
    })?;
    let mut gateways = checked.compiled.gateways.into_values();
    let Some(config) = gateways.next() else {
        for problem in &checked.problems {
            say(&format!("problem: {problem}"));
        }
        anyhow::bail!(
            "{}: no usable RoutingPolicy: there is nothing to route",
            path.display()
        );
    };
    if let Some(second) = gateways.next() {
        anyhow::bail!(
            "{}: the policies name two gateways, {} and {}: one process runs one",
            path.display(),
            config.gateway,
            second.gateway
        );
    }
    Ok(Folder {
        manifests: checked.manifests,
        config: Arc::new(config),
        problems: checked.problems,
    })
}

/// Loads the folder again whenever a file's text changes. A folder that cannot be used leaves the last good one.
pub(super) async fn follow(
    path: PathBuf,
    mut keyring: Keyring,
    load_to: watch::Sender<Arc<Folder>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut seen = texts(&path);
    let mut told: BTreeSet<String> = load_to.borrow().problems.iter().cloned().collect();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = stop.cancelled() => return Ok(()),
        }
        let look = path.clone();
        let now = tokio::task::spawn_blocking(move || texts(&look))
            .await
            .context("read the folder")?;
        if now == seen {
            continue;
        }
        seen = now;
        match load(&path, &mut keyring) {
            Ok(folder) => {
                for problem in folder
                    .problems
                    .iter()
                    .filter(|problem| !told.contains(*problem))
                {
                    say(&format!("problem: {problem}"));
                }
                told = folder.problems.iter().cloned().collect();
                say("objects changed: applied");
                load_to.send_replace(Arc::new(folder));
            }
            Err(err) => say(&format!(
                "objects changed, but cannot be used; the last good ones stay: {err:#}"
            )),
        }
    }
}

fn texts(path: &Path) -> Vec<(String, String)> {
    directory::read(path)
        .unwrap_or_default()
        .into_iter()
        .map(|file| (file.path, file.text))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_address_is_parsed_and_refused_with_its_form() {
        let address = parse_service("default/engine:8000=127.0.0.1:9000").unwrap();
        assert_eq!(address.service.to_string(), "default/engine:8000");
        assert!(parse_service("engine=127.0.0.1:9000").is_err());
        assert!(
            parse_service("default/engine:8000")
                .unwrap_err()
                .contains("NAMESPACE/NAME")
        );
    }
}
