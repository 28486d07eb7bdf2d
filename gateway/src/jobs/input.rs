//! (IO) The lines of a batch's input, read from the store piece by piece.

use bytes::{Bytes, BytesMut};
use memchr::memchr;

use super::files::{File, PIECE_BYTES};
use super::lines::MAX_LINE_BYTES;
use crate::store::{Error, Key, Store};

/// Why there is no further line although the file does not end.
#[derive(Debug)]
pub(super) enum InputError {
    /// The store failed.
    Store(Error),
    /// The file is gone.
    Gone,
    /// A line is larger than [`MAX_LINE_BYTES`].
    TooLong,
}

impl From<Error> for InputError {
    fn from(err: Error) -> Self {
        Self::Store(err)
    }
}

/// A line and where the next one begins.
pub(super) struct Line {
    /// From 1; blank lines count.
    pub(super) number: u64,
    pub(super) bytes: Bytes,
    /// In the file.
    pub(super) ends_at: u64,
}

/// Reads lines from some place on.
pub(super) struct Input<'a> {
    store: &'a Store,
    log: Key,
    size: u64,
    /// Bytes that were read and not given out.
    rest: BytesMut,
    /// How many of them are known to have no line end.
    searched: usize,
    /// Where `rest` begins.
    offset: u64,
    lines: u64,
    piece: u64,
    /// Bytes of the next piece that lie before `offset`.
    skip: usize,
}

impl<'a> Input<'a> {
    /// From `offset`, which lies behind `lines` lines.
    pub(super) fn new(store: &'a Store, file: &File, lines: u64, offset: u64) -> Self {
        let piece_bytes = u64::try_from(PIECE_BYTES).unwrap_or(u64::MAX);
        Self {
            store,
            log: file.content(),
            size: file.bytes,
            rest: BytesMut::new(),
            searched: 0,
            offset,
            lines,
            piece: offset / piece_bytes,
            skip: usize::try_from(offset % piece_bytes).unwrap_or(0),
        }
    }

    /// The next line, without its end; `None` at the end of the file.
    pub(super) async fn next(&mut self) -> Result<Option<Line>, InputError> {
        loop {
            let fresh = self.rest.get(self.searched..).unwrap_or_default();
            if let Some(length) = memchr(b'\n', fresh) {
                let end = self.searched + length + 1;
                return Ok(Some(self.take(end)));
            }
            self.searched = self.rest.len();
            let read_to = self.offset + u64::try_from(self.rest.len()).unwrap_or(u64::MAX);
            if read_to >= self.size {
                let end = self.rest.len();
                return Ok((end > 0).then(|| self.take(end)));
            }
            if self.rest.len() > MAX_LINE_BYTES {
                return Err(InputError::TooLong);
            }
            let pieces = self.store.pieces(&self.log, self.piece, 1).await?;
            let (_, piece) = pieces.into_iter().next().ok_or(InputError::Gone)?;
            self.piece += 1;
            let skip = std::mem::take(&mut self.skip);
            self.rest
                .extend_from_slice(piece.get(skip..).unwrap_or_default());
        }
    }

    fn take(&mut self, end: usize) -> Line {
        let line = self.rest.split_to(end);
        self.searched = 0;
        self.offset += u64::try_from(end).unwrap_or(0);
        self.lines += 1;
        Line {
            number: self.lines,
            bytes: line.freeze(),
            ends_at: self.offset,
        }
    }
}
