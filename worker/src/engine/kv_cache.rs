//! Keys and values of past tokens on the processor, in blocks that a `Pager` hands out.
//!
//! Elements are bf16. The keys of a block stand by element, so that attention multiplies a query with many of them at a
//! time; the values stand by token, so that it adds whole rows. Invariant: the storage is made once and never grows.

use half::bf16;
use half::slice::HalfBitsSliceExt;

use super::pager::{BLOCK_TOKENS, Blocks, ELEMENT_BYTES, Kind, KvShape, Pager, Span};
use crate::memory::pages::ask_for_large;

/// The storage of all keys and values.
#[derive(Debug)]
pub struct KvCache {
    /// Which blocks are whose.
    pub pager: Pager,
    full: Pool,
    window: Pool,
    /// For each layer its index within its pool.
    slots: Vec<usize>,
}

#[derive(Debug)]
struct Pool {
    layers: usize,
    /// The bits of bf16 values: zeroed integers come as untouched pages, which take no memory until they are written.
    data: Vec<u16>,
}

/// One block of one layer and one head.
#[derive(Debug)]
pub struct BlockView<'a> {
    /// The keys. Shapes: [head_dim, BLOCK_TOKENS].
    pub keys: &'a [bf16],
    /// The values. Shapes: [BLOCK_TOKENS, head_dim].
    pub values: &'a [bf16],
}

impl KvCache {
    /// Makes a cache with `full_blocks` blocks for whole-context layers and room for the windows of `sequences`.
    #[must_use]
    pub fn new(shape: KvShape, full_blocks: u32, sequences: u32, step_tokens: u32) -> KvCache {
        let pager = Pager::new(shape, full_blocks, sequences, step_tokens);
        let shape = pager.shape();
        let block_elements = 2 * shape.kv_heads * shape.head_dim * BLOCK_TOKENS as usize;
        let pool = |kind: Kind| {
            let layers = shape.layers(kind);
            let mut data = vec![0; pager.pool_blocks(kind) as usize * layers * block_elements];
            // Where there are none, small pages serve as well, only slower.
            let _ = ask_for_large(&mut data);
            Pool { layers, data }
        };
        KvCache { full: pool(Kind::Full), window: pool(Kind::Window), slots: shape.slots(), pager }
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

    /// Gives the bytes of the storage.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.full.data.len() + self.window.data.len()) as u64 * ELEMENT_BYTES
    }

    /// Writes the key and value of one token in one layer.
    ///
    /// Shapes: key, value: [kv_heads, head_dim] f32, rounded to bf16.
    ///
    /// # Panics
    /// When no block was reserved for the position.
    pub fn write(&mut self, layer: usize, blocks: &Blocks, position: u32, key: &[f32], value: &[f32]) {
        let (kind, head_dim) = (Kind::of(self.pager.shape().spans[layer]), self.pager.shape().head_dim);
        let block = blocks.table(kind).block_of(position / BLOCK_TOKENS);
        let heads = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let start = self.start(layer, block, head);
            let (half, token) = (self.half(), (position % BLOCK_TOKENS) as usize);
            let data = match kind {
                Kind::Full => &mut self.full.data,
                Kind::Window => &mut self.window.data,
            };
            let (keys, values) = data[start..start + 2 * half].split_at_mut(half);
            for (place, key) in keys[token..].iter_mut().step_by(BLOCK_TOKENS as usize).zip(key) {
                *place = rounded(*key);
            }
            for (place, value) in values[token * head_dim..].iter_mut().zip(value) {
                *place = rounded(*value);
            }
        }
    }

    /// Gives the keys and values of the `index`th block of a sequence in one layer, for one head.
    ///
    /// # Panics
    /// When the sequence does not hold the block.
    #[must_use]
    pub fn block(&self, layer: usize, blocks: &Blocks, index: u32, head: usize) -> BlockView<'_> {
        let kind = Kind::of(self.pager.shape().spans[layer]);
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
        self.pager.shape().spans[layer]
    }

    /// Elements of the keys of one block, one layer, one head; its values follow them.
    fn half(&self) -> usize {
        BLOCK_TOKENS as usize * self.pager.shape().head_dim
    }

    fn start(&self, layer: usize, block: u32, head: usize) -> usize {
        let pool = match Kind::of(self.pager.shape().spans[layer]) {
            Kind::Full => &self.full,
            Kind::Window => &self.window,
        };
        ((block as usize * pool.layers + self.slots[layer]) * self.pager.shape().kv_heads + head) * 2 * self.half()
    }
}

/// Gives the bits of the nearest bf16, the even one of two, without a branch; no number stays none.
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet = bits | 0x0040_0000;
    ((if value.is_nan() { quiet } else { nearest }) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_type() {
        let edges = [0x0000_8000, 0x0001_8000, 0x3f80_8000, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0x7fff_ffff];
        let signed = edges.into_iter().chain(edges.map(|bits| bits | 1 << 31));
        for bits in (0..1 << 20).map(|i: u32| i.wrapping_mul(4_099)).chain(signed) {
            let value = f32::from_bits(bits);
            assert_eq!(rounded(value), bf16::from_f32(value).to_bits(), "{bits:x}");
        }
    }

    fn cache(full_blocks: u32) -> KvCache {
        let spans = vec![Span::Window(40), Span::Full, Span::Window(40)];
        KvCache::new(KvShape { spans, kv_heads: 2, head_dim: 4 }, full_blocks, 2, 16)
    }

    #[test]
    fn what_is_written_is_read_in_its_layer_head_and_position() {
        let mut cache = cache(4);
        let mut blocks = Blocks::default();
        cache.pager.reserve(&mut blocks, 70).expect("three blocks are free");
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
            let (token, tokens) = ((position % BLOCK_TOKENS) as usize, BLOCK_TOKENS as usize);
            let expected = bf16::from_f32(key(layer, position, head));
            assert_eq!(std::array::from_fn(|element| view.keys[element * tokens + token]), [expected; 4]);
            assert_eq!(view.values[token * 4..token * 4 + 4], [-expected; 4]);
        }
    }
}
