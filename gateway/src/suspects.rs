//! Requests that ended the backends that read them. Pure: times come in.
//!
//! Such a request, sent again and again by its caller and repeated elsewhere each time, takes down one backend after
//! the other. So a body under which two connections broke, at two endpoints or at one at two times, is not sent again
//! for [`BLAMED_MS`], unless the same body is answered meanwhile: then it was not the body's fault. So that it can be
//! answered where all callers send the same one, it is tried now and then where it broke off last: soon where many ask
//! with it, late where one caller may be sending it again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::balance::prefix_affinity::Owner;

/// Long enough for a supervisor to bring backends back, and short enough for a mistake.
const BLAMED_MS: u64 = 60_000;
/// Before the first trial of a body that is blamed; each one in vain doubles it.
const TRIAL_MS: u64 = 2_000;
/// The same where few ask with it: whoever sends what ends a backend sends it again.
const ALONE_MS: u64 = 20_000;
/// So many that were refused are no longer few.
const MANY: u8 = 10;
/// One that ends takes many requests with it at once: they count as one time.
const APART_MS: u64 = 1_000;
/// Connections that broke before a body is blamed.
const BREAKS: u8 = 2;
/// Bodies that are remembered. When all places are taken, the oldest goes.
const BODIES: usize = 1_024;

/// Hash of a body.
pub type BodyHash = u128;

/// The bodies that are remembered.
#[derive(Debug, Default)]
pub struct Suspects {
    len: AtomicUsize,
    bodies: Mutex<HashMap<BodyHash, Suspect>>,
}

#[derive(Clone, Copy, Debug)]
struct Suspect {
    breaks: u8,
    /// Where it broke off last.
    endpoint: Owner,
    at_ms: u64,
    /// From when on it may be tried.
    trial_ms: u64,
    /// Requests that were refused since it broke off last.
    refused: u8,
}

impl Suspect {
    /// Between two trials.
    fn wait_ms(self) -> u64 {
        let doublings = u32::from(self.breaks.saturating_sub(BREAKS)).min(8);
        (TRIAL_MS << doublings).min(BLAMED_MS)
    }

    /// From when on it may be tried, as far as is known now.
    fn due_ms(self) -> u64 {
        if self.refused >= MANY {
            self.trial_ms
        } else {
            self.trial_ms.max(self.at_ms + ALONE_MS)
        }
    }
}

/// What becomes of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is sent as all others.
    Free,
    /// This once it is sent, to this endpoint alone.
    Trial(Owner),
    /// It is not sent for so many ms more.
    Blamed(u64),
}

impl Suspects {
    /// Whether none is remembered, which is the usual case.
    pub fn is_empty(&self) -> bool {
        self.len.load(Ordering::Relaxed) == 0
    }

    /// A connection broke under a body before an answer began. Whether it is to blame.
    pub fn broke(&self, body: BodyHash, endpoint: Owner, now_ms: u64) -> bool {
        let mut bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.retain(|_, suspect| now_ms < suspect.at_ms + BLAMED_MS);
        let suspect = bodies.get(&body).copied();
        let breaks = match suspect {
            None => 1,
            Some(before) if before.endpoint == endpoint && now_ms < before.at_ms + APART_MS => {
                before.breaks
            }
            Some(before) => before.breaks.saturating_add(1),
        };
        if suspect.is_none() && bodies.len() >= BODIES {
            let oldest = bodies.iter().min_by_key(|(_, suspect)| suspect.at_ms);
            let oldest = oldest.map(|(body, _)| *body);
            oldest.and_then(|oldest| bodies.remove(&oldest));
        }
        let mut suspect = Suspect {
            breaks,
            endpoint,
            at_ms: now_ms,
            trial_ms: 0,
            refused: 0,
        };
        suspect.trial_ms = now_ms + suspect.wait_ms();
        bodies.insert(body, suspect);
        self.len.store(bodies.len(), Ordering::Relaxed);
        breaks >= BREAKS
    }

    /// A body was answered.
    pub fn answered(&self, body: BodyHash) {
        let mut bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.remove(&body);
        self.len.store(bodies.len(), Ordering::Relaxed);
    }

    /// What becomes of a body. A trial is one request's.
    pub fn verdict(&self, body: BodyHash, now_ms: u64) -> Verdict {
        let mut bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(suspect) = bodies.get_mut(&body) else {
            return Verdict::Free;
        };
        let left_ms = (suspect.at_ms + BLAMED_MS).saturating_sub(now_ms);
        if suspect.breaks < BREAKS || left_ms == 0 {
            return Verdict::Free;
        }
        let due_ms = suspect.due_ms();
        if now_ms < due_ms {
            suspect.refused = suspect.refused.saturating_add(1);
            return Verdict::Blamed((due_ms - now_ms).min(left_ms));
        }
        suspect.trial_ms = now_ms + suspect.wait_ms();
        Verdict::Trial(suspect.endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_endpoints_are_enough_and_it_is_forgiven_after_a_while() {
        let suspects = Suspects::default();
        assert!(!suspects.broke(7, 1, 100));
        assert_eq!(suspects.verdict(7, 100), Verdict::Free);
        assert!(suspects.broke(7, 2, 200));
        assert_eq!(suspects.verdict(7, 200), Verdict::Blamed(ALONE_MS));
        assert_eq!(suspects.verdict(8, 200), Verdict::Free);
        assert_eq!(suspects.verdict(7, 200 + BLAMED_MS), Verdict::Free);
        assert!(!suspects.broke(7, 1, 200 + BLAMED_MS), "it begins anew");
    }

    #[test]
    fn many_equal_requests_that_break_with_one_endpoint_are_one_break() {
        let suspects = Suspects::default();
        assert!((0..100).all(|step| !suspects.broke(7, 1, 100 + step)));
        assert!(suspects.broke(7, 1, 200 + APART_MS), "its second time");
    }

    #[test]
    fn an_answer_acquits() {
        let suspects = Suspects::default();
        suspects.broke(7, 1, 100);
        suspects.broke(7, 2, 200);
        suspects.answered(7);
        assert_eq!(suspects.verdict(7, 200), Verdict::Free);
        assert!(suspects.is_empty());
    }

    /// So many that ask with a body and are refused that they are not few.
    fn crowd(suspects: &Suspects, now_ms: u64) {
        for _ in 0..MANY {
            assert!(matches!(suspects.verdict(7, now_ms), Verdict::Blamed(_)));
        }
    }

    #[test]
    fn one_of_many_is_a_trial_where_it_broke_off_last_and_each_in_vain_doubles_the_wait() {
        let suspects = Suspects::default();
        suspects.broke(7, 1, 100);
        suspects.broke(7, 2, 100);
        crowd(&suspects, 100);
        let first = 100 + TRIAL_MS;
        assert_eq!(suspects.verdict(7, first - 1), Verdict::Blamed(1));
        assert_eq!(suspects.verdict(7, first), Verdict::Trial(2));
        assert_eq!(suspects.verdict(7, first), Verdict::Blamed(TRIAL_MS));
        assert_eq!(
            suspects.verdict(7, first + TRIAL_MS),
            Verdict::Trial(2),
            "it was not even taken"
        );
        assert!(suspects.broke(7, 2, first + TRIAL_MS));
        crowd(&suspects, first + TRIAL_MS);
        assert_eq!(
            suspects.verdict(7, first + TRIAL_MS),
            Verdict::Blamed(2 * TRIAL_MS)
        );
        suspects.answered(7);
        assert_eq!(suspects.verdict(7, first + TRIAL_MS), Verdict::Free);
    }

    #[test]
    fn who_sends_it_again_alone_waits_long() {
        let suspects = Suspects::default();
        suspects.broke(7, 1, 0);
        suspects.broke(7, 2, 0);
        for second in 1..u64::from(MANY) {
            let left_ms = ALONE_MS - 1_000 * second;
            assert_eq!(
                suspects.verdict(7, 1_000 * second),
                Verdict::Blamed(left_ms)
            );
        }
        assert_eq!(suspects.verdict(7, ALONE_MS), Verdict::Trial(2));
    }

    #[test]
    fn bodies_are_bounded_and_the_oldest_goes() {
        let suspects = Suspects::default();
        for body in 0..=BODIES {
            let body = u128::try_from(body).unwrap();
            let at_ms = u64::try_from(body).unwrap();
            suspects.broke(body, 1, at_ms);
            suspects.broke(body, 2, at_ms);
        }
        assert_eq!(suspects.len.load(Ordering::Relaxed), BODIES);
        assert_eq!(suspects.verdict(0, 1), Verdict::Free);
        assert_ne!(suspects.verdict(1, 2), Verdict::Free);
    }
}
