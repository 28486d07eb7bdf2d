//! (IO) On whose behalf a request is answered, as of now.

use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, HeaderName};
use penstock_core::ids::Id;

use crate::identity::Claimed;
use crate::principal::Who;
use crate::process::Process;
use crate::reject::Reject;
use crate::snapshot::Snapshot;
use crate::stored_keys;

/// How long a request waits for the keys by which its token is verified.
const KEYS_WAIT: Duration = Duration::from_secs(2);

/// On whose behalf a request is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Behalf {
    /// Its caller's, who shows a key where that is needed.
    Caller,
    /// The gateway's own.
    Gateway,
    /// The caller's of this VirtualKey, who left it as a job.
    Key(Id),
    /// The caller's for whom a provider vouched when it left it as a job.
    Claimed(Box<Claimed>),
}

impl Behalf {
    /// Who that is now.
    pub(crate) async fn who(&self, process: &Process) -> Result<Who, Reject> {
        if let Self::Key(id) = self
            && id.namespace == stored_keys::NAMESPACE
        {
            return Ok(Who::Known(process.stored_keys.of(id).await?));
        }
        let snapshot = process.snapshot.load();
        let principals = snapshot.as_ref().and_then(|of| of.principals.as_ref());
        match (self, principals) {
            (Self::Key(id), Some(principals)) => principals.of(id, now_s()),
            (Self::Claimed(claimed), Some(principals)) => principals.again(claimed),
            _ => Ok(Who::Anyone),
        }
    }
}

fn now_s() -> u64 {
    penstock_shell::clock::since_epoch().as_secs()
}

/// Who shows one of these headers, and in which, or a certificate with these names.
fn shown(
    snapshot: Option<&Snapshot>,
    headers: &HeaderMap,
    names: &[String],
) -> Result<(Who, Option<HeaderName>), Reject> {
    let principals = snapshot.and_then(|snapshot| snapshot.principals.as_ref());
    principals.map_or(Ok((Who::Anyone, None)), |known| {
        known.identify(headers, names, now_s())
    })
}

/// Who sends a request, over a connection whose caller showed a certificate with these names. A key or token that is
/// known goes no further: what else it says of the caller is in what is returned.
pub(crate) async fn identify(
    process: &Process,
    head: &mut Parts,
    names: &[String],
) -> Result<Who, Reject> {
    let (who, shown_in) = shown_to(process, &head.headers, names).await?;
    if let Some(name) = shown_in {
        head.headers.remove(name);
    }
    Ok(who)
}

/// Who shows one of these headers, and in which; waits for what must be read to tell.
pub(crate) async fn shown_to(
    process: &Process,
    headers: &HeaderMap,
    names: &[String],
) -> Result<(Who, Option<HeaderName>), Reject> {
    let look = || shown(process.snapshot.load().as_deref(), headers, names);
    let found = match look() {
        Err(Reject::KeysUnavailable { unread: Some(hash) }) => {
            process.stored_keys.read(&hash).await?;
            look()
        }
        found => found,
    };
    match found {
        Err(Reject::IdentityUnavailable { is_awaited: true }) => known_soon(process, look).await,
        found => found,
    }
}

/// What is known once the keys of a provider have been read that are on their way.
async fn known_soon<T>(
    process: &Process,
    look: impl Fn() -> Result<T, Reject>,
) -> Result<T, Reject> {
    let mut reads = process.key_sets.reads.subscribe();
    let found = tokio::time::timeout(KEYS_WAIT, async {
        loop {
            match look() {
                Err(Reject::IdentityUnavailable { is_awaited: true }) => {}
                found => return found,
            }
            if reads.changed().await.is_err() {
                return look();
            }
        }
    });
    found.await.unwrap_or_else(|_| look())
}
