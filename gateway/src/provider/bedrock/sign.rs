//! Signs a request for Bedrock. Pure: the time comes in.

use std::fmt;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_core::config::sha256_hex;

use super::keys::Keys;
use super::sigv4::{self, Scope, Signed};

const DATE: HeaderName = HeaderName::from_static("x-amz-date");
const TOKEN: HeaderName = HeaderName::from_static("x-amz-security-token");
const SERVICE: &str = "bedrock";

/// Who signs, and for where.
pub struct Signer {
    /// Its keys.
    pub keys: Keys,
    /// The region that is asked.
    pub region: String,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}

/// Signs a POST of `body` to `path` at the time `now` since 1970: its type, its host, its time, its session. All else
/// may still be changed on the way.
pub fn sign(signer: &Signer, headers: &mut HeaderMap, path: &str, body: &[u8], now: Duration) {
    let date = sigv4::date(now);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(date) = HeaderValue::from_str(&date) {
        headers.insert(DATE, date);
    }
    if let Some(token) = &signer.keys.token
        && let Ok(mut token) = HeaderValue::from_str(token.expose())
    {
        token.set_sensitive(true);
        headers.insert(TOKEN, token);
    }
    // In order of their names.
    let names = [CONTENT_TYPE, HOST, DATE, TOKEN];
    let signed: Vec<(&str, &str)> = names
        .iter()
        .filter_map(|name| Some((name.as_str(), headers.get(name)?.to_str().ok()?.trim())))
        .collect();
    let signed = Signed {
        method: "POST",
        path,
        headers: &signed,
        body_hash: &sha256_hex(body),
    };
    let scope = Scope {
        region: &signer.region,
        service: SERVICE,
    };
    let value = sigv4::authorization(&signed, &signer.keys, scope, &date);
    if let Ok(mut value) = HeaderValue::from_str(&value) {
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
}
