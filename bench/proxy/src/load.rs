//! (IO) `load`: connections that call for a time. Without a rate each sends its next request when it has an answer;
//! with one, requests are due whether or not a connection is free, and an answer's time counts from then.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use crate::answer::{Answer, Failure};
use crate::args::{LoadArgs, Shape};
use crate::caller::{Caller, Target, first_nonce};
use crate::say;
use crate::tally::Tally;
use crate::template::Template;

/// A caller whose request failed waits this long, so that a dead proxy does not cost a core.
const PAUSE: Duration = Duration::from_millis(10);
/// Requests become due in steps of this: shorter ones cost the core that client and mock share.
const TICK: Duration = Duration::from_micros(200);

/// What the connections of one run share.
struct Run {
    /// Of each answer.
    deltas: u64,
    nonce: Cell<u64>,
    tally: RefCell<Tally>,
    from: Instant,
    to: Instant,
}

/// Requests that are due, by when they became so.
#[derive(Default)]
struct Due {
    times: RefCell<VecDeque<Instant>>,
    more: Notify,
    is_over: Cell<bool>,
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(crate) async fn run(shape: &Shape, load: &LoadArgs) -> anyhow::Result<()> {
    let template = Rc::new(Template::new(shape));
    let begun = Rc::default();
    let target = Target {
        address: shape.connect,
        tls: None,
    };
    let mut tally = Tally::new()?;
    let mut callers = Vec::new();
    for _ in 0..load.connections {
        let mut caller = Caller::new(&target, &template, &begun);
        // One after the other: all at once might be more than the backlog of the proxy's listener.
        if let Err(failure) = caller.open().await {
            tally.failed(&failure.reason());
        }
        callers.push(caller);
    }
    let from = Instant::now() + load.warm_up();
    let run = Rc::new(Run {
        deltas: template.deltas(),
        nonce: Cell::new(first_nonce()),
        tally: RefCell::new(tally),
        from,
        to: from + load.window(),
    });
    let mut tasks = JoinSet::new();
    if let Some(rate) = load.rate {
        let due = Rc::new(Due::default());
        for caller in callers {
            tasks.spawn_local(at_rate(Rc::clone(&run), caller, Rc::clone(&due)));
        }
        let (sender, mut ticks) = mpsc::unbounded_channel();
        let to = run.to;
        let clock = std::thread::Builder::new()
            .name("clock".to_owned())
            .spawn(move || tick(rate, to, &sender))
            .context("start the clock")?;
        while let Some((now, count)) = ticks.recv().await {
            for _ in 0..count {
                due.times.borrow_mut().push_back(now);
                due.more.notify_one();
            }
        }
        due.is_over.set(true);
        due.more.notify_waiters();
        clock.join().ok().context("the clock")?;
    } else {
        for caller in callers {
            tasks.spawn_local(in_turn(Rc::clone(&run), caller));
        }
    }
    while let Some(ended) = tasks.join_next().await {
        ended.context("a caller")?;
    }
    say(&run.tally.borrow().json(load.window()))
}

impl Run {
    fn next_nonce(&self) -> u64 {
        let nonce = self.nonce.get();
        self.nonce.set(nonce + 1);
        nonce
    }

    fn note(&self, result: &Result<Answer, Failure>, due: Option<Instant>) {
        let mut tally = self.tally.borrow_mut();
        match result {
            Ok(answer) => {
                tally.answered(self.deltas);
                if answer.end >= self.from && answer.end < self.to {
                    let start = due.unwrap_or(answer.sent);
                    tally.times(answer.first - start, answer.end - start);
                }
            }
            Err(failure) => tally.failed(&failure.reason()),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
async fn in_turn(run: Rc<Run>, mut caller: Caller) {
    loop {
        let result = caller.call(run.next_nonce()).await;
        run.note(&result, None);
        let now = if let Ok(answer) = &result {
            answer.end
        } else {
            tokio::time::sleep(PAUSE).await;
            Instant::now()
        };
        if now >= run.to {
            return;
        }
    }
}

async fn at_rate(run: Rc<Run>, mut caller: Caller, due: Rc<Due>) {
    loop {
        let next = due.times.borrow_mut().pop_front();
        let Some(time) = next else {
            if due.is_over.get() {
                return;
            }
            due.more.notified().await;
            continue;
        };
        let result = caller.call(run.next_nonce()).await;
        run.note(&result, Some(time));
        if result.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Says again and again how many requests became due. A thread of its own, because the runtime's timers know only
/// milliseconds.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
fn tick(rate: f64, to: Instant, sender: &mpsc::UnboundedSender<(Instant, u32)>) {
    let mut last = Instant::now();
    let mut owed = 0.0;
    while last < to {
        std::thread::sleep(TICK);
        let now = Instant::now();
        owed += (now - last).as_secs_f64() * rate;
        last = now;
        let mut count = 0;
        while owed >= 1.0 {
            owed -= 1.0;
            count += 1;
        }
        if count > 0 && sender.send((now, count)).is_err() {
            return;
        }
    }
}
