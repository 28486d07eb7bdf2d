//! (IO) `hold`: many streams at a time, each on a connection of its own or, over HTTP/2, on one that it shares. Once
//! all have begun it says how many are open; all connections stay until the last stream has ended.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::answer::{Answer, Failure};
use crate::args::{HoldArgs, Shape};
use crate::caller::{Caller, Target, first_nonce};
use crate::tally::Tally;
use crate::template::Template;
use crate::{http2, say, tls};

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Who holds one stream.
enum Holder {
    Alone(Caller),
    Shared(http2::Caller),
}

impl Holder {
    async fn call(&mut self, nonce: u64) -> Result<Answer, Failure> {
        match self {
            Self::Alone(caller) => caller.call(nonce).await,
            Self::Shared(caller) => caller.call(nonce).await,
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(crate) async fn run(shape: &Shape, hold: &HoldArgs) -> anyhow::Result<()> {
    let template = Rc::new(Template::new(shape));
    let begun: Rc<Cell<u32>> = Rc::default();
    let ended: Rc<Cell<u32>> = Rc::default();
    let tally = Rc::new(RefCell::new(Tally::new()?));
    let mut connections = JoinSet::new();
    let holders: Vec<Holder> = if hold.h2 {
        let callers = http2::callers(hold.streams, shape, &template, &begun, &mut connections);
        callers.await?.into_iter().map(Holder::Shared).collect()
    } else {
        let ca = hold.ca.as_deref().filter(|_| hold.tls);
        let tls = ca.map(tls::connector);
        let target = Target {
            address: shape.connect,
            tls: tls.transpose()?,
        };
        let caller = |_| Holder::Alone(Caller::new(&target, &template, &begun));
        (0..hold.streams).map(caller).collect()
    };
    let first = first_nonce();
    let start = Instant::now();
    let mut streams = JoinSet::new();
    for (number, mut holder) in (0..hold.streams).zip(holders) {
        let (template, tally, ended) = (Rc::clone(&template), Rc::clone(&tally), Rc::clone(&ended));
        let due = start + Duration::from_millis(hold.ramp_ms) * number / hold.streams;
        streams.spawn_local(async move {
            tokio::time::sleep_until(due).await;
            let result = holder.call(first + u64::from(number)).await;
            ended.set(ended.get() + 1);
            match result {
                Ok(answer) => {
                    let mut tally = tally.borrow_mut();
                    tally.answered(template.deltas());
                    tally.times(answer.first - answer.sent, answer.end - answer.sent);
                }
                Err(failure) => tally.borrow_mut().failed(&failure.reason()),
            }
            holder
        });
    }
    while begun.get() < hold.streams && ended.get() < hold.streams {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    say(&json!({"open": begun.get().saturating_sub(ended.get())}))?;
    let mut open = Vec::new();
    while let Some(holder) = streams.join_next().await {
        open.push(holder.context("a caller")?);
    }
    let window = start.elapsed();
    say(&tally.borrow().json(window))
}
