//! Less for endpoints that have just come, whatever the strategy. Pure.

/// What an endpoint gets of its share at first.
const LEAST: f32 = 0.1;

/// Which part of its share an endpoint gets that has been ready for `ready_ms`, in a window of `window_ms`.
pub fn share(ready_ms: u64, window_ms: Option<u64>) -> f32 {
    let Some(window_ms) = window_ms.filter(|window_ms| *window_ms > ready_ms) else {
        return 1.0;
    };
    #[expect(clippy::cast_precision_loss, reason = "a part of an hour")]
    let part = ready_ms as f32 / window_ms as f32;
    LEAST + (1.0 - LEAST) * part
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_share_grows_from_a_tenth_to_all() {
        assert!((share(0, Some(10_000)) - 0.1).abs() < 1e-6);
        assert!((share(5_000, Some(10_000)) - 0.55).abs() < 1e-6);
        assert!((share(10_000, Some(10_000)) - 1.0).abs() < 1e-6);
        assert!((share(0, None) - 1.0).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn it_never_falls(ready in 0_u64..100_000, later in 0_u64..100_000, window in 1_u64..100_000) {
            let now = share(ready, Some(window));
            prop_assert!((LEAST..=1.0).contains(&now));
            prop_assert!(share(ready + later, Some(window)) >= now);
        }
    }
}
