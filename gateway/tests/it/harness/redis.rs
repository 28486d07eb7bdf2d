//! A real Redis or Valkey on loopback, with its log in a folder of its own.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A server; killed when dropped.
pub(crate) struct Server {
    address: SocketAddr,
    folder: tempfile::TempDir,
    process: Running,
}

impl Server {
    /// `None`, with the reason printed, if this machine has none; in CI that is a failure.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with(&[])
    }

    fn start_with(more: &[&str]) -> Option<Self> {
        let Some(program) = program() else {
            assert!(
                std::env::var("CI").map_or(true, |ci| ci != "true"),
                "neither valkey-server nor redis-server is there: apt-get install redis-server"
            );
            println!("skipped: neither valkey-server nor redis-server is there");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let address = free();
        let process = run(program, address, folder.path(), more);
        Some(Self {
            address,
            folder,
            process,
        })
    }

    /// What `--store` takes.
    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Kills the server as if its machine had lost power, but for what the kernel had.
    pub(crate) fn kill(&mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }

    /// Changes a setting of it.
    pub(crate) fn set(&self, name: &str, value: &str) {
        self.command(&format!("CONFIG SET {name} {value}"));
    }

    /// For commands whose answer is OK.
    fn command(&self, command: &str) {
        let mut connection = TcpStream::connect(self.address).unwrap();
        write!(connection, "{command}\r\n").unwrap();
        let mut answer = [0; 5];
        connection.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+OK\r\n", "{command}");
    }

    /// Waits until it knows all slots of its cluster.
    fn joined(&self) {
        for _ in 0..3_000 {
            let mut connection = TcpStream::connect(self.address).unwrap();
            write!(connection, "CLUSTER INFO\r\nQUIT\r\n").unwrap();
            let mut told = String::new();
            connection.read_to_string(&mut told).unwrap();
            if told.contains("cluster_state:ok") && told.contains("cluster_size:3") {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the cluster does not come together");
    }

    /// Starts it again from its log.
    pub(crate) fn restart(&mut self) {
        self.process = run(program().unwrap(), self.address, self.folder.path(), &[]);
    }
}

/// Three servers that have a third of all slots each.
pub(crate) struct Cluster(Vec<Server>);

impl Cluster {
    /// As [`Server::start`].
    pub(crate) fn start() -> Option<Self> {
        let mut servers = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..3 {
            let bus = free().port().to_string();
            servers.push(Server::start_with(&[
                "--cluster-enabled",
                "yes",
                "--cluster-announce-ip",
                "127.0.0.1",
                "--cluster-port",
                &bus,
            ])?);
            buses.push(bus);
        }
        for (server, slots) in servers.iter().zip(["0 5460", "5461 10922", "10923 16383"]) {
            server.command(&format!("CLUSTER ADDSLOTSRANGE {slots}"));
        }
        for (server, bus) in servers.iter().zip(&buses).skip(1) {
            let port = server.address.port();
            servers[0].command(&format!("CLUSTER MEET 127.0.0.1 {port} {bus}"));
        }
        let cluster = Self(servers);
        cluster.0.iter().for_each(Server::joined);
        Some(cluster)
    }

    /// What `--store` takes.
    pub(crate) fn url(&self) -> String {
        format!("redis-cluster://{}", self.0[0].address)
    }
}

/// An address where nobody listens.
fn free() -> SocketAddr {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap()
}

/// Whichever is installed.
fn program() -> Option<&'static str> {
    let mut programs = ["valkey-server", "redis-server"].into_iter();
    programs.find(|program| {
        let mut version = Command::new(program);
        version.arg("--version").stdout(Stdio::null());
        version.status().is_ok()
    })
}

fn run(program: &str, address: SocketAddr, folder: &std::path::Path, more: &[&str]) -> Running {
    let port = address.port().to_string();
    let process = Command::new(program)
        .args(["--bind", "127.0.0.1", "--port", &port, "--save", ""])
        .args(["--appendonly", "yes", "--appendfsync", "always", "--dir"])
        .arg(folder)
        .args(more)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(process);
    for _ in 0..2_000 {
        if TcpStream::connect(address).is_ok() {
            return running;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{program} does not listen");
}

/// A process that ends with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
