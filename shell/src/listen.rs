//! (IO) Listeners. A taken port is named together with the flag that changes it.

use std::net::SocketAddr;

use tokio::net::TcpListener;

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has it.
    #[error("{address} is already in use: choose another address with {flag}")]
    InUse {
        /// The wanted address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
    },
    /// Any other refusal.
    #[error("listen on {address} ({flag})")]
    Listen {
        /// The wanted address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// What the system said.
        #[source]
        err: std::io::Error,
    },
}

/// Binds `address`; `flag` is the command-line flag it came from.
pub async fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|err| match err.kind() {
            std::io::ErrorKind::AddrInUse => ListenError::InUse { address, flag },
            _ => ListenError::Listen { address, flag, err },
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn taken_port_names_the_flag() {
        let first = bind("127.0.0.1:0".parse().unwrap(), "--listen")
            .await
            .unwrap();
        let taken = first.local_addr().unwrap();
        let error = bind(taken, "--listen").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{taken} is already in use: choose another address with --listen")
        );
    }
}
