//! (IO) Overload: callers give up in masses, and the endpoints that could answer have as many waiting as they answer
//! in time. Then a request waits for its turn (see `queue`), or is refused at once if it would wait too long:
//! a clear answer now is worth more than a good one that nobody reads, and costs the backends nothing.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use penstock_core::ids::BackendId;
use tokio::sync::Notify;
use xxhash_rust::xxh3::xxh3_64;

use crate::choose::{Choice, Nowhere, choose};
use crate::hold::{self, Place};
use crate::job::Job;
use crate::outbound::API_KEYS;
use crate::patience;
use crate::principal::Who;
use crate::queue::{Queue, Tenant, Waiter};
use crate::record::Record;
use crate::snapshot::{Candidate, Rule};
use crate::wish::{Unfit, Wish};

/// A place in the queue; left when dropped.
struct Turn<'a> {
    queue: &'a Queue,
    number: u64,
    /// Where it goes from here.
    served: Option<BackendId>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let now = penstock_shell::clock::now();
        self.queue.leave(self.number, self.served.as_ref(), now);
    }
}

/// Chooses an endpoint once it is the request's turn. [`Nowhere::Full`]: it would be too late.
pub(crate) async fn in_turn(
    job: &Job<'_>,
    rule: &Rule,
    record: &mut Record,
    unfit: &Unfit,
) -> Result<Choice, Nowhere> {
    let process = &*job.worker.process;
    let look = |tried: &[_]| {
        let wish = job.wish(penstock_shell::clock::now(), unfit);
        choose(rule, tried, wish, &mut rand::rng())
    };
    let now = penstock_shell::clock::now();
    let wish = job.wish(now, unfit);
    let backends: Vec<BackendId> = fitting(rule, wish)
        .map(|candidate| candidate.backend.id.clone())
        .collect();
    let tenant = tenant(&record.who, job.headers);
    let urgency = rule.urgency.min(record.most_urgent);
    let ahead = process.queue.ahead(urgency, tenant, &backends);
    if ahead == 0 {
        match look(&record.tried) {
            Err(Nowhere::Full) => {}
            found => return found,
        }
    }
    heed(rule, wish);
    let most = rule.patience.known(wish.now_ms);
    let until = record.started + most.map_or(rule.first_token, patience::in_queue);
    let first = fitting(rule, wish).next().ok_or(Nowhere::Full)?;
    if now + expected(rule, wish, ahead) > until {
        return Err(Nowhere::Full);
    }
    let give_way = || process.queue.give_way(urgency, tenant, now);
    let _place = Place::take(process)
        .or_else(|| give_way().then(|| Place::take_over(process)))
        .ok_or(Nowhere::Full)?;
    hold::held(job, first, record, now);
    let wake = Arc::new(Notify::new());
    let number = process.queue.join(Waiter {
        urgency,
        tenant,
        since: now,
        until,
        backends,
        wake: Arc::clone(&wake),
    });
    let mut turn = Turn {
        queue: &process.queue,
        number,
        served: None,
    };
    if ahead == 0 {
        // Room that came since it was looked for.
        wake.notify_one();
    }
    loop {
        if tokio::time::timeout_at(until.into(), wake.notified())
            .await
            .is_err()
        {
            return Err(Nowhere::Full);
        }
        match look(&record.tried) {
            Err(Nowhere::Full) if process.queue.stays(number) => {}
            Err(Nowhere::Full) => return Err(Nowhere::Full),
            found => {
                let choice = found.as_ref().ok();
                turn.served = choice.map(|choice| choice.endpoint.live.backend.clone());
                return found;
            }
        }
    }
}

fn fitting<'a>(rule: &'a Rule, wish: Wish<'a>) -> impl Iterator<Item = &'a Candidate> {
    rule.candidates()
        .filter(move |candidate| wish.fits(candidate))
}

/// How long `ahead` others take, by what the endpoints answer.
fn expected(rule: &Rule, wish: Wish<'_>, ahead: usize) -> Duration {
    let per_s = fitting(rule, wish).map(|candidate| candidate.backend.per_s(wish.now_ms));
    let per_s: u32 = per_s.sum();
    let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
    Duration::from_secs(1).mul_f64(f64::from(ahead) / f64::from(per_s.max(1)))
}

/// What is known of callers' patience keeps requests back: it is still needed.
fn heed(rule: &Rule, wish: Wish<'_>) {
    rule.patience.heeded(wish.now_ms);
    for candidate in fitting(rule, wish) {
        candidate.backend.patience.heeded(wish.now_ms);
    }
}

/// Callers of one team are one tenant, and all whom a gateway does not know that knows some. Where it knows nobody,
/// callers with the same credential are one.
fn tenant(who: &Who, headers: &HeaderMap) -> Tenant {
    match who {
        Who::Known(principal) => return xxh3_64(principal.team.as_bytes()),
        Who::Stranger { .. } => return 0,
        Who::Anyone => {}
    }
    let key = [AUTHORIZATION]
        .iter()
        .chain(&API_KEYS)
        .find_map(|name| headers.get(name));
    key.map_or(0, |key| xxh3_64(key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use penstock_core::ids::Id;

    use super::*;
    use crate::principal::Principal;

    fn shows(bearer: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static(bearer))])
    }

    fn known(key: &str, team: &str) -> Who {
        Who::Known(Arc::new(Principal::named(Id::new("ns", key), team, None)))
    }

    #[test]
    fn a_team_is_one_tenant_whatever_else_its_callers_send() {
        let one = tenant(&known("a", "search"), &shows("x"));
        assert_eq!(one, tenant(&known("b", "search"), &shows("y")));
        assert_ne!(one, tenant(&known("a", "ads"), &shows("x")));
    }

    #[test]
    fn made_up_credentials_are_no_tenants_where_callers_are_known() {
        let stranger = Who::Stranger { shows_key: true };
        assert_eq!(
            tenant(&stranger, &shows("x")),
            tenant(&stranger, &shows("y"))
        );
        assert_ne!(
            tenant(&stranger, &shows("x")),
            tenant(&known("a", "search"), &shows("x"))
        );
    }

    #[test]
    fn where_nobody_is_known_a_credential_is_a_tenant() {
        let of = |headers: &HeaderMap| tenant(&Who::Anyone, headers);
        assert_eq!(of(&shows("x")), of(&shows("x")));
        assert_ne!(of(&shows("x")), of(&shows("y")));
        assert_eq!(of(&HeaderMap::new()), 0);
    }
}
