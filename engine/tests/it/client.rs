//! Starts engines on free ports and asks them things.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use penstock_engine::model::{Limits, Profile, StepTime};
use penstock_engine::{Error, Settings, run};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Far beyond what anything here takes, even on a machine that does something else.
const DEADLINE: Duration = Duration::from_mins(1);

const fn profile(name: &'static str, base_ns: u64) -> Profile {
    Profile {
        name,
        about: "a test's",
        source: "made up",
        step_time: StepTime {
            base_ns,
            prefill_token_ns: 0,
            kv_token_ns: 0,
            sequence_ns: 0,
        },
        num_gpu_blocks: 512,
        max_num_seqs: 16,
        max_num_batched_tokens: 512,
    }
}

/// Answers come quickly.
pub(crate) static STEPS_OF_2_MS: Profile = profile("steps-of-2-ms", 2_000_000);
/// Answers can be watched: 900 tokens take 18 s.
pub(crate) static STEPS_OF_20_MS: Profile = profile("steps-of-20-ms", 20_000_000);

/// An engine for tests that serves `tiny`.
pub(crate) fn settings(profile: &'static Profile) -> Settings {
    let limits = Limits {
        max_model_len: 1024,
        ..Settings::limits_of(profile)
    };
    Settings {
        profile,
        limits,
        ..Settings::new("tiny")
    }
}

/// Asks until `true`.
pub(crate) async fn eventually(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

/// An engine that runs.
pub(crate) struct Engine {
    pub(crate) address: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    task: JoinSet<Result<(), Error>>,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Engine {
    pub(crate) async fn start(settings: Settings) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let mut task = JoinSet::new();
        let loading = !settings.startup_delay.is_zero();
        task.spawn(run(settings, listener, shutdown.clone()));
        let client = Client::builder(TokioExecutor::new()).build_http();
        let engine = Self {
            address,
            shutdown,
            task,
            client,
        };
        if !loading {
            eventually("the engine serves", async || {
                engine.get("/health").await.status == StatusCode::OK
            })
            .await;
        }
        engine
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body)).unwrap();
        let response = tokio::time::timeout(DEADLINE, self.client.request(request)).await;
        Answer::new(response.expect("an answer in time").unwrap())
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(
            "POST",
            path,
            &[("content-type", "application/json")],
            body.to_string(),
        )
        .await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], String::new()).await
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        Metrics(self.get("/metrics").await.text().await)
    }

    /// Shuts down and waits for the end.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(DEADLINE, self.task.join_next()).await;
        ended.expect("the engine stops").unwrap().unwrap().unwrap();
    }
}

/// A page of metrics.
pub(crate) struct Metrics(String);

impl Metrics {
    /// The value of the first series whose text begins so.
    pub(crate) fn value(&self, series: &str) -> &str {
        let line = self
            .0
            .lines()
            .find(|line| line.starts_with(series))
            .unwrap_or_else(|| panic!("no {series}"));
        line.rsplit_once(' ').unwrap().1
    }
}

/// An answer whose body may still be on its way.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    response: Response<Incoming>,
    read: String,
}

impl Answer {
    fn new(response: Response<Incoming>) -> Self {
        Self {
            status: response.status(),
            response,
            read: String::new(),
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response
            .headers()
            .get(name)
            .map(|value| value.to_str().unwrap())
    }

    /// The next piece of the body.
    pub(crate) async fn chunk(&mut self) -> Option<String> {
        let frame = tokio::time::timeout(DEADLINE, self.response.body_mut().frame())
            .await
            .expect("a chunk in time");
        let data = frame?
            .expect("the body is whole")
            .into_data()
            .unwrap_or_default();
        let text = String::from_utf8(data.to_vec()).unwrap();
        self.read.push_str(&text);
        Some(text)
    }

    pub(crate) async fn text(mut self) -> String {
        while self.chunk().await.is_some() {}
        self.read
    }

    pub(crate) async fn json(self) -> Value {
        serde_json::from_str(&self.text().await).unwrap()
    }

    /// The data of all events, those read before included.
    pub(crate) async fn events(self) -> Vec<String> {
        let text = self.text().await;
        text.split_terminator("\n\n")
            .map(|event| event.strip_prefix("data: ").unwrap().to_owned())
            .collect()
    }
}
