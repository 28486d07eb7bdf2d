//! Request targets: where at a backend each of its calls goes. Pure.
//!
//! Some providers have the model in the path. A model's name there is one segment, whatever it holds: names that a
//! server could take for steps in the path have no target.

use std::fmt::Write as _;

use http::Uri;
use http::uri::PathAndQuery;
use penstock_core::config::Protocol;

use crate::openai::Api;

/// Where the calls of a backend go.
#[derive(Debug)]
pub enum Targets {
    /// One target for each call, by [`Api::index`].
    Fixed(Box<[Uri]>),
    /// Azure: most calls name the model in their path.
    Deployments {
        /// The path of the resource, without a slash at its end.
        base: String,
        /// The `api-version` that is asked for.
        version: String,
    },
    /// Bedrock: the path names the model and whether a stream is wanted.
    Converse {
        /// The path, without a slash at its end.
        base: String,
    },
    /// Gemini: the path names the model and what to do.
    Models {
        /// The path with the API's version, without a slash at its end.
        base: String,
    },
}

impl Targets {
    /// Those of a backend that speaks `protocol` below the path `base`; `None` if that is no path.
    pub fn new(protocol: Protocol, base: &str, api_version: Option<&str>) -> Option<Self> {
        match (protocol, api_version) {
            (Protocol::OpenAi, _) => {
                let mut targets = fixed(base)?;
                // Engines have it beside the version that they share with OpenAI.
                let root = base.strip_suffix("/v1").unwrap_or(base);
                targets[Api::CountTokens.index()] = uri(format!("{root}/tokenize"))?;
                Some(Self::Fixed(targets))
            }
            (Protocol::Anthropic | Protocol::Http, _) => fixed(base).map(Self::Fixed),
            (Protocol::AzureOpenAi, None) => fixed(&format!("{base}/openai/v1")).map(Self::Fixed),
            (Protocol::AzureOpenAi, Some(version)) => Some(Self::Deployments {
                base: path(base)?,
                version: version.to_owned(),
            }),
            (Protocol::Gemini, _) => Some(Self::Models { base: path(base)? }),
            (Protocol::Bedrock, _) => Some(Self::Converse { base: path(base)? }),
        }
    }

    /// Whether all its calls can ask for `model`.
    pub fn take(&self, model: &str) -> bool {
        match self {
            Self::Fixed(_) => true,
            Self::Deployments { .. } | Self::Models { .. } | Self::Converse { .. } => {
                is_segment(model)
            }
        }
    }

    /// Where the call `api` goes that asks for `model`, and for a stream or not; `None` if the model's name cannot
    /// stand in a path.
    pub fn of(&self, api: Api, stream: bool, model: &str) -> Option<Uri> {
        match self {
            Self::Fixed(uris) => uris.get(api.index()).cloned(),
            Self::Deployments { base, version } => {
                let below = if is_of_a_deployment(api) {
                    format!("/deployments/{}{}", segment(model)?, api.path())
                } else {
                    api.path().to_owned()
                };
                uri(format!("{base}/openai{below}?api-version={version}"))
            }
            Self::Converse { base } => {
                let model = segment(model)?;
                let action = if stream {
                    "converse-stream"
                } else {
                    "converse"
                };
                uri(format!("{base}/model/{model}/{action}"))
            }
            Self::Models { base } => {
                let model = segment(model)?;
                let action = match (api, stream) {
                    (Api::Embeddings, _) => "batchEmbedContents",
                    (_, true) => "streamGenerateContent?alt=sse",
                    (_, false) => "generateContent",
                };
                uri(format!("{base}/models/{model}:{action}"))
            }
        }
    }
}

fn path(base: &str) -> Option<String> {
    PathAndQuery::try_from(base.to_owned() + "/").ok()?;
    Some(base.to_owned())
}

fn fixed(base: &str) -> Option<Box<[Uri]>> {
    let uris = Api::ALL.map(|api| uri(format!("{base}{}", api.path())));
    uris.into_iter().collect()
}

fn uri(mut target: String) -> Option<Uri> {
    if target.is_empty() {
        // That of a base without a path, which is the server itself.
        target.push('/');
    }
    PathAndQuery::try_from(target).map(Uri::from).ok()
}

/// Azure's calls that have the deployment in their path; the others have it in their body alone.
fn is_of_a_deployment(api: Api) -> bool {
    matches!(
        api,
        Api::Chat
            | Api::Completions
            | Api::Embeddings
            | Api::Speech
            | Api::Transcription
            | Api::Translation
            | Api::ImageGeneration
            | Api::ImageEdit
    )
}

/// Not names with a part that is empty, `.` or `..`: servers that decode before they resolve would leave the path.
fn is_segment(name: &str) -> bool {
    let steps = |part: &str| part.is_empty() || part == "." || part == "..";
    !name.split(['/', '\\']).any(steps)
}

/// A name as one segment of a path: all but RFC 3986's unreserved characters are encoded.
fn segment(name: &str) -> Option<String> {
    if !is_segment(name) {
        return None;
    }
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to memory cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    Some(encoded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn azure(version: Option<&str>) -> Targets {
        Targets::new(Protocol::AzureOpenAi, "/x", version).unwrap()
    }

    fn target(targets: &Targets, api: Api, model: &str) -> String {
        targets.of(api, false, model).unwrap().to_string()
    }

    #[test]
    fn calls_go_below_the_base() {
        let openai = Targets::new(Protocol::OpenAi, "/v1", None).unwrap();
        assert_eq!(target(&openai, Api::Chat, "m"), "/v1/chat/completions");
        let anthropic = Targets::new(Protocol::Anthropic, "/v1", None).unwrap();
        assert_eq!(target(&anthropic, Api::Messages, "m"), "/v1/messages");
        assert!(Targets::new(Protocol::OpenAi, "/a b", None).is_none());
        let bare = Targets::new(Protocol::OpenAi, "", None).unwrap();
        assert_eq!(target(&bare, Api::Chat, "m"), "/chat/completions");
        let count = "/v1/messages/count_tokens";
        assert_eq!(target(&anthropic, Api::CountTokens, "m"), count);
    }

    #[test]
    fn engines_count_tokens_beside_their_version() {
        for (base, expected) in [
            ("/v1", "/tokenize"),
            ("/a/v1", "/a/tokenize"),
            ("", "/tokenize"),
            ("/openai", "/openai/tokenize"),
        ] {
            let targets = Targets::new(Protocol::OpenAi, base, None).unwrap();
            assert_eq!(target(&targets, Api::CountTokens, "m"), expected);
        }
    }

    #[test]
    fn azures_deployments_stand_in_the_path() {
        let dated = azure(Some("2024-10-21"));
        assert_eq!(
            target(&dated, Api::Chat, "gpt 4/o"),
            "/x/openai/deployments/gpt%204%2Fo/chat/completions?api-version=2024-10-21"
        );
        assert_eq!(
            target(&dated, Api::Responses, "m"),
            "/x/openai/responses?api-version=2024-10-21"
        );
        assert_eq!(
            target(&azure(None), Api::Embeddings, "m"),
            "/x/openai/v1/embeddings"
        );
    }

    #[test]
    fn geminis_models_stand_in_the_path() {
        let gemini = Targets::new(Protocol::Gemini, "/v1beta", None).unwrap();
        assert_eq!(
            target(&gemini, Api::Chat, "gemini 3"),
            "/v1beta/models/gemini%203:generateContent"
        );
        assert_eq!(
            gemini.of(Api::Chat, true, "g").unwrap(),
            "/v1beta/models/g:streamGenerateContent?alt=sse"
        );
        assert_eq!(
            target(&gemini, Api::Embeddings, "e"),
            "/v1beta/models/e:batchEmbedContents"
        );
    }

    #[test]
    fn bedrocks_models_stand_in_the_path_as_aws_writes_them() {
        let bedrock = Targets::new(Protocol::Bedrock, "", None).unwrap();
        let arn = "arn:aws:bedrock:eu-central-1:1:inference-profile/eu.m-v1:0";
        assert_eq!(
            target(&bedrock, Api::Chat, arn),
            "/model/arn%3Aaws%3Abedrock%3Aeu-central-1%3A1%3Ainference-profile%2Feu.m-v1%3A0/converse"
        );
        assert_eq!(
            bedrock.of(Api::Chat, true, "m").unwrap(),
            "/model/m/converse-stream"
        );
    }

    #[test]
    fn names_that_step_through_a_path_have_no_target() {
        for name in ["", ".", "..", "a/../b", "..\\x", "/a", "a/"] {
            let targets = azure(Some("1"));
            assert!(
                !targets.take(name) && targets.of(Api::Chat, false, name).is_none(),
                "{name}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_name_never_changes_the_path_around_it(name in "\\PC{1,20}|[./\\\\?#%&; \\n\\x00a]{1,8}") {
            if let Some(uri) = azure(Some("1")).of(Api::Chat, false, &name) {
                prop_assert_eq!(uri.query(), Some("api-version=1"));
                let segments: Vec<&str> = uri.path().split('/').collect();
                prop_assert_eq!(segments.len(), 7, "{}", uri);
                prop_assert_eq!(&segments[5..], &["chat", "completions"]);
            }
        }
    }
}
