//! The KV-cache blocks of one engine: which are held, which are free, and which of the free ones still hold a prefix
//! that a later request may reuse.
//!
//! Numbers in, decisions out; no clock. A free block stays cached until it is handed out again, least recently freed
//! first, as in vLLM's block pool. Block 0 is never handed out there either; here it is also the head of the free list.

use std::collections::HashMap;

/// Number of a block within its pool.
pub(crate) type BlockId = u32;

/// Block 0: vLLM's null block, and the sentinel of the circular free list.
const NULL: BlockId = 0;

#[derive(Clone, Debug)]
struct Block {
    /// How many requests hold the block; 0 means that it is in the free list.
    holders: u32,
    /// The prefix that the block holds, if it is in the cache.
    hash: Option<u64>,
    previous: BlockId,
    next: BlockId,
}

/// Leading blocks of a request that are in the cache already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hits {
    /// How many leading blocks.
    pub(crate) blocks: u32,
    /// How many of them are free now, so that reusing them uses up free blocks.
    pub(crate) free: u32,
}

/// All blocks of one engine.
#[derive(Clone, Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    free: u32,
    cached: HashMap<u64, BlockId>,
    caching: bool,
}

impl BlockPool {
    /// `num_blocks` counts block 0, so one fewer can be held. Panics below 2: limits are checked before.
    pub(crate) fn new(num_blocks: u32, caching: bool) -> Self {
        assert!(num_blocks >= 2, "a pool needs block 0 and one more");
        let blocks = (0..num_blocks)
            .map(|id| Block {
                holders: 0,
                hash: None,
                previous: if id == NULL { num_blocks - 1 } else { id - 1 },
                next: if id == num_blocks - 1 { NULL } else { id + 1 },
            })
            .collect();
        Self {
            blocks,
            free: num_blocks - 1,
            cached: HashMap::new(),
            caching,
        }
    }

    /// Blocks that no request holds, cached ones included.
    pub(crate) fn free(&self) -> u32 {
        self.free
    }

    /// Blocks that requests can hold in all.
    pub(crate) fn usable(&self) -> u32 {
        u32::try_from(self.blocks.len()).unwrap_or(u32::MAX) - 1
    }

    /// Share of the usable blocks that is held, 0 to 1.
    pub(crate) fn usage(&self) -> f64 {
        1.0 - f64::from(self.free) / f64::from(self.usable())
    }

    fn block(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id as usize]
    }

    /// Takes `id` out of the free list.
    fn unlink(&mut self, id: BlockId) {
        let (previous, next) = {
            let block = self.block(id);
            (block.previous, block.next)
        };
        self.block(previous).next = next;
        self.block(next).previous = previous;
        self.free -= 1;
    }

    /// Appends `id` to the free list: it will be reused after all that are free now.
    fn append(&mut self, id: BlockId) {
        let last = self.block(NULL).previous;
        self.block(last).next = id;
        self.block(NULL).previous = id;
        let block = self.block(id);
        block.previous = last;
        block.next = NULL;
        self.free += 1;
    }

    /// How many of the leading `hashes` are cached. Stops at the first that is not.
    pub(crate) fn lookup(&self, hashes: &[u64]) -> Hits {
        let mut hits = Hits::default();
        if !self.caching {
            return hits;
        }
        for hash in hashes {
            let Some(&id) = self.cached.get(hash) else {
                break;
            };
            hits.blocks += 1;
            hits.free += u32::from(self.blocks[id as usize].holders == 0);
        }
        hits
    }

    /// Holds the cached blocks of `hashes`, which [`lookup`](Self::lookup) has just found, and appends them to `held`.
    pub(crate) fn reuse(&mut self, hashes: &[u64], held: &mut Vec<BlockId>) {
        for hash in hashes {
            let Some(&id) = self.cached.get(hash) else {
                break;
            };
            if self.block(id).holders == 0 {
                self.unlink(id);
            }
            self.block(id).holders += 1;
            held.push(id);
        }
    }

    /// Holds `count` fresh blocks and appends them to `held`; false, and nothing changes, if fewer are free. A cached
    /// block that is handed out leaves the cache.
    pub(crate) fn allocate(&mut self, count: u32, held: &mut Vec<BlockId>) -> bool {
        if count > self.free {
            return false;
        }
        for _ in 0..count {
            let id = self.block(NULL).next;
            self.unlink(id);
            let block = self.block(id);
            block.holders = 1;
            if let Some(hash) = block.hash.take() {
                self.cached.remove(&hash);
            }
            held.push(id);
        }
        true
    }

    /// Puts a held, full block into the cache. If another block holds the same prefix already, that one stays.
    pub(crate) fn cache(&mut self, id: BlockId, hash: u64) {
        if !self.caching || self.block(id).hash.is_some() {
            return;
        }
        if let std::collections::hash_map::Entry::Vacant(entry) = self.cached.entry(hash) {
            entry.insert(id);
            self.block(id).hash = Some(hash);
        }
    }

    /// Gives `held` back, last block first, so that the head of a prefix outlives its tail.
    pub(crate) fn release(&mut self, held: &mut Vec<BlockId>) {
        while let Some(id) = held.pop() {
            let block = self.block(id);
            block.holders -= 1;
            if block.holders == 0 {
                self.append(id);
            }
        }
    }

    /// What must hold after every operation, given all blocks that requests hold (with repetitions).
    #[cfg(test)]
    pub(crate) fn check(&self, held: impl Iterator<Item = BlockId>) {
        let mut holders = vec![0; self.blocks.len()];
        held.for_each(|id| holders[id as usize] += 1);
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[id], "holders of block {id}");
        }
        assert_eq!(holders[NULL as usize], 0, "block 0 is never held");
        let mut listed = 0;
        let mut id = self.blocks[NULL as usize].next;
        while id != NULL {
            assert_eq!(
                self.blocks[id as usize].holders, 0,
                "block {id} is free and held"
            );
            listed += 1;
            id = self.blocks[id as usize].next;
        }
        assert_eq!(listed, self.free);
        let held = holders.iter().filter(|&&count| count > 0).count();
        assert_eq!(
            held + listed as usize,
            self.usable() as usize,
            "blocks are neither lost nor made"
        );
        for (hash, &id) in &self.cached {
            assert_eq!(self.blocks[id as usize].hash, Some(*hash));
        }
        assert!((0.0..=1.0).contains(&self.usage()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_zero_is_never_handed_out() {
        let mut pool = BlockPool::new(4, true);
        let mut held = Vec::new();
        assert!(pool.allocate(3, &mut held));
        assert_eq!(held, [1, 2, 3]);
        assert!(!pool.allocate(1, &mut held));
        assert!((pool.usage() - 1.0).abs() < f64::EPSILON);
        pool.check(held.into_iter());
    }

    #[test]
    fn freed_prefix_is_found_until_its_block_is_handed_out_again() {
        let mut pool = BlockPool::new(4, true);
        let mut held = Vec::new();
        pool.allocate(2, &mut held);
        pool.cache(held[0], 70);
        pool.cache(held[1], 71);
        pool.release(&mut held);
        assert_eq!(pool.free(), 3);
        assert_eq!(pool.lookup(&[70, 71, 72]), Hits { blocks: 2, free: 2 });

        // The third block was never used and the tail of the prefix was freed before its head.
        pool.allocate(2, &mut held);
        assert_eq!(held, [3, 2]);
        assert_eq!(pool.lookup(&[70, 71]), Hits { blocks: 1, free: 1 });
        pool.allocate(1, &mut held);
        assert_eq!(pool.lookup(&[70, 71]), Hits::default());
    }

    #[test]
    fn shared_prefix_is_freed_by_its_last_holder() {
        let mut pool = BlockPool::new(4, true);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        pool.allocate(1, &mut first);
        pool.cache(first[0], 70);
        assert_eq!(pool.lookup(&[70]), Hits { blocks: 1, free: 0 });
        pool.reuse(&[70], &mut second);
        assert_eq!(pool.free(), 2);
        pool.release(&mut first);
        assert_eq!(pool.free(), 2);
        pool.release(&mut second);
        assert_eq!(pool.free(), 3);
        pool.check(std::iter::empty());
    }

    #[test]
    fn without_caching_nothing_is_found() {
        let mut pool = BlockPool::new(4, false);
        let mut held = Vec::new();
        pool.allocate(1, &mut held);
        pool.cache(held[0], 70);
        assert_eq!(pool.lookup(&[70]), Hits::default());
    }
}
