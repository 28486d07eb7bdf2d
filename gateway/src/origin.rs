//! Where a caller is: what a trusted proxy says of its request. Pure.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

/// Longer names of regions are not believed.
const MAX_REGION_BYTES: usize = 63;

/// Who may say where callers are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    /// The header that says it.
    pub header: Option<HeaderName>,
    /// The addresses whose header is believed.
    pub trusted: Vec<IpNet>,
}

impl Origins {
    /// The region that a request came from which `peer` sent on; `None` where nobody says so who may. A header that is
    /// there twice may have come from the caller.
    pub fn told<'a>(&self, peer: IpAddr, headers: &'a HeaderMap) -> Option<&'a str> {
        let peer = peer.to_canonical();
        let is_trusted = self.trusted.iter().any(|net| net.contains(&peer));
        is_trusted.then(|| self.said(headers))?
    }

    /// The region that the headers say, whoever sent them.
    pub fn said<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        let mut values = headers.get_all(self.header.as_ref()?).iter();
        let (Some(region), None) = (values.next(), values.next()) else {
            return None;
        };
        let region = region.to_str().ok()?.trim();
        let is_name = (1..=MAX_REGION_BYTES).contains(&region.len());
        is_name.then_some(region)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_a_trusted_peer_is_believed_and_only_once() {
        let header = HeaderName::from_static("x-region");
        let origins = Origins {
            header: Some(header.clone()),
            trusted: vec!["10.1.0.0/16".parse().unwrap()],
        };
        let told = |peer: &str, values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header.clone(), HeaderValue::from_static(value));
            }
            let told = origins.told(peer.parse().unwrap(), &headers);
            told.map(str::to_owned)
        };
        assert_eq!(told("10.1.2.3", &[" eu-west-1"]).unwrap(), "eu-west-1");
        assert_eq!(
            told("::ffff:10.1.2.3", &["eu-west-1"]).unwrap(),
            "eu-west-1"
        );
        assert_eq!(told("10.2.0.1", &["eu-west-1"]), None);
        assert_eq!(told("10.1.2.3", &[]), None);
        assert_eq!(told("10.1.2.3", &[""]), None);
        assert_eq!(told("10.1.2.3", &["eu-west-1", "us-east-1"]), None);
        let none = Origins::default();
        assert_eq!(none.told([10, 1, 2, 3].into(), &HeaderMap::new()), None);
    }
}
