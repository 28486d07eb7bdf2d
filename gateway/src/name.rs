//! (IO) Where a backend is that is known by its name. The name is looked up every few seconds while it is used. The
//! last addresses count until there are others: a resolver that fails, says nothing or has forgotten the name takes no
//! backend away that works.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use http::Uri;

/// A name is looked up again after this long, and so often while that fails. Records have a TTL that resolvers of
/// operating systems do not tell; 5 s is the least that providers and Kubernetes' DNS use.
const FRESH: Duration = Duration::from_secs(3);
/// Addresses older than this are not used at once: the name may have moved while nobody asked.
const OLD: Duration = Duration::from_mins(1);
/// How long requests wait for newer addresses than old ones.
const PATIENCE: Duration = Duration::from_secs(1);
/// Of one name.
const MAX_ADDRESSES: usize = 32;

type Addresses = Arc<[SocketAddr]>;
/// `None`: no address was found.
type Lookup = Shared<BoxFuture<'static, Option<Addresses>>>;

/// The name of a backend, or none.
#[derive(Debug, Default)]
pub struct Name {
    /// `None` for one that is known by its address.
    host: Option<(String, u16)>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last addresses, and when they came.
    known: Option<(Instant, Addresses)>,
    asked: Option<Instant>,
    /// One at a time, so a resolver that says nothing holds one thread for each name.
    lookup: Option<Lookup>,
    turn: usize,
}

impl Name {
    /// Of a backend at this origin (scheme and authority).
    pub fn of(origin: &str) -> Self {
        let uri: Option<Uri> = origin.parse().ok();
        let host = uri.as_ref().and_then(|uri| {
            let usual = if uri.scheme_str() == Some("https") {
                443
            } else {
                80
            };
            Some((uri.host()?.to_owned(), uri.port_u16().unwrap_or(usual)))
        });
        let is_address = |host: &str| {
            let plain = host.trim_start_matches('[').trim_end_matches(']');
            plain.parse::<IpAddr>().is_ok()
        };
        Self {
            host: host.filter(|(host, _)| !is_address(host)),
            ..Self::default()
        }
    }

    /// Whether a connection to `peer` leads where the name does.
    pub fn leads_to(&self, peer: IpAddr, now: Instant) -> bool {
        let Some(host) = &self.host else { return true };
        let (known, _) = self.state().look(now, || look_up(host.clone()));
        known.is_none_or(|(_, addresses)| addresses.iter().any(|address| address.ip() == peer))
    }

    /// Where to connect, in turns where there are several addresses; `None` if that is not known. `Some(&[])` for a
    /// backend that is known by its address. Cancel safe.
    pub async fn addresses(&self) -> Option<Vec<SocketAddr>> {
        let Some(host) = &self.host else {
            return Some(Vec::new());
        };
        let now = penstock_shell::clock::now();
        let (known, lookup) = self.state().look(now, || look_up(host.clone()));
        let found = match (known, lookup) {
            (Some((at, addresses)), Some(lookup)) if now.saturating_duration_since(at) >= OLD => {
                let newer = tokio::time::timeout(PATIENCE, lookup).await;
                newer.ok().flatten().unwrap_or(addresses)
            }
            (Some((_, addresses)), _) => addresses,
            (None, Some(lookup)) => lookup.await?,
            (None, None) => return None,
        };
        let mut found = found.to_vec();
        let turn = self.state().next_turn();
        let by = turn.checked_rem(found.len()).unwrap_or(0);
        found.rotate_left(by);
        Some(found)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What is known, and the lookup that is under way. `start` begins one if it is time.
    fn look(
        &mut self,
        now: Instant,
        start: impl FnOnce() -> BoxFuture<'static, Option<Addresses>>,
    ) -> (Option<(Instant, Addresses)>, Option<Lookup>) {
        self.hear(now);
        let is_fresh = |asked| now.saturating_duration_since(asked) < FRESH;
        if self.lookup.is_none() && !self.asked.is_some_and(is_fresh) {
            self.asked = Some(now);
            self.lookup = Some(start().shared());
            // Nothing happens before it is polled.
            self.hear(now);
        }
        (self.known.clone(), self.lookup.clone())
    }

    /// Takes in the answer of the lookup, if it has come.
    fn hear(&mut self, now: Instant) {
        let Some(answer) = self.lookup.clone().and_then(Lookup::now_or_never) else {
            return;
        };
        self.lookup = None;
        if let Some(addresses) = answer.filter(|addresses| !addresses.is_empty()) {
            self.known = Some((now, addresses));
        }
    }

    fn next_turn(&mut self) -> usize {
        self.turn = self.turn.wrapping_add(1);
        self.turn
    }
}

fn look_up((host, port): (String, u16)) -> BoxFuture<'static, Option<Addresses>> {
    async move {
        let found = tokio::net::lookup_host((host.as_str(), port)).await;
        Some(found.ok()?.take(MAX_ADDRESSES).collect())
    }
    .boxed()
}

#[cfg(test)]
mod tests {
    use futures::channel::oneshot;

    use super::*;

    fn addresses(last: u8) -> Addresses {
        Arc::from([SocketAddr::from(([127, 0, 1, last], 80))])
    }

    fn answer(addresses: Option<Addresses>) -> BoxFuture<'static, Option<Addresses>> {
        std::future::ready(addresses).boxed()
    }

    fn never() -> BoxFuture<'static, Option<Addresses>> {
        std::future::pending().boxed()
    }

    fn known(
        state: &mut State,
        now: Instant,
        next: BoxFuture<'static, Option<Addresses>>,
    ) -> Option<Addresses> {
        state.look(now, || next).0.map(|(_, addresses)| addresses)
    }

    #[test]
    fn a_name_is_asked_for_now_and_then() {
        let (mut state, start) = (State::default(), penstock_shell::clock::now());
        assert_eq!(
            known(&mut state, start, answer(Some(addresses(1)))),
            Some(addresses(1))
        );
        let soon = start + FRESH / 2;
        assert_eq!(
            known(&mut state, soon, answer(Some(addresses(2)))),
            Some(addresses(1))
        );
        let later = start + FRESH;
        assert_eq!(
            known(&mut state, later, answer(Some(addresses(2)))),
            Some(addresses(2))
        );
    }

    #[test]
    fn the_last_addresses_outlive_a_resolver_that_fails_or_says_nothing() {
        let (mut state, mut now) = (State::default(), penstock_shell::clock::now());
        known(&mut state, now, answer(Some(addresses(1))));
        for failed in [answer(None), answer(Some(Arc::from([]))), never()] {
            now += FRESH;
            assert_eq!(known(&mut state, now, failed), Some(addresses(1)));
        }
        // The one that says nothing is still asked: nobody else is.
        now += FRESH * 10;
        assert_eq!(
            known(&mut state, now, answer(Some(addresses(2)))),
            Some(addresses(1))
        );
    }

    #[test]
    fn a_late_answer_counts_when_it_comes() {
        let (mut state, start) = (State::default(), penstock_shell::clock::now());
        known(&mut state, start, answer(Some(addresses(1))));
        let (sender, receiver) = oneshot::channel();
        let late = receiver.map(Result::ok).boxed();
        assert_eq!(known(&mut state, start + FRESH, late), Some(addresses(1)));
        sender.send(addresses(2)).unwrap();
        let soon = start + FRESH + Duration::from_millis(1);
        assert_eq!(known(&mut state, soon, never()), Some(addresses(2)));
    }

    #[test]
    fn addresses_are_no_names() {
        for origin in ["http://127.0.0.1:80", "https://[::1]", "http://[::1]:8000"] {
            assert_eq!(Name::of(origin).host, None, "{origin}");
        }
        let name = Name::of("https://api.example.com");
        assert_eq!(name.host, Some(("api.example.com".to_owned(), 443)));
        assert_eq!(Name::of("http://a:8000").host, Some(("a".to_owned(), 8000)));
    }

    #[tokio::test]
    async fn a_real_name_is_found_and_left_when_it_leads_elsewhere() {
        let name = Name::of("http://localhost:80");
        let found = name.addresses().await.unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback()));
        let now = penstock_shell::clock::now();
        assert!(name.leads_to(found[0].ip(), now));
        assert!(!name.leads_to(IpAddr::from([192, 0, 2, 1]), now));
        assert!(Name::default().leads_to(IpAddr::from([192, 0, 2, 1]), now));
    }
}
