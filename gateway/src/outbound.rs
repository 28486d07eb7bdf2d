//! Which headers cross the gateway. Pure.
//!
//! Never upstream: hop-by-hop headers (RFC 9110, 7.6.1), what the gateway writes itself, and the caller's credentials
//! and cookies, unless they are for an HTTP backend that is to have them. Never to the caller: hop-by-hop headers, and
//! cookies of any other backend.

use std::net::IpAddr;

use http::header::{
    ACCEPT_ENCODING, AGE, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING,
    CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, COOKIE, EXPECT, HOST, MAX_FORWARDS,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_core::config::Protocol;
use penstock_core::names::REQUEST_ID_HEADER;

use crate::guard::Caller;
use crate::openai::Dialect;
use crate::principal::KEY;

/// [`REQUEST_ID_HEADER`].
pub const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// What Azure takes its key from.
pub const AZURE_KEY: HeaderName = HeaderName::from_static("api-key");
/// What Anthropic's API takes its key from.
pub const ANTHROPIC_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// What Google takes its key from.
pub const GOOGLE_KEY: HeaderName = HeaderName::from_static("x-goog-api-key");
/// Providers' own ways to say `Authorization`.
pub(crate) const API_KEYS: [HeaderName; 3] = [AZURE_KEY, ANTHROPIC_KEY, GOOGLE_KEY];
/// Anthropic demands it of every request.
const ANTHROPIC_VERSION: HeaderName = HeaderName::from_static("anthropic-version");
const ANTHROPIC_BETA: HeaderName = HeaderName::from_static("anthropic-beta");
/// The version that translations are made for, and the newest there is.
const SPOKEN_VERSION: HeaderValue = HeaderValue::from_static("2023-06-01");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// A caller's place in a trace (W3C Trace Context).
const TRACE: [HeaderName; 2] = [
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];
/// Headers that the gateway adds: `Host`, the credential, `Via`, the request id, and `Anthropic-Version` or the three
/// `X-Forwarded`, `TE` and `Connection`.
const ADDED: usize = 9;

fn is_hop_by_hop(name: &HeaderName) -> bool {
    [
        CONNECTION,
        TRANSFER_ENCODING,
        TE,
        TRAILER,
        UPGRADE,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
    ]
    .contains(name)
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
}

/// What the gateway writes itself, or no next hop has a use for.
fn stays_here(name: &HeaderName) -> bool {
    [HOST, CONTENT_LENGTH, EXPECT].contains(name)
        || is_hop_by_hop(name)
        || *name == REQUEST_ID
        || *name == KEY
}

fn is_credential(name: &HeaderName) -> bool {
    [AUTHORIZATION, COOKIE].contains(name) || API_KEYS.contains(name)
}

/// A body may come back compressed only if the gateway can read it, and credentials are the gateway's own.
fn is_for_models(name: &HeaderName) -> bool {
    !is_credential(name) && *name != ACCEPT_ENCODING
}

/// Names that a `Connection` header makes hop-by-hop.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    names_in(headers, &CONNECTION)
}

/// The names that the headers of this name list.
fn names_in(headers: &HeaderMap, list: &HeaderName) -> Vec<HeaderName> {
    headers
        .get_all(list)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::try_from(name.trim()).ok())
        .collect()
}

/// What may be stored of a caller's headers: no credentials, nothing about the connection.
pub fn kept(headers: &HeaderMap) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
    let named = named_by_connection(headers);
    headers
        .iter()
        .filter(move |(name, _)| is_for_models(name) && !stays_here(name) && !named.contains(name))
}

/// What [`kept`] has and calls of several callers can have in common: all but the place of each in its trace.
pub fn of_any_caller(headers: &HeaderMap) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
    kept(headers).filter(|(name, _)| !TRACE.contains(name))
}

/// The headers of a call that is made for several callers, out of those of one of them.
pub fn for_several(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    for name in TRACE {
        headers.remove(name);
    }
    headers
}

/// What the gateway says for itself.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// Where the request goes.
    pub host: &'a HeaderValue,
    /// The backend's credential.
    pub credential: Option<(&'a HeaderName, &'a HeaderValue)>,
    /// This gateway.
    pub via: &'a HeaderValue,
    /// The request's id.
    pub id: &'a HeaderValue,
}

/// What goes upstream, less the protocol's own: see [`speak`].
pub fn request(from_caller: &HeaderMap, own: &Own<'_>) -> HeaderMap {
    end_to_end(from_caller, own, is_for_models)
}

/// Whom a request comes from, for a backend that is no model.
#[derive(Clone, Debug)]
pub struct Forwarded {
    address: IpAddr,
    is_tls: bool,
    host: Option<HeaderValue>,
}

impl Forwarded {
    /// Of a request that `caller` sent.
    pub(crate) fn new(caller: &Caller, head: &http::request::Parts) -> Self {
        let authority = head.uri.authority();
        let authority = authority.and_then(|name| HeaderValue::from_str(name.as_str()).ok());
        Self {
            address: caller.address.to_canonical(),
            is_tls: caller.is_tls,
            host: authority.or_else(|| head.headers.get(HOST).cloned()),
        }
    }

    /// Adds the caller to those that the request went through before. What a proxy said of the first of them stays.
    fn tell(&self, headers: &mut HeaderMap) {
        let before = headers.get_all(X_FORWARDED_FOR).iter();
        let before = before.filter_map(|value| value.to_str().ok());
        let all: Vec<String> = before
            .map(str::to_owned)
            .chain([self.address.to_string()])
            .collect();
        if let Ok(all) = HeaderValue::try_from(all.join(", ")) {
            headers.insert(X_FORWARDED_FOR, all);
        }
        let scheme = if self.is_tls { "https" } else { "http" };
        headers
            .entry(X_FORWARDED_PROTO)
            .or_insert(HeaderValue::from_static(scheme));
        if let Some(host) = &self.host {
            headers.entry(X_FORWARDED_HOST).or_insert(host.clone());
        }
    }
}

fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(TE).iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
}

/// What goes to a backend that is no model. Trailers pass there, so that they are announced and asked for passes too.
pub fn to_service(
    from_caller: &HeaderMap,
    own: &Own<'_>,
    keeps_credentials: bool,
    forwarded: &Forwarded,
) -> HeaderMap {
    let mut headers = end_to_end(from_caller, own, |name| {
        keeps_credentials || !is_credential(name)
    });
    for announced in from_caller.get_all(TRAILER) {
        headers.append(TRAILER, announced.clone());
    }
    if takes_trailers(from_caller) {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    forwarded.tell(&mut headers);
    headers
}

/// What goes further than this hop, and what the gateway says itself.
fn end_to_end(
    from_caller: &HeaderMap,
    own: &Own<'_>,
    passes: impl Fn(&HeaderName) -> bool,
) -> HeaderMap {
    let named = if from_caller.contains_key(CONNECTION) {
        named_by_connection(from_caller)
    } else {
        Vec::new()
    };
    let mut headers = HeaderMap::with_capacity(from_caller.len() + ADDED);
    headers.insert(HOST, own.host.clone());
    for (name, value) in from_caller {
        if passes(name) && !stays_here(name) && !named.contains(name) {
            headers.append(name, value.clone());
        }
    }
    if let Some((name, value)) = own.credential {
        headers.insert(name, value.clone());
    }
    headers.append(VIA, own.via.clone());
    headers.insert(REQUEST_ID, own.id.clone());
    headers
}

/// The protocol's own headers. Those of a caller mean something only to a backend that speaks the caller's protocol.
pub fn speak(headers: &mut HeaderMap, protocol: Protocol, is_callers: bool) {
    if !is_callers {
        headers.remove(ANTHROPIC_VERSION);
        headers.remove(ANTHROPIC_BETA);
    }
    if let Protocol::Gemini | Protocol::Bedrock = protocol {
        // They steer the provider's API, on the gateway's account.
        let is_providers = |name: &&HeaderName| {
            let name = name.as_str();
            (name.starts_with("x-goog-") && name != GOOGLE_KEY) || name.starts_with("x-amz")
        };
        let steering: Vec<HeaderName> = headers.keys().filter(is_providers).cloned().collect();
        for name in steering {
            headers.remove(name);
        }
    }
    if protocol == Protocol::Anthropic && !headers.contains_key(ANTHROPIC_VERSION) {
        headers.insert(ANTHROPIC_VERSION, SPOKEN_VERSION);
    }
}

/// Which protocol a caller speaks on paths that both have: Anthropic's clients name its version.
pub fn speaks(headers: &HeaderMap) -> Dialect {
    if headers.contains_key(ANTHROPIC_VERSION) {
        Dialect::Anthropic
    } else {
        Dialect::OpenAi
    }
}

/// Leaves of a backend's headers what the caller may see. The length stays only where the bytes are sure to match.
pub fn answer(headers: &mut HeaderMap, keeps_length: bool) {
    headers.remove(TRAILER);
    answer_of_service(headers, keeps_length, false);
}

/// [`answer`], or what follows one, of a backend that is no model: its cookies may pass, and its trailers.
pub fn answer_of_service(headers: &mut HeaderMap, keeps_length: bool, keeps_cookies: bool) {
    if !keeps_cookies {
        headers.remove(SET_COOKIE);
    }
    if !keeps_length {
        headers.remove(CONTENT_LENGTH);
    }
    if headers.contains_key(CONNECTION) {
        for name in named_by_connection(headers) {
            headers.remove(name);
        }
    }
    for name in [
        &CONNECTION,
        &TRANSFER_ENCODING,
        &KEEP_ALIVE,
        &UPGRADE,
        &PROXY_AUTHENTICATE,
        &PROXY_CONNECTION,
    ] {
        headers.remove(name);
    }
}

/// The trailers that a head announces.
pub(crate) fn announced(headers: &HeaderMap) -> Vec<HeaderName> {
    names_in(headers, &TRAILER)
}

/// What recipients act on before a body: in its trailers it would be too late, or somebody else's word (RFC 9110,
/// 6.5.1).
fn is_of_heads(name: &HeaderName) -> bool {
    [
        AGE,
        CACHE_CONTROL,
        CONTENT_ENCODING,
        CONTENT_RANGE,
        CONTENT_TYPE,
        MAX_FORWARDS,
        SET_COOKIE,
        VIA,
        X_FORWARDED_FOR,
        X_FORWARDED_PROTO,
        X_FORWARDED_HOST,
    ]
    .contains(name)
}

/// What of trailers goes further, in either direction: nothing about the connection, no credentials, no cookies, and
/// nothing that belongs in a head.
pub(crate) fn trailers(trailers: HeaderMap) -> HeaderMap {
    let mut passed = HeaderMap::with_capacity(trailers.len());
    for (name, value) in &trailers {
        if !stays_here(name) && !is_credential(name) && !is_of_heads(name) {
            passed.append(name, value.clone());
        }
    }
    passed
}

/// Whether the request went through a gateway that calls itself `token` before.
pub fn passed(headers: &HeaderMap, token: &str) -> bool {
    headers
        .get_all(VIA)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| {
            value
                .split(',')
                .any(|hop| hop.split_ascii_whitespace().nth(1) == Some(token))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn only_end_to_end_headers_go_upstream() {
        let caller = map(&[
            ("authorization", "Bearer caller"),
            ("x-api-key", "caller"),
            ("cookie", "a=b"),
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("host", "gateway"),
            ("content-length", "5"),
            ("accept-encoding", "gzip"),
            ("x-request-id", "theirs"),
            ("traceparent", "00-1"),
            ("via", "1.1 other"),
        ]);
        let value = HeaderValue::from_static;
        let sent = request(
            &caller,
            &Own {
                host: &value("pod:8000"),
                credential: Some((&AUTHORIZATION, &value("Bearer ours"))),
                via: &value("1.1 me"),
                id: &value("id"),
            },
        );
        let expected = map(&[
            ("host", "pod:8000"),
            ("traceparent", "00-1"),
            ("via", "1.1 other"),
            ("via", "1.1 me"),
            ("authorization", "Bearer ours"),
            ("x-request-id", "id"),
        ]);
        let expected: HeaderMap =
            expected
                .into_iter()
                .fold(HeaderMap::new(), |mut all, (name, value)| {
                    if let Some(name) = name {
                        all.append(name, value);
                    } else {
                        all.append(VIA, value);
                    }
                    all
                });
        assert_eq!(sent, expected);
    }

    #[test]
    fn what_is_stored_holds_no_credential() {
        let caller = map(&[
            ("authorization", "Bearer caller"),
            ("x-api-key", "caller"),
            ("cookie", "a=b"),
            ("connection", "x-private"),
            ("x-private", "1"),
            ("accept-encoding", "gzip"),
            ("x-team", "research"),
        ]);
        let stored: Vec<&str> = kept(&caller).map(|(name, _)| name.as_str()).collect();
        assert_eq!(stored, ["x-team"]);
    }

    #[test]
    fn without_a_credential_no_authorization_goes_upstream() {
        let caller = map(&[("authorization", "Bearer caller")]);
        let value = HeaderValue::from_static;
        let own = Own {
            host: &value("h"),
            credential: None,
            via: &value("1.1 me"),
            id: &value("id"),
        };
        let sent = request(&caller, &own);
        assert!(!sent.contains_key(AUTHORIZATION));
    }

    #[test]
    fn cookies_and_connection_of_a_backend_stop_here() {
        let mut headers = map(&[
            ("set-cookie", "a"),
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "chunked"),
            ("content-type", "text/event-stream"),
        ]);
        answer(&mut headers, false);
        assert_eq!(headers, map(&[("content-type", "text/event-stream")]));
    }

    #[test]
    fn trailers_hold_no_credential_and_nothing_about_the_connection() {
        let sent = map(&[
            ("grpc-status", "0"),
            ("authorization", "Bearer caller"),
            ("cookie", "a=b"),
            ("set-cookie", "a"),
            ("content-length", "5"),
            ("transfer-encoding", "chunked"),
            ("x-api-key", "k"),
            ("x-forwarded-for", "10.0.0.1"),
            ("content-type", "text/html"),
        ]);
        assert_eq!(trailers(sent), map(&[("grpc-status", "0")]));
    }

    #[test]
    fn a_service_is_asked_for_trailers_where_the_caller_takes_them() {
        let value = HeaderValue::from_static;
        let own = Own {
            host: &value("h"),
            credential: None,
            via: &value("1.1 me"),
            id: &value("id"),
        };
        let forwarded = Forwarded {
            address: IpAddr::from([127, 0, 0, 1]),
            is_tls: false,
            host: None,
        };
        let sent = |te| to_service(&map(&[("te", te)]), &own, false, &forwarded);
        assert_eq!(sent("gzip;q=0.5, Trailers")[TE], "trailers");
        assert_eq!(sent("gzip;q=0.5, Trailers")[CONNECTION], "te");
        assert!(!sent("gzip").contains_key(TE));
    }

    #[test]
    fn anthropic_gets_a_version_and_others_none() {
        let caller = [("anthropic-version", "2024-01-01"), ("anthropic-beta", "x")];
        let spoken = |protocol, is_callers| {
            let mut headers = map(&caller);
            speak(&mut headers, protocol, is_callers);
            headers
        };
        assert_eq!(spoken(Protocol::Anthropic, true), map(&caller));
        let own = map(&[("anthropic-version", "2023-06-01")]);
        assert_eq!(spoken(Protocol::Anthropic, false), own);
        assert_eq!(spoken(Protocol::OpenAi, false), HeaderMap::new());
        let mut steering = map(&[
            ("x-goog-user-project", "theirs"),
            ("x-goog-api-key", "ours"),
            ("x-amz-target", "theirs"),
            ("x-other", "1"),
        ]);
        speak(&mut steering, Protocol::Gemini, false);
        let kept = [("x-goog-api-key", "ours"), ("x-other", "1")];
        assert_eq!(steering, map(&kept));
    }

    #[test]
    fn a_loop_is_seen_in_any_via_header() {
        let headers = map(&[("via", "1.0 a, 1.1 penstock-ns-g (x)")]);
        assert!(passed(&headers, "penstock-ns-g"));
        assert!(!passed(&headers, "penstock-ns-g2"));
        assert!(!passed(&HeaderMap::new(), "penstock-ns-g"));
    }
}
