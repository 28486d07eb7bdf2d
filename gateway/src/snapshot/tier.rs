//! The candidates of one priority of a rule, and their endpoints as strategies see them.

use std::sync::{Arc, Mutex};

use xxhash_rust::xxh3::xxh3_64;

use super::Candidate;
use crate::balance::Home;
use crate::balance::prefix_affinity::PrefixIndex;
use crate::balance::region::Distance;
use crate::settings::Place;

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
    /// Its backend.
    pub backend: Home,
    /// How far it is from this gateway.
    pub distance: Distance,
}

/// The endpoints of all candidates with their shares, and the sums of the shares.
#[expect(clippy::cast_precision_loss, reason = "weights and counts are small")]
pub(super) fn slots(
    candidates: &[Candidate],
    weights: &[u32],
    place: &Place,
) -> (Vec<Slot>, Vec<f32>) {
    let with_endpoints = || {
        let both = candidates.iter().zip(weights).enumerate();
        both.filter(|(_, (candidate, _))| !candidate.backend.endpoints.is_empty())
    };
    let total: u32 = with_endpoints().map(|(_, (_, weight))| *weight).sum();
    let slots: Vec<Slot> = with_endpoints()
        .flat_map(|(index, (candidate, weight))| {
            let count = candidate.backend.endpoints.len();
            let backend = Home {
                name: xxh3_64(candidate.backend.label.as_bytes()),
                weight: *weight as f32,
            };
            let share = *weight as f32 / total as f32 / count as f32;
            let endpoints = candidate.backend.endpoints.iter().enumerate();
            endpoints.map(move |(position, endpoint)| Slot {
                candidate: index,
                endpoint: position,
                share,
                name: xxh3_64(endpoint.address.to_string().as_bytes()),
                backend,
                distance: place.to(
                    candidate.backend.profile.region.as_deref(),
                    endpoint.zone.as_deref(),
                ),
            })
        })
        .collect();
    let cumulative = slots.iter().scan(0.0, |sum, slot| {
        *sum += slot.share;
        Some(*sum)
    });
    let cumulative = cumulative.collect();
    (slots, cumulative)
}
