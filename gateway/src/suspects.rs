//! Requests that ended the backends that read them. Pure: times come in.
//!
//! Such a request, sent again and again by its caller and repeated elsewhere each time, takes down one backend after
//! the other. So a body under which two connections broke, at two endpoints or at one at two times, is not sent again
//! for [`BLAMED_MS`], unless the same body is answered meanwhile: then it was not the body's fault.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::balance::prefix_affinity::Owner;

/// Long enough for a supervisor to bring backends back, and short enough for a mistake.
const BLAMED_MS: u64 = 60_000;
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
    endpoint: Owner,
    at_ms: u64,
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
        let suspect = Suspect {
            breaks,
            endpoint,
            at_ms: now_ms,
        };
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

    /// For how many ms more a body is not to be sent.
    pub fn blamed_ms(&self, body: BodyHash, now_ms: u64) -> Option<u64> {
        let bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        let suspect = bodies.get(&body)?;
        let left_ms = (suspect.at_ms + BLAMED_MS).saturating_sub(now_ms);
        (suspect.breaks >= BREAKS && left_ms > 0).then_some(left_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_endpoints_are_enough_and_it_is_forgiven_after_a_while() {
        let suspects = Suspects::default();
        assert!(!suspects.broke(7, 1, 100));
        assert_eq!(suspects.blamed_ms(7, 100), None);
        assert!(suspects.broke(7, 2, 200));
        assert_eq!(suspects.blamed_ms(7, 200), Some(BLAMED_MS));
        assert_eq!(suspects.blamed_ms(8, 200), None);
        assert_eq!(suspects.blamed_ms(7, 200 + BLAMED_MS), None);
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
        assert_eq!(suspects.blamed_ms(7, 200), None);
        assert!(suspects.is_empty());
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
        assert_eq!(suspects.blamed_ms(0, 1), None);
        assert!(suspects.blamed_ms(1, 2).is_some());
    }
}
