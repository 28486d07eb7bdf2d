//! TLS provider of the process: rustls with ring, installed once.

/// Makes ring the provider for every rustls user in this process. Safe to call again.
pub fn install() {
    // Err means that a provider is installed already; all of ours are ring.
    let _already_set = rustls::crypto::ring::default_provider().install_default();
}
