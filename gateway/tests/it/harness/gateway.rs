//! The gateway on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use penstock_gateway::source::{Applied, Credentials, Publisher, channel};
use penstock_gateway::{Error, Listeners, Settings};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Answer, Client, DONE, Plan, SOON, Step, id, sse_head, within, word};

/// A running gateway.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// Where it speaks TLS, if it has certificates.
    pub(crate) tls_address: Option<SocketAddr>,
    pub(crate) publisher: Publisher,
    pub(crate) shutdown: CancellationToken,
    tasks: JoinSet<Result<(), Error>>,
}

pub(crate) fn settings() -> Settings {
    let mut settings = Settings::new(id("gateway"));
    settings.workers = 1;
    settings.replica = "replica-0".to_owned();
    settings.drain = Duration::from_secs(10);
    settings
}

impl Gateway {
    pub(crate) async fn start(plan: &Plan) -> Self {
        Self::start_with(plan, settings()).await
    }

    pub(crate) async fn start_with(plan: &Plan, settings: Settings) -> Self {
        let gateway = Self::empty(settings).await;
        gateway.apply(plan).await;
        gateway
    }

    /// One that has no config yet.
    pub(crate) async fn empty(settings: Settings) -> Self {
        let (publisher, sources) = channel();
        let data = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let https = if settings.tls.folders.is_empty() {
            None
        } else {
            Some(TcpListener::bind("127.0.0.1:0").await.unwrap())
        };
        let tls_address = https.as_ref().map(|https| https.local_addr().unwrap());
        let (address, admin_address) = (data.local_addr().unwrap(), admin.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(penstock_gateway::run(
            settings,
            sources,
            Listeners {
                http: data,
                https,
                admin,
            },
            shutdown.clone(),
        ));
        Self {
            address,
            admin: admin_address,
            tls_address,
            publisher,
            shutdown,
            tasks,
        }
    }

    /// Its sources, for somebody else to feed.
    pub(crate) fn take_publisher(&mut self) -> Publisher {
        std::mem::replace(&mut self.publisher, channel().0)
    }

    /// Publishes a plan and waits until it is in force.
    pub(crate) async fn apply(&self, plan: &Plan) {
        let digest = plan.config.digest().unwrap();
        self.publisher
            .endpoints
            .send_replace(Arc::new(plan.endpoints.clone()));
        self.publisher
            .config
            .send_replace(Some(Arc::new(plan.config.clone())));
        let mut applied = self.publisher.applied.clone();
        let wait = applied.wait_for(|applied| {
            applied
                .as_ref()
                .is_some_and(|applied| applied.digest == digest)
        });
        within("config applied", wait).await.unwrap();
    }

    /// What it says that it serves.
    pub(crate) fn applied(&self) -> Applied {
        self.publisher.applied.borrow().clone().unwrap()
    }

    pub(crate) fn set_credentials(&self, credentials: Credentials) {
        self.publisher
            .credentials
            .send_replace(Arc::new(credentials));
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// One request on a connection of its own.
    pub(crate) async fn post(&self, body: &str) -> Answer {
        self.post_with("", body).await
    }

    pub(crate) async fn post_with(&self, headers: &str, body: &str) -> Answer {
        let mut client = self.client().await;
        client.post(headers, body).await;
        client.answer().await
    }

    /// A stream of which the caller has seen the first word, `one`.
    pub(crate) async fn begun(&self, steps: &UnboundedSender<Step>) -> Client {
        let mut client = self.client().await;
        client.post("", &chat(true)).await;
        steps.send(Step::Write(sse_head())).unwrap();
        steps.send(Step::Chunk(word("one"))).unwrap();
        assert_eq!(client.head().await.0, 200);
        client.expect(&word("one")).await;
        client
    }

    pub(crate) async fn admin_get(&self, path: &str) -> Answer {
        let mut client = Client::connect(self.admin).await;
        client
            .send(&format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"))
            .await;
        client.answer().await
    }

    pub(crate) async fn metrics(&self) -> String {
        self.admin_get("/metrics").await.body
    }

    /// The value of a series, 0 if there is none.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let text = self.metrics().await;
        let line = text.lines().find(|line| {
            line.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(' '))
        });
        line.map_or(0.0, |line| {
            line.rsplit(' ').next().unwrap().parse().unwrap()
        })
    }

    /// Waits until a series has this value: some are counted a moment after the caller has its answer.
    pub(crate) async fn metric_is(&self, series: &str, value: f64) {
        let mut got = f64::NAN;
        let wait = async {
            while (got - value).abs() > 0.001 || got.is_nan() {
                got = self.metric(series).await;
            }
        };
        let in_time = tokio::time::timeout(SOON, wait).await.is_ok();
        assert!(in_time, "{series} is {got} and not {value}");
    }

    /// Waits for the end of `run`.
    pub(crate) async fn ended(&mut self) -> Result<(), Error> {
        within("gateway ended", self.tasks.join_next())
            .await
            .unwrap()
            .unwrap()
    }
}

/// `{"model":"chat","stream":…}`
pub(crate) fn chat(stream: bool) -> String {
    format!(
        "{{\"model\":\"chat\",\"stream\":{stream},\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}]}}"
    )
}

/// Lets a begun stream end as it should.
pub(crate) async fn finish(client: &mut Client, steps: &UnboundedSender<Step>) {
    steps.send(Step::Chunk(DONE.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    client.expect(DONE).await;
    assert_eq!(client.chunk().await, Ok(None));
}
