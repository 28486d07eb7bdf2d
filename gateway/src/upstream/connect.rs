//! (IO) A connection without HTTP over it: the name, TCP, TLS.

use std::convert::Infallible;
use std::error::Error;
use std::future::Ready;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns;
use tokio::net::{TcpSocket, TcpStream};
use tower_service::Service;

use super::ConnectError;
use crate::snapshot::{Address, Endpoint};
use crate::socket::Socket;
use crate::trust::{HandshakeError, Secured};

/// What the kernel keeps of an answer whose caller does not take it, at most; systems allow less (Linux twice
/// `net.core.rmem_max`, which is 416 KiB where nobody changed it). Left alone it becomes up to 6 MiB: a backend would
/// go on for a caller that is gone. 200 KiB under way are 2 MB/s where the round trip is 100 ms: few answers come
/// faster.
const RECEIVE_BYTES: usize = 512 << 10;

/// How a connection is made.
pub(super) struct Made {
    /// What its handshake is made with.
    secured: Option<Arc<Secured>>,
    /// Where it leads, once that is known, and if it can change.
    peer: OnceLock<IpAddr>,
}

impl Made {
    /// One to `endpoint`.
    pub(super) fn new(endpoint: &Endpoint) -> Self {
        Self {
            secured: endpoint.secured.clone(),
            peer: OnceLock::new(),
        }
    }

    /// It is `socket` now.
    pub(super) fn open(&self, endpoint: &Endpoint, socket: &Socket) {
        if let (Address::Origin(_), Ok(peer)) = (&endpoint.address, socket.tcp().peer_addr()) {
            self.peer.get_or_init(|| peer.ip());
        }
    }

    /// Whether a new one to `endpoint` could be made in the same way.
    pub(super) fn is_of(&self, endpoint: &Endpoint, now: Instant) -> bool {
        let is_secured_so = match (&self.secured, &endpoint.secured) {
            (Some(made), Some(wanted)) => Arc::ptr_eq(made, wanted),
            (made, wanted) => made.is_none() && wanted.is_none(),
        };
        let name = &endpoint.live.name;
        is_secured_so && self.peer.get().is_none_or(|peer| name.leads_to(*peer, now))
    }
}

/// The addresses of a name, for hyper's connector, which tries them one after another.
#[derive(Clone)]
struct Known(Vec<SocketAddr>);

impl Service<dns::Name> for Known {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _name: dns::Name) -> Self::Future {
        std::future::ready(Ok(self.0.clone().into_iter()))
    }
}

/// Connects to an endpoint; each address of a name gets its part of `limit`.
pub(super) async fn socket(endpoint: &Endpoint, limit: Duration) -> Result<Socket, ConnectError> {
    let tcp = tcp(endpoint, limit).await?;
    let Some(secured) = &endpoint.secured else {
        return Ok(Socket::Plain(tcp));
    };
    match secured.connect(tcp).await {
        Ok(socket) => {
            // A backend that does not take the gateway's certificate says so later.
            if endpoint.live.handshake.failed() != Some(HandshakeError::ClientCertificate) {
                endpoint.live.handshake.note(None);
            }
            Ok(socket)
        }
        Err(err) => {
            let failed = HandshakeError::find(&err).unwrap_or(HandshakeError::Handshake);
            note(endpoint, failed, &err);
            Err(ConnectError::Handshake(failed))
        }
    }
}

async fn tcp(endpoint: &Endpoint, limit: Duration) -> Result<TcpStream, ConnectError> {
    match &endpoint.address {
        Address::Socket(address) => {
            let opened = plain(*address).await;
            opened.map_err(|_| ConnectError::Refused)
        }
        Address::Origin(origin) => {
            let uri: Uri = origin.parse().map_err(|_| ConnectError::Refused)?;
            let known = endpoint.live.name.addresses().await;
            let known = Known(known.ok_or(ConnectError::Refused)?);
            let mut connector = HttpConnector::new_with_resolver(known);
            connector.set_nodelay(true);
            connector.set_recv_buffer_size(Some(RECEIVE_BYTES));
            connector.enforce_http(false);
            connector.set_connect_timeout(Some(limit));
            let opened = connector.call(uri).await;
            let opened = opened.map_err(|_| ConnectError::Refused)?;
            Ok(opened.into_inner())
        }
    }
}

async fn plain(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    let bytes = u32::try_from(RECEIVE_BYTES).unwrap_or(u32::MAX);
    socket.set_recv_buffer_size(bytes)?;
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Says why TLS cannot be spoken with an endpoint, once for each reason.
pub(super) fn note(endpoint: &Endpoint, failed: HandshakeError, err: &(dyn Error + 'static)) {
    if endpoint.live.handshake.note(Some(failed)) {
        tracing::warn!(
            backend.id = %endpoint.live.backend,
            endpoint = %endpoint.address,
            reason = failed.label(),
            error = err,
            "no TLS with this endpoint: {failed}"
        );
    }
}
