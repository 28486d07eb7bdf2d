//! Callers over TLS: which certificate they see, when it changes, and who is let in.

use std::sync::atomic::{AtomicUsize, Ordering};

use penstock_gateway::{Settings, TlsSettings};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::*;

fn serving(folders: &[&tempfile::TempDir]) -> Settings {
    let mut settings = settings();
    settings.tls.folders = folders.iter().map(|dir| dir.path().to_owned()).collect();
    settings
}

fn mounted(signed: &Signed) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    signed.mount(folder.path(), "1");
    folder
}

/// A gateway with an upstream that counts.
async fn gateway(settings: Settings) -> (Gateway, Upstream) {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    (gateway, upstream)
}

/// The certificate that a caller for `name` sees.
async fn seen(
    gateway: &Gateway,
    authority: &Authority,
    name: &str,
) -> Option<CertificateDer<'static>> {
    let address = gateway.tls_address.unwrap();
    let stream = tls(address, authority.client(&[], None), name).await.ok()?;
    let chain = stream.get_ref().1.peer_certificates()?;
    chain.first().cloned().map(CertificateDer::into_owned)
}

#[tokio::test]
async fn both_protocols_are_spoken_over_tls_beside_the_clear() {
    let authority = Authority::new();
    let folder = mounted(&authority.sign(&["gateway.example"]));
    let (gateway, upstream) = gateway(serving(&[&folder])).await;
    let address = gateway.tls_address.unwrap();
    let body = chat(false);

    let config = authority.client(&["h2", "http/1.1"], None);
    let stream = tls(address, config, "gateway.example").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut client = H2Client::over(stream).await.unwrap();
    for _ in 0..2 {
        let answer = client.post("/v1/chat/completions", &body).await;
        assert_eq!(answer, (200, completion("x")));
    }

    for protocols in [&["http/1.1"][..], &[]] {
        let config = authority.client(protocols, None);
        let mut stream = tls(address, config, "gateway.example").await.unwrap();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        within("an answer", stream.read_to_string(&mut answer))
            .await
            .unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with(&completion("x")),
            "{answer}"
        );
    }
    assert_eq!(gateway.post(&body).await.status, 200);
    assert_eq!(upstream.count(), 5);
}

#[tokio::test]
async fn a_client_that_speaks_no_protocol_of_ours_and_old_tls_are_refused() {
    let authority = Authority::new();
    let folder = mounted(&authority.sign(&["gateway.example"]));
    let (gateway, _upstream) = gateway(serving(&[&folder])).await;
    let address = gateway.tls_address.unwrap();
    let config = authority.client(&["smtp"], None);
    assert!(tls(address, config, "gateway.example").await.is_err());
    // TLS 1.1, a client hello that offers nothing newer: an alert comes back, or the end.
    let mut old = Client::connect(address).await;
    let hello = [
        &[22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 2][..],
        &[7; 32],
        &[0, 0, 2, 0, 47, 1, 0],
    ]
    .concat();
    old.stream.write_all(&hello).await.unwrap();
    let mut said = Vec::new();
    let read = within("the end", old.stream.read_to_end(&mut said)).await;
    assert!(
        read.is_err() || said.first() == Some(&21) || said.is_empty(),
        "{said:?}"
    );
    // In the clear on the port for TLS.
    let mut clear = Client::connect(address).await;
    clear.post("", &chat(false)).await;
    let mut said = Vec::new();
    let _ = within("the end", clear.stream.read_to_end(&mut said)).await;
    assert!(!said.starts_with(b"HTTP"), "{said:?}");
}

#[tokio::test]
async fn the_name_that_a_caller_asks_for_chooses_the_certificate() {
    let authority = Authority::new();
    let first = authority.sign(&["one.example"]);
    let second = authority.sign(&["two.example", "*.wild.example"]);
    let (a, b) = (mounted(&first), mounted(&second));
    let (gateway, _upstream) = gateway(serving(&[&a, &b])).await;
    for (name, expected) in [
        ("one.example", &first),
        ("two.example", &second),
        ("x.wild.example", &second),
    ] {
        let got = seen(&gateway, &authority, name).await;
        assert_eq!(got, Some(expected.der()), "{name}");
    }
    // The first one answers, and is not for that name.
    assert_eq!(seen(&gateway, &authority, "other.example").await, None);
}

#[tokio::test]
async fn a_new_certificate_is_served_without_a_restart() {
    let authority = Authority::new();
    let (old, new) = (
        authority.sign(&["x.example"]),
        authority.sign(&["x.example"]),
    );
    let folder = mounted(&old);
    let (gateway, _upstream) = gateway(serving(&[&folder])).await;
    let address = gateway.tls_address.unwrap();
    let stream = tls(address, authority.client(&["h2"], None), "x.example")
        .await
        .unwrap();
    let mut client = H2Client::over(stream).await.unwrap();
    assert_eq!(
        client.post("/v1/chat/completions", &chat(false)).await.0,
        200
    );

    new.mount(folder.path(), "2");
    let tries = AtomicUsize::new(0);
    within("the new certificate", async {
        while seen(&gateway, &authority, "x.example").await != Some(new.der()) {
            tries.fetch_add(1, Ordering::Relaxed);
        }
    })
    .await;
    assert_eq!(
        client.post("/v1/chat/completions", &chat(false)).await.0,
        200,
        "connections stay"
    );
    gateway
        .metric_is("penstock_gateway_certificate_reloads_total", 2.0)
        .await;
    gateway
        .metric_is("penstock_gateway_certificates_unusable", 0.0)
        .await;
}

#[tokio::test]
async fn a_broken_certificate_leaves_the_last_good_one_in_force() {
    let authority = Authority::new();
    let (old, new) = (
        authority.sign(&["x.example"]),
        authority.sign(&["x.example"]),
    );
    let folder = mounted(&new);
    let (gateway, _upstream) = gateway(serving(&[&folder])).await;
    assert_eq!(
        seen(&gateway, &authority, "x.example").await,
        Some(new.der())
    );
    for (version, broken) in [
        (
            "3",
            Signed {
                key: old.key.clone(),
                ..new.clone()
            },
        ),
        (
            "4",
            Signed {
                certificate: "no certificate".to_owned(),
                ..new.clone()
            },
        ),
        (
            "5",
            Signed {
                key: String::new(),
                ..new.clone()
            },
        ),
    ] {
        broken.mount(folder.path(), version);
        gateway
            .metric_is("penstock_gateway_certificates_unusable", 1.0)
            .await;
        assert_eq!(
            seen(&gateway, &authority, "x.example").await,
            Some(new.der()),
            "{version}"
        );
        new.mount(folder.path(), &format!("{version}-mended"));
        gateway
            .metric_is("penstock_gateway_certificates_unusable", 0.0)
            .await;
    }
    std::fs::remove_file(folder.path().join("..data")).unwrap();
    gateway
        .metric_is("penstock_gateway_certificates_unusable", 1.0)
        .await;
    assert_eq!(
        seen(&gateway, &authority, "x.example").await,
        Some(new.der())
    );
}

#[tokio::test]
async fn one_broken_certificate_takes_no_other_with_it() {
    let authority = Authority::new();
    let good = authority.sign(&["good.example"]);
    let (broken, folder) = (tempfile::tempdir().unwrap(), mounted(&good));
    let (gateway, _upstream) = gateway(serving(&[&broken, &folder])).await;
    gateway
        .metric_is("penstock_gateway_certificates_unusable", 1.0)
        .await;
    assert_eq!(
        seen(&gateway, &authority, "good.example").await,
        Some(good.der())
    );
    assert_eq!(gateway.post(&chat(false)).await.status, 200, "in the clear");
}

#[tokio::test]
async fn with_an_authority_for_callers_only_those_that_it_signed_are_let_in() {
    let (authority, ours, theirs) = (Authority::new(), Authority::new(), Authority::new());
    let folder = mounted(&authority.sign(&["x.example"]));
    let file = folder.path().join("ca.crt");
    std::fs::write(&file, &ours.pem).unwrap();
    let mut settings = serving(&[&folder]);
    settings.tls = TlsSettings {
        client_ca: Some(file),
        ..settings.tls
    };
    let (gateway, upstream) = gateway(settings).await;
    let address = gateway.tls_address.unwrap();
    for (shown, is_let_in) in [
        (Some(ours.sign(&["caller"])), true),
        (Some(theirs.sign(&["caller"])), false),
        (None, false),
    ] {
        let config = authority.client(&["h2"], shown.as_ref());
        // With TLS 1.3 a client learns that it was refused when it reads.
        let answer = match tls(address, config, "x.example").await {
            Err(_) => None,
            Ok(stream) => match H2Client::over(stream).await {
                Err(_) => None,
                Ok(mut client) => client
                    .request(post_to("/v1/chat/completions", &chat(false)))
                    .await
                    .ok(),
            },
        };
        assert_eq!(answer.is_some(), is_let_in);
    }
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn a_handshake_that_does_not_come_closes_the_connection() {
    let authority = Authority::new();
    let folder = mounted(&authority.sign(&["x.example"]));
    let mut settings = serving(&[&folder]);
    settings.limits.header_timeout = std::time::Duration::from_millis(200);
    let (gateway, _upstream) = gateway(settings).await;
    let mut silent = Client::connect(gateway.tls_address.unwrap()).await;
    assert!(silent.closed().await);
}
