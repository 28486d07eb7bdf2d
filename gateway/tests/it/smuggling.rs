//! Requests whose end can be read in two ways: what follows them must never be taken for a request.

use crate::harness::*;

const LINE: &str = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n";

/// Sends `bytes` in pieces of this size, and awaits the answer and the end of the connection.
async fn refused(gateway: &Gateway, bytes: &str, piece: usize) -> (u16, String) {
    let mut client = gateway.client().await;
    for piece in bytes.as_bytes().chunks(piece) {
        client.send(std::str::from_utf8(piece).unwrap()).await;
        tokio::task::yield_now().await;
    }
    let answer = client.answer().await;
    assert!(client.closed().await, "the connection stays: {bytes:?}");
    let code = if answer.body.is_empty() {
        String::new()
    } else {
        answer.code()
    };
    (answer.status, code)
}

/// What a front proxy that believes the other length would have sent as the next request.
fn hidden() -> String {
    let body = chat(false);
    format!("{LINE}content-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn a_body_with_two_lengths_is_refused_and_nothing_behind_it_is_read() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let body = chunk(&chat(false));
    let hidden = hidden();
    let both = [
        "content-length: 3\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 3\r\n",
        "Transfer-Encoding: chunked\r\nx: y\r\nCONTENT-LENGTH:3\r\n",
    ];
    for headers in both {
        let head = format!("{LINE}{headers}\r\n");
        let request = format!("{head}{body}0\r\n\r\n{hidden}");
        for (request, piece) in [(&head, 1), (&head, 7), (&request, request.len())] {
            assert_eq!(
                refused(&gateway, request, piece).await,
                (400, "ambiguous_length".to_owned()),
                "{request:?}"
            );
        }
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn two_lengths_are_found_on_a_connection_that_carried_requests_before() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let body = chunk(&chat(false));
    let chunked = format!("{LINE}transfer-encoding: chunked\r\n\r\n{body}0\r\n\r\n");
    let both = format!(
        "{LINE}content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n{body}0\r\n\r\n{}",
        hidden()
    );
    let mut client = gateway.client().await;
    // All at once: the heads behind the first come while it is still answered.
    client
        .send(&format!("{}{chunked}{}{both}", hidden(), hidden()))
        .await;
    for _ in 0..3 {
        assert_eq!(client.answer().await.status, 200);
    }
    let last = client.answer().await;
    assert_eq!(
        (last.status, last.code().as_str(), last.header("connection")),
        (400, "ambiguous_length", "close")
    );
    assert!(client.closed().await);
    assert_eq!(upstream.count(), 3);
}

#[tokio::test]
async fn lengths_and_codings_that_somebody_could_read_otherwise_are_refused() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let hidden = hidden();
    for headers in [
        "content-length: 4\r\ncontent-length: 5\r\n",
        "content-length: 4, 4\r\n",
        "content-length: +4\r\n",
        "content-length: 0x4\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding: identity, chunked\r\n",
        "transfer-encoding: gzip, chunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: identity\r\n",
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding : chunked\r\n",
        "content-length: 4\r\n transfer-encoding: chunked\r\n",
        "x: a\r\n b\r\ncontent-length: 4\r\n",
        "x: a\rtransfer-encoding: chunked\r\ncontent-length: 4\r\n",
        "host : y\r\ncontent-length: 4\r\n",
    ] {
        let request = format!("{LINE}{headers}\r\n{{}}\r\n{hidden}");
        assert_eq!(
            refused(&gateway, &request, request.len()).await.0,
            400,
            "{headers:?}"
        );
    }
    let old =
        format!("POST /v1/chat/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n{hidden}");
    assert_eq!(refused(&gateway, &old, old.len()).await.0, 400);
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_chunk_that_is_none_ends_the_connection() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    for chunks in [
        "ZZ\r\n{}\r\n0\r\n\r\n",
        "-2\r\n{}\r\n0\r\n\r\n",
        "2{}\r\n0\r\n\r\n",
        "fffffffffffffffff\r\n{}",
    ] {
        let request = format!(
            "{LINE}transfer-encoding: chunked\r\n\r\n{chunks}{}",
            hidden()
        );
        assert_eq!(
            refused(&gateway, &request, request.len()).await.0,
            400,
            "{chunks:?}"
        );
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn lines_that_end_in_a_line_feed_alone_are_lines() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let body = chat(false);
    let plain = format!(
        "POST /v1/chat/completions HTTP/1.1\nhost: x\ncontent-length: {}\n\n{body}",
        body.len()
    );
    let mut client = gateway.client().await;
    client.send(&plain).await;
    client.send(&plain).await;
    for _ in 0..2 {
        assert_eq!(client.answer().await.status, 200);
    }
    let both = format!(
        "POST /v1/chat/completions HTTP/1.1\nhost: x\ncontent-length: 3\ntransfer-encoding: chunked\n\n{}0\r\n\r\n",
        chunk(&body)
    );
    assert_eq!(refused(&gateway, &both, both.len()).await.0, 400);
    assert_eq!(upstream.count(), 2);
}
