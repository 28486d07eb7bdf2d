//! (IO) The floor: copies bytes both ways between a caller and the mock and looks at none of them.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// As much as one read of an HTTP server commonly takes.
const COPY_BYTES: usize = 8 << 10;

pub(crate) async fn run(listen: SocketAddr, to: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.context("listen")?;
    let mut connections = JoinSet::new();
    loop {
        let (mut caller, _) = listener.accept().await.context("accept")?;
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            let mut upstream = TcpStream::connect(to).await?;
            caller.set_nodelay(true)?;
            upstream.set_nodelay(true)?;
            tokio::io::copy_bidirectional_with_sizes(
                &mut caller,
                &mut upstream,
                COPY_BYTES,
                COPY_BYTES,
            )
            .await
        });
    }
}
