//! What a request needs of a backend, and which backends are said to lack it. Pure.
//!
//! A feature that a backend lacks drops it: its answer would be a refusal or would leave something out. A context that
//! is too short drops a backend only while another one has room for more, because the tokens of a prompt are estimated
//! and the engine's own count is exact.

use std::collections::BTreeSet;

use penstock_core::config::{Capabilities, FailureClass, Need, Protocol};

use crate::conditions::is_needed;
use crate::openai::{Api, Call};
use crate::provider::Misfit;
use crate::snapshot::{Candidate, Rule};

/// What is looked for in a request.
const FEATURES: [Need; 4] = [Need::Vision, Need::Audio, Need::Tools, Need::JsonSchema];

/// What a request needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needed {
    features: BTreeSet<Need>,
    /// Of the context, for prompt and answer.
    tokens: u32,
    /// That it counts a prompt.
    counts: bool,
}

/// What a backend lacks for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// It cannot do this.
    Feature(Need),
    /// Its context is shorter than the request.
    Context {
        /// About how many tokens the request takes.
        needed: u32,
        /// How many the backend has.
        has: u32,
    },
    /// It is not known to count prompts.
    Count,
}

impl Needed {
    /// Nothing.
    pub const NOTHING: Self = Self {
        features: BTreeSet::new(),
        tokens: 0,
        counts: false,
    };

    /// What `call` needs of the candidates of `rule`; nothing where all of them are taken to be able to do everything.
    pub fn of(rule: &Rule, api: Api, call: &Call<'_>) -> Self {
        // What is too long for others is what it waits for, or nothing for it.
        let takes_long = |candidate: &&Candidate| {
            !candidate.is_fallback() || candidate.after.contains(&FailureClass::ContextLength)
        };
        let said = || {
            rule.candidates()
                .filter(takes_long)
                .map(|candidate| &candidate.backend.profile.capabilities)
        };
        let counts = api == Api::CountTokens;
        if !counts && said().all(takes_all) {
            return Self::NOTHING;
        }
        let features = FEATURES
            .into_iter()
            .filter(|need| is_needed(*need, call))
            .collect();
        let most = said()
            .filter(|capabilities| capabilities.lacks.is_disjoint(&features))
            .map(|capabilities| capabilities.context_tokens.unwrap_or(u32::MAX))
            .max();
        Self {
            tokens: context_tokens(api, call)
                .unwrap_or(0)
                .min(most.unwrap_or(0)),
            features,
            counts,
        }
    }

    /// What a candidate lacks.
    pub fn lack_of(&self, candidate: &Candidate) -> Option<Lack> {
        let backend = &candidate.backend;
        self.lack(backend.protocol, &backend.profile.capabilities)
    }

    /// What a backend lacks that speaks `protocol` and has these `capabilities`.
    fn lack(&self, protocol: Protocol, capabilities: &Capabilities) -> Option<Lack> {
        // Anthropic's protocol has a call for it.
        let counts = protocol == Protocol::Anthropic || capabilities.tokenize;
        if self.counts && !counts {
            return Some(Lack::Count);
        }
        let feature = self.features.intersection(&capabilities.lacks).next();
        let has = capabilities.context_tokens.unwrap_or(u32::MAX);
        match feature {
            Some(feature) => Some(Lack::Feature(*feature)),
            None => (self.tokens > has).then_some(Lack::Context {
                needed: self.tokens,
                has,
            }),
        }
    }

    /// What a request is refused for that no candidate of `rule` can take.
    pub fn misfit(&self, rule: &Rule) -> Option<Misfit> {
        let mut lacks = rule
            .candidates()
            .filter_map(|candidate| self.lack_of(candidate));
        lacks.find_map(|lack| match lack {
            Lack::Feature(need) => Some(Misfit::Unsupported(member(need).to_owned())),
            Lack::Count => Some(Misfit::Unsupported(Api::CountTokens.path().to_owned())),
            Lack::Context { .. } => None,
        })
    }
}

/// Whether a backend is never dropped for what it lacks.
fn takes_all(capabilities: &Capabilities) -> bool {
    capabilities.lacks.is_empty() && capabilities.context_tokens.is_none()
}

/// About how many tokens of a context prompt and answer take. `None` where bytes do not tell: pictures, sound and files
/// are not as long as their base64, and a list of texts is not one prompt.
pub(crate) fn context_tokens(api: Api, call: &Call<'_>) -> Option<u32> {
    let is_one_text = match api {
        Api::Chat | Api::Responses | Api::Messages => true,
        Api::Completions => call.prompt.starts_with(b"\""),
        _ => false,
    };
    let is_text = || {
        !is_needed(Need::Vision, call)
            && !is_needed(Need::Audio, call)
            && memchr::memmem::find(call.prompt, b";base64,").is_none()
            && memchr::memmem::find(call.prompt, b"\"document\"").is_none()
    };
    let answer = call.max_tokens.unwrap_or(0);
    (is_one_text && is_text()).then(|| call.prompt_tokens.saturating_add(answer))
}

/// The member of a request by which it is known.
fn member(need: Need) -> &'static str {
    match need {
        Need::Vision => "image_url",
        Need::Audio => "input_audio",
        Need::Tools => "tools",
        Need::JsonSchema => "json_schema",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::Snapshot;
    use crate::snapshot::tests::{build, config, endpoints, rule, rule_of};
    use crate::source::Credentials;
    use penstock_core::config::NameMatch;
    use penstock_core::ids::Id;

    fn snapshot(capabilities: &[Capabilities]) -> Snapshot {
        let names = ["a", "b", "c"];
        let wanted: Vec<(&str, u32, u32)> = names
            .iter()
            .zip(capabilities)
            .map(|(name, _)| (*name, 1, 0))
            .collect();
        let rule = rule("r", &[NameMatch::Exact("m".to_owned())], &wanted);
        let mut config = config(&names[..capabilities.len()], vec![rule]);
        for (name, capabilities) in names.iter().zip(capabilities) {
            let backend = config.backends.get_mut(&Id::new("ns", *name)).unwrap();
            backend.profile.capabilities = capabilities.clone();
        }
        build(config, &endpoints(&[]), &Credentials::default(), None)
    }

    fn lacks(capabilities: &[Capabilities], body: &str) -> Vec<Option<Lack>> {
        let rule = rule_of(&snapshot(capabilities), "m").unwrap();
        let call = Call::parse(body.as_bytes()).unwrap();
        let needed = Needed::of(&rule, Api::Chat, &call);
        capabilities
            .iter()
            .map(|capabilities| needed.lack(Protocol::OpenAi, capabilities))
            .collect()
    }

    fn without(need: Need) -> Capabilities {
        Capabilities {
            lacks: BTreeSet::from([need]),
            ..Capabilities::default()
        }
    }

    fn context(tokens: u32) -> Capabilities {
        Capabilities {
            context_tokens: Some(tokens),
            ..Capabilities::default()
        }
    }

    #[test]
    fn a_backend_that_lacks_a_feature_is_dropped_where_it_is_needed() {
        let tools = r#"{"model":"m","tools":[{"type":"function"}]}"#;
        let lack = Some(Lack::Feature(Need::Tools));
        let all = Capabilities::default();
        assert_eq!(
            lacks(&[without(Need::Tools), all.clone()], tools),
            [lack, None]
        );
        assert_eq!(lacks(&[without(Need::Tools)], tools), [lack]);
        assert_eq!(lacks(&[without(Need::Vision), all], tools), [None, None]);
    }

    #[test]
    fn a_count_is_for_those_who_can() {
        let counting = Capabilities {
            tokenize: true,
            ..Capabilities::default()
        };
        let both = [Capabilities::default(), counting];
        let rule = rule_of(&snapshot(&both), "m").unwrap();
        let call = Call::parse(br#"{"model":"m"}"#).unwrap();
        let lacks = |api, protocol| {
            let needed = Needed::of(&rule, api, &call);
            both.each_ref().map(|has| needed.lack(protocol, has))
        };
        let openai = lacks(Api::CountTokens, Protocol::OpenAi);
        assert_eq!(openai, [Some(Lack::Count), None]);
        assert_eq!(lacks(Api::CountTokens, Protocol::Anthropic), [None; 2]);
        assert_eq!(lacks(Api::Messages, Protocol::OpenAi), [None; 2]);
    }

    #[test]
    fn the_longest_context_always_stays() {
        let body = |max: u32| {
            let text = "x".repeat(4_000);
            format!(
                r#"{{"model":"m","max_tokens":{max},"messages":[{{"role":"user","content":"{text}"}}]}}"#
            )
        };
        let both = [context(1_000), context(8_000)];
        let short = |needed| Some(Lack::Context { needed, has: 1_000 });
        assert_eq!(lacks(&both, &body(1)), [short(1_008), None]);
        assert_eq!(lacks(&both, &body(99_000)), [short(8_000), None]);
        assert_eq!(lacks(&both[..1], &body(1)), [None]);
        let unknown = [context(1_000), Capabilities::default()];
        assert_eq!(lacks(&unknown, &body(99_000)), [short(100_007), None]);
    }

    #[test]
    fn the_longest_context_is_that_of_a_backend_that_has_the_features() {
        let text = "x".repeat(4_000);
        let body = format!(
            r#"{{"model":"m","tools":[{{"type":"function"}}],"messages":[{{"role":"user","content":"{text}"}}]}}"#
        );
        let long = Capabilities {
            context_tokens: Some(100_000),
            ..without(Need::Tools)
        };
        let found = lacks(&[context(500), long], &body);
        assert_eq!(found, [None, Some(Lack::Feature(Need::Tools))]);
    }

    #[test]
    fn bytes_of_pictures_are_no_tokens() {
        let data = "A".repeat(100_000);
        let body = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}]}}]}}"#
        );
        assert_eq!(lacks(&[context(4_096), context(8_192)], &body), [None; 2]);
    }

    proptest! {
        #[test]
        fn somebody_with_the_features_is_always_left(
            contexts in prop::collection::vec((prop::option::of(1_u32..5_000), any::<bool>()), 1..4),
            length in 0_usize..10_000,
            tools in any::<bool>(),
        ) {
            let capabilities: Vec<Capabilities> = contexts.iter().map(|(tokens, lacks)| Capabilities {
                context_tokens: *tokens,
                lacks: lacks.then_some(Need::Tools).into_iter().collect(),
                ..Capabilities::default()
            }).collect();
            let offered = if tools { r#"[{"type":"function"}]"# } else { "[]" };
            let text = "x".repeat(length);
            let body = format!(r#"{{"model":"m","tools":{offered},"messages":[{{"content":"{text}"}}]}}"#);
            let found = lacks(&capabilities, &body);
            let able = contexts.iter().any(|(_, lacks)| !lacks || !tools);
            prop_assert_eq!(found.contains(&None), able);
        }
    }
}
