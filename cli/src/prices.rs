//! (IO) `penstock prices`: the built-in catalogue of prices.

use std::io::Write as _;

use anyhow::bail;
use penstock_crds::prices::catalogue;

use crate::table::aligned;

/// Lists what models cost at providers, in USD for a million tokens: names for `spec.price.catalogue` of LLMBackends.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Only names that begin so, such as `openai/` or `anthropic/claude-sonnet`.
    #[arg(value_name = "PREFIX", default_value = "")]
    prefix: String,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let catalogue = catalogue();
    let headings = ["MODEL", "INPUT", "CACHED INPUT", "OUTPUT"].map(str::to_owned);
    let mut rows = vec![headings.to_vec()];
    for (name, price) in catalogue.beginning_with(&args.prefix) {
        let figures = [price.input, price.cached_input, price.output].map(usd);
        rows.push([&[name.to_owned()], &figures[..]].concat());
    }
    if rows.len() == 1 {
        bail!(
            "no model of the catalogue ({}) begins with '{}'",
            catalogue.source,
            args.prefix
        );
    }
    let mut out = std::io::stdout().lock();
    for line in aligned(&rows, None) {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "USD for a million tokens, as of {}", catalogue.source)?;
    Ok(())
}

/// Micro-USD in USD, with as many digits as it has, and two at least.
fn usd(micro: u64) -> String {
    let text = format!("{}.{:06}", micro / 1_000_000, micro % 1_000_000);
    let short = text.trim_end_matches('0');
    let digits = short.len() - short.find('.').unwrap_or(short.len());
    format!("{short}{}", "0".repeat(3_usize.saturating_sub(digits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_have_the_digits_that_they_need() {
        for (micro, text) in [
            (0, "0.00"),
            (2_500_000, "2.50"),
            (250_000, "0.25"),
            (27_500, "0.0275"),
            (15_000_000, "15.00"),
            (1, "0.000001"),
        ] {
            assert_eq!(usd(micro), text);
        }
    }
}
