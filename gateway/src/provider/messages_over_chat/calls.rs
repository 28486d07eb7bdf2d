//! The calls of tools in a stream of chunks, whose pieces may come in any order, as the blocks of a message, of which
//! only one is open at a time. The pieces of the open call pass; what comes meanwhile waits until its arguments are
//! whole, or the answer ends. Pure.

use std::collections::VecDeque;

use crate::sse::{EventTooLarge, MAX_EVENT_BYTES};

/// Closed calls that are remembered: as many as OpenAI lets one answer have.
const MAX_CLOSED: usize = 128;

/// What goes out, or waits to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    Thinking(String),
    /// Begins a block.
    Call(Call),
    /// Arguments of the call whose block is open.
    Arguments(String),
}

impl Piece {
    /// What keeping it takes.
    fn bytes(&self) -> usize {
        let texts = match self {
            Self::Text(text) | Self::Thinking(text) | Self::Arguments(text) => text.len(),
            Self::Call(call) => call.id.len() + call.name.len() + call.arguments.len(),
        };
        size_of::<Self>() + texts
    }

    /// Takes in what follows; gives back what begins something else.
    fn take(&mut self, next: Self) -> Option<Self> {
        match (self, next) {
            (Self::Text(text), Self::Text(more)) | (Self::Thinking(text), Self::Thinking(more)) => {
                text.push_str(&more);
                None
            }
            (Self::Call(call), Self::Call(piece)) if call.is_of(&piece) => {
                call.take(piece);
                None
            }
            (_, next) => Some(next),
        }
    }

    fn is_call_of(&self, piece: &Call) -> bool {
        matches!(self, Self::Call(own) if own.is_of(piece))
    }
}

/// A call of a tool, or a piece of one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) index: usize,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) arguments: String,
}

impl Call {
    /// Whether `piece` is a piece of it. Some backends number all calls alike; a new id begins a new call.
    fn is_of(&self, piece: &Self) -> bool {
        let has_same_id = piece.id.is_empty() || self.id.is_empty() || piece.id == self.id;
        self.index == piece.index && has_same_id
    }

    /// Takes in its next piece. Names and ids come once, or are repeated.
    fn take(&mut self, piece: Self) {
        if self.id.is_empty() {
            self.id = piece.id;
        }
        if self.name.is_empty() {
            self.name = piece.name;
        }
        self.arguments.push_str(&piece.arguments);
    }
}

/// Follows a text until it is a whole JSON object.
#[derive(Debug, Default)]
struct Object {
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
    is_whole: bool,
}

impl Object {
    fn feed(&mut self, text: &str) {
        for byte in text.bytes() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.is_in_string => self.is_escaped = true,
                b'"' => self.is_in_string = !self.is_in_string,
                b'{' if !self.is_in_string => self.depth += 1,
                b'}' if !self.is_in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    self.is_whole = self.depth == 0;
                }
                _ => {}
            }
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// The call whose block is open, without its arguments.
    open: Option<(Call, Object)>,
    /// Those whose blocks were closed.
    closed: VecDeque<Call>,
    waiting: VecDeque<Piece>,
    /// What is kept of those that wait.
    bytes: usize,
}

impl Calls {
    /// Whether text may go out now, and not wait behind a call that goes on.
    pub(super) fn lets_pass(&mut self) -> bool {
        if self
            .open
            .as_ref()
            .is_some_and(|(_, object)| object.is_whole)
        {
            self.close();
        }
        self.open.is_none()
    }

    /// Takes text, or a piece of a call, and says what goes out now.
    pub(super) fn feed(&mut self, piece: Piece) -> Result<Vec<Piece>, EventTooLarge> {
        let mut out = Vec::new();
        match piece {
            Piece::Call(call) if self.waiting.iter().any(|own| own.is_call_of(&call)) => {
                self.keep(Piece::Call(call))?;
            }
            Piece::Call(call) => match &mut self.open {
                Some((open, object)) if open.is_of(&call) => {
                    object.feed(&call.arguments);
                    out.push(Piece::Arguments(call.arguments));
                }
                // Its arguments are whole: what still comes for it says nothing.
                _ if self.closed.iter().any(|closed| closed.is_of(&call)) => {}
                _ => self.keep(Piece::Call(call))?,
            },
            text => self.keep(text)?,
        }
        while !self.waiting.is_empty() && self.lets_pass() {
            out.extend(self.next());
        }
        Ok(out)
    }

    /// Everything that waits: nothing follows.
    pub(super) fn end(&mut self) -> Vec<Piece> {
        self.open = None;
        self.bytes = 0;
        std::mem::take(&mut self.waiting).into()
    }

    fn close(&mut self) {
        self.closed.extend(self.open.take().map(|(call, _)| call));
        if self.closed.len() > MAX_CLOSED {
            self.closed.pop_front();
        }
    }

    /// Lets the first of those that wait out.
    fn next(&mut self) -> Option<Piece> {
        let piece = self.waiting.pop_front()?;
        self.bytes = self.bytes.saturating_sub(piece.bytes());
        if let Piece::Call(call) = &piece {
            let mut object = Object::default();
            object.feed(&call.arguments);
            let open = Call {
                index: call.index,
                id: call.id.clone(),
                ..Call::default()
            };
            self.open = Some((open, object));
        }
        Some(piece)
    }

    fn keep(&mut self, piece: Piece) -> Result<(), EventTooLarge> {
        let place = match &piece {
            Piece::Call(call) => {
                let mut waiting = self.waiting.iter_mut().rev();
                waiting.find(|own| own.is_call_of(call))
            }
            _ => self.waiting.back_mut(),
        };
        let mut rest = Some(piece);
        if let Some(place) = place {
            let before = place.bytes();
            rest = rest.and_then(|piece| place.take(piece));
            self.bytes += place.bytes() - before;
        }
        self.bytes += rest.as_ref().map_or(0, Piece::bytes);
        self.waiting.extend(rest);
        if self.bytes > MAX_EVENT_BYTES {
            return Err(EventTooLarge);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(index: usize, id: &str, arguments: &str) -> Piece {
        let name = if id.is_empty() { "" } else { "f" };
        Piece::Call(Call {
            index,
            id: id.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        })
    }

    fn more(arguments: &str) -> Piece {
        Piece::Arguments(arguments.to_owned())
    }

    #[test]
    fn a_call_passes_as_it_comes_once_the_one_before_is_whole() {
        let mut calls = Calls::default();
        let begun = call(0, "a", r#"{"x":"}"#);
        assert_eq!(calls.feed(begun).unwrap(), [call(0, "a", r#"{"x":"}"#)]);
        assert_eq!(calls.feed(call(1, "b", "{")).unwrap(), []);
        let rest = call(0, "", r#"\"{"}"#);
        assert_eq!(
            calls.feed(rest).unwrap(),
            [more(r#"\"{"}"#), call(1, "b", "{")]
        );
        assert_eq!(calls.feed(call(1, "", "}")).unwrap(), [more("}")]);
        assert_eq!(calls.feed(call(0, "", "\n")).unwrap(), [], "it is closed");
        // All calls of some backends have the same number.
        assert_eq!(
            calls.feed(call(0, "c", "{}")).unwrap(),
            [call(0, "c", "{}")]
        );
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut calls = Calls::default();
        calls.feed(call(0, "a", "{")).unwrap();
        let long = "x".repeat(MAX_EVENT_BYTES / 5);
        let fed = (0..5).map(|_| calls.feed(Piece::Text(long.clone())));
        let failed: Vec<bool> = fed.map(|fed| fed.is_err()).collect();
        assert_eq!(failed, [false, false, false, false, true]);
    }

    #[test]
    fn arguments_that_never_become_whole_come_at_the_end() {
        let mut calls = Calls::default();
        calls.feed(call(0, "a", "")).unwrap();
        assert_eq!(calls.feed(Piece::Text("t".into())).unwrap(), []);
        assert_eq!(calls.feed(Piece::Text("u".into())).unwrap(), []);
        assert_eq!(calls.end(), [Piece::Text("tu".into())]);
        assert_eq!(calls.end(), []);
    }
}
