//! The catalogue of prices that is built in: what models cost at providers, as of one version of a list that others
//! keep (`tools/prices` writes it).

use std::collections::BTreeMap;
use std::sync::LazyLock;

use penstock_core::config::Price;
use serde::Deserialize;

const JSON: &str = include_str!("../prices.json");

/// Prices by `provider/model`.
#[derive(Debug, Default, Deserialize)]
pub struct Catalogue {
    /// Which list, and which version of it.
    pub source: String,
    models: BTreeMap<String, Vec<u64>>,
}

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| {
    // It is looked at by a test.
    serde_json::from_str(JSON).unwrap_or_default()
});

/// The catalogue of this build.
pub fn catalogue() -> &'static Catalogue {
    &CATALOGUE
}

impl Catalogue {
    /// What a model costs, as `openai/gpt-5-mini`.
    pub fn price(&self, model: &str) -> Option<Price> {
        read(self.models.get(model)?)
    }

    /// All that begin so, in order.
    pub fn beginning_with<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, Price)> {
        let models = self.models.range(prefix.to_owned()..);
        let models = models.take_while(move |(name, _)| name.starts_with(prefix));
        models.filter_map(|(name, figures)| Some((name.as_str(), read(figures)?)))
    }

    /// Up to three names that look like this one.
    pub fn like(&self, model: &str) -> Vec<&str> {
        let own = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
        let wanted = own(model).to_ascii_lowercase();
        let names = self.models.keys().map(String::as_str);
        let mut alike: Vec<&str> = names
            .filter(|name| {
                let name = own(name);
                name.starts_with(&wanted) || (!name.is_empty() && wanted.starts_with(&name))
            })
            .collect();
        alike.sort_by_key(|name| (own(name).len().abs_diff(wanted.len()), *name));
        alike.truncate(3);
        alike
    }
}

/// Of a prompt, of an answer, and of what a cache held of a prompt, if that has a price of its own.
fn read(figures: &[u64]) -> Option<Price> {
    let (&input, &output) = (figures.first()?, figures.get(1)?);
    Some(Price {
        input,
        cached_input: figures.get(2).copied().unwrap_or(input),
        output,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_can_be_read_and_no_price_is_out_of_the_way() {
        let catalogue = catalogue();
        assert!(catalogue.source.starts_with("litellm "));
        assert!(catalogue.models.len() > 500);
        for (name, price) in catalogue.beginning_with("") {
            assert!(name.contains('/'), "{name}");
            // Nothing costs more than a thousand USD a million tokens.
            let all = [price.input, price.cached_input, price.output];
            assert!(
                all.iter().all(|value| *value <= 1_000_000_000),
                "{name}: {price:?}"
            );
            assert!(
                price.input > 0 && price.cached_input <= price.input,
                "{name}: {price:?}"
            );
        }
    }

    #[test]
    fn a_model_is_found_by_its_name_and_others_by_what_they_look_like() {
        let catalogue = catalogue();
        let price = catalogue.price("openai/gpt-5-mini").unwrap();
        assert_eq!((price.input, price.output), (250_000, 2_000_000));
        assert_eq!(price.cached_input, 25_000);
        assert_eq!(catalogue.price("gpt-5-mini"), None);
        assert!(catalogue.like("gpt-5-mini").contains(&"openai/gpt-5-mini"));
        assert!(catalogue.like("openai/gpt-5-min")[0].ends_with("/gpt-5-mini"));
        assert!(catalogue.like("nothing-like-it").is_empty());
        let mut of_anthropic = catalogue.beginning_with("anthropic/");
        assert!(of_anthropic.all(|(name, _)| name.starts_with("anthropic/")));
    }
}
