//! Durations on the command line, written as in the kinds: `500ms`, `30s`, `10m`, `2h`, `0s`.

use std::time::Duration;

use penstock_crds::text::{DurationText, ParseDurationError};

/// For clap's `value_parser`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, ParseDurationError> {
    DurationText::from(text).parse()
}
