//! Simulated runs of a budget: gateways that share one record in a store, with everything that happens to them. Each
//! run has a seed; what upstreams took is counted apart from what the ledger says.
//!
//! A gateway reads the record, changes it and writes it under the condition that nobody else did. Between any two of
//! these it may die, its messages may be late, lost or come twice, the store may forget everything, and its
//! clock may be set; and backends may take more than they were asked for, which is beyond what a budget can bound.
//! `RUNS` is the number of runs (default 300), `SEED` the first one's.

use std::collections::VecDeque;

use penstock_gateway::ledger::clock::Seen;
use penstock_gateway::ledger::holder::{Holder, Taken};
use penstock_gateway::ledger::record::{Ask, IDLE_PERCENT, LEASE_MS, Record, Terms, Told};
use penstock_gateway::ledger::span::Span;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const STEPS: usize = 4_000;
const GATEWAYS: usize = 4;
/// Longer than any run: what is spent stays so, and the whole run can be checked at its end.
const WINDOW_MS: u64 = 1 << 40;

/// What a message from a gateway to the store does there.
struct Write {
    version: u64,
    record: Record,
}

/// Where a gateway is with its question.
enum Phase {
    Idle,
    /// It has read the record.
    Read {
        version: u64,
        record: Record,
        read: (u64, u64),
    },
    /// It has written, and waits for the answer: what it would be, if it was in time.
    Written {
        told: Told,
        read: (u64, u64),
        taken: bool,
    },
}

struct Gateway {
    name: String,
    holder: Holder,
    phase: Phase,
    /// Requests under way: what they have, what they take in the end, and when that is.
    under_way: Vec<(Taken, u64, u64)>,
    waiting: VecDeque<u64>,
    /// Its own clock is ahead of the world's.
    ahead_ms: u64,
}

#[derive(Default)]
struct Counts {
    took: u64,
    asked: u64,
    answered: u64,
    refused_at: Option<u64>,
    deaths: u64,
    losses: u64,
    /// What backends took beyond what was reserved for them.
    beyond: u64,
}

/// What happens besides requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// Gateways die.
    Deaths,
    /// The store forgets. What a gateway alone knew that dies then is lost with it, so none does.
    Losses,
    /// Backends take more than they were asked for. Again only a gateway knows.
    Excess,
}

struct World {
    rng: StdRng,
    terms: Terms,
    now_ms: u64,
    store_ahead_ms: i64,
    record: Record,
    version: u64,
    /// Writes that come twice.
    late: Vec<Write>,
    gateways: Vec<Gateway>,
    lives: u64,
    counts: Counts,
    trouble: Trouble,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let cap = [10, 100, 1_000, 1_000_000][rng.random_range(0..4)];
        let mut world = Self {
            terms: Terms {
                cap,
                span: Span::Sliding { ms: WINDOW_MS },
            },
            now_ms: 1_800_000_000_000,
            store_ahead_ms: 0,
            record: Record::default(),
            version: 0,
            late: Vec::new(),
            gateways: Vec::new(),
            lives: 0,
            counts: Counts::default(),
            trouble: [Trouble::Deaths, Trouble::Losses, Trouble::Excess][rng.random_range(0..3)],
            rng,
        };
        for _ in 0..GATEWAYS {
            let gateway = world.born();
            world.gateways.push(gateway);
        }
        world
    }

    fn born(&mut self) -> Gateway {
        self.lives += 1;
        Gateway {
            name: format!("gateway-{}", self.lives),
            holder: Holder::default(),
            phase: Phase::Idle,
            under_way: Vec::new(),
            waiting: VecDeque::new(),
            ahead_ms: self.rng.random_range(0..1_000_000),
        }
    }

    fn store_ms(&self) -> u64 {
        self.now_ms.saturating_add_signed(self.store_ahead_ms)
    }

    /// One thing happens.
    fn step(&mut self) {
        self.now_ms += self.rng.random_range(0..40);
        let index = self.rng.random_range(0..GATEWAYS);
        match self.rng.random_range(0..100) {
            0..35 => self.arrives(index),
            35..60 => self.ends(index),
            60..92 => self.goes_on(index),
            92 if self.trouble == Trouble::Deaths && self.rng.random_bool(0.1) => self.dies(index),
            93 if self.trouble == Trouble::Losses
                && self.counts.losses == 0
                && self.all_know()
                && self.rng.random_bool(0.2) =>
            {
                self.counts.losses += 1;
                (self.record, self.version) = (Record::default(), 0);
                // Its connections are gone with it, and what was on them.
                self.late.clear();
            }
            95 if self.rng.random_bool(0.1) => {
                self.store_ahead_ms = self.rng.random_range(-3_600_000..3_600_000);
            }
            96 => {
                if let Some(write) = self.late.pop() {
                    self.write(&write);
                }
            }
            97 if self.rng.random_bool(0.1) => self.now_ms += LEASE_MS,
            _ => self.now_ms += self.rng.random_range(0..200),
        }
    }

    /// Whether there is no gateway that remembers nothing.
    fn all_know(&self) -> bool {
        let mut gateways = self.gateways.iter();
        gateways.all(|gateway| gateway.holder.stand().lineage > 0)
    }

    fn arrives(&mut self, index: usize) {
        let most = (self.terms.cap / 5).max(1);
        let need = self.rng.random_range(1..=most);
        self.counts.asked += 1;
        let now_ms = self.now_ms + self.gateways[index].ahead_ms;
        match self.gateways[index].holder.take(need, now_ms) {
            Some(taken) => self.begins(index, taken),
            None => self.gateways[index].waiting.push_back(need),
        }
    }

    fn begins(&mut self, index: usize, taken: Taken) {
        // Most answers are much shorter than they may be.
        let actual = match self.rng.random_range(0..4) {
            0 if self.trouble == Trouble::Excess => {
                taken.amount() + self.rng.random_range(0..=taken.amount())
            }
            0 => taken.amount(),
            1 => 0,
            _ => self.rng.random_range(0..=taken.amount() / 2),
        };
        let ends_ms = self.now_ms + self.rng.random_range(0..10_000);
        self.counts.answered += 1;
        self.gateways[index]
            .under_way
            .push((taken, actual, ends_ms));
    }

    fn ends(&mut self, index: usize) {
        let now_ms = self.now_ms;
        let gateway = &mut self.gateways[index];
        let over = gateway
            .under_way
            .iter()
            .position(|(_, _, ends_ms)| *ends_ms <= now_ms);
        if let Some(over) = over {
            let (taken, actual, _) = gateway.under_way.swap_remove(over);
            self.counts.took += actual;
            self.counts.beyond += actual.saturating_sub(taken.amount());
            gateway.holder.settle(taken, actual);
        }
    }

    /// The next thing that a gateway does with its question.
    fn goes_on(&mut self, index: usize) {
        let now_ms = self.now_ms + self.gateways[index].ahead_ms;
        let store_ms = self.store_ms();
        let gateway = &mut self.gateways[index];
        match std::mem::replace(&mut gateway.phase, Phase::Idle) {
            Phase::Idle => {
                let wants = !gateway.waiting.is_empty();
                if wants || gateway.holder.has_news(now_ms) || gateway.holder.is_asking() {
                    gateway.phase = Phase::Read {
                        version: self.version,
                        record: self.record.clone(),
                        read: (now_ms, store_ms),
                    };
                }
            }
            Phase::Read {
                version,
                mut record,
                read,
            } => {
                let needs: Vec<u64> = gateway.waiting.iter().take(8).copied().collect();
                let ask: Ask = gateway.holder.ask(&needs, u64::MAX, now_ms).clone();
                let seen: Option<Seen> = gateway.holder.seen(read.0);
                let name = gateway.name.clone();
                let told = record.ask(&self.terms, &name, &ask, read.1, seen);
                let write = Write { version, record };
                // It may be lost on the way, or come twice.
                let arrives = !self.rng.random_bool(0.1);
                let taken = arrives && self.write(&write);
                if self.rng.random_bool(0.1) {
                    self.late.push(write);
                }
                self.gateways[index].phase = Phase::Written { told, read, taken };
            }
            // No answer, or somebody else was first: it asks the same again.
            Phase::Written { taken: false, .. } => {}
            Phase::Written { .. } if self.rng.random_bool(0.1) => {}
            Phase::Written { told, read, .. } => {
                gateway.holder.told(&told, Some(read));
                self.serve(index, now_ms, &told);
            }
        }
    }

    /// Returns whether it was in time.
    fn write(&mut self, write: &Write) -> bool {
        if write.version != self.version {
            return false;
        }
        self.version += 1;
        self.record = write.record.clone();
        true
    }

    /// Those who wait get what is there; the others are refused.
    fn serve(&mut self, index: usize, now_ms: u64, told: &Told) {
        for need in std::mem::take(&mut self.gateways[index].waiting) {
            if let Some(taken) = self.gateways[index].holder.take(need, now_ms) {
                self.begins(index, taken);
            } else {
                let spent = told.stand.spent + told.stand.leased;
                self.counts.refused_at.get_or_insert(spent);
            }
        }
    }

    fn dies(&mut self, index: usize) {
        self.counts.deaths += 1;
        let gateway = self.born();
        let dead = std::mem::replace(&mut self.gateways[index], gateway);
        for (taken, ..) in dead.under_way {
            // Its upstream went on.
            self.counts.took += taken.amount();
        }
    }

    fn check(&self, seed: u64) {
        let under_way = self.gateways.iter().flat_map(|gateway| &gateway.under_way);
        let under_way: u64 = under_way.map(|(taken, ..)| taken.amount()).sum();
        let most = self.counts.took - self.counts.beyond + under_way;
        assert!(
            most <= self.terms.cap,
            "seed {seed}: {most} of {} are taken",
            self.terms.cap
        );
    }

    /// All comes to rest, and everybody tells what they know.
    fn rest(&mut self) {
        for gateway in &mut self.gateways {
            gateway.waiting.clear();
        }
        for _ in 0..200 {
            self.now_ms += 1_000;
            for index in 0..GATEWAYS {
                for _ in 0..4 {
                    self.ends(index);
                    self.goes_on(index);
                }
            }
        }
    }
}

/// What a run came to.
struct Run {
    cap: u64,
    took: u64,
    spent: u64,
    orphaned: u64,
    locked: bool,
    counts: Counts,
}

fn run(seed: u64) -> Run {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
        world.check(seed);
    }
    world.rest();
    world.check(seed);
    // Leases of the dead end when somebody asks.
    world.now_ms += LEASE_MS;
    let store_ms = world.store_ms();
    let (terms, nothing) = (world.terms.clone(), Ask::default());
    let stand = world
        .record
        .ask(&terms, "another", &nothing, store_ms, None)
        .stand;
    let cap = world.terms.cap;
    // What lies idle may not be there for others; all the rest is.
    let idle = (cap * IDLE_PERCENT / 100).max(1);
    let free = cap.saturating_sub(stand.spent).saturating_sub(idle);
    let locked = free > 0 && {
        let mut record = world.record.clone();
        let ask = Ask {
            question: 1,
            generation: Some(stand.epoch),
            needs: vec![free],
            ..Ask::default()
        };
        let told = record.ask(&world.terms, "another", &ask, world.store_ms(), None);
        told.granted == 0
    };
    Run {
        cap,
        took: world.counts.took,
        spent: stand.spent,
        orphaned: stand.orphaned,
        locked,
        counts: world.counts,
    }
}

#[test]
#[expect(clippy::cast_precision_loss, reason = "percents are for people")]
fn no_run_overspends_loses_or_locks_out() {
    let number = |name: &str, usual: u64| {
        let text = std::env::var(name).ok();
        text.map_or(usual, |text| text.parse().unwrap())
    };
    let (runs, first) = (number("RUNS", 300), number("SEED", 1));
    let (mut lost, mut double, mut lockout, mut orphaned, mut unused, mut ended) =
        (0, 0, 0, 0.0, 0.0, 0);
    let (mut answered, mut deaths, mut losses, mut beyond) = (0, 0, 0, 0);
    for seed in first..first + runs {
        let run = run(seed);
        lost += u64::from(run.spent < run.took);
        double += u64::from(run.spent > run.took + run.orphaned);
        lockout += u64::from(run.locked);
        assert!(
            run.spent >= run.took,
            "seed {seed}: {} of {} are lost",
            run.took - run.spent,
            run.took
        );
        assert!(
            run.spent <= run.took + run.orphaned,
            "seed {seed}: counted twice"
        );
        assert!(!run.locked, "seed {seed}: locked out");
        orphaned += run.orphaned as f64 / run.cap as f64;
        if let Some(at) = run.counts.refused_at {
            unused += 1.0 - at as f64 / run.cap as f64;
            ended += 1;
        }
        answered += run.counts.answered;
        deaths += run.counts.deaths;
        losses += run.counts.losses;
        beyond += u64::from(run.counts.beyond > 0);
    }
    println!(
        "ledger: {answered} requests, {deaths} deaths of gateways, {losses} losses of the store, \
         {beyond} runs whose backends took more than they were asked for"
    );
    println!(
        "ledger: sim={runs} overspend_beyond_bound=0 bound_pct={IDLE_PERCENT} lost={lost} double={double} \
         lockout={lockout} orphan_charged_pct={:.1} underuse_pct={:.1}",
        100.0 * orphaned / runs as f64,
        100.0 * unused / f64::from(ended.max(1)),
    );
    assert!(
        deaths > 0 && losses > 0 && beyond > 0 && ended > 0,
        "the runs are too tame"
    );
}
