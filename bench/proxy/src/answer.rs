//! (IO) An answer as it arrives: when its parts came, whether it is whole, and why not.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::mock::{LAST, MARK};
use crate::template::Template;
use crate::wire::Marker;

/// No answer takes longer than a paced stream of the longest kind.
pub(crate) const LONGEST: Duration = Duration::from_secs(40);

/// When parts of an answer arrived.
pub(crate) struct Answer {
    pub(crate) sent: Instant,
    pub(crate) first: Instant,
    pub(crate) end: Instant,
}

/// Why there was no whole answer.
pub(crate) enum Failure {
    Connect,
    Handshake,
    Send,
    Receive,
    Closed,
    Malformed,
    Late,
    Status(u16),
    /// Marks that came, of those that had to.
    Short(u64, u64),
}

/// What has come of an answer's body.
pub(crate) struct Reading {
    sent: Instant,
    marks: Marker,
    ends: Marker,
    first: Option<Instant>,
}

impl Failure {
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Connect => "cannot connect".to_owned(),
            Self::Handshake => "no TLS, or no certificate that is trusted".to_owned(),
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

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
impl Reading {
    /// Begins when the request is sent.
    pub(crate) fn begin() -> Self {
        Self {
            sent: Instant::now(),
            marks: Marker::new(MARK),
            ends: Marker::new(LAST),
            first: None,
        }
    }

    pub(crate) fn read(&mut self, piece: &[u8]) {
        self.marks.read(piece);
        self.ends.read(piece);
    }

    /// Called when what has come was read. `begun` counts answers whose first mark is here.
    pub(crate) fn note(&mut self, begun: &Cell<u32>) {
        if self.first.is_none() && self.marks.count > 0 {
            self.first = Some(Instant::now());
            begun.set(begun.get() + 1);
        }
    }

    /// Called when the body has ended.
    pub(crate) fn end(&self, status: u16, template: &Template) -> Result<Answer, Failure> {
        if status != 200 {
            return Err(Failure::Status(status));
        }
        let (sent, end) = (self.sent, Instant::now());
        let is_whole =
            self.marks.count == template.marks && (self.ends.count == 1) == template.stream;
        match self.first {
            Some(first) if is_whole => Ok(Answer { sent, first, end }),
            _ => Err(Failure::Short(self.marks.count, template.marks)),
        }
    }
}
