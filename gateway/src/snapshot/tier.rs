//! The candidates of one priority of a rule, and their endpoints as strategies see them.

use std::sync::{Arc, Mutex};

use super::Candidate;
use crate::balance::prefix_affinity::PrefixIndex;
use crate::balance::region::Distance;

/// Candidates of equal priority that come after the same failures.
pub struct Tier {
    /// Backends and how this rule uses them.
    pub candidates: Vec<Candidate>,
    /// Their weights, in the same order.
    pub weights: Vec<u32>,
    /// The balancer's state.
    pub wheel: Arc<Mutex<Vec<i64>>>,
    /// The endpoints of all candidates.
    pub slots: Vec<Slot>,
    /// Sums of the shares up to and with each slot.
    pub cumulative: Vec<f32>,
    /// Which endpoint was sent which prompts, by any rule.
    pub prefixes: Arc<PrefixIndex>,
}

/// An endpoint of a tier.
pub struct Slot {
    /// Position of its candidate.
    pub candidate: usize,
    /// Its position in the candidate's backend.
    pub endpoint: usize,
    /// Which part of its tier's traffic it is meant to get, above 0: its backend's weight, divided among the
    /// backend's endpoints.
    pub share: f32,
    /// Hash of its address, the same in all replicas.
    pub name: u64,
    /// How far it is from this gateway.
    pub distance: Distance,
}
