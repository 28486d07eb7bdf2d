//! (IO) Listeners. A taken port is named together with the flag that changes it.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket};

/// Connections that the kernel may hold until they are accepted; it takes `net.core.somaxconn` (usually 4096) if that
/// is less. With the library's 128 a burst of callers loses connection attempts, which come again after a second.
const BACKLOG: u32 = 4096;

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

/// Binds `address`; `flag` is the command-line flag it came from. Called within a runtime, which it joins.
pub fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, ListenError> {
    listen(address).map_err(|err| match err.kind() {
        std::io::ErrorKind::AddrInUse => ListenError::InUse { address, flag },
        _ => ListenError::Listen { address, flag, err },
    })
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // A restarted process may listen while connections of the last one linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn taken_port_names_the_flag() {
        let first = bind("127.0.0.1:0".parse().unwrap(), "--listen").unwrap();
        let taken = first.local_addr().unwrap();
        let error = bind(taken, "--listen").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{taken} is already in use: choose another address with --listen")
        );
    }
}
