//! AWS Signature Version 4 of one request, in its headers. Pure: the time comes in.
//! Source: <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>.

use std::fmt::Write as _;
use std::time::Duration;

use ring::{digest, hmac};

use super::keys::Keys;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// What is signed of a request.
pub(super) struct Signed<'a> {
    pub(super) method: &'a str,
    /// As it is sent: percent-encoded once.
    pub(super) path: &'a str,
    /// In lower case and in order of their names, values trimmed; `host` and `x-amz-date` among them.
    pub(super) headers: &'a [(&'a str, &'a str)],
    /// SHA-256 of the body, hexadecimal.
    pub(super) body_hash: &'a str,
}

/// Where and for what a signature is good.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) region: &'a str,
    pub(super) service: &'a str,
}

/// The value of `Authorization`. `now` is the `x-amz-date`.
pub(super) fn authorization(
    signed: &Signed<'_>,
    keys: &Keys,
    scope: Scope<'_>,
    now: &str,
) -> String {
    let day = now.get(..8).unwrap_or_default();
    let Scope { region, service } = scope;
    let scope = format!("{day}/{region}/{service}/aws4_request");
    let request = hash(canonical(signed).as_bytes());
    let text = format!("{ALGORITHM}\n{now}\n{scope}\n{request}");
    let secret = format!("AWS4{}", keys.secret.expose());
    let steps = [day, region, service, "aws4_request"];
    let key = steps
        .iter()
        .fold(secret.into_bytes(), |key, step| mac(&key, step));
    let signature = hexadecimal(&mac(&key, &text));
    let names = names(signed.headers);
    let access = &keys.access;
    format!("{ALGORITHM} Credential={access}/{scope}, SignedHeaders={names}, Signature={signature}")
}

fn names(headers: &[(&str, &str)]) -> String {
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    names.join(";")
}

/// The canonical request, without a query. Paths are encoded a second time, as every service but S3 wants it.
fn canonical(signed: &Signed<'_>) -> String {
    let mut text = format!("{}\n", signed.method);
    for byte in signed.path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to memory cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text.push_str("\n\n");
    for (name, value) in signed.headers {
        let _ = writeln!(text, "{name}:{value}");
    }
    let _ = write!(text, "\n{}\n{}", names(signed.headers), signed.body_hash);
    text
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, text.as_bytes()).as_ref().to_vec()
}

/// SHA-256, hexadecimal.
fn hash(bytes: &[u8]) -> String {
    hexadecimal(digest::digest(&digest::SHA256, bytes).as_ref())
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `20150830T123600Z`. Days to a date after Howard Hinnant, <https://howardhinnant.github.io/date_algorithms.html>.
pub(super) fn date(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::SecretText;

    const DATE: &str = "20150830T123600Z";
    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const TOKEN: &str = "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267";

    fn signature(method: &str, path: &str, headers: &[(&str, &str)], body_hash: &str) -> String {
        let keys = Keys {
            access: "AKIDEXAMPLE".to_owned(),
            secret: SecretText::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"),
            token: None,
        };
        let scope = Scope {
            region: "us-east-1",
            service: "service",
        };
        let signed = Signed {
            method,
            path,
            headers,
            body_hash,
        };
        let value = authorization(&signed, &keys, scope, DATE);
        value.rsplit_once("Signature=").unwrap().1.to_owned()
    }
    /// Cases of AWS's own suite, as the package `aws-sigv4` 1.6.4 ships it (`aws-signing-test-suite/v4`).
    #[test]
    fn signatures_are_those_of_the_published_suite() {
        let host = ("host", "example.amazonaws.com");
        let date = ("x-amz-date", DATE);
        let body = "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e";
        let form = [
            ("content-length", "13"),
            ("content-type", "application/x-www-form-urlencoded"),
            host,
            ("x-amz-content-sha256", body),
            date,
        ];
        let unreserved = "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        for (name, expected, found) in [
            (
                "get-vanilla",
                "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
                signature("GET", "/", &[host, date], EMPTY),
            ),
            (
                "post-vanilla",
                "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
                signature("POST", "/", &[host, date], EMPTY),
            ),
            (
                "get-unreserved",
                "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
                signature("GET", unreserved, &[host, date], EMPTY),
            ),
            (
                "post-header-key-sort",
                "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
                signature("POST", "/", &[host, ("my-header1", "value1"), date], EMPTY),
            ),
            (
                "get-vanilla-with-session-token",
                "07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8",
                signature(
                    "GET",
                    "/",
                    &[host, date, ("x-amz-security-token", TOKEN)],
                    EMPTY,
                ),
            ),
            (
                "post-x-www-form-urlencoded",
                "d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b",
                signature("POST", "/", &form, body),
            ),
            // Its path is written unencoded there, and encoded once when it is signed.
            (
                "get-utf8",
                "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
                signature("GET", "/\u{1234}", &[host, date], EMPTY),
            ),
        ] {
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn an_encoded_path_is_encoded_again() {
        // The canonical request of `double-encode-path`.
        let headers = [
            ("host", "tj9n5r0m12.execute-api.us-east-1.amazonaws.com"),
            ("x-amz-date", "20210511T154045Z"),
        ];
        let signed = Signed {
            method: "POST",
            path: "/test/@connections/JBDvjfGEIAMCERw%3D",
            headers: &headers,
            body_hash: EMPTY,
        };
        let expected = "POST\n/test/%40connections/JBDvjfGEIAMCERw%253D\n\nhost:tj9n5r0m12.execute-api.us-east-1.amazonaws.com\n\
            x-amz-date:20210511T154045Z\n\nhost;x-amz-date\n";
        assert_eq!(canonical(&signed), expected.to_owned() + EMPTY);
    }

    #[test]
    fn dates_are_written_as_aws_wants_them() {
        for (seconds, expected) in [
            (0, "19700101T000000Z"),
            (951_782_399, "20000228T235959Z"),
            (951_782_400, "20000229T000000Z"),
            (1_440_938_160, DATE),
            (4_102_444_799, "20991231T235959Z"),
        ] {
            assert_eq!(date(Duration::from_secs(seconds)), expected);
        }
    }
}
