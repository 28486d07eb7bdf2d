//! (IO) One connection that sends requests which were made before, one at a time, and checks that each answer is whole.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::args::Shape;
use crate::mock::{LAST, MARK};
use crate::wire::{Body, Buffer, Framing, Marker, head};

/// Of the number that makes each body another one, in hexadecimal.
const NONCE_DIGITS: usize = 16;
/// No answer takes longer than a paced stream of the longest kind.
const LONGEST_ANSWER: Duration = Duration::from_secs(40);

/// A request to copy, and what its answer must hold.
pub(crate) struct Template {
    bytes: Vec<u8>,
    head_bytes: usize,
    nonce_at: usize,
    marks: u64,
    stream: bool,
    split: bool,
    connect: SocketAddr,
}

/// When parts of an answer arrived.
pub(crate) struct Answer {
    pub(crate) sent: Instant,
    pub(crate) first: Instant,
    pub(crate) end: Instant,
}

/// Why there was no whole answer.
pub(crate) enum Failure {
    Connect,
    Send,
    Receive,
    Closed,
    Malformed,
    Late,
    Status(u16),
    /// Marks that came, of those that had to.
    Short(u64, u64),
}

pub(crate) struct Caller {
    template: Rc<Template>,
    request: Vec<u8>,
    stream: Option<TcpStream>,
    buffer: Buffer,
    marks: Marker,
    ends: Marker,
    /// Counts streams that have begun.
    begun: Rc<Cell<u32>>,
}

impl Failure {
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Connect => "cannot connect".to_owned(),
            Self::Send => "cannot send".to_owned(),
            Self::Receive => "cannot receive".to_owned(),
            Self::Closed => "closed early".to_owned(),
            Self::Malformed => "malformed HTTP".to_owned(),
            Self::Late => "no end in time".to_owned(),
            Self::Status(status) => format!("status {status}"),
            Self::Short(marks, of) => format!("{marks} of {of} parts"),
        }
    }
}

impl Template {
    pub(crate) fn new(shape: &Shape) -> Self {
        let before = format!(
            r#"{{"model":"mock","stream":{},"max_tokens":{},"seed":{},"messages":[{{"role":"user","content":""#,
            shape.stream, shape.deltas, shape.gap_ms
        );
        let after = r#""}]}"#;
        let fixed = before.len() + NONCE_DIGITS + after.len();
        let filler: String = " Tell me about the fox and the dog."
            .chars()
            .cycle()
            .take(shape.body_bytes.saturating_sub(fixed))
            .collect();
        let nonce = "0".repeat(NONCE_DIGITS);
        let body = format!("{before}{nonce}{filler}{after}");
        let mut head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\naccept: */*\r\n\
             user-agent: penstock-bench\r\nauthorization: Bearer sk-bench\r\ncontent-length: {}\r\n",
            shape.connect,
            body.len()
        );
        for header in &shape.headers {
            head.push_str(header);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        Self {
            head_bytes: head.len(),
            nonce_at: head.len() + before.len(),
            bytes: [head, body].concat().into_bytes(),
            marks: if shape.stream { shape.deltas } else { 1 },
            stream: shape.stream,
            split: shape.split,
            connect: shape.connect,
        }
    }

    pub(crate) fn deltas(&self) -> u64 {
        if self.stream { self.marks } else { 0 }
    }
}

impl Caller {
    pub(crate) fn new(template: &Rc<Template>, begun: &Rc<Cell<u32>>) -> Self {
        Self {
            request: template.bytes.clone(),
            template: Rc::clone(template),
            stream: None,
            buffer: Buffer::new(),
            marks: Marker::new(MARK),
            ends: Marker::new(LAST),
            begun: Rc::clone(begun),
        }
    }

    pub(crate) fn deltas(&self) -> u64 {
        self.template.deltas()
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
        let place = self.template.nonce_at..self.template.nonce_at + NONCE_DIGITS;
        self.request[place].copy_from_slice(format!("{nonce:016x}").as_bytes());
        let exchange = tokio::time::timeout(LONGEST_ANSWER, self.exchange(&mut stream));
        let (answer, close) = exchange.await.map_err(|_| Failure::Late)??;
        if !close {
            self.stream = Some(stream);
        }
        Ok(answer)
    }

    async fn connect(&mut self) -> Result<TcpStream, Failure> {
        self.buffer.clear();
        let stream = TcpStream::connect(self.template.connect)
            .await
            .map_err(|_| Failure::Connect)?;
        stream.set_nodelay(true).map_err(|_| Failure::Connect)?;
        Ok(stream)
    }

    #[expect(clippy::disallowed_methods, reason = "(IO) file")]
    async fn exchange(&mut self, stream: &mut TcpStream) -> Result<(Answer, bool), Failure> {
        let sent = Instant::now();
        if self.template.split {
            let (head, body) = self.request.split_at(self.template.head_bytes);
            stream.write_all(head).await.map_err(|_| Failure::Send)?;
            stream.write_all(body).await.map_err(|_| Failure::Send)?;
        } else {
            let all = stream.write_all(&self.request);
            all.await.map_err(|_| Failure::Send)?;
        }
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
        let mut first = None;
        let mut body = Body::new(head.framing);
        self.marks.reset();
        self.ends.reset();
        loop {
            let (marks, ends) = (&mut self.marks, &mut self.ends);
            let taken = body.take(self.buffer.data(), |piece| {
                marks.read(piece);
                ends.read(piece);
            });
            self.buffer.consume(taken.map_err(|_| Failure::Malformed)?);
            if first.is_none() && self.marks.count > 0 {
                first = Some(Instant::now());
                self.begun.set(self.begun.get() + 1);
            }
            if body.is_done() {
                break;
            }
            self.receive(stream).await?;
        }
        if head.status != 200 {
            return Err(Failure::Status(head.status));
        }
        let end = Instant::now();
        let is_whole = self.marks.count == self.template.marks
            && (self.ends.count == 1) == self.template.stream;
        match first {
            Some(first) if is_whole => Ok((Answer { sent, first, end }, head.close)),
            _ => Err(Failure::Short(self.marks.count, self.template.marks)),
        }
    }

    async fn receive(&mut self, stream: &mut TcpStream) -> Result<(), Failure> {
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
