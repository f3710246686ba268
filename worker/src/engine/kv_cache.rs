//! Keys and values of past tokens, in blocks.
//!
//! Owns two pools: one for the layers that see the whole context and one for those that see a sliding window. A sequence
//! holds a table of blocks in each; in the second, blocks that no later token can see are given back as the sequence
//! grows. Values are bf16. Invariants: a block belongs to at most one table; what a table does not hold is free; the
//! storage is made once and never grows.

use std::collections::VecDeque;

use half::bf16;
use half::slice::HalfBitsSliceExt;

use crate::model::config::Config;

/// Tokens in a block.
pub const BLOCK_TOKENS: u32 = 32;

/// Bytes of one key or value element.
const ELEMENT_BYTES: u64 = size_of::<bf16>() as u64;

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

    /// Gives the bytes that the windows of one sequence take, when a step adds at most `step_tokens` to it.
    #[must_use]
    pub fn window_bytes(&self, step_tokens: u32) -> u64 {
        self.layer_block_bytes() * self.layers(Kind::Window) as u64 * u64::from(self.window_blocks(step_tokens))
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

    fn layers(&self, kind: Kind) -> usize {
        self.spans.iter().filter(|span| Kind::of(**span) == kind).count()
    }

    fn window_tokens(&self) -> Option<u32> {
        self.spans.iter().find_map(|span| match span {
            Span::Full => None,
            Span::Window(tokens) => Some(*tokens),
        })
    }

    /// Blocks that a window and a step's new tokens touch at most: neither end need be aligned.
    fn window_blocks(&self, step_tokens: u32) -> u32 {
        self.window_tokens().map_or(0, |window| (window + step_tokens).div_ceil(BLOCK_TOKENS) + 1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Full,
    Window,
}

impl Kind {
    fn of(span: Span) -> Kind {
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
    fn table(&self, kind: Kind) -> &Table {
        match kind {
            Kind::Full => &self.full,
            Kind::Window => &self.window,
        }
    }
}

#[derive(Debug, Default)]
struct Table {
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

    fn block_of(&self, index: u32) -> u32 {
        self.blocks[(index - self.first) as usize]
    }
}

#[derive(Debug)]
struct Pool {
    layers: usize,
    free: Vec<u32>,
    /// The bits of bf16 values: zeroed integers come as untouched pages, which take no memory until they are written.
    data: Vec<u16>,
}

/// The storage of all keys and values.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    full: Pool,
    window: Pool,
    /// For each layer its index within its pool.
    slots: Vec<usize>,
    full_blocks: u32,
}

/// One block of one layer and one head: keys and values by token. Shapes: each [BLOCK_TOKENS, head_dim].
#[derive(Debug)]
pub struct BlockView<'a> {
    /// The keys.
    pub keys: &'a [bf16],
    /// The values.
    pub values: &'a [bf16],
}

impl KvCache {
    /// Makes a cache with `full_blocks` blocks for whole-context layers and room for the windows of `sequences`.
    #[must_use]
    pub fn new(shape: KvShape, full_blocks: u32, sequences: u32, step_tokens: u32) -> KvCache {
        let mut counts = [0usize; 2];
        let mut slot = |span: &Span| {
            let count = &mut counts[Kind::of(*span) as usize];
            *count += 1;
            *count - 1
        };
        let slots = shape.spans.iter().map(&mut slot).collect();
        let block_elements = 2 * shape.kv_heads * shape.head_dim * BLOCK_TOKENS as usize;
        let pool = |kind: Kind, blocks: u32| {
            let layers = shape.layers(kind);
            // Reversed, so that the lowest block is taken first and memory is touched from the start.
            let free = (0..blocks).rev().collect();
            Pool { layers, free, data: vec![0; blocks as usize * layers * block_elements] }
        };
        let full = pool(Kind::Full, full_blocks);
        let window = pool(Kind::Window, sequences * shape.window_blocks(step_tokens));
        KvCache { full, window, slots, full_blocks, shape }
    }

    /// Makes a cache for `sequences` of at most `tokens` tokens each.
    #[must_use]
    pub fn for_many(shape: KvShape, sequences: u32, tokens: u32, step_tokens: u32) -> KvCache {
        KvCache::new(shape, sequences * tokens.div_ceil(BLOCK_TOKENS), sequences, step_tokens)
    }

    /// Makes a cache for one sequence of at most `tokens` tokens.
    #[must_use]
    pub fn for_one(shape: KvShape, tokens: u32, step_tokens: u32) -> KvCache {
        KvCache::for_many(shape, 1, tokens, step_tokens)
    }

    /// Gives the number of blocks, and of free ones, in the pool of whole-context layers.
    #[must_use]
    pub fn blocks(&self) -> (u32, u32) {
        (self.full_blocks, self.full.free.len() as u32)
    }

    /// Gives the bytes of the storage.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.full.data.len() + self.window.data.len()) as u64 * ELEMENT_BYTES
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

    /// Writes the key and value of one token in one layer.
    ///
    /// Shapes: key, value: [kv_heads, head_dim] f32, rounded to bf16.
    ///
    /// # Panics
    /// When no block was reserved for the position.
    pub fn write(&mut self, layer: usize, blocks: &Blocks, position: u32, key: &[f32], value: &[f32]) {
        let (kind, head_dim) = (Kind::of(self.shape.spans[layer]), self.shape.head_dim);
        let block = blocks.table(kind).block_of(position / BLOCK_TOKENS);
        let heads = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let start = self.start(layer, block, head) + (position % BLOCK_TOKENS) as usize * head_dim;
            let half = self.half();
            let data = match kind {
                Kind::Full => &mut self.full.data,
                Kind::Window => &mut self.window.data,
            };
            for (offset, (key, value)) in key.iter().zip(value).enumerate() {
                data[start + offset] = bf16::from_f32(*key).to_bits();
                data[start + half + offset] = bf16::from_f32(*value).to_bits();
            }
        }
    }

    /// Gives the keys and values of the `index`th block of a sequence in one layer, for one head.
    ///
    /// # Panics
    /// When the sequence does not hold the block.
    #[must_use]
    pub fn block(&self, layer: usize, blocks: &Blocks, index: u32, head: usize) -> BlockView<'_> {
        let kind = Kind::of(self.shape.spans[layer]);
        let start = self.start(layer, blocks.table(kind).block_of(index), head);
        let data = match kind {
            Kind::Full => &self.full.data,
            Kind::Window => &self.window.data,
        };
        let (keys, values) = data[start..start + 2 * self.half()].reinterpret_cast().split_at(self.half());
        BlockView { keys, values }
    }

    /// Gives the span of a layer.
    #[must_use]
    pub fn span(&self, layer: usize) -> Span {
        self.shape.spans[layer]
    }

    /// Elements of the keys of one block, one layer, one head; its values follow them.
    fn half(&self) -> usize {
        BLOCK_TOKENS as usize * self.shape.head_dim
    }

    fn start(&self, layer: usize, block: u32, head: usize) -> usize {
        let pool = match Kind::of(self.shape.spans[layer]) {
            Kind::Full => &self.full,
            Kind::Window => &self.window,
        };
        ((block as usize * pool.layers + self.slots[layer]) * self.shape.kv_heads + head) * 2 * self.half()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(full_blocks: u32) -> KvCache {
        let spans = vec![Span::Window(40), Span::Full, Span::Window(40)];
        KvCache::new(KvShape { spans, kv_heads: 2, head_dim: 4 }, full_blocks, 2, 16)
    }

    #[test]
    fn what_is_written_is_read_in_its_layer_head_and_position() {
        let mut cache = cache(4);
        let mut blocks = Blocks::default();
        cache.reserve(&mut blocks, 70).expect("three blocks are free");
        let key = |layer: usize, position: u32, head: usize| (layer * 100 + head * 10) as f32 + position as f32 / 128.0;
        for position in 0..70 {
            for layer in 0..3 {
                let heads: Vec<f32> = (0..8).map(|i| key(layer, position, i / 4)).collect();
                let values: Vec<f32> = heads.iter().map(|k| -k).collect();
                cache.write(layer, &blocks, position, &heads, &values);
            }
        }
        for (position, layer, head) in [(0, 0, 0), (31, 1, 1), (32, 1, 0), (69, 2, 1), (40, 0, 1)] {
            let view = cache.block(layer, &blocks, position / BLOCK_TOKENS, head);
            let at = (position % BLOCK_TOKENS) as usize * 4;
            let expected = bf16::from_f32(key(layer, position, head));
            assert_eq!(view.keys[at..at + 4], [expected; 4]);
            assert_eq!(view.values[at..at + 4], [-expected; 4]);
        }
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
        let mut cache = cache(4);
        let (mut first, mut second) = (Blocks::default(), Blocks::default());
        cache.reserve(&mut first, 3 * BLOCK_TOKENS).expect("three of four");
        assert_eq!(cache.blocks(), (4, 1));
        assert_eq!(cache.reserve(&mut second, BLOCK_TOKENS + 1), Err(Exhausted));
        assert_eq!(cache.blocks(), (4, 1));
        cache.reserve(&mut second, BLOCK_TOKENS).expect("the last one");
        cache.release(&mut first);
        cache.release(&mut second);
        assert_eq!(cache.blocks(), (4, 4));
    }

    #[test]
    fn a_window_gives_its_blocks_back_as_it_moves() {
        let mut cache = cache(64);
        let mut blocks = Blocks::default();
        let all = cache.window.free.len();
        for position in 0..1000 {
            cache.reserve(&mut blocks, position + 1).expect("a window never needs more than its share");
            cache.write(0, &blocks, position, &[1.0; 8], &[1.0; 8]);
            let first = Span::Window(40).first_visible(position);
            let _ = cache.block(0, &blocks, first / BLOCK_TOKENS, 1);
            cache.release_behind(&mut blocks, position + 1);
            assert!(all - cache.window.free.len() <= 3, "a window of 40 touches at most three blocks of 32");
        }
        cache.release(&mut blocks);
        assert_eq!(cache.window.free.len(), all);
    }
}
