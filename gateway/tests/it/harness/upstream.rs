//! An upstream that does what a script says.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// A request as an upstream saw it.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) line: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    /// Number of the connection it came on, from 0.
    pub(crate) connection: usize,
}

/// What an upstream does next, when a test drives it.
#[derive(Debug)]
pub(crate) enum Step {
    /// These bytes, as they are.
    Write(String),
    /// One HTTP chunk.
    Chunk(String),
    /// The last chunk.
    End,
    /// The connection is reset.
    Reset,
}

/// What an upstream does with a request.
pub(crate) enum Reply {
    /// A whole answer, and the connection stays.
    Json(u16, String),
    /// The same with headers (`name: value\r\n`).
    Headers(u16, &'static str, String),
    /// Events, each in a chunk of its own, then the end.
    Sse(Vec<String>),
    /// The same after a time.
    LateSse(Duration, Vec<String>),
    /// These bytes, then the connection is closed.
    Raw(String),
    /// The connection is reset.
    Reset,
    /// A whole answer after a time.
    Late(Duration, String),
    /// Nothing, for ever.
    Silent,
    /// What the test says.
    Steps(mpsc::UnboundedReceiver<Step>),
}

/// A driven reply and its driver.
pub(crate) fn driven() -> (mpsc::UnboundedSender<Step>, Reply) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (sender, Reply::Steps(receiver))
}

type Script = Arc<dyn Fn(usize, &Received) -> Reply + Send + Sync>;

/// A scripted server.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Received>>>,
    /// Connections that the gateway closed while an answer was not finished.
    gone: Arc<AtomicUsize>,
    /// What it says at `/metrics`. Who reads that makes no request that is counted.
    page: Arc<Page>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Page {
    text: Mutex<Option<String>>,
    reads: AtomicUsize,
}

impl Upstream {
    /// `script` gets the request's number, from 0.
    pub(crate) async fn start(
        script: impl Fn(usize, &Received) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let gone = Arc::new(AtomicUsize::new(0));
        let page = Arc::new(Page::default());
        let mut tasks = JoinSet::new();
        let script: Script = Arc::new(script);
        tasks.spawn({
            let (seen, gone, page) = (Arc::clone(&seen), Arc::clone(&gone), Arc::clone(&page));
            async move {
                let mut connections = JoinSet::new();
                let mut number = 0;
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (script, page) = (Arc::clone(&script), Arc::clone(&page));
                    let (seen, gone) = (Arc::clone(&seen), Arc::clone(&gone));
                    connections.spawn(async move {
                        let _ended = serve(stream, number, &script, &page, &seen, &gone).await;
                    });
                    number += 1;
                }
            }
        });
        Self {
            address,
            seen,
            gone,
            page,
            _tasks: tasks,
        }
    }

    /// Says from now on that so many requests are in its batch, and that so much of its cache is in use.
    pub(crate) fn tell(&self, running: u32, kv_use: f32) {
        *self.page.text.lock().unwrap() = Some(format!(
            "vllm:kv_cache_usage_perc{{engine=\"0\"}} {kv_use}\nvllm:num_requests_running {running}\nvllm:num_requests_waiting 0\n"
        ));
    }

    /// Answers every request alike.
    pub(crate) async fn always(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Self {
        Self::start(move |_, _| reply()).await
    }

    /// Several such, and their addresses.
    pub(crate) async fn several(
        count: usize,
        reply: impl Fn() -> Reply + Clone + Send + Sync + 'static,
    ) -> (Vec<Self>, Vec<SocketAddr>) {
        let mut upstreams = Vec::new();
        for _ in 0..count {
            upstreams.push(Self::always(reply.clone()).await);
        }
        let addresses = upstreams.iter().map(|upstream| upstream.address).collect();
        (upstreams, addresses)
    }

    /// Gives out `replies` in order; panics beyond.
    pub(crate) async fn replies(replies: Vec<Reply>) -> Self {
        let replies = Mutex::new(replies.into_iter());
        Self::start(move |_, _| {
            replies
                .lock()
                .unwrap()
                .next()
                .expect("one more request than replies")
        })
        .await
    }

    /// How often its page was read.
    pub(crate) fn page_reads(&self) -> usize {
        self.page.reads.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> Vec<Received> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    pub(crate) fn gone(&self) -> usize {
        self.gone.load(Ordering::SeqCst)
    }
}

/// An address where nobody listens and nobody will: its port stays taken.
pub(crate) fn nobody() -> SocketAddr {
    static TAKEN: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    TAKEN.lock().unwrap().push(socket);
    address
}

async fn serve(
    mut stream: TcpStream,
    connection: usize,
    script: &Script,
    page: &Page,
    seen: &Mutex<Vec<Received>>,
    gone: &AtomicUsize,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        let Some(received) = receive(&mut stream, &mut buffer, connection).await? else {
            return Ok(());
        };
        if received.line.starts_with("GET /metrics ") {
            page.reads.fetch_add(1, Ordering::SeqCst);
            let told = page.text.lock().unwrap().clone();
            let status = if told.is_some() { 200 } else { 404 };
            whole(&mut stream, status, "", &told.unwrap_or_default()).await?;
            continue;
        }
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.push(received.clone());
            seen.len() - 1
        };
        match script(number, &received) {
            Reply::Json(status, body) => whole(&mut stream, status, "", &body).await?,
            Reply::Late(wait, body) => {
                tokio::time::sleep(wait).await;
                whole(&mut stream, 200, "", &body).await?;
            }
            Reply::Headers(status, headers, body) => {
                whole(&mut stream, status, headers, &body).await?;
            }
            Reply::Sse(events) => stream_of(&mut stream, events).await?,
            Reply::LateSse(wait, events) => {
                tokio::time::sleep(wait).await;
                stream_of(&mut stream, events).await?;
            }
            Reply::Raw(bytes) => {
                stream.write_all(bytes.as_bytes()).await?;
                return stream.shutdown().await;
            }
            Reply::Reset => return reset(&stream),
            Reply::Silent => {
                wait_gone(&mut stream, gone).await;
                return Ok(());
            }
            Reply::Steps(mut steps) => loop {
                let step = tokio::select! {
                    step = steps.recv() => step,
                    () = wait_gone(&mut stream, gone) => return Ok(()),
                };
                let written = match step {
                    Some(Step::Write(bytes)) => stream.write_all(bytes.as_bytes()).await,
                    Some(Step::Chunk(text)) => stream.write_all(chunk(&text).as_bytes()).await,
                    Some(Step::End) => {
                        stream.write_all(b"0\r\n\r\n").await?;
                        break;
                    }
                    Some(Step::Reset) => return reset(&stream),
                    None => return stream.shutdown().await,
                };
                // A peer that closes before it has read everything resets, which the next write meets first.
                if written.is_err() {
                    gone.fetch_add(1, Ordering::SeqCst);
                    return written;
                }
            },
        }
    }
}

async fn stream_of(stream: &mut TcpStream, events: Vec<String>) -> io::Result<()> {
    stream.write_all(sse_head().as_bytes()).await?;
    for event in events {
        stream.write_all(chunk(&event).as_bytes()).await?;
        stream.flush().await?;
    }
    stream.write_all(b"0\r\n\r\n").await
}

fn reset(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// Returns when the peer closes.
async fn wait_gone(stream: &mut TcpStream, gone: &AtomicUsize) {
    let mut byte = [0; 1];
    let _ = stream.read(&mut byte).await;
    gone.fetch_add(1, Ordering::SeqCst);
}

async fn whole(stream: &mut TcpStream, status: u16, headers: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(answer.as_bytes()).await
}

pub(crate) fn sse_head() -> String {
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-penstock-engine: simulated\r\nset-cookie: secret\r\ntransfer-encoding: chunked\r\n\r\n".to_owned()
}

pub(crate) fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// Reads one request with its content-length body.
async fn receive(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    connection: usize,
) -> io::Result<Option<Received>> {
    let end = loop {
        if let Some(end) = find(buffer, b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let (line, headers) = parse_head(&head);
    let length: usize = headers
        .get("content-length")
        .map_or(0, |length| length.parse().unwrap());
    while buffer.len() < end + 4 + length {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
    let body = String::from_utf8_lossy(&buffer[end + 4..end + 4 + length]).into_owned();
    buffer.drain(..end + 4 + length);
    Ok(Some(Received {
        line,
        headers,
        body,
        connection,
    }))
}

pub(crate) fn find(buffer: &[u8], pattern: &[u8]) -> Option<usize> {
    buffer
        .windows(pattern.len())
        .position(|window| window == pattern)
}

pub(crate) fn parse_head(head: &str) -> (String, BTreeMap<String, String>) {
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default().to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    (line, headers)
}

pub(crate) fn word(text: &str) -> String {
    format!(
        "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]}}\n\n"
    )
}

pub(crate) fn role() -> String {
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n".to_owned()
}

pub(crate) fn abort() -> String {
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"abort\"}]}\n\n".to_owned()
}

pub(crate) const DONE: &str = "data: [DONE]\n\n";

pub(crate) fn hello() -> Reply {
    Reply::Sse(vec![role(), word("hel"), word("lo"), DONE.to_owned()])
}

pub(crate) fn json_answer(text: &str) -> Reply {
    Reply::Json(200, completion(text))
}

pub(crate) fn completion(text: &str) -> String {
    format!(
        "{{\"choices\":[{{\"message\":{{\"content\":\"{text}\"}},\"finish_reason\":\"stop\"}}],\"usage\":{{\"prompt_tokens\":5,\"completion_tokens\":2}}}}"
    )
}

pub(crate) fn shaped_error(message: &str) -> String {
    format!("{{\"error\":{{\"message\":\"{message}\",\"type\":\"x\",\"code\":1}}}}")
}
