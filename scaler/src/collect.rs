//! (IO) Where the numbers come from: engine pods, gateways, Prometheus servers, the cluster. Each source turns into
//! [`Event`]s for the one task that holds the fleet; none of them decides anything.

pub mod gateways;
pub mod http;
pub mod kubernetes;
pub mod pods;
pub mod prometheus;

use std::sync::Arc;

use penstock_core::load::LoadReport;

use crate::fleet::{Answers, Scrape, TargetKey};
use penstock_core::engine_page::Sample;

/// Readings on their way to the fleet. Beyond it, sources wait: a slow fleet slows the scraping, nothing piles up.
pub const QUEUE: usize = 1024;

/// One reading.
#[derive(Debug)]
pub enum Event {
    /// A pod's page.
    Sample {
        /// Which page.
        scrape: Scrape,
        /// What it said.
        sample: Sample,
    },
    /// A gateway's line.
    Load {
        /// The gateway's id in the world.
        gateway: String,
        /// What it said.
        report: Box<LoadReport>,
    },
    /// A Prometheus server's answers.
    Answers {
        /// For which target.
        key: Arc<TargetKey>,
        /// What it said.
        answers: Answers,
    },
}
