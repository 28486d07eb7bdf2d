//! When requests leave. Pure: the random generator is passed in.

use std::time::Duration;

use rand::{Rng, RngExt as _};

/// Bound of one run: memory for the plan of 10 million requests would not help anybody.
const MAX_REQUESTS: usize = 1_000_000;

/// Arrivals per second, changing evenly from the first to the second number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate {
    from: f64,
    to: f64,
}

/// Distribution of the time between arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arrivals {
    /// Exponential.
    Poisson,
    /// Even.
    Constant,
}

/// More arrivals than one run may have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the schedule has more than {MAX_REQUESTS} requests: lower --rate or --duration")]
pub(crate) struct TooManyRequests;

/// `5` or `1:20`.
pub(crate) fn parse_rate(text: &str) -> Result<Rate, String> {
    let number = |text: &str| {
        let number: f64 = text
            .parse()
            .map_err(|_| format!("'{text}' is not a number"))?;
        if (0.0..=100_000.0).contains(&number) {
            Ok(number)
        } else {
            Err(format!(
                "{text} is out of range: use 0 to 100000 requests per second"
            ))
        }
    };
    let (from, to) = text.split_once(':').unwrap_or((text, text));
    Ok(Rate {
        from: number(from)?,
        to: number(to)?,
    })
}

/// Due times in ascending order, all before `duration`.
pub(crate) fn schedule(
    rate: Rate,
    arrivals: Arrivals,
    duration: Duration,
    rng: &mut impl Rng,
) -> Result<Vec<Duration>, TooManyRequests> {
    let end = duration.as_secs_f64();
    let mut due = Vec::new();
    // Arrivals are where the integral of the rate reaches sums of unit steps (time rescaling).
    let mut area = 0.0;
    loop {
        area += match arrivals {
            Arrivals::Constant => 1.0,
            Arrivals::Poisson => -(1.0 - rng.random::<f64>()).ln(),
        };
        match time_of(area, rate, end) {
            Some(at) if at < end => due.push(Duration::from_secs_f64(at)),
            _ => return Ok(due),
        }
        if due.len() > MAX_REQUESTS {
            return Err(TooManyRequests);
        }
    }
}

/// The time at which `rate`, integrated from 0, reaches `area`; none if it never does.
fn time_of(area: f64, rate: Rate, end: f64) -> Option<f64> {
    let slope = (rate.to - rate.from) / end;
    if slope.abs() < 1e-12 {
        return (rate.from > 0.0).then(|| area / rate.from);
    }
    let root = rate.from * rate.from + 2.0 * slope * area;
    (root >= 0.0).then(|| (root.sqrt() - rate.from) / slope)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn times(rate: &str, arrivals: Arrivals, seconds: u64) -> Vec<Duration> {
        let mut rng = StdRng::seed_from_u64(7);
        schedule(
            parse_rate(rate).unwrap(),
            arrivals,
            Duration::from_secs(seconds),
            &mut rng,
        )
        .unwrap()
    }

    #[test]
    fn constant_rate_is_evenly_spread() {
        let times = times("10", Arrivals::Constant, 2);
        assert_eq!(times.len(), 19);
        assert_eq!(times[9], Duration::from_secs(1));
    }

    #[test]
    fn ramp_has_its_mean_rate_and_gets_denser() {
        let times = times("0:20", Arrivals::Constant, 10);
        assert!((98..=100).contains(&times.len()), "{}", times.len());
        let first_half = times.iter().filter(|at| at.as_secs() < 5).count();
        assert!((23..=26).contains(&first_half), "{first_half}");
    }

    #[test]
    fn poisson_has_about_its_rate_and_is_sorted() {
        let times = times("50", Arrivals::Poisson, 100);
        assert!((4_700..5_300).contains(&times.len()), "{}", times.len());
        assert!(times.is_sorted());
    }

    #[test]
    fn falling_ramp_ends_at_zero() {
        let times = times("10:0", Arrivals::Constant, 10);
        assert!((48..=50).contains(&times.len()), "{}", times.len());
    }

    #[test]
    fn bound_of_requests_is_an_error_that_says_what_to_lower() {
        let mut rng = StdRng::seed_from_u64(7);
        let rate = parse_rate("100000").unwrap();
        let error =
            schedule(rate, Arrivals::Constant, Duration::from_secs(20), &mut rng).unwrap_err();
        assert!(error.to_string().contains("--rate"));
    }

    #[test]
    fn rate_of_nothing_sends_nothing() {
        assert!(times("0", Arrivals::Constant, 10).is_empty());
        assert!(parse_rate("fast").is_err());
    }
}
