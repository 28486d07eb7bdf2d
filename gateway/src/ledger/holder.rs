//! One gateway's lease of one limit: what requests take of it, and what the record is asked and told. Pure.
//!
//! All of it is: used (spent, and not told yet), reserved (requests under way), idle (for the next ones), and spare
//! (came back from requests, beyond what may lie idle). Only idle is given to requests, so what gateways have lying
//! about stays within its bound whatever comes back.

use super::clock::Seen;
use super::record::{Ask, LEASE_MS, Stand, Told};

/// The lease is renewed when so much of its time is over.
const RENEW_MS: u64 = LEASE_MS / 3;
/// Nothing is taken of a lease in the last part of its time: the record may have ended it by its own clock.
const SAFE_MS: u64 = LEASE_MS * 2 / 3;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Holder {
    generation: Option<u64>,
    used: u64,
    beyond: u64,
    reserved: u64,
    idle: u64,
    spare: u64,
    most_idle: u64,
    question: u64,
    /// The question that has no answer yet, and when it was asked.
    asking: Option<(Ask, u64)>,
    /// When the last answer's question was asked.
    told_ms: u64,
    /// When the store's clock was read last, by the own one, and what it said.
    read: Option<(u64, u64)>,
    stand: Stand,
}

/// What a request has of a lease.
#[must_use = "it is settled, or the lease never gets it back"]
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Taken {
    amount: u64,
    generation: u64,
}

impl Taken {
    /// So much.
    pub fn amount(&self) -> u64 {
        self.amount
    }

    #[cfg(test)]
    pub(super) fn made(amount: u64, generation: u64) -> Self {
        Self { amount, generation }
    }

    #[cfg(test)]
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }
}

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// What so many of its needs take, the first ones, is idle now.
    pub granted: usize,
    /// When the next one may be, in ms, if waiting helps.
    pub retry_ms: Option<u64>,
}

impl Holder {
    /// Takes `amount` for a request, if the lease has so much and is good at `now_ms`, by the gateway's own clock.
    pub fn take(&mut self, amount: u64, now_ms: u64) -> Option<Taken> {
        let generation = self.generation?;
        if amount > self.idle || now_ms.saturating_sub(self.told_ms) >= SAFE_MS {
            return None;
        }
        self.idle -= amount;
        self.reserved += amount;
        Some(Taken { amount, generation })
    }

    /// A request took `actual` in the end.
    pub fn settle(&mut self, taken: Taken, actual: u64) {
        let beyond = actual.saturating_sub(taken.amount);
        self.beyond = self.beyond.saturating_add(beyond);
        // What an earlier lease had was charged whole when it was lost.
        if self.generation != Some(taken.generation) {
            return;
        }
        let used = actual.min(taken.amount);
        let back = taken.amount - used;
        let room = self.most_idle.saturating_sub(self.idle);
        self.reserved -= taken.amount;
        self.used += used;
        self.idle += back.min(room);
        self.spare += back - back.min(room);
    }

    /// A request took `actual` though nothing was reserved for it.
    pub fn charge(&mut self, actual: u64) {
        self.beyond = self.beyond.saturating_add(actual);
    }

    /// Gives back what no request needs: nobody seems to come.
    pub fn rest(&mut self) {
        self.spare += std::mem::take(&mut self.idle);
    }

    /// Whether there is something to tell, or the lease grows old, though nobody needs more.
    pub fn has_news(&self, now_ms: u64) -> bool {
        let is_old = now_ms.saturating_sub(self.told_ms) >= RENEW_MS;
        let tells = self.used + self.spare > 0 || self.beyond > 0;
        self.asking.is_none() && (tells || is_old && self.has_lease())
    }

    /// Whether there is a lease with something in it.
    pub fn has_lease(&self) -> bool {
        self.generation.is_some() && self.reserved + self.idle > 0
    }

    /// The question to ask next: for what requests need that wait, and what may come in handy. One at a time: the same
    /// one, until it is answered.
    pub fn ask(&mut self, needs: &[u64], want: u64, now_ms: u64) -> &Ask {
        if self.asking.is_none() {
            self.question += 1;
            let too_much = self.idle.saturating_sub(self.most_idle);
            self.idle -= too_much;
            let ask = Ask {
                generation: self.generation,
                question: self.question,
                used: std::mem::take(&mut self.used),
                beyond: std::mem::take(&mut self.beyond),
                released: std::mem::take(&mut self.spare) + too_much,
                idle: self.idle,
                needs: needs.to_vec(),
                want,
                stand: self.stand,
            };
            self.asking = Some((ask, now_ms));
        }
        let (ask, _) = self.asking.get_or_insert_default();
        ask
    }

    /// Whether a question has no answer yet.
    pub fn is_asking(&self) -> bool {
        self.asking.is_some()
    }

    /// What the record's clock is compared with.
    pub fn seen(&self, now_ms: u64) -> Option<Seen> {
        let (read_ms, store_ms) = self.read?;
        Some(Seen {
            store_ms,
            elapsed_ms: now_ms.saturating_sub(read_ms),
            correction: self.stand.correction,
        })
    }

    /// The record's answer. `read` is when the store's clock was read, by the own one, and what it said; `None` if that
    /// took too long to tell.
    pub fn told(&mut self, told: &Told, read: Option<(u64, u64)>) -> Answered {
        let answered = Answered {
            granted: told.granted,
            retry_ms: told.retry_ms,
        };
        let Some((_, asked_ms)) = self.asking.take() else {
            return answered;
        };
        self.told_ms = asked_ms;
        self.read = read;
        self.stand = told.stand;
        self.most_idle = told.most_idle;
        if told.lost || self.generation != told.generation {
            // Requests under way are paid for: see `settle`.
            self.used = 0;
            self.reserved = 0;
            self.idle = 0;
            self.spare = 0;
        }
        self.generation = told.generation;
        // What is new in it; requests went on meanwhile, so what is known of the rest counts.
        let known = self.used + self.reserved + self.idle + self.spare;
        self.idle += told.amount.saturating_sub(known);
        answered
    }

    /// How the record stood when it last answered.
    pub fn stand(&self) -> Stand {
        self.stand
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Record, Terms};
    use super::super::span::Span;
    use super::*;

    const TERMS: Terms = Terms {
        cap: 1_000,
        span: Span::Sliding { ms: 3_600_000 },
    };

    /// A holder with 20 lying idle.
    fn holder(record: &mut Record) -> Holder {
        let mut holder = Holder::default();
        ask(&mut holder, record, &[], 20, 1_000);
        assert_eq!(holder.idle, 20);
        holder
    }

    fn ask(
        holder: &mut Holder,
        record: &mut Record,
        needs: &[u64],
        want: u64,
        now_ms: u64,
    ) -> Answered {
        let question = holder.ask(needs, want, now_ms).clone();
        let told = record.ask(&TERMS, "a", &question, now_ms, holder.seen(now_ms));
        holder.told(&told, Some((now_ms, now_ms)))
    }

    #[test]
    fn requests_are_answered_out_of_the_lease_and_told_of_later() {
        let mut record = Record::default();
        let mut holder = holder(&mut record);
        assert!(!holder.has_news(1_000));
        let taken = holder.take(15, 1_000).unwrap();
        assert_eq!(holder.take(6, 1_000), None, "there is no more");
        holder.settle(taken, 10);
        assert!(holder.has_news(1_000));
        assert!(
            holder.take(10, 1_000).is_some(),
            "what was not taken is there again"
        );
        ask(&mut holder, &mut record, &[], 20, 2_000);
        assert_eq!((holder.stand().spent, holder.stand().leased), (10, 30));
    }

    #[test]
    fn what_comes_back_is_not_more_than_may_lie_idle() {
        let mut record = Record::default();
        let mut holder = Holder::default();
        let answered = ask(&mut holder, &mut record, &[500], 0, 1_000);
        assert_eq!(answered.granted, 1);
        let taken = holder.take(500, 1_000).unwrap();
        holder.settle(taken, 100);
        assert_eq!((holder.idle, holder.spare), (20, 380));
        ask(&mut holder, &mut record, &[], 0, 1_000);
        assert_eq!((holder.stand().spent, holder.stand().leased), (100, 20));
    }

    #[test]
    fn what_a_backend_took_beyond_is_charged_too() {
        let mut record = Record::default();
        let mut holder = holder(&mut record);
        let taken = holder.take(10, 1_000).unwrap();
        holder.settle(taken, 17);
        ask(&mut holder, &mut record, &[], 0, 1_000);
        assert_eq!(holder.stand().spent, 17);
    }

    #[test]
    fn a_lease_that_grows_old_is_renewed_and_then_not_used() {
        let mut record = Record::default();
        let mut holder = holder(&mut record);
        assert!(holder.has_news(1_000 + RENEW_MS));
        assert_eq!(holder.take(1, 1_000 + SAFE_MS), None);
        let taken = holder.take(1, 999 + SAFE_MS).unwrap();
        // By then the record has ended it, and charged it whole.
        ask(&mut holder, &mut record, &[], 20, 1_000 + LEASE_MS);
        assert_eq!(holder.stand().spent, 20);
        holder.settle(taken, 1);
        assert!(!holder.has_news(1_000 + LEASE_MS), "it is paid for");
    }
}
