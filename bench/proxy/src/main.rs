//! (IO) The rig of the proxy benchmark: `mock`, an upstream that answers at once or at a pace; `relay`, which copies
//! bytes and understands nothing; `load` and `hold`, the callers; `certificate`, for those that speak TLS. Requests are
//! made before they are needed and answers are only counted, so that little of what is measured is the rig itself.
//! `run.py` starts them.

mod answer;
mod args;
mod caller;
mod hold;
mod http2;
mod load;
mod mock;
mod relay;
mod tally;
mod template;
mod tls;
mod wire;

use std::io::Write as _;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::task::LocalSet;

use args::Command;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Mock { listen } => mock::run(listen).await,
        Command::Relay { listen, to } => relay::run(listen, to).await,
        Command::Load { shape, load } => LocalSet::new().run_until(load::run(&shape, &load)).await,
        Command::Hold { shape, hold } => LocalSet::new().run_until(hold::run(&shape, &hold)).await,
        Command::Certificate { folder } => tls::certificate(&folder),
    }
}

/// One line of JSON for `run.py`, which waits for it.
fn say(line: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").context("print")?;
    out.flush().context("print")
}
