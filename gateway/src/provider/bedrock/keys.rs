//! What a Secret holds for Bedrock: keys that sign, as AWS's own file `credentials` has them, or an API key of
//! Bedrock's. Pure.

use crate::source::SecretText;

/// Keys that sign.
#[derive(Clone, Debug)]
pub struct Keys {
    /// `aws_access_key_id`.
    pub(super) access: String,
    /// `aws_secret_access_key`.
    pub(super) secret: SecretText,
    /// `aws_session_token`, of keys that are good for a time only.
    pub(super) token: Option<SecretText>,
}

/// Reads the first profile of a file `credentials`; `None` if the text is none, and so an API key.
pub fn read(text: &str) -> Option<Keys> {
    let (mut access, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') && access.is_some() {
            break;
        }
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let value = value.trim().to_owned();
        match name.trim() {
            "aws_access_key_id" => access = Some(value),
            "aws_secret_access_key" => secret = Some(value),
            "aws_session_token" => token = Some(value),
            _ => {}
        }
    }
    Some(Keys {
        access: access?,
        secret: SecretText::new(secret?),
        token: token.map(SecretText::new),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_profile_counts() {
        let file = "# mine\n[default]\naws_access_key_id = AKID\n aws_secret_access_key=a/b+c=\nregion = x\n\n\
            [other]\naws_access_key_id = NO\naws_session_token = NO\n";
        let keys = read(file).unwrap();
        assert_eq!(
            (keys.access.as_str(), keys.secret.expose()),
            ("AKID", "a/b+c=")
        );
        assert!(keys.token.is_none());
        let with_token = file.replace("region = x", "aws_session_token = t=");
        assert_eq!(read(&with_token).unwrap().token.unwrap().expose(), "t=");
    }

    #[test]
    fn anything_else_is_an_api_key() {
        for text in ["", "bedrock-api-key-abc==", "aws_access_key_id = AKID"] {
            assert!(read(text).is_none(), "{text}");
        }
    }

    #[test]
    fn debug_never_shows_a_secret() {
        let keys =
            read("aws_access_key_id=A\naws_secret_access_key=canary\naws_session_token=canary");
        assert!(!format!("{keys:?}").contains("canary"));
    }
}
