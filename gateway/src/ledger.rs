//! The ledger: what budgets have left, so that all gateways together never give out more. Pure.
//!
//! Each limit has one durable [`record`]: what was spent in its window, and what is leased to whom. A gateway is a
//! [`holder`]: it leases a little beforehand, answers requests out of that without asking anybody, and tells what they
//! took when it asks for more. What a gateway took along when it died is charged whole once its lease is over. Nothing
//! here knows a clock ([`clock`]), a store or a socket.

pub mod clock;
pub mod holder;
pub mod record;
pub mod span;
pub mod spent;

#[cfg(test)]
mod model;
