//! Which conversation or user a request body names: what `Hash` and `Sticky` keep together where their rule has no
//! header for it. Pure.

use serde::Deserialize;
use serde_json::value::RawValue;

/// Members of a body that name something to which more than one request belongs, as JSON texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names<'a> {
    /// Responses: an id, or an object with one.
    pub conversation: Option<&'a str>,
    /// Chat completions and Responses.
    pub prompt_cache_key: Option<&'a str>,
    /// Chat completions, text completions and Responses.
    pub user: Option<&'a str>,
    /// Chat completions and Responses, where newer callers have their user.
    pub safety_identifier: Option<&'a str>,
    /// Messages: an object with `user_id`. Others have what they like in it.
    pub metadata: Option<&'a str>,
    /// Responses: the turn before.
    pub previous_response_id: Option<&'a str>,
}

#[derive(Default, Deserialize)]
struct Within<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    user_id: Option<&'a RawValue>,
}

impl<'a> Names<'a> {
    /// None.
    pub const NONE: Names<'static> = Names {
        conversation: None,
        prompt_cache_key: None,
        user: None,
        safety_identifier: None,
        metadata: None,
        previous_response_id: None,
    };

    /// The narrowest lasting name, as JSON text: the conversation, then the user. The turn before is another one at
    /// each turn, so it counts only where nothing else is named: those who go on from the same turn stay together.
    pub fn session(self) -> Option<&'a str> {
        self.lasting_conversation()
            .or_else(|| self.user())
            .or_else(|| text(self.previous_response_id))
    }

    /// The conversation, as JSON text.
    pub fn conversation(self) -> Option<&'a str> {
        self.lasting_conversation()
            .or_else(|| text(self.previous_response_id))
    }

    /// The user, as JSON text.
    pub fn user(self) -> Option<&'a str> {
        let of_metadata = || text(within(self.metadata)?.user_id.map(RawValue::get));
        text(self.user)
            .or_else(|| text(self.safety_identifier))
            .or_else(of_metadata)
    }

    fn lasting_conversation(self) -> Option<&'a str> {
        let conversation = self.conversation;
        text(conversation)
            .or_else(|| text(within(conversation)?.id.map(RawValue::get)))
            .or_else(|| text(self.prompt_cache_key))
    }
}

/// A text that is not empty.
fn text(raw: Option<&str>) -> Option<&str> {
    raw.filter(|raw| raw.starts_with('"') && raw.len() > 2)
}

fn within(raw: Option<&str>) -> Option<Within<'_>> {
    let raw = raw.filter(|raw| raw.starts_with('{'))?;
    serde_json::from_str(raw).ok()
}

#[cfg(test)]
mod tests {
    use crate::openai::Call;

    fn session(members: &str) -> Option<String> {
        let body = format!(r#"{{"model":"m"{members}}}"#);
        let call = Call::parse(body.as_bytes()).unwrap();
        call.names.session().map(str::to_owned)
    }

    #[test]
    fn each_protocol_names_its_conversations_and_users() {
        let table = [
            // Chat completions.
            (r#","user":"u""#, Some("u")),
            (r#","safety_identifier":"s""#, Some("s")),
            (r#","user":"u","safety_identifier":"s""#, Some("u")),
            (r#","user":null,"safety_identifier":"s""#, Some("s")),
            (r#","user":"","safety_identifier":"s""#, Some("s")),
            (r#","user":"u","prompt_cache_key":"k""#, Some("k")),
            (r#","metadata":{"trace":"1"}"#, None),
            (r#","metadata":{"trace":"1"},"user":"u""#, Some("u")),
            // Messages.
            (r#","metadata":{"user_id":"u"}"#, Some("u")),
            (r#","metadata":{"user_id":null}"#, None),
            (r#","metadata":{}"#, None),
            (r#","metadata":"u""#, None),
            // Responses.
            (r#","conversation":"c""#, Some("c")),
            (r#","conversation":{"id":"c"}"#, Some("c")),
            (r#","conversation": {"id" : "c" } "#, Some("c")),
            (r#","conversation":{"id":"c"},"user":"u""#, Some("c")),
            (r#","conversation":{},"user":"u""#, Some("u")),
            (r#","conversation":null,"safety_identifier":"s""#, Some("s")),
            (r#","previous_response_id":"r""#, Some("r")),
            (r#","previous_response_id":"r","user":"u""#, Some("u")),
            (
                r#","previous_response_id":"r","conversation":"c""#,
                Some("c"),
            ),
            (r#","previous_response_id":null"#, None),
            ("", None),
        ];
        for (members, expected) in table {
            let expected = expected.map(|name| format!("\"{name}\""));
            assert_eq!(session(members), expected, "{members}");
        }
    }

    #[test]
    fn conversations_and_users_are_told_apart() {
        let both = r#"{"model":"m","user":"u","prompt_cache_key":"c","previous_response_id":"r"}"#;
        let names = Call::parse(both.as_bytes()).unwrap().names;
        assert_eq!(names.conversation(), Some("\"c\""));
        assert_eq!(names.user(), Some("\"u\""));
        let turn = r#"{"model":"m","metadata":{"user_id":"u"},"previous_response_id":"r"}"#;
        let names = Call::parse(turn.as_bytes()).unwrap().names;
        assert_eq!(names.conversation(), Some("\"r\""));
        assert_eq!(names.user(), Some("\"u\""));
    }

    #[test]
    fn what_is_no_name_harms_nobody() {
        for odd in ["7", "[]", "{\"id\":7}", "[\"id\"]", "true", "{\"id\":{}}"] {
            for member in ["conversation", "user", "metadata", "previous_response_id"] {
                assert_eq!(
                    session(&format!(",\"{member}\":{odd}")),
                    None,
                    "{member} {odd}"
                );
            }
        }
    }
}
