//! (IO) `hold`: many streams at a time, each on a connection of its own. Once all have begun it says how many are open;
//! all connections stay until the last stream has ended.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::args::{HoldArgs, Shape};
use crate::caller::{Caller, first_nonce};
use crate::say;
use crate::tally::Tally;
use crate::template::Template;

const LOOK_EVERY: Duration = Duration::from_millis(20);

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(crate) async fn run(shape: &Shape, hold: &HoldArgs) -> anyhow::Result<()> {
    let template = Rc::new(Template::new(shape));
    let begun: Rc<Cell<u32>> = Rc::default();
    let ended: Rc<Cell<u32>> = Rc::default();
    let tally = Rc::new(RefCell::new(Tally::new()?));
    let first = first_nonce();
    let start = Instant::now();
    let mut streams = JoinSet::new();
    for number in 0..hold.streams {
        let mut caller = Caller::new(&template, &begun);
        let (template, tally, ended) = (Rc::clone(&template), Rc::clone(&tally), Rc::clone(&ended));
        let due = start + Duration::from_millis(hold.ramp_ms) * number / hold.streams;
        streams.spawn_local(async move {
            tokio::time::sleep_until(due).await;
            let result = caller.call(first + u64::from(number)).await;
            ended.set(ended.get() + 1);
            match result {
                Ok(answer) => {
                    let mut tally = tally.borrow_mut();
                    tally.answered(template.deltas());
                    tally.times(answer.first - answer.sent, answer.end - answer.sent);
                }
                Err(failure) => tally.borrow_mut().failed(&failure.reason()),
            }
            caller
        });
    }
    while begun.get() < hold.streams && ended.get() < hold.streams {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    say(&json!({"open": begun.get().saturating_sub(ended.get())}))?;
    let mut open = Vec::new();
    while let Some(caller) = streams.join_next().await {
        open.push(caller.context("a caller")?);
    }
    let window = start.elapsed();
    say(&tally.borrow().json(window))
}
