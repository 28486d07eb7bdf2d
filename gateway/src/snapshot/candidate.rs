//! `Candidate`: a backend as one rule uses it. Pure: made with the snapshot, and read by every choice.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use penstock_core::config::FailureClass;

use super::Backend;
use crate::cache::exact::Maker;
use crate::metrics::RouteMetrics;

/// A backend as one rule uses it.
pub struct Candidate {
    /// The backend.
    pub backend: Arc<Backend>,
    /// The model asked of it; `None` leaves the caller's.
    pub model: Option<Model>,
    /// What must have failed before, one of these; empty: nothing.
    pub after: BTreeSet<FailureClass>,
    /// What a stored answer must have been made by.
    pub maker: Maker,
    /// Handles.
    pub metrics: Arc<RouteMetrics>,
}

/// A model's name at a backend.
pub struct Model {
    /// As it is.
    pub name: Box<str>,
    /// As JSON text.
    pub json: Bytes,
}

impl Candidate {
    /// What the model is called there that the caller calls `asked`.
    pub fn model_name<'a>(&'a self, asked: &'a str) -> &'a str {
        self.model.as_ref().map_or(asked, |model| &model.name)
    }

    /// Whether there is somewhere to send to.
    pub fn has_endpoint(&self) -> bool {
        !self.backend.endpoints.is_empty()
    }

    /// Whether it comes only after a failure of others.
    pub fn is_fallback(&self) -> bool {
        !self.after.is_empty()
    }
}
