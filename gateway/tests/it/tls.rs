//! Backends behind https. The key in `fixtures` is known to everybody and serves these tests only; its certificate
//! is good for `localhost` and 127.0.0.1 until 2126.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use penstock_gateway::Error;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::harness::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// Answers one request a connection over TLS, from a thread that ends with the process.
fn https_server() -> SocketAddr {
    let certificates = CertificateDer::pem_file_iter(fixture("server.pem"))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let key = PrivateKeyDer::from_pem_file(fixture("server.key")).unwrap();
    let config =
        ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            let stream = StreamOwned::new(connection, stream.unwrap());
            // A handshake that the gateway refuses ends the connection, not the server.
            let _refused = answer(stream);
        }
    });
    address
}

fn answer(stream: StreamOwned<ServerConnection, std::net::TcpStream>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        let line = line.to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let seen =
        if head.contains("post /base/v1/chat/completions") && head.contains("host: localhost:") {
            "as asked"
        } else {
            "something else"
        };
    let text = completion(seen);
    let mut stream = reader.into_inner();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    )?;
    stream.flush()
}

fn plan(server: SocketAddr) -> Plan {
    Plan::new().url("a", &format!("https://localhost:{}/base/v1", server.port()))
}

#[tokio::test]
async fn a_backend_signed_by_the_given_authority_is_used() {
    let mut settings = settings();
    settings.upstream_ca = Some(fixture("authority.pem"));
    let gateway = Gateway::start_with(&plan(https_server()), settings).await;
    for _ in 0..2 {
        let answer = gateway.post(&chat(false)).await;
        assert_eq!((answer.status, answer.body), (200, completion("as asked")));
    }
}

#[tokio::test]
async fn a_backend_that_nobody_vouches_for_is_not_used() {
    let gateway = Gateway::start(&plan(https_server())).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "upstream_unreachable")
    );
}

#[tokio::test]
async fn authorities_that_cannot_be_read_stop_the_start() {
    for name in ["missing.pem", "server.key"] {
        let mut settings = settings();
        settings.upstream_ca = Some(fixture(name));
        let mut gateway = Gateway::empty(settings).await;
        assert!(
            matches!(gateway.ended().await, Err(Error::Tls(_))),
            "{name}"
        );
    }
}
