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
        let Some(program) = program() else {
            assert!(
                std::env::var("CI").map_or(true, |ci| ci != "true"),
                "neither valkey-server nor redis-server is there: apt-get install redis-server"
            );
            println!("skipped: neither valkey-server nor redis-server is there");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let process = run(program, address, folder.path());
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
        let mut connection = TcpStream::connect(self.address).unwrap();
        write!(connection, "CONFIG SET {name} {value}\r\n").unwrap();
        let mut answer = [0; 5];
        connection.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+OK\r\n");
    }

    /// Starts it again from its log.
    pub(crate) fn restart(&mut self) {
        self.process = run(program().unwrap(), self.address, self.folder.path());
    }
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

fn run(program: &str, address: SocketAddr, folder: &std::path::Path) -> Running {
    let port = address.port().to_string();
    let process = Command::new(program)
        .args(["--bind", "127.0.0.1", "--port", &port, "--save", ""])
        .args(["--appendonly", "yes", "--appendfsync", "always", "--dir"])
        .arg(folder)
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
