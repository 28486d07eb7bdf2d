//! What the fill of an engine's KV cache costs. Pure.
//!
//! A cache that is half full is as quick as an empty one. One that is nearly full makes new requests wait until others
//! end, and preempts those that run: their prompts are then computed again.

/// Up to this fill nothing is lost: llm-d's threshold for a saturated engine.
const ROOM: f32 = 0.8;
/// How many times dearer a full cache is.
const FULL: f32 = 10.0;

/// What the expected time is to be multiplied with at a KV cache that is filled to `kv_use`, 0 to 1: 1 up to [`ROOM`],
/// then in inverse proportion to what is left, up to [`FULL`].
pub fn pressure(kv_use: f32) -> f32 {
    let beyond = ((kv_use - ROOM) / (1.0 - ROOM)).clamp(0.0, 1.0);
    1.0 / (1.0 - beyond * (1.0 - 1.0 / FULL))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_a_cache_is_as_good_as_an_empty_one_and_a_full_one_is_not() {
        assert!((pressure(0.0) - 1.0).abs() < 1e-6 && (pressure(0.8) - 1.0).abs() < 1e-6);
        assert!((pressure(0.9) - 1.818).abs() < 0.01);
        assert!((pressure(1.0) - FULL).abs() < 1e-3);
    }

    proptest! {
        #[test]
        fn a_fuller_cache_never_costs_less(kv_use in -1.0_f32..2.0, more in 0.0_f32..1.0) {
            let cost = pressure(kv_use);
            prop_assert!((1.0..=FULL + 0.001).contains(&cost));
            prop_assert!(pressure(kv_use + more) >= cost);
        }
    }
}
