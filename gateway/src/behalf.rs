//! (IO) On whose behalf a request is answered, as of now.

use http::request::Parts;
use http::{HeaderMap, HeaderName};
use penstock_core::ids::Id;

use crate::principal::Who;
use crate::process::Process;
use crate::reject::Reject;
use crate::snapshot::Snapshot;

/// On whose behalf a request is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Behalf {
    /// Its caller's, who shows a key where that is needed.
    Caller,
    /// The gateway's own.
    Gateway,
    /// The caller's of this VirtualKey, who left it as a job.
    Key(Id),
}

impl Behalf {
    /// Who that is now.
    pub(crate) fn who(&self, process: &Process) -> Result<Who, Reject> {
        let snapshot = process.snapshot.load();
        let principals = snapshot.as_ref().and_then(|of| of.principals.as_ref());
        match (self, principals) {
            (Self::Key(id), Some(principals)) => principals.of(id, now_s()),
            _ => Ok(Who::Anyone),
        }
    }
}

fn now_s() -> u64 {
    penstock_shell::clock::since_epoch().as_secs()
}

/// Who shows one of these headers, and in which.
pub(crate) fn shown(
    snapshot: Option<&Snapshot>,
    headers: &HeaderMap,
) -> Result<(Who, Option<HeaderName>), Reject> {
    let principals = snapshot.and_then(|snapshot| snapshot.principals.as_ref());
    principals.map_or(Ok((Who::Anyone, None)), |known| {
        known.identify(headers, now_s())
    })
}

/// Who sends a request. A key that is known goes no further: what else it says of the caller is in what is returned.
pub(crate) fn identify(process: &Process, head: &mut Parts) -> Result<Who, Reject> {
    let (who, shown_in) = shown(process.snapshot.load().as_deref(), &head.headers)?;
    if let Some(name) = shown_in {
        head.headers.remove(name);
    }
    Ok(who)
}
