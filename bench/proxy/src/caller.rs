//! (IO) One connection of HTTP/1.1, in the clear or over TLS, that sends one request at a time and checks that each
//! answer is whole.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;

use rustls::pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::answer::{Answer, Failure, LONGEST, Reading};
use crate::template::Template;
use crate::wire::{Body, Buffer, Framing, head};

type Connection = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Where connections go.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    /// What speaks TLS there; none in the clear.
    pub(crate) tls: Option<TlsConnector>,
}

pub(crate) struct Caller {
    target: Target,
    template: Rc<Template>,
    request: Vec<u8>,
    stream: Option<Connection>,
    buffer: Buffer,
    /// Counts streams that have begun.
    begun: Rc<Cell<u32>>,
}

impl Target {
    async fn connect(&self) -> Result<Connection, Failure> {
        let stream = connect(self.address).await?;
        let Some(tls) = &self.tls else {
            return Ok(Either::Left(stream));
        };
        let handshake = tls.connect(ServerName::from(self.address.ip()), stream);
        let stream = tokio::time::timeout(LONGEST, handshake).await;
        let stream = stream.map_err(|_| Failure::Late)?;
        let stream = stream.map_err(|_| Failure::Handshake)?;
        Ok(Either::Right(Box::new(stream)))
    }
}

pub(crate) async fn connect(address: SocketAddr) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(address).await;
    let stream = stream.map_err(|_| Failure::Connect)?;
    stream.set_nodelay(true).map_err(|_| Failure::Connect)?;
    Ok(stream)
}

impl Caller {
    pub(crate) fn new(target: &Target, template: &Rc<Template>, begun: &Rc<Cell<u32>>) -> Self {
        Self {
            target: target.clone(),
            request: template.request(),
            template: Rc::clone(template),
            stream: None,
            buffer: Buffer::new(),
            begun: Rc::clone(begun),
        }
    }

    /// Connects, which the first call does otherwise.
    pub(crate) async fn open(&mut self) -> Result<(), Failure> {
        self.stream = Some(self.connect().await?);
        Ok(())
    }

    /// One request and its answer. After a failure the next call makes a new connection.
    pub(crate) async fn call(&mut self, nonce: u64) -> Result<Answer, Failure> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect().await?,
        };
        self.template.number(&mut self.request, nonce);
        let exchange = tokio::time::timeout(LONGEST, self.exchange(&mut stream));
        let (answer, close) = exchange.await.map_err(|_| Failure::Late)??;
        if !close {
            self.stream = Some(stream);
        }
        Ok(answer)
    }

    async fn connect(&mut self) -> Result<Connection, Failure> {
        self.buffer.clear();
        self.target.connect().await
    }

    async fn exchange(&mut self, stream: &mut Connection) -> Result<(Answer, bool), Failure> {
        let mut reading = Reading::begin();
        if self.template.split {
            let (head, body) = self.template.parts(&self.request);
            stream.write_all(head).await.map_err(|_| Failure::Send)?;
            stream.write_all(body).await.map_err(|_| Failure::Send)?;
        } else {
            let all = stream.write_all(&self.request);
            all.await.map_err(|_| Failure::Send)?;
        }
        // TLS may hold back what the socket had no room for.
        stream.flush().await.map_err(|_| Failure::Send)?;
        let head = loop {
            match head(self.buffer.data()).map_err(|_| Failure::Malformed)? {
                Some(head) => break head,
                None => self.receive(stream).await?,
            }
        };
        self.buffer.consume(head.bytes);
        if head.framing == Framing::Unsaid {
            return Err(Failure::Malformed);
        }
        let mut body = Body::new(head.framing);
        loop {
            let taken = body.take(self.buffer.data(), |piece| reading.read(piece));
            self.buffer.consume(taken.map_err(|_| Failure::Malformed)?);
            reading.note(&self.begun);
            if body.is_done() {
                break;
            }
            self.receive(stream).await?;
        }
        Ok((reading.end(head.status, &self.template)?, head.close))
    }

    async fn receive(&mut self, stream: &mut Connection) -> Result<(), Failure> {
        match self.buffer.fill(stream).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::Closed),
            Err(_) => Err(Failure::Receive),
        }
    }
}

/// Where a run's numbers begin, so that no two runs send the same body.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(crate) fn first_nonce() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(0))
}
