//! All that can happen to one limit and two gateways, to a depth: every order of requests, answers that are lost,
//! questions that are repeated, gateways that die, and time. Whatever happens, backends are never asked for more than
//! the cap, nothing that they were asked for is missing in the end, and nothing is counted twice.

use std::collections::HashSet;

use super::holder::{Holder, Taken};
use super::record::{LEASE_MS, Record, Terms};
use super::span::Span;

const STEP_MS: u64 = LEASE_MS / 3;

/// A gateway, and what it has under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Gateway {
    holder: Holder,
    /// How many there were before: each has a name of its own.
    lives: u8,
    /// Amounts of requests under way.
    under_way: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    record: Record,
    gateways: [Gateway; 2],
    now_ms: u64,
    /// What backends took.
    took: u64,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// A request for so much; the question, if one is needed, and its answer arrive.
    Request(usize, u64),
    /// The same, and the answer is lost.
    Unanswered(usize, u64),
    /// The oldest request under way ends, having taken all, or nothing.
    End(usize, bool),
    /// News are told.
    Tell(usize),
    Die(usize),
    Time,
    /// The store has no record any more.
    Lose,
}

/// What happens besides requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// Gateways die.
    Deaths,
    /// The store forgets. What a gateway alone knew that dies then is lost, so none does.
    Losses,
}

fn events(amounts: &[u64], trouble: Trouble) -> Vec<Event> {
    let mut events = vec![Event::Time];
    if trouble == Trouble::Losses {
        events.push(Event::Lose);
    }
    for gateway in 0..2 {
        for amount in amounts {
            events.push(Event::Request(gateway, *amount));
            events.push(Event::Unanswered(gateway, *amount));
        }
        events.extend([
            Event::End(gateway, true),
            Event::End(gateway, false),
            Event::Tell(gateway),
        ]);
        if trouble == Trouble::Deaths {
            events.push(Event::Die(gateway));
        }
    }
    events
}

impl State {
    fn new() -> Self {
        Self {
            record: Record::default(),
            gateways: Default::default(),
            now_ms: 1_000_000,
            took: 0,
        }
    }

    fn ask(&mut self, terms: &Terms, index: usize, needs: &[u64], is_answered: bool) {
        let now_ms = self.now_ms;
        let gateway = &mut self.gateways[index];
        let name = format!("{index}-{}", gateway.lives);
        let seen = gateway.holder.seen(now_ms);
        let ask = gateway.holder.ask(needs, 1, now_ms).clone();
        let told = self.record.ask(terms, &name, &ask, now_ms, seen);
        if is_answered {
            gateway.holder.told(&told, Some((now_ms, now_ms)));
        }
    }

    fn begin(&mut self, index: usize, amount: u64) -> bool {
        let gateway = &mut self.gateways[index];
        let Some(taken) = gateway.holder.take(amount, self.now_ms) else {
            return false;
        };
        gateway.under_way.push(parts(taken));
        true
    }

    fn happens(&mut self, terms: &Terms, event: Event) {
        match event {
            Event::Request(index, amount) => {
                if !self.begin(index, amount) {
                    self.ask(terms, index, &[amount], true);
                    self.begin(index, amount);
                }
            }
            Event::Unanswered(index, amount) => {
                if !self.begin(index, amount) {
                    self.ask(terms, index, &[amount], false);
                }
            }
            Event::End(index, took_all) => {
                let gateway = &mut self.gateways[index];
                if gateway.under_way.is_empty() {
                    return;
                }
                let (amount, generation) = gateway.under_way.remove(0);
                let actual = if took_all { amount } else { 0 };
                self.took += actual;
                gateway
                    .holder
                    .settle(Taken::made(amount, generation), actual);
            }
            Event::Tell(index) => {
                self.ask(terms, index, &[], true);
            }
            Event::Die(index) => {
                let gateway = &mut self.gateways[index];
                // The backends went on: they took all, at worst.
                self.took += gateway
                    .under_way
                    .drain(..)
                    .map(|(amount, _)| amount)
                    .sum::<u64>();
                gateway.holder = Holder::default();
                gateway.lives += 1;
            }
            Event::Time => self.now_ms += STEP_MS,
            // Who remembers nothing cannot know that there was something.
            Event::Lose => {
                let knows = |gateway: &Gateway| gateway.holder.stand().lineage > 0;
                if self.gateways.iter().all(knows) {
                    self.now_ms += 1;
                    self.record = Record::default();
                }
            }
        }
    }

    /// What holds at all times.
    fn check(&self, terms: &Terms) {
        let under_way = self.gateways.iter().flat_map(|gateway| &gateway.under_way);
        let under_way: u64 = under_way.map(|(amount, _)| amount).sum();
        assert!(self.took + under_way <= terms.cap, "{self:#?}");
        let stand = self.record.stand();
        assert!(stand.spent + stand.leased <= terms.cap, "{self:#?}");
    }

    /// Everything ends, everybody tells, and what nobody tells of is over.
    fn check_end(mut self, terms: &Terms) {
        for index in 0..2 {
            while !self.gateways[index].under_way.is_empty() {
                self.happens(terms, Event::End(index, true));
            }
            self.happens(terms, Event::Tell(index));
            self.happens(terms, Event::Tell(index));
        }
        self.now_ms += 2 * LEASE_MS;
        self.happens(terms, Event::Tell(0));
        let stand = self.record.stand();
        assert!(stand.spent >= self.took, "lost: {self:#?}");
        assert!(
            stand.spent <= self.took + stand.orphaned,
            "counted twice: {self:#?}"
        );
        assert!(stand.spent <= terms.cap, "{self:#?}");
    }
}

/// What is spent stays so.
fn terms(cap: u64) -> Terms {
    Terms {
        cap,
        span: Span::Sliding { ms: u64::MAX / 4 },
    }
}

fn parts(taken: Taken) -> (u64, u64) {
    (taken.amount(), taken.generation())
}

fn explore(terms: &Terms, amounts: &[u64], trouble: Trouble, depth: usize) -> usize {
    let events = events(amounts, trouble);
    let mut level = vec![State::new()];
    let mut known: HashSet<State> = level.iter().cloned().collect();
    for _ in 0..depth {
        let mut next = Vec::new();
        for state in level {
            for event in &events {
                let mut after = state.clone();
                after.happens(terms, *event);
                if known.insert(after.clone()) {
                    after.check(terms);
                    after.clone().check_end(terms);
                    next.push(after);
                }
            }
        }
        level = next;
    }
    known.len()
}

#[test]
fn whatever_happens_no_more_than_the_cap_is_taken_and_nothing_is_lost() {
    // A small cap, of which 2 % are nothing; and one of which they are a request.
    let deaths = Trouble::Deaths;
    let states = explore(&terms(3), &[1, 2], deaths, 5) + explore(&terms(100), &[1, 60], deaths, 5);
    assert!(states > 10_000, "{states}");
}

#[test]
fn a_store_that_forgets_gives_nothing_out_twice() {
    let losses = Trouble::Losses;
    let states = explore(&terms(3), &[2], losses, 6) + explore(&terms(100), &[60], losses, 6);
    assert!(states > 5_000, "{states}");
}
