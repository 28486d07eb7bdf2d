//! (IO) A client for what the gateway itself asks of others than backends: keys of identity providers, places for
//! usage.

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::ClientConfig;

/// One that trusts whom `tls` trusts and keeps no connection.
pub(crate) fn open<B>(tls: &ClientConfig) -> Client<HttpsConnector<HttpConnector>, B>
where
    B: hyper::body::Body + Send,
    B::Data: Send,
{
    let mut tls = tls.clone();
    // The connector says itself what is spoken.
    tls.alpn_protocols.clear();
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .build();
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .build(connector)
}

/// What lies at the bottom of an error.
pub(crate) fn root(err: &dyn std::error::Error) -> String {
    let mut at = err;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}
