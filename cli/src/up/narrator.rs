//! (IO) What `penstock up` tells the person at the terminal: one line for each thing that happens.

use std::io::Write as _;

/// Prints one line. A terminal that has gone away is no reason to stop serving.
pub(super) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
