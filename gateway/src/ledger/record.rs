//! One limit's durable record: what was spent, and what is leased to which gateway. Pure: [`Record::ask`] is the only
//! way in which it changes, and whoever changes it writes it under the condition that nobody else did.
//!
//! At all times: spent in the window + leased ≤ cap, but for what backends took beyond what was reserved for them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::clock::{self, Correction, Seen};
use super::span::Span;
use super::spent::{Spent, Window};

/// Gateways that hold leases of one limit.
pub const MAX_HOLDERS: usize = 256;
/// What all gateways together may hold beyond what requests under way need, in percent of the cap.
pub const IDLE_PERCENT: u64 = 2;
/// How long a lease lasts that nobody renews: a gateway that is away for longer has died, or is cut off.
pub const LEASE_MS: u64 = 15_000;
/// How long the last question is known of a gateway whose lease is over: longer than it asks the same one.
const ENDED_MS: u64 = 600_000;
/// Requests that one question asks for.
pub const MAX_NEEDS: usize = 64;
/// When to come back where waiting does not tell: requests under way may end at any time.
const SOON_MS: u64 = 1_000;

/// What a limit says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The most in one window.
    pub cap: u64,
    /// Which windows.
    pub span: Span,
}

/// What a limit is at a moment.
#[derive(Clone, Copy)]
struct Limit {
    cap: u64,
    window: Window,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// Rises with each change. One that is lower than it was has been lost and found.
    epoch: u64,
    /// A greater one after each loss.
    lineage: u64,
    /// After a loss: nothing is given out until then, so that all gateways can say what they remember.
    closed_until_ms: u64,
    /// What of `spent` was remembered.
    remembered: u64,
    /// The record's time of the last change.
    last_ms: u64,
    correction: Correction,
    spent: Spent,
    leases: BTreeMap<String, Lease>,
    /// The last questions of those whose leases are over: asked again because no answer came, they change nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    ended: BTreeMap<String, Ended>,
    /// What was charged for gateways that died, and may be more than was taken; ever.
    orphaned: u64,
}

/// What one gateway has.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Lease {
    /// Tells it from earlier ones of the same gateway.
    generation: u64,
    /// The last question that changed it.
    question: u64,
    /// What is not spent of it.
    amount: u64,
    /// What of that no request needs, as far as is known.
    idle: u64,
    /// How many needs of the last question are in it.
    granted: usize,
    ends_ms: u64,
}

/// A lease whose time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Ended {
    question: u64,
    at_ms: u64,
}

/// What a gateway says and wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ask {
    /// The lease that it believes to have.
    pub generation: Option<u64>,
    /// The number of the question. The same one, asked again because no answer came, changes nothing.
    pub question: u64,
    /// What was spent of the lease since the question before.
    pub used: u64,
    /// What was spent beyond what was reserved.
    pub beyond: u64,
    /// What is given back.
    pub released: u64,
    /// What of the rest no request needs.
    pub idle: u64,
    /// What requests need that wait now, one after the other; [`MAX_NEEDS`] at most.
    pub needs: Vec<u64>,
    /// What may come in handy besides.
    pub want: u64,
    /// How the record stood when it last answered.
    pub stand: Stand,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// The lease; `None`: there is none, since too many gateways have one.
    pub generation: Option<u64>,
    /// What is not spent of it.
    pub amount: u64,
    /// Whether the lease that was believed in was not there: it was charged whole.
    pub lost: bool,
    /// So many needs are in it, the first ones.
    pub granted: usize,
    /// What of a lease may lie idle at each gateway.
    pub most_idle: u64,
    /// When the first need that is not granted may be, in ms; `None`: never, as things are.
    pub retry_ms: Option<u64>,
    /// How the record stands.
    pub stand: Stand,
}

/// How a record stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stand {
    /// See [`Record`].
    pub epoch: u64,
    /// See [`Record`].
    pub lineage: u64,
    /// Its time.
    pub now_ms: u64,
    /// For the next [`Seen`].
    pub correction: Correction,
    /// In the window.
    pub spent: u64,
    /// All of it.
    pub leased: u64,
    /// See [`Record`].
    pub orphaned: u64,
    /// When the window ends, or the first part of a sliding one with something in it.
    pub resets_ms: Option<u64>,
}

impl Record {
    /// Answers `holder`. `store_ms` is what the store's clock says, `seen` what the holder remembers of it.
    pub fn ask(
        &mut self,
        terms: &Terms,
        holder: &str,
        ask: &Ask,
        store_ms: u64,
        seen: Option<Seen>,
    ) -> Told {
        let (now_ms, correction) = clock::now(self.correction, self.last_ms, store_ms, seen);
        self.correction = correction;
        self.last_ms = now_ms;
        let limit = Limit {
            cap: terms.cap,
            window: terms.span.window(now_ms),
        };
        self.remember(limit.window, holder, ask, now_ms);
        self.epoch += 1;
        self.spent.roll(limit.window, now_ms);
        self.end_leases(limit.window, now_ms);
        let known = self.leases.get(holder);
        let is_repeated = known.is_some_and(|lease| lease.question == ask.question);
        let has = known.map(|lease| lease.generation);
        let lost = !is_repeated && ask.generation.is_some() && ask.generation != has;
        if !is_repeated {
            self.change(limit, holder, ask, now_ms);
        }
        self.told(limit, holder, ask, lost)
    }

    /// A gateway that saw this record later than it is now knows that it was lost, or replaced by an older one. Then
    /// what was leased is taken to be spent, of everything that gateways remember the most counts, and nothing is given
    /// out for the time of a lease: until then every gateway that lives has asked.
    fn remember(&mut self, window: Window, holder: &str, ask: &Ask, now_ms: u64) {
        let stand = &ask.stand;
        let is_new = self.epoch == 0;
        if is_new {
            self.lineage = now_ms.max(1);
        }
        let is_older = (stand.lineage, stand.epoch) > (self.lineage, self.epoch);
        let is_lost = is_new || is_older || self.lacks(holder, ask, now_ms);
        if stand.lineage == 0 || stand.lineage == self.lineage && !is_lost {
            return;
        }
        if is_lost {
            let holders: Vec<String> = self.leases.keys().cloned().collect();
            for holder in holders {
                self.charge(window, &holder, now_ms);
            }
            self.spent.roll(window, now_ms);
            self.remembered = self.spent.sum();
            self.lineage = self.lineage.max(now_ms).max(stand.lineage + 1);
            self.closed_until_ms = now_ms.saturating_add(LEASE_MS);
        }
        // Or a lease could have the number of one that was lost.
        self.epoch = self.epoch.max(stand.epoch);
        let is_over = match window {
            Window::Held => true,
            Window::Sliding { ms } => now_ms >= stand.now_ms.saturating_add(ms),
            Window::Fixed { starts_ms, .. } => stand.now_ms < starts_ms,
        };
        if !is_over {
            let then = stand.spent.saturating_add(stand.leased);
            let more = then.saturating_sub(self.remembered);
            self.spent.roll(window, now_ms);
            self.spent.add(window, now_ms, more);
            // What was leased may not have been used.
            let estimated = more.min(stand.leased);
            self.orphaned = self.orphaned.max(stand.orphaned).saturating_add(estimated);
            self.remembered = self.remembered.max(then);
        }
    }

    /// Whether the lease of a gateway is not as the gateway was told, though its time is not over.
    fn lacks(&self, holder: &str, ask: &Ask, now_ms: u64) -> bool {
        let ends_ms = ask.stand.now_ms.saturating_add(LEASE_MS);
        let known = self.leases.get(holder).map(|lease| lease.question);
        let is_told = known.is_some_and(|question| question.saturating_add(1) >= ask.question);
        let is_same = ask.stand.lineage == self.lineage;
        is_same && ask.generation.is_some() && now_ms < ends_ms && !is_told
    }

    /// Leases whose time is over are charged whole.
    fn end_leases(&mut self, window: Window, now_ms: u64) {
        let over = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.ends_ms <= now_ms);
        let over: Vec<String> = over.map(|(holder, _)| holder.clone()).collect();
        for holder in over {
            self.charge(window, &holder, now_ms);
        }
    }

    /// What a gateway had is taken to be spent.
    fn charge(&mut self, window: Window, holder: &str, now_ms: u64) {
        let Some(lease) = self.leases.remove(holder) else {
            return;
        };
        self.remember_question(holder, lease.question, now_ms);
        if window != Window::Held {
            self.spent.add(window, now_ms, lease.amount);
            self.orphaned = self.orphaned.saturating_add(lease.amount);
        }
    }

    fn remember_question(&mut self, holder: &str, question: u64, now_ms: u64) {
        let ended = Ended {
            question,
            at_ms: now_ms,
        };
        self.ended.insert(holder.to_owned(), ended);
        self.ended
            .retain(|_, ended| now_ms < ended.at_ms.saturating_add(ENDED_MS));
        if self.ended.len() > MAX_HOLDERS {
            let oldest = self.ended.iter().min_by_key(|(_, ended)| ended.at_ms);
            let oldest = oldest.map(|(holder, _)| holder.clone());
            oldest.and_then(|holder| self.ended.remove(&holder));
        }
    }

    fn change(&mut self, limit: Limit, holder: &str, ask: &Ask, now_ms: u64) {
        let ended = self.ended.remove(holder);
        if ended.is_none_or(|ended| ended.question != ask.question) {
            self.spent.add(limit.window, now_ms, ask.beyond);
        }
        let known = self.leases.remove(holder);
        let known = known.filter(|lease| ask.generation == Some(lease.generation));
        let mut lease = match known {
            Some(lease) => self.settled(limit.window, lease, ask, now_ms),
            // It was charged whole, or never; or the gateway has not learned of it, and has spent nothing of it.
            None => Lease {
                generation: self.epoch,
                amount: 0,
                idle: 0,
                question: 0,
                granted: 0,
                ends_ms: 0,
            },
        };
        lease.question = ask.question;
        lease.ends_ms = now_ms.saturating_add(LEASE_MS);
        lease.granted = 0;
        if self.leases.len() >= MAX_HOLDERS {
            // What is left of it was given back.
            return;
        }
        let mut free = self.free(limit, now_ms).saturating_sub(lease.amount);
        let needs = ask.needs.iter().take(MAX_NEEDS);
        for need in needs.clone() {
            // One that is too much holds up those behind it: or small ones would for ever come before it.
            if *need > free {
                break;
            }
            free -= need;
            lease.amount += need;
            lease.granted += 1;
        }
        if lease.granted == needs.len() {
            let others = self.leases.values().map(|other| other.idle);
            let idle = others.fold(lease.idle, u64::saturating_add);
            let extra = ask
                .want
                .min(free)
                .min(self.most_idle(limit, 1).saturating_sub(lease.idle))
                .min(all_idle(limit.cap).saturating_sub(idle));
            lease.amount += extra;
            lease.idle += extra;
        }
        self.leases.insert(holder.to_owned(), lease);
    }

    /// A lease after what its gateway says of it. Nobody spends, or gives back, what it does not have.
    fn settled(&mut self, window: Window, mut lease: Lease, ask: &Ask, now_ms: u64) -> Lease {
        let used = ask.used.min(lease.amount);
        let released = ask.released.min(lease.amount - used);
        lease.amount -= used + released;
        lease.idle = ask.idle.min(lease.amount);
        self.spent.add(window, now_ms, used);
        lease
    }

    /// What is neither spent nor leased, and may be given out.
    fn free(&self, limit: Limit, now_ms: u64) -> u64 {
        if now_ms < self.closed_until_ms {
            return 0;
        }
        let taken = self.spent.sum().saturating_add(self.leased());
        limit.cap.saturating_sub(taken)
    }

    fn leased(&self) -> u64 {
        let amounts = self.leases.values().map(|lease| lease.amount);
        amounts.fold(0, u64::saturating_add)
    }

    fn idle(&self) -> u64 {
        let amounts = self.leases.values().map(|lease| lease.idle);
        amounts.fold(0, u64::saturating_add)
    }

    /// What may lie idle at each gateway, with `more` that have no lease yet.
    fn most_idle(&self, limit: Limit, more: usize) -> u64 {
        let holders = u64::try_from(self.leases.len() + more).unwrap_or(u64::MAX);
        all_idle(limit.cap) / holders.max(1)
    }

    fn told(&self, limit: Limit, holder: &str, ask: &Ask, lost: bool) -> Told {
        let stand = Stand {
            resets_ms: self.resets_ms(limit.window),
            ..self.stand()
        };
        let lease = self.leases.get(holder);
        let granted = lease.map_or(0, |lease| lease.granted);
        let need = ask.needs.get(granted).copied().unwrap_or(0);
        let short = need.saturating_sub(self.free(limit, stand.now_ms));
        let gone_ms = match self.closed_until_ms.saturating_sub(stand.now_ms) {
            // Requests under way may give back enough at any time.
            0 if self.leased().saturating_sub(self.idle()) >= short => None,
            0 => {
                let short = short.min(self.spent.sum());
                self.spent.gone_in(limit.window, stand.now_ms, short)
            }
            left_ms => Some(left_ms),
        };
        Told {
            generation: lease.map(|lease| lease.generation),
            amount: lease.map_or(0, |lease| lease.amount),
            lost,
            granted,
            most_idle: self.most_idle(limit, 0),
            retry_ms: (need <= limit.cap).then(|| gone_ms.unwrap_or(SOON_MS)),
            stand,
        }
    }

    /// How it stands, as of its last change.
    pub fn stand(&self) -> Stand {
        Stand {
            epoch: self.epoch,
            lineage: self.lineage,
            now_ms: self.last_ms,
            correction: self.correction,
            spent: self.spent.sum(),
            leased: self.leased(),
            orphaned: self.orphaned,
            resets_ms: None,
        }
    }

    fn resets_ms(&self, window: Window) -> Option<u64> {
        match window {
            Window::Held => None,
            Window::Fixed { ends_ms, .. } => Some(ends_ms),
            Window::Sliding { .. } => {
                let in_ms = self.spent.gone_in(window, self.last_ms, 1)?;
                Some(self.last_ms.saturating_add(in_ms))
            }
        }
    }
}

/// What of `cap` may lie idle at all gateways together.
pub fn all_idle(cap: u64) -> u64 {
    // By parts, since a product could be too large.
    cap / 100 * IDLE_PERCENT + cap % 100 * IDLE_PERCENT / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;
    const TERMS: Terms = Terms {
        cap: 1_000,
        span: Span::Sliding { ms: HOUR },
    };

    fn ask(generation: Option<u64>, question: u64, need: u64, want: u64) -> Ask {
        Ask {
            generation,
            question,
            needs: Some(need).filter(|need| *need > 0).into_iter().collect(),
            want,
            ..Ask::default()
        }
    }

    #[test]
    fn a_lease_is_what_is_needed_and_a_little_more() {
        let mut record = Record::default();
        let told = record.ask(&TERMS, "a", &ask(None, 1, 100, 500), 1_000, None);
        assert!(told.granted == 1 && !told.lost);
        assert_eq!(
            (told.amount, told.most_idle),
            (120, 20),
            "2 % of 1000 besides"
        );
        // Two gateways share what may lie idle: the first one has taken it all, until it hears of the second.
        let second = record.ask(&TERMS, "b", &ask(None, 1, 100, 500), 1_000, None);
        assert_eq!((second.amount, second.most_idle), (100, 10));
        let rest = Ask {
            used: 100,
            released: 10,
            idle: 10,
            ..ask(told.generation, 2, 0, 500)
        };
        let first = record.ask(&TERMS, "a", &rest, 2_000, None);
        assert_eq!(
            (first.amount, first.stand.spent, first.stand.leased),
            (10, 100, 110)
        );
        let second = record.ask(&TERMS, "b", &ask(second.generation, 2, 0, 500), 2_000, None);
        assert_eq!(second.amount, 110);
    }

    #[test]
    fn what_was_taken_beyond_is_charged_once_though_it_is_told_again_when_the_lease_is_over() {
        let mut record = Record::default();
        let first = record.ask(&TERMS, "a", &ask(None, 1, 100, 0), 1_000, None);
        let more = Ask {
            used: 100,
            beyond: 7,
            ..ask(first.generation, 2, 0, 0)
        };
        // The answer is lost.
        record.ask(&TERMS, "a", &more, 2_000, None);
        let late_ms = 2_000 + LEASE_MS;
        let again = record.ask(&TERMS, "a", &more, late_ms, None);
        assert_eq!((again.lost, again.stand.spent), (true, 107));
        let next = Ask {
            beyond: 7,
            ..ask(again.generation, 3, 0, 0)
        };
        let next = record.ask(&TERMS, "a", &next, late_ms, None);
        assert_eq!(next.stand.spent, 114);
        for number in 0..2 * MAX_HOLDERS as u64 {
            let name = format!("holder-{number}");
            let now_ms = late_ms + number * LEASE_MS;
            record.ask(&TERMS, &name, &ask(None, 1, 0, 1), now_ms, None);
        }
        assert!(record.ended.len() <= MAX_HOLDERS);
    }

    #[test]
    fn what_is_not_there_is_refused_and_it_is_said_when_it_may_be() {
        let mut record = Record::default();
        let first = record.ask(&TERMS, "a", &ask(None, 1, 990, 0), 1_000, None);
        let full = record.ask(&TERMS, "b", &ask(None, 1, 11, 9), 2_000, None);
        assert_eq!(full.granted, 0);
        assert_eq!(
            (full.amount, full.retry_ms),
            (0, Some(SOON_MS)),
            "it is under way"
        );
        let used = Ask {
            used: 990,
            ..ask(first.generation, 2, 0, 0)
        };
        record.ask(&TERMS, "a", &used, 3_000, None);
        let full = record.ask(&TERMS, "b", &ask(full.generation, 2, 11, 9), 4_000, None);
        assert_eq!(full.retry_ms, Some(HOUR + 60_000 - 4_000));
        let never = record.ask(&TERMS, "b", &ask(full.generation, 3, 1_001, 0), 4_000, None);
        assert_eq!((never.granted, never.retry_ms), (0, None));
        let fits = record.ask(&TERMS, "b", &ask(full.generation, 4, 10, 9), 4_000, None);
        assert_eq!(fits.granted, 1);
    }

    #[test]
    fn a_question_that_is_repeated_changes_nothing() {
        let mut record = Record::default();
        let first = record.ask(&TERMS, "a", &ask(None, 1, 100, 20), 1_000, None);
        let again = record.ask(&TERMS, "a", &ask(None, 1, 100, 20), 1_500, None);
        assert_eq!(
            (again.generation, again.amount, again.granted),
            (first.generation, 120, 1)
        );
        let used = Ask {
            used: 50,
            ..ask(first.generation, 2, 0, 0)
        };
        for _ in 0..3 {
            let told = record.ask(&TERMS, "a", &used, 2_000, None);
            assert_eq!((told.amount, told.stand.spent), (70, 50));
        }
    }

    #[test]
    fn what_a_gateway_had_that_died_is_charged_whole() {
        let mut record = Record::default();
        let dead = record.ask(&TERMS, "a", &ask(None, 1, 100, 20), 1_000, None);
        let other = record.ask(&TERMS, "b", &ask(None, 1, 0, 0), 1_000 + LEASE_MS, None);
        let stand = other.stand;
        assert_eq!((stand.spent, stand.leased, stand.orphaned), (120, 0, 120));
        // It was only away: what it took since is paid for.
        let back = Ask {
            used: 90,
            beyond: 5,
            ..ask(dead.generation, 2, 10, 0)
        };
        let back = record.ask(&TERMS, "a", &back, 2_000 + LEASE_MS, None);
        assert!(back.lost && back.granted == 1);
        assert_eq!((back.amount, back.stand.spent), (10, 125));
    }

    #[test]
    fn places_are_given_back_and_never_spent() {
        let places = Terms {
            cap: 2,
            span: Span::Held,
        };
        let mut record = Record::default();
        let first = record.ask(&places, "a", &ask(None, 1, 2, 0), 1_000, None);
        assert_eq!(
            record
                .ask(&places, "b", &ask(None, 1, 1, 0), 1_000, None)
                .granted,
            0
        );
        let back = Ask {
            released: 1,
            ..ask(first.generation, 2, 0, 0)
        };
        record.ask(&places, "a", &back, 1_500, None);
        let told = record.ask(&places, "b", &ask(None, 2, 1, 0), 2_000, None);
        assert_eq!(told.granted, 1);
        // The place of a gateway that died is free again.
        let told = record.ask(
            &places,
            "b",
            &ask(told.generation, 3, 1, 0),
            1_500 + LEASE_MS,
            None,
        );
        assert!(told.granted == 1 && told.stand.orphaned == 0);
    }

    #[test]
    fn there_are_so_many_holders_and_no_more() {
        let mut record = Record::default();
        for number in 0..MAX_HOLDERS {
            record.ask(
                &TERMS,
                &number.to_string(),
                &ask(None, 1, 1, 0),
                1_000,
                None,
            );
        }
        let told = record.ask(&TERMS, "one more", &ask(None, 1, 1, 0), 1_000, None);
        assert_eq!((told.generation, told.granted), (None, 0));
        let known = record.ask(&TERMS, "0", &ask(Some(1), 2, 1, 0), 1_000, None);
        assert!(known.granted == 1 && !known.lost);
    }

    #[test]
    fn needs_are_granted_in_their_order_as_far_as_they_go() {
        let mut record = Record::default();
        let many = Ask {
            needs: vec![400, 500, 200, 1],
            ..ask(None, 1, 0, 500)
        };
        let told = record.ask(&TERMS, "a", &many, 1_000, None);
        assert_eq!(
            (told.granted, told.amount),
            (2, 900),
            "and nothing to lie idle"
        );
        assert_eq!(told.retry_ms, Some(SOON_MS));
    }
    /// Both gateways have some of it, and the store then has an older record, or none.
    fn lost(before: impl FnOnce(&Record) -> Record) -> (Record, [Told; 2]) {
        let mut record = Record::default();
        let first = record.ask(&TERMS, "a", &ask(None, 1, 100, 0), 1_000, None);
        let old = before(&record);
        let second = record.ask(&TERMS, "b", &ask(None, 1, 200, 0), 2_000, None);
        let used = Ask {
            used: 40,
            stand: first.stand,
            ..ask(first.generation, 2, 0, 0)
        };
        let first = record.ask(&TERMS, "a", &used, 3_000, None);
        assert_eq!((first.stand.spent, first.stand.leased), (40, 260));
        (old, [first, second])
    }

    #[test]
    fn what_a_store_forgot_gateways_remember() {
        for forgets in [true, false] {
            let (mut record, [first, second]) = lost(|record| {
                if forgets {
                    Record::default()
                } else {
                    record.clone()
                }
            });
            let says = |told: &Told, question, need| Ask {
                stand: told.stand,
                ..ask(told.generation, question, need, 0)
            };
            // The one that knows less comes first.
            let b = record.ask(&TERMS, "b", &says(&second, 2, 10), 10_000, None);
            assert!(b.granted == 0 && b.lost, "it is closed");
            assert_eq!(b.retry_ms, Some(LEASE_MS));
            let a = record.ask(&TERMS, "a", &says(&first, 3, 10), 11_000, None);
            assert_eq!((a.granted, a.stand.spent, a.stand.leased), (0, 300, 0));
            let open_ms = 10_000 + LEASE_MS;
            let b = record.ask(&TERMS, "b", &says(&b, 3, 700), open_ms, None);
            assert_eq!((b.granted, b.stand.spent), (1, 300));
            // Nobody is believed twice.
            let a = record.ask(&TERMS, "a", &says(&a, 4, 1), open_ms, None);
            assert_eq!((a.granted, a.stand.spent), (0, 300));
            assert!(record.closed_until_ms <= open_ms);
        }
    }

    #[test]
    fn a_record_that_was_not_lost_is_not_closed() {
        let mut record = Record::default();
        let mut told = record.ask(&TERMS, "a", &ask(None, 1, 10, 0), 1_000, None);
        for question in 2..10 {
            let next = Ask {
                stand: told.stand,
                ..ask(told.generation, question, 10, 0)
            };
            told = record.ask(&TERMS, "a", &next, 1_000 * question, None);
            assert!(told.granted == 1 && !told.lost);
        }
    }
}
