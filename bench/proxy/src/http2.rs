//! (IO) Connections of HTTP/2 in the clear that begin with it ("prior knowledge"), each for many streams at a time.

use std::cell::Cell;
use std::rc::Rc;

use anyhow::Context as _;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderName, HeaderValue, Request};
use tokio::task::JoinSet;

use crate::answer::{Answer, Failure, LONGEST, Reading};
use crate::args::Shape;
use crate::caller::connect;
use crate::template::{HEADERS, PATH, Template};

/// On one connection at a time: what servers commonly allow, and what clients take for granted (RFC 9113, 6.5.2).
pub(crate) const STREAMS: usize = 100;

/// A stream on a connection that others share.
pub(crate) struct Caller {
    connection: SendRequest<Bytes>,
    head: Request<()>,
    template: Rc<Template>,
    /// Counts streams that have begun.
    begun: Rc<Cell<u32>>,
}

/// As many callers as are wanted, [`STREAMS`] of them to a connection. `connections` carries what they send: who drops
/// it ends them all. One that breaks fails its streams, which say so.
pub(crate) async fn callers(
    wanted: u32,
    shape: &Shape,
    template: &Rc<Template>,
    begun: &Rc<Cell<u32>>,
    connections: &mut JoinSet<Result<(), h2::Error>>,
) -> anyhow::Result<Vec<Caller>> {
    let wanted = usize::try_from(wanted)?;
    let head = head(shape, template)?;
    let mut callers = Vec::new();
    while callers.len() < wanted {
        let stream = connect(shape.connect).await;
        let stream = stream.map_err(|failure| anyhow::anyhow!(failure.reason()))?;
        let (sender, connection) = h2::client::handshake(stream)
            .await
            .context("begin HTTP/2")?;
        connections.spawn_local(connection);
        for _ in 0..STREAMS.min(wanted - callers.len()) {
            callers.push(Caller {
                connection: sender.clone(),
                head: head.clone(),
                template: Rc::clone(template),
                begun: Rc::clone(begun),
            });
        }
    }
    Ok(callers)
}

/// The same headers as over HTTP/1.1.
fn head(shape: &Shape, template: &Template) -> anyhow::Result<Request<()>> {
    let mut head = Request::post(format!("http://{}{PATH}", shape.connect)).body(())?;
    let headers = head.headers_mut();
    for (name, value) in HEADERS {
        let value = HeaderValue::from_static(value);
        headers.append(HeaderName::from_static(name), value);
    }
    headers.append(http::header::CONTENT_LENGTH, template.body_bytes().into());
    for header in &shape.headers {
        let (name, value) = header.split_once(':').context("a header has no colon")?;
        headers.append(name.parse::<HeaderName>()?, value.trim().parse()?);
    }
    Ok(head)
}

impl Caller {
    /// One request and its answer.
    pub(crate) async fn call(&self, nonce: u64) -> Result<Answer, Failure> {
        let exchange = tokio::time::timeout(LONGEST, self.exchange(nonce));
        exchange.await.map_err(|_| Failure::Late)?
    }

    async fn exchange(&self, nonce: u64) -> Result<Answer, Failure> {
        let connection = self.connection.clone().ready().await;
        let mut connection = connection.map_err(|_| Failure::Send)?;
        let mut reading = Reading::begin();
        let sent = connection.send_request(self.head.clone(), false);
        let (answer, mut request) = sent.map_err(|_| Failure::Send)?;
        let sent = request.send_data(self.template.body(nonce), true);
        sent.map_err(|_| Failure::Send)?;
        let answer = answer.await.map_err(|_| Failure::Receive)?;
        let status = answer.status().as_u16();
        let mut body = answer.into_body();
        while let Some(piece) = body.data().await {
            let piece = piece.map_err(|_| Failure::Receive)?;
            let released = body.flow_control().release_capacity(piece.len());
            released.map_err(|_| Failure::Receive)?;
            reading.read(&piece);
            reading.note(&self.begun);
        }
        reading.end(status, &self.template)
    }
}
