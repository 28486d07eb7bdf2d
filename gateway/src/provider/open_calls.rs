//! The calls of tools in a stream of blocks that have an index: which call of the answer each block is. Several may be
//! open at a time, and other blocks between them. Pure.

/// Blocks that are open at a time: as many calls as OpenAI lets one answer have. The oldest counts as closed beyond.
const MAX_OPEN: usize = 128;

/// See the module. A backend may leave indices out: all blocks are then the same one.
#[derive(Debug, Default)]
pub(super) struct OpenCalls {
    open: Vec<Open>,
    /// Calls so far.
    count: usize,
}

#[derive(Debug)]
struct Open {
    block: Option<usize>,
    number: usize,
    /// No part of its arguments has come.
    is_bare: bool,
}

impl OpenCalls {
    /// A block begins that is a call; which one of the answer.
    pub(super) fn begin(&mut self, block: Option<usize>) -> usize {
        if self.open.len() == MAX_OPEN {
            self.open.remove(0);
        }
        let number = self.count;
        self.count += 1;
        self.open.push(Open {
            block,
            number,
            is_bare: true,
        });
        number
    }

    /// A part of arguments comes in a block; `None` if that is no call.
    pub(super) fn go_on(&mut self, block: Option<usize>) -> Option<usize> {
        let at = self.place(block)?;
        let open = self.open.get_mut(at)?;
        open.is_bare = false;
        Some(open.number)
    }

    /// A block ends; which call it is if that had no arguments.
    pub(super) fn end(&mut self, block: Option<usize>) -> Option<usize> {
        let open = self.open.remove(self.place(block)?);
        open.is_bare.then_some(open.number)
    }

    /// The newest block of this index.
    fn place(&self, block: Option<usize>) -> Option<usize> {
        self.open.iter().rposition(|open| open.block == block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_go_to_the_call_of_their_block_and_others_to_none() {
        let mut calls = OpenCalls::default();
        assert_eq!((calls.begin(Some(2)), calls.begin(Some(5))), (0, 1));
        assert_eq!(calls.go_on(Some(2)), Some(0));
        assert_eq!(calls.go_on(Some(3)), None, "a block that is no call");
        assert_eq!(calls.end(Some(2)), None, "it has arguments");
        assert_eq!(calls.end(Some(5)), Some(1));
        assert_eq!(calls.go_on(Some(5)), None);
        assert_eq!((calls.begin(None), calls.go_on(None)), (2, Some(2)));
    }

    #[test]
    fn open_blocks_are_bounded() {
        let mut calls = OpenCalls::default();
        for block in 0..=MAX_OPEN {
            calls.begin(Some(block));
        }
        assert_eq!(calls.open.len(), MAX_OPEN);
        assert_eq!(calls.go_on(Some(0)), None);
        assert_eq!(calls.go_on(Some(MAX_OPEN)), Some(MAX_OPEN));
    }
}
