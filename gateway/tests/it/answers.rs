//! What backends of HTTP/1.1 send that is no answer, or only looks like one.

use crate::harness::*;

#[tokio::test]
async fn a_whole_answer_that_is_cut_with_its_connection_is_repeated_elsewhere() {
    let head = "HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n";
    let text = completion("whole");
    let (half, _) = text.split_at(text.len() / 2);
    let replies = vec![
        Reply::Raw(format!("{head}{text}")),
        Reply::Raw(format!("{head}{half}")),
    ];
    let upstream = Upstream::replies(replies).await;
    let other = Upstream::always(|| json_answer("other")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address, other.address])).await;
    for expected in ["whole", "other"] {
        let answer = gateway.post(&chat(false)).await;
        assert_eq!((answer.status, answer.body), (200, completion(expected)));
    }
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn what_is_told_before_an_answer_is_dropped_however_much_it_is() {
    let told = "HTTP/1.1 102 Processing\r\nx-told: 1\r\n\r\n".repeat(4_000);
    let text = completion("x");
    let length = text.len();
    let answer = format!(
        "{told}HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{text}"
    );
    let upstream = Upstream::replies(vec![Reply::Raw(answer)]).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.header("x-told")), (200, ""));
    assert_eq!(answer.body, text);
}

#[tokio::test]
async fn what_is_no_answer_is_not_asked_for_again_at_the_same_place() {
    let doubtful = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}";
    let replies = vec![json_answer("one"), Reply::Raw(doubtful.to_owned())];
    let upstream = Upstream::replies(replies).await;
    let other = Upstream::always(|| json_answer("other")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address, other.address])).await;
    // The second one finds the connection of the first, which was good until then.
    for expected in ["one", "other"] {
        let answer = gateway.post(&chat(false)).await;
        assert_eq!((answer.status, answer.body), (200, completion(expected)));
    }
    assert_eq!(upstream.count(), 2);
}
