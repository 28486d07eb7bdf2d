//! (IO) On whose behalf a request is answered, as of now.

use http::request::Parts;
use penstock_core::ids::Id;

use crate::principal::Who;
use crate::process::Process;
use crate::reject::Reject;

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

/// Who sends a request. A key that is known goes no further: what else it says of the caller is in what is returned.
pub(crate) fn identify(process: &Process, head: &mut Parts) -> Result<Who, Reject> {
    let snapshot = process.snapshot.load();
    let principals = snapshot.as_ref().and_then(|of| of.principals.as_ref());
    let Some(principals) = principals else {
        return Ok(Who::Anyone);
    };
    let (who, shown_in) = principals.identify(&head.headers, now_s())?;
    if let Some(name) = shown_in {
        head.headers.remove(name);
    }
    Ok(who)
}
