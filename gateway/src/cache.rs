//! The exact cache: a key from the request, an answer from memory.

pub mod canonical;
pub mod exact;
