//! `Outlook`: whether a backend has a ready endpoint, or may be expected to have one soon. Pure.
//!
//! A request waits for an endpoint only where waiting may help: where pods sleep for want of requests, and for a while
//! where the first ones are on their way. Where all that were ready are gone, its caller is told so at once: an engine
//! that starts again loads its model for longer than callers wait.

/// What is known of a backend's endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// Some are ready.
    Up,
    /// None is there, and requests may wake some.
    Asleep,
    /// None was ready yet, since this time.
    Coming {
        /// In ms of the process's clock.
        since_ms: u64,
    },
    /// Those that were ready are not any more.
    Down,
}

impl Outlook {
    /// After `before`, with so many that are ready. `sleeps`: nobody is there, for want of requests it may be.
    pub fn new(before: Option<Self>, ready: usize, sleeps: bool, now_ms: u64) -> Self {
        match before {
            _ if ready > 0 => Self::Up,
            _ if sleeps => Self::Asleep,
            Some(coming @ Self::Coming { .. }) => coming,
            Some(Self::Up | Self::Down) => Self::Down,
            None | Some(Self::Asleep) => Self::Coming { since_ms: now_ms },
        }
    }

    /// Whether a request that waits for at most `hold_ms` may get an endpoint.
    pub fn is_awaited(self, now_ms: u64, hold_ms: u64) -> bool {
        match self {
            Self::Up | Self::Asleep => true,
            Self::Coming { since_ms } => now_ms.saturating_sub(since_ms) < hold_ms,
            Self::Down => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outlooks of a backend along `steps`: how many are ready, and whether it sleeps. One step takes 10 s.
    fn along(steps: &[(usize, bool)]) -> Vec<Outlook> {
        let mut before = None;
        let steps = steps.iter().zip(0_u64..).map(|((ready, sleeps), step)| {
            let now = Outlook::new(before, *ready, *sleeps, step * 10_000);
            before = Some(now);
            now
        });
        steps.collect()
    }

    #[test]
    fn who_starts_is_awaited_for_a_while() {
        let coming = Outlook::Coming { since_ms: 0 };
        assert_eq!(
            along(&[(0, false), (0, false), (1, false)]),
            [coming, coming, Outlook::Up]
        );
        assert!(coming.is_awaited(29_999, 30_000));
        assert!(!coming.is_awaited(30_000, 30_000));
    }

    #[test]
    fn who_was_ready_is_not_awaited() {
        let steps = [(2, false), (0, false), (0, false), (1, false)];
        let down = Outlook::Down;
        assert_eq!(along(&steps), [Outlook::Up, down, down, Outlook::Up]);
        assert!(!down.is_awaited(0, 30_000));
    }

    #[test]
    fn who_sleeps_is_awaited_and_so_is_who_wakes() {
        let steps = [(1, false), (0, true), (0, false), (1, false)];
        let waking = Outlook::Coming { since_ms: 20_000 };
        assert_eq!(
            along(&steps),
            [Outlook::Up, Outlook::Asleep, waking, Outlook::Up]
        );
        assert!(Outlook::Asleep.is_awaited(u64::MAX, 30_000));
    }
}
