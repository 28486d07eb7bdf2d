//! A real kube-apiserver with etcd, shared by all tests of this binary. Nothing else of Kubernetes runs: the tests play
//! the kubelet, KEDA and the HPA.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Name of the operator's account, as the chart makes it.
pub(crate) const OPERATOR: &str = "system:serviceaccount:penstock-system:penstock-operator";

const START_WITHIN: Duration = Duration::from_mins(2);

/// Where the API server listens and what it logs.
pub(crate) struct Cluster {
    url: String,
    audit_log: PathBuf,
}

/// The cluster, or why there is none. Without its programs a test is skipped at a desk and fails in CI.
pub(crate) fn cluster() -> Option<&'static Cluster> {
    static CLUSTER: OnceLock<Result<Cluster, String>> = OnceLock::new();
    match CLUSTER.get_or_init(start) {
        Ok(cluster) => Some(cluster),
        Err(reason) if std::env::var("CI").is_ok_and(|ci| ci == "true") => panic!("{reason}"),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

impl Cluster {
    /// A client with every right.
    pub(crate) async fn admin(&self) -> Client {
        self.client("admin-token").await
    }

    /// A client with the operator's rights and no others.
    pub(crate) async fn operator(&self) -> Client {
        self.client("operator-token").await
    }

    async fn client(&self, token: &str) -> Client {
        penstock_shell::tls::install();
        let kubeconfig = Kubeconfig::from_yaml(&format!(
            "{{apiVersion: v1, kind: Config, current-context: c,
              clusters: [{{name: c, cluster: {{server: '{}', insecure-skip-tls-verify: true}}}}],
              users: [{{name: u, user: {{token: {token}}}}}],
              contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}",
            self.url
        ));
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig.unwrap(), &options)
            .await
            .unwrap();
        Client::try_from(config).unwrap()
    }

    /// Writes of `user` in `namespace` so far, as `verb resource name`, Leases and Events apart.
    pub(crate) fn writes(&self, user: &str, namespace: &str) -> Vec<String> {
        let log = fs::read_to_string(&self.audit_log).unwrap();
        let entries = log
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        entries
            .filter(|entry| {
                let text = |path: &str| {
                    entry
                        .pointer(path)
                        .and_then(serde_json::Value::as_str)
                        .unwrap_or_default()
                };
                text("/user/username") == user
                    && text("/objectRef/namespace") == namespace
                    && !["leases", "events"].contains(&text("/objectRef/resource"))
            })
            .map(|entry| {
                let text = |path: &str| {
                    entry
                        .pointer(path)
                        .and_then(serde_json::Value::as_str)
                        .unwrap_or_default()
                };
                format!(
                    "{} {} {} {}",
                    text("/verb"),
                    text("/objectRef/resource"),
                    text("/objectRef/name"),
                    text("/objectRef/subresource")
                )
                .trim_end()
                .to_owned()
            })
            .collect()
    }
}

fn programs() -> PathBuf {
    let home = || std::env::var("HOME").unwrap_or_default();
    let base = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| format!("{}/.cache", home()));
    let cache = std::env::var("PENSTOCK_CACHE").unwrap_or_else(|_| format!("{base}/penstock"));
    Path::new(&cache).join("kind/programs")
}

/// The newest folder whose name begins with `project-`.
fn program(project: &str, name: &str) -> Result<PathBuf, String> {
    let folder = programs();
    let mut found: Vec<PathBuf> = fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with(project))
        })
        .map(|path| path.join(name))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop().ok_or_else(|| {
        format!(
            "no {project}*/{name} in {}: build it with e2e/kind/programs etcd kubernetes",
            folder.display()
        )
    })
}

fn start() -> Result<Cluster, String> {
    let (etcd, apiserver) = (
        program("etcd-", "server")?,
        program("kubernetes-", "kube-apiserver")?,
    );
    for tool in ["openssl", "setpriv"] {
        let found = Command::new(tool).arg("--version").output().is_ok();
        if !found {
            return Err(format!(
                "{tool} is missing: install the Debian package openssl or util-linux"
            ));
        }
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    // The programs die with the thread that started them (setpriv --pdeathsig), and this thread lives as long as the
    // process: whatever ends the tests ends them too.
    std::thread::spawn(move || {
        let (result, _children) = match launch(&etcd, &apiserver) {
            Ok((cluster, children)) => (Ok(cluster), children),
            Err(reason) => (Err(reason), Vec::new()),
        };
        let _unheard = sender.send(result);
        loop {
            std::thread::park();
        }
    });
    let cluster = receiver
        .recv()
        .map_err(|_| "the launcher died".to_owned())??;
    Ok(cluster)
}

fn launch(etcd: &Path, apiserver: &Path) -> Result<(Cluster, Vec<Child>), String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("operator-cluster-{}", std::process::id()));
    remove_old(Path::new(env!("CARGO_TARGET_TMPDIR")));
    fs::create_dir_all(&folder).map_err(|err| format!("{}: {err}", folder.display()))?;
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let [client_port, peer_port, api_port] = free_ports();
    let (client, peer) = (
        format!("http://127.0.0.1:{client_port}"),
        format!("http://127.0.0.1:{peer_port}"),
    );

    let etcd = run(
        &folder,
        "etcd",
        etcd,
        &[
            format!("--data-dir={}", file("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=error".to_owned(),
        ],
    )?;
    let key = Command::new("openssl")
        .args(["genrsa", "-out", &file("sa.key"), "2048"])
        .output();
    key.map_err(|err| format!("openssl: {err}"))?;
    let operator = format!("operator-token,{OPERATOR},o,\"system:serviceaccounts\"\n");
    write(
        &file("tokens"),
        &format!("admin-token,admin,a,\"system:masters\"\n{operator}"),
    )?;
    write(
        &file("audit.yaml"),
        "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n\
         - {level: None, verbs: [get, list, watch]}\n- {level: Metadata}\n",
    )?;
    let api = run(
        &folder,
        "kube-apiserver",
        apiserver,
        &[
            format!("--etcd-servers={client}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={api_port}"),
            format!("--cert-dir={}", file("certificates")),
            "--service-cluster-ip-range=10.0.0.0/16".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("sa.key")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--authorization-mode=RBAC".to_owned(),
            format!("--token-auth-file={}", file("tokens")),
            // Nothing makes the accounts and tokens that it would ask for.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            format!("--audit-policy-file={}", file("audit.yaml")),
            format!("--audit-log-path={}", file("audit.log")),
        ],
    )?;
    let url = format!("https://127.0.0.1:{api_port}");
    wait_ready(&url, &folder)?;
    Ok((
        Cluster {
            url,
            audit_log: folder.join("audit.log"),
        },
        vec![etcd, api],
    ))
}

fn run(folder: &Path, name: &str, program: &Path, arguments: &[String]) -> Result<Child, String> {
    let log =
        fs::File::create(folder.join(format!("{name}.log"))).map_err(|err| err.to_string())?;
    let errors = log.try_clone().map_err(|err| err.to_string())?;
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .map_err(|err| format!("{name}: {err}"))
}

fn write(path: &str, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|err| format!("{path}: {err}"))
}

fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// Folders of runs that have ended.
fn remove_old(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(process) = name.strip_prefix("operator-cluster-")
            && !Path::new("/proc").join(process).exists()
        {
            let _still_there = fs::remove_dir_all(entry.path());
        }
    }
}

/// Waits for `/readyz`, asked by the admin.
fn wait_ready(url: &str, folder: &Path) -> Result<(), String> {
    let deadline = now() + START_WITHIN;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| err.to_string())?;
    runtime.block_on(async {
        let cluster = Cluster {
            url: url.to_owned(),
            audit_log: PathBuf::new(),
        };
        let client = cluster.admin().await;
        while now() < deadline {
            if is_ready(&client).await {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(format!(
            "the API server was not ready in time: see {}",
            folder.display()
        ))
    })
}

async fn is_ready(client: &Client) -> bool {
    let request = axum::http::Request::get("/readyz")
        .body(Vec::new())
        .unwrap();
    client
        .request_text(request)
        .await
        .is_ok_and(|text| text == "ok")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a deadline for programs that start"
)]
fn now() -> Instant {
    Instant::now()
}
