//! Command line of the rig.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};

#[derive(Parser)]
pub(crate) enum Command {
    /// Answers chat completions, streams among them, as their bodies ask.
    Mock {
        /// Address to listen on.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Copies bytes between each caller and a connection of its own to the mock: what any proxy costs at least.
    Relay {
        /// Address to listen on.
        #[arg(long)]
        listen: SocketAddr,
        /// Where the bytes go.
        #[arg(long)]
        to: SocketAddr,
    },
    /// Calls for a time and prints one line: as fast as answers come, or at a rate.
    Load {
        #[command(flatten)]
        shape: Shape,
        #[command(flatten)]
        load: LoadArgs,
    },
    /// Opens many streams; prints a line once all of them have begun, and one when all have ended.
    Hold {
        #[command(flatten)]
        shape: Shape,
        #[command(flatten)]
        hold: HoldArgs,
    },
    /// Makes an authority and a certificate for 127.0.0.1: `ca.crt`, `tls.crt` and `tls.key`.
    Certificate {
        /// Folder for the files; it must be there.
        #[arg(long)]
        folder: PathBuf,
    },
}

/// What each request looks like, and so its answer.
#[derive(Args)]
pub(crate) struct Shape {
    /// Address of the proxy, or of the mock itself.
    #[arg(long)]
    pub(crate) connect: SocketAddr,
    /// A header besides those that are needed, `name: value`. May be repeated.
    #[arg(long = "header")]
    pub(crate) headers: Vec<String>,
    /// Bytes of the body.
    #[arg(long, default_value_t = 1024)]
    pub(crate) body_bytes: usize,
    /// Ask for a stream.
    #[arg(long)]
    pub(crate) stream: bool,
    /// Deltas of a stream.
    #[arg(long, default_value_t = 16)]
    pub(crate) deltas: u64,
    /// Time between two deltas; 0 writes one after the other.
    #[arg(long, default_value_t = 0)]
    pub(crate) gap_ms: u64,
    /// Write head and body apart, as many clients do: two segments.
    #[arg(long)]
    pub(crate) split: bool,
}

#[derive(Args)]
pub(crate) struct LoadArgs {
    /// Connections, each with at most one request at a time.
    #[arg(long, default_value_t = 1)]
    pub(crate) connections: usize,
    /// Requests per second, whether or not answers keep up; without it the next request follows an answer.
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Time before the window.
    #[arg(long, default_value_t = 300)]
    pub(crate) warm_up_ms: u64,
    /// Time that is measured.
    #[arg(long, default_value_t = 1500)]
    pub(crate) window_ms: u64,
}

#[derive(Args)]
pub(crate) struct HoldArgs {
    /// Streams, each on a connection of its own but for --h2.
    #[arg(long)]
    pub(crate) streams: u32,
    /// Time within which they are opened.
    #[arg(long, default_value_t = 2000)]
    pub(crate) ramp_ms: u64,
    /// Speak HTTP/1.1 over TLS.
    #[arg(long, requires = "ca")]
    pub(crate) tls: bool,
    /// PEM file with the authority that must have signed the certificate which is shown; no other counts.
    #[arg(long, requires = "tls")]
    pub(crate) ca: Option<PathBuf>,
    /// Speak HTTP/2 in the clear, with at most 100 streams on a connection.
    #[arg(long, conflicts_with = "tls")]
    pub(crate) h2: bool,
}

impl LoadArgs {
    pub(crate) fn warm_up(&self) -> Duration {
        Duration::from_millis(self.warm_up_ms)
    }

    pub(crate) fn window(&self) -> Duration {
        Duration::from_millis(self.window_ms)
    }
}
