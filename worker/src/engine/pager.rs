//! Blocks of the KV cache: who holds which, wherever their bytes lie.
//!
//! Owns two pools of block numbers: one for the layers that see the whole context and one for those that see a sliding
//! window. A sequence holds a table of blocks in each; in the second, blocks that no later token can see are given back as
//! the sequence grows. Refuses: to know what a block holds or where that lies.
//! Invariants: a block belongs to at most one table; what a table does not hold is free.

use std::collections::VecDeque;

use crate::model::config::Config;

/// Tokens in a block.
pub const BLOCK_TOKENS: u32 = 32;

/// Bytes of one key or value element in 16 bits.
pub(crate) const ELEMENT_BYTES: u64 = 2;

/// No block is free: a sequence must give some back first.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no block of KV cache is free")]
pub struct Exhausted;

/// How far back a layer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// To the start of the sequence.
    Full,
    /// The token itself and those before it, `0` of them in all.
    Window(u32),
}

impl Span {
    /// Gives the first position that a token at `position` sees.
    #[must_use]
    pub fn first_visible(self, position: u32) -> u32 {
        match self {
            Span::Full => 0,
            Span::Window(tokens) => (position + 1).saturating_sub(tokens),
        }
    }
}

/// What the sizes of a cache follow from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// The span of each layer. All windows of a model have one width.
    pub spans: Vec<Span>,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
}

impl KvShape {
    /// Reads the shape off a model's configuration.
    #[must_use]
    pub fn of(config: &Config) -> KvShape {
        // A window beyond 32 bits is wider than any context: it hides nothing.
        let window = |tokens| u32::try_from(tokens).map_or(Span::Full, Span::Window);
        let spans = (0..config.layers.len()).map(|layer| config.window(layer).map_or(Span::Full, window)).collect();
        KvShape { spans, kv_heads: config.kv_heads, head_dim: config.head_dim }
    }

    /// Gives the bytes of one block in the pool of whole-context layers.
    #[must_use]
    pub fn full_block_bytes(&self) -> u64 {
        self.layer_block_bytes() * self.layers(Kind::Full) as u64
    }

    /// Gives the bytes that the windows of `sequences` take, when a step adds at most `step_tokens` to all of them.
    #[must_use]
    pub fn window_bytes(&self, sequences: u32, step_tokens: u32) -> u64 {
        let blocks = u64::from(self.window_blocks(sequences, step_tokens));
        self.layer_block_bytes() * self.layers(Kind::Window) as u64 * blocks
    }

    /// Gives the bytes of keys and values that a token at `position` reads in all layers, its own included.
    #[must_use]
    pub fn read_bytes(&self, position: u32) -> u64 {
        let token = self.layer_block_bytes() / u64::from(BLOCK_TOKENS);
        let visible = |span: &Span| u64::from(position - span.first_visible(position) + 1);
        self.spans.iter().map(visible).sum::<u64>() * token
    }

    fn layer_block_bytes(&self) -> u64 {
        2 * self.kv_heads as u64 * self.head_dim as u64 * u64::from(BLOCK_TOKENS) * ELEMENT_BYTES
    }

    /// Gives for each layer its index among the layers of its pool.
    #[must_use]
    pub fn slots(&self) -> Vec<usize> {
        let mut counts = [0usize; 2];
        let mut slot = |span: &Span| {
            let count = &mut counts[Kind::of(*span) as usize];
            *count += 1;
            *count - 1
        };
        self.spans.iter().map(&mut slot).collect()
    }

    /// Gives the number of layers whose blocks lie in a pool.
    #[must_use]
    pub fn layers(&self, kind: Kind) -> usize {
        self.spans.iter().filter(|span| Kind::of(**span) == kind).count()
    }

    /// Gives the width of the windows, if there are any. Units: tokens.
    #[must_use]
    pub fn window_tokens(&self) -> Option<u32> {
        self.spans.iter().find_map(|span| match span {
            Span::Full => None,
            Span::Window(tokens) => Some(*tokens),
        })
    }

    /// Gives the blocks that the windows of `sequences` and the new tokens of a step touch at most. Neither end of a
    /// sequence's window, nor that of its new tokens, need be aligned.
    #[must_use]
    pub fn window_blocks(&self, sequences: u32, step_tokens: u32) -> u32 {
        let of_windows = |window: u32| sequences * (window.div_ceil(BLOCK_TOKENS) + 2);
        self.window_tokens().map_or(0, |window| of_windows(window) + step_tokens.div_ceil(BLOCK_TOKENS))
    }
}

/// A pool of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// That of the layers that see the whole context.
    Full,
    /// That of the layers with a sliding window.
    Window,
}

impl Kind {
    /// Gives the pool of a layer.
    #[must_use]
    pub fn of(span: Span) -> Kind {
        match span {
            Span::Full => Kind::Full,
            Span::Window(_) => Kind::Window,
        }
    }
}

/// The blocks of one sequence, by pool.
#[derive(Debug, Default)]
pub struct Blocks {
    full: Table,
    window: Table,
}

impl Blocks {
    /// Gives the table of a pool.
    #[must_use]
    pub fn table(&self, kind: Kind) -> &Table {
        match kind {
            Kind::Full => &self.full,
            Kind::Window => &self.window,
        }
    }
}

/// The blocks of one sequence in one pool.
#[derive(Debug, Default)]
pub struct Table {
    /// The index within the sequence of the first block that is still held.
    first: u32,
    blocks: VecDeque<u32>,
}

impl Table {
    /// Blocks that `tokens` tokens need beyond those held.
    fn missing(&self, tokens: u32) -> usize {
        let held = self.first as usize + self.blocks.len();
        (tokens.div_ceil(BLOCK_TOKENS) as usize).saturating_sub(held)
    }

    /// Gives the index within the sequence of the first block that is held.
    #[must_use]
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Gives the blocks that are held, in order.
    pub fn held(&self) -> impl Iterator<Item = u32> {
        self.blocks.iter().copied()
    }

    /// Gives the block that holds the `index`th tokens of the sequence.
    ///
    /// # Panics
    /// When it is not held.
    #[must_use]
    pub fn block_of(&self, index: u32) -> u32 {
        self.blocks[(index - self.first) as usize]
    }
}

#[derive(Debug)]
struct Pool {
    layers: usize,
    blocks: u32,
    free: Vec<u32>,
}

/// Which blocks are free.
#[derive(Debug)]
pub struct Pager {
    shape: KvShape,
    full: Pool,
    window: Pool,
}

impl Pager {
    /// Makes `full_blocks` blocks for whole-context layers and those for the windows of `sequences`.
    #[must_use]
    pub fn new(shape: KvShape, full_blocks: u32, sequences: u32, step_tokens: u32) -> Pager {
        let pool = |kind: Kind, blocks: u32| {
            // Reversed, so that the lowest block is taken first and memory is touched from the start.
            Pool { layers: shape.layers(kind), blocks, free: (0..blocks).rev().collect() }
        };
        let full = pool(Kind::Full, full_blocks);
        let window = pool(Kind::Window, shape.window_blocks(sequences, step_tokens));
        Pager { full, window, shape }
    }

    /// Gives the shape of what the blocks hold.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Gives the number of blocks in a pool.
    #[must_use]
    pub fn pool_blocks(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Full => self.full.blocks,
            Kind::Window => self.window.blocks,
        }
    }

    /// Gives the number of blocks, and of free ones, in the pool of whole-context layers.
    #[must_use]
    pub fn blocks(&self) -> (u32, u32) {
        (self.full.blocks, self.full.free.len() as u32)
    }

    /// Makes sure that a sequence has blocks for its first `tokens` tokens.
    ///
    /// # Errors
    /// `Exhausted` when a pool has too few; nothing is taken then.
    pub fn reserve(&mut self, blocks: &mut Blocks, tokens: u32) -> Result<(), Exhausted> {
        let needs = |pool: &Pool, table: &Table| if pool.layers == 0 { 0 } else { table.missing(tokens) };
        let (full, window) = (needs(&self.full, &blocks.full), needs(&self.window, &blocks.window));
        if full > self.full.free.len() || window > self.window.free.len() {
            return Err(Exhausted);
        }
        let take = |pool: &mut Pool, table: &mut Table, count: usize| {
            let from = pool.free.len() - count;
            table.blocks.extend(pool.free.drain(from..).rev());
        };
        take(&mut self.full, &mut blocks.full, full);
        take(&mut self.window, &mut blocks.window, window);
        Ok(())
    }

    /// Gives back the window blocks that no token from `next_position` on can see.
    pub fn release_behind(&mut self, blocks: &mut Blocks, next_position: u32) {
        let Some(window) = self.shape.window_tokens() else { return };
        let first_visible = Span::Window(window).first_visible(next_position);
        while blocks.window.first < first_visible / BLOCK_TOKENS {
            let Some(block) = blocks.window.blocks.pop_front() else { return };
            self.window.free.push(block);
            blocks.window.first += 1;
        }
    }

    /// Gives back all blocks of a sequence.
    pub fn release(&mut self, blocks: &mut Blocks) {
        let held = std::mem::take(blocks);
        self.full.free.extend(held.full.blocks);
        self.window.free.extend(held.window.blocks);
    }

    /// Takes as many blocks as an empty table held before it gave them back, at the same place of the sequence.
    ///
    /// # Errors
    /// `Exhausted` when a pool has too few; nothing is taken then.
    pub fn restore(&mut self, held: Held) -> Result<Blocks, Exhausted> {
        if held.full as usize > self.full.free.len() || held.window as usize > self.window.free.len() {
            return Err(Exhausted);
        }
        let take = |pool: &mut Pool, count: u32| {
            let from = pool.free.len() - count as usize;
            pool.free.drain(from..).rev().collect()
        };
        Ok(Blocks {
            full: Table { first: 0, blocks: take(&mut self.full, held.full) },
            window: Table { first: held.window_first, blocks: take(&mut self.window, held.window) },
        })
    }
}

/// How many blocks a sequence holds, and from where on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// In the pool of whole-context layers.
    pub full: u32,
    /// In the pool of windows.
    pub window: u32,
    /// The index of the first of these in the sequence.
    pub window_first: u32,
}

impl Blocks {
    /// Counts the blocks.
    #[must_use]
    pub fn count(&self) -> Held {
        Held {
            full: self.full.blocks.len() as u32,
            window: self.window.blocks.len() as u32,
            window_first: self.window.first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pager(full_blocks: u32) -> Pager {
        let spans = vec![Span::Window(40), Span::Full, Span::Window(40)];
        Pager::new(KvShape { spans, kv_heads: 2, head_dim: 4 }, full_blocks, 2, 16)
    }

    #[test]
    fn a_token_reads_its_window_or_everything() {
        let shape = KvShape { spans: vec![Span::Window(40), Span::Full], kv_heads: 2, head_dim: 4 };
        for (position, keys) in [(0, 2), (39, 80), (40, 81), (99, 140)] {
            // A key and a value of two heads of four elements, two bytes each.
            assert_eq!(shape.read_bytes(position), keys * 2 * 2 * 4 * 2, "{position}");
        }
    }

    #[test]
    fn a_reservation_takes_all_or_nothing_and_comes_back_whole() {
        let mut pager = pager(4);
        let (mut first, mut second) = (Blocks::default(), Blocks::default());
        pager.reserve(&mut first, 3 * BLOCK_TOKENS).expect("three of four");
        assert_eq!(pager.blocks(), (4, 1));
        assert_eq!(pager.reserve(&mut second, BLOCK_TOKENS + 1), Err(Exhausted));
        assert_eq!(pager.blocks(), (4, 1));
        pager.reserve(&mut second, BLOCK_TOKENS).expect("the last one");
        pager.release(&mut first);
        pager.release(&mut second);
        assert_eq!(pager.blocks(), (4, 4));
    }

    #[test]
    fn a_window_gives_its_blocks_back_as_it_moves() {
        let mut pager = pager(64);
        let mut blocks = Blocks::default();
        let all = pager.window.free.len();
        for position in 0..1000 {
            pager.reserve(&mut blocks, position + 1).expect("a window never needs more than its share");
            let first = Span::Window(40).first_visible(position);
            for visible in [first, position] {
                let _ = blocks.table(Kind::Window).block_of(visible / BLOCK_TOKENS);
            }
            pager.release_behind(&mut blocks, position + 1);
            assert!(all - pager.window.free.len() <= 3, "a window of 40 touches at most three blocks of 32");
        }
        pager.release(&mut blocks);
        assert_eq!(pager.window.free.len(), all);
    }

    #[test]
    fn what_was_given_back_can_be_taken_again_at_the_same_place() {
        let mut pager = pager(8);
        let mut blocks = Blocks::default();
        pager.reserve(&mut blocks, 100).expect("room");
        pager.release_behind(&mut blocks, 100);
        let held = blocks.count();
        assert_eq!(held, Held { full: 4, window: 3, window_first: 1 });
        pager.release(&mut blocks);
        assert_eq!(pager.restore(held).expect("room").count(), held);
        assert_eq!(pager.restore(Held { full: 5, ..held }).err(), Some(Exhausted));
    }
}
