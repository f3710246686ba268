//! A tile: the queries of some neighbouring tokens for one head of keys and values, against one split of the context.
//!
//! A split is `SPLIT_TOKENS` positions that begin at a multiple of it. Within one, a query's scores are computed, then
//! their powers relative to the largest, then the weighted sum of the values: a state of (largest, sum of powers, sums).
//! States of splits are merged in ascending order, as in Dao 2022, "FlashAttention", and Milakov and Gimelshein 2018,
//! "Online normalizer calculation for softmax".
//!
//! Invariant: what a query comes to follows from its own values, its position and its sequence alone. A score is a sum over
//! the head in ascending order in one lane; a sum of values goes over positions in ascending order in one lane; powers are
//! added in sixteen lanes by position. Neighbours in a tile share loads, never arithmetic, and a position that one of them
//! sees and another doesn't adds an exact zero to the other.

use std::ops::Range;

use half::bf16;

use super::lanes::{Lanes, Vectorised, exp};
use crate::engine::kv_cache::{BlockView, KvCache};
use crate::engine::pager::{BLOCK_TOKENS, Blocks};

/// Positions of a split: enough work for a thread to be handed, few enough that a long context feeds many.
pub(super) const SPLIT_TOKENS: u32 = 256;
const SPLIT: usize = SPLIT_TOKENS as usize;
const BLOCK: usize = BLOCK_TOKENS as usize;
const _: () = assert!(SPLIT.is_multiple_of(BLOCK));

/// Queries of a tile, at most, where a token does not have more: with their scores they stay in the second cache.
pub(super) const TILE_QUERIES: usize = 64;

/// Lanes over which powers are added, whatever a vector holds.
const SUM_LANES: usize = 16;

/// Blocks from where keys or values are read to where memory is asked for more.
const AHEAD: usize = 2;

/// Elements of a cache line.
const LINE: usize = 32;

/// Queries that share the loads of keys and values in registers.
const WIDE: usize = 8;
const NARROW: usize = 4;

/// Neighbouring tokens of one sequence, for one head of keys and values.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) layer: usize,
    pub(super) blocks: &'a Blocks,
    pub(super) kv_head: usize,
    /// The position of the first token.
    pub(super) position: u32,
    /// Tokens, and queries of each.
    pub(super) tokens: usize,
    pub(super) group: usize,
    /// Elements of a head.
    pub(super) dim: usize,
}

impl<'a> Tile<'a> {
    /// Queries of the tile.
    pub(super) fn queries(&self) -> usize {
        self.tokens * self.group
    }

    /// Gives the keys and values of a block of a split.
    fn block(&self, split: u32, block: usize) -> BlockView<'a> {
        let index = split * (SPLIT_TOKENS / BLOCK_TOKENS) + block as u32;
        self.cache.block(self.layer, self.blocks, index, self.kv_head)
    }

    /// Gives the positions of a split that a token sees, counted from the split's start.
    fn visible(&self, token: usize, split: u32) -> Range<usize> {
        let (start, position) = (split * SPLIT_TOKENS, self.position + token as u32);
        let within = |position: u32| position.saturating_sub(start).min(SPLIT_TOKENS) as usize;
        within(self.cache.span(self.layer).first_visible(position))..within(position + 1)
    }
}

/// What queries have come to over some splits. Shapes: sums: [queries, dim], largest, powers: [queries].
pub(super) struct State<'a> {
    pub(super) sums: &'a mut [f32],
    pub(super) largest: &'a mut [f32],
    pub(super) powers: &'a mut [f32],
}

/// A state to read.
#[derive(Clone, Copy)]
pub(super) struct StateView<'a> {
    pub(super) sums: &'a [f32],
    pub(super) largest: &'a [f32],
    pub(super) powers: &'a [f32],
}

impl<'a> StateView<'a> {
    /// Reads that of some queries out of a buffer that was laid out by `State::within`.
    pub(super) fn of(buffer: &'a [f32], queries: usize, wanted: Range<usize>, dim: usize) -> StateView<'a> {
        let (sums, rest) = buffer.split_at(queries * dim);
        let (largest, powers) = rest.split_at(queries);
        let sums = &sums[wanted.start * dim..wanted.end * dim];
        StateView { sums, largest: &largest[wanted.clone()], powers: &powers[wanted] }
    }
}

impl<'a> State<'a> {
    /// Gives the length of a buffer that holds a state.
    pub(super) fn len(queries: usize, dim: usize) -> usize {
        queries * (dim + 2)
    }

    /// Lays a state out in a buffer.
    pub(super) fn within(buffer: &'a mut [f32], queries: usize, dim: usize) -> State<'a> {
        let (sums, rest) = buffer.split_at_mut(queries * dim);
        let (largest, powers) = rest.split_at_mut(queries);
        State { sums, largest, powers: &mut powers[..queries] }
    }

    /// Starts with nothing seen but a sink for each query; minus infinity for none.
    pub(super) fn start(&mut self, sink: impl Fn(usize) -> f32) {
        self.sums.fill(0.0);
        for (query, (largest, power)) in self.largest.iter_mut().zip(self.powers.iter_mut()).enumerate() {
            *largest = sink(query);
            *power = if *largest == f32::NEG_INFINITY { 0.0 } else { 1.0 };
        }
    }
}

/// Gives the length of the buffer that `Attend` works in.
pub(super) fn work_len(queries: usize, dim: usize) -> usize {
    queries * (SPLIT + dim) + State::len(queries, dim)
}

/// Attends for a tile over some splits and merges what comes of them into a state, in ascending order.
pub(super) struct Attend<'a> {
    pub(super) tile: Tile<'a>,
    pub(super) splits: Range<u32>,
    /// Gives the query of a token and a head of the group. Shapes: [tokens, stride] with [group, dim] from the start.
    pub(super) rows: &'a [f32],
    pub(super) stride: usize,
    pub(super) state: State<'a>,
    /// As long as `work_len`; what it holds is of no account.
    pub(super) work: &'a mut [f32],
}

impl Vectorised for Attend<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Attend { tile, splits, rows, stride, mut state, work } = self;
        let (queries, dim) = (tile.queries(), tile.dim);
        let (packed, work) = work.split_at_mut(queries * dim);
        let (scores, work) = work.split_at_mut(queries * SPLIT);
        let own = State::within(work, queries, dim);
        pack::<L>(&tile, rows, stride, packed);
        for split in splits {
            let seen = tile.visible(0, split).start..tile.visible(tile.tokens - 1, split).end;
            if seen.is_empty() {
                continue;
            }
            score::<L>(&tile, split, &seen, packed, scores);
            for query in 0..queries {
                let scores = &mut scores[query * SPLIT..(query + 1) * SPLIT];
                let visible = tile.visible(query / tile.group, split);
                (own.largest[query], own.powers[query]) = to_powers::<L>(scores, visible, &seen);
            }
            own.sums.fill(0.0);
            add_values::<L>(&tile, split, &seen, scores, own.sums);
            let own = StateView { sums: own.sums, largest: own.largest, powers: own.powers };
            merge::<L>(&mut state, own, dim);
        }
    }
}

/// Merges the state of one split into that of those before it.
pub(super) struct Merge<'a, 'b> {
    pub(super) state: &'a mut State<'b>,
    pub(super) next: StateView<'a>,
    pub(super) dim: usize,
}

impl Vectorised for Merge<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        merge::<L>(self.state, self.next, self.dim);
    }
}

#[inline(always)]
fn merge<L: Lanes>(state: &mut State<'_>, next: StateView<'_>, dim: usize) {
    for query in 0..state.largest.len() {
        // Nothing of the split was seen, or nothing at all.
        if next.powers[query] == 0.0 {
            continue;
        }
        let (before, after) = (state.largest[query], next.largest[query]);
        let largest = if after > before { after } else { before };
        let mut factors = [0.0; SUM_LANES];
        (factors[0], factors[1]) = (before - largest, after - largest);
        let powers = exp(L::load(&factors));
        powers.store(&mut factors);
        let [kept, added] = [factors[0], factors[1]];
        state.largest[query] = largest;
        state.powers[query] = L::multiply_add_one(next.powers[query], added, state.powers[query] * kept);
        let sums = &mut state.sums[query * dim..(query + 1) * dim];
        let next = &next.sums[query * dim..(query + 1) * dim];
        let (mut chunks, mut next_chunks) = (sums.chunks_exact_mut(L::COUNT), next.chunks_exact(L::COUNT));
        for (sums, next) in (&mut chunks).zip(&mut next_chunks) {
            let scaled = L::load(sums).multiply(L::splat(kept));
            L::load(next).multiply_add(L::splat(added), scaled).store(sums);
        }
        for (sum, next) in chunks.into_remainder().iter_mut().zip(next_chunks.remainder()) {
            *sum = L::multiply_add_one(*next, added, *sum * kept);
        }
    }
}

/// Gives how many of the queries that are left share registers next: eight if there are so many, then four, then one.
///
/// Loops over these stand written out, for a closure would be compiled without the instructions of the function around it.
#[inline(always)]
fn bundle<L: Lanes>(left: usize) -> usize {
    match left {
        WIDE.. if L::COUNT == SUM_LANES => WIDE,
        NARROW.. => NARROW,
        _ => 1,
    }
}

/// Scales the queries and puts them so that those of a bundle lie side by side. Shapes: packed: bundles of [dim, count].
#[inline(always)]
fn pack<L: Lanes>(tile: &Tile<'_>, rows: &[f32], stride: usize, packed: &mut [f32]) {
    let dim = tile.dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut first = 0;
    while first < tile.queries() {
        let count = bundle::<L>(tile.queries() - first);
        let packed = &mut packed[first * dim..(first + count) * dim];
        for place in 0..count {
            let query = first + place;
            let start = query / tile.group * stride + query % tile.group * dim;
            for (packed, value) in packed[place..].iter_mut().step_by(count).zip(&rows[start..start + dim]) {
                *packed = value * scale;
            }
        }
        first += count;
    }
}

/// Blocks of a split that hold some of these positions.
fn blocks(seen: &Range<usize>) -> Range<usize> {
    seen.start / BLOCK..seen.end.div_ceil(BLOCK)
}

/// Gives what is read so many blocks behind the first keys of a split: its keys, then its values, then the keys of the next.
/// Pages lie apart, and no processor looks ahead across them.
#[inline(always)]
fn ahead<'a>(tile: &Tile<'a>, split: u32, all: &Range<usize>, step: usize) -> &'a [bf16] {
    let count = all.len();
    if step < count {
        return tile.block(split, all.start + step).keys;
    }
    if step < 2 * count {
        return tile.block(split, all.start + step - count).values;
    }
    let block = step - 2 * count;
    let start = (split + 1) * SPLIT_TOKENS + block as u32 * BLOCK_TOKENS;
    if start < tile.position + tile.tokens as u32 { tile.block(split + 1, block).keys } else { &[] }
}

/// Shapes: scores: [queries, SPLIT], of which the blocks that hold `seen` are written.
#[inline(always)]
fn score<L: Lanes>(tile: &Tile<'_>, split: u32, seen: &Range<usize>, packed: &[f32], scores: &mut [f32]) {
    let all = blocks(seen);
    for block in all.clone() {
        let keys = tile.block(split, block).keys;
        let ahead = ahead(tile, split, &all, block - all.start + AHEAD);
        let mut first = 0;
        while first < tile.queries() {
            let count = bundle::<L>(tile.queries() - first);
            let queries = &packed[first * tile.dim..(first + count) * tile.dim];
            let scores = &mut scores[first * SPLIT + block * BLOCK..];
            let ahead = if first == 0 { ahead } else { &[] };
            match (count, L::COUNT) {
                (WIDE, _) => score_bundle::<L, WIDE, 2>(queries, keys, scores, ahead),
                (NARROW, _) => score_bundle::<L, NARROW, 2>(queries, keys, scores, ahead),
                (_, 8) => score_bundle::<L, 1, 4>(queries, keys, scores, ahead),
                _ => score_bundle::<L, 1, 2>(queries, keys, scores, ahead),
            }
            first += count;
        }
    }
}

/// Multiplies queries with the keys of a block, `V` vectors of positions at a time.
///
/// Shapes: queries: [dim, R], keys: [dim, BLOCK], scores: [R, SPLIT], of which the first BLOCK of each are written. `ahead`
/// is what is read next, or nothing.
#[inline(always)]
fn score_bundle<L: Lanes, const R: usize, const V: usize>(
    queries: &[f32],
    keys: &[bf16],
    scores: &mut [f32],
    ahead: &[bf16],
) {
    let (queries, keys) = (queries.as_chunks::<R>().0, keys.as_chunks::<BLOCK>().0);
    let mut ahead = ahead.as_chunks::<BLOCK>().0.iter();
    for column in (0..BLOCK).step_by(V * L::COUNT) {
        let mut sums = [[L::splat(0.0); V]; R];
        for (query, keys) in queries.iter().zip(keys) {
            if let Some(ahead) = ahead.next() {
                L::prefetch(ahead);
            }
            let mut wide = [L::splat(0.0); V];
            for v in 0..V {
                wide[v] = L::load_bf16(&keys[column + v * L::COUNT..]);
            }
            for r in 0..R {
                let query = L::splat(query[r]);
                for v in 0..V {
                    sums[r][v] = wide[v].multiply_add(query, sums[r][v]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(&mut scores[r * SPLIT + column + v * L::COUNT..]);
            }
        }
    }
}

/// Turns the visible ones of a query's scores into powers relative to the largest of them, and all others that a neighbour
/// sees into 0. Gives the largest and the sum of the powers.
#[inline(always)]
fn to_powers<L: Lanes>(scores: &mut [f32], visible: Range<usize>, seen: &Range<usize>) -> (f32, f32) {
    let all = blocks(seen).start * BLOCK..blocks(seen).end * BLOCK;
    if visible.is_empty() {
        scores[all].fill(0.0);
        return (f32::NEG_INFINITY, 0.0);
    }
    let own = blocks(&visible).start * BLOCK..blocks(&visible).end * BLOCK;
    scores[all.start..own.start].fill(0.0);
    scores[own.end..all.end].fill(0.0);
    scores[own.start..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..own.end].fill(f32::NEG_INFINITY);
    let mut largest = [L::splat(f32::NEG_INFINITY); SUM_LANES / 8];
    for scores in scores[own.clone()].chunks_exact(SUM_LANES) {
        for (largest, scores) in largest.iter_mut().zip(scores.chunks_exact(L::COUNT)) {
            *largest = L::load(scores).larger(*largest);
        }
    }
    let largest = fold::<L>(&largest, |a, b| if a > b { a } else { b });
    let mut sums = [L::splat(0.0); SUM_LANES / 8];
    for scores in scores[own].chunks_exact_mut(SUM_LANES) {
        for (sum, scores) in sums.iter_mut().zip(scores.chunks_exact_mut(L::COUNT)) {
            let power = exp(L::load(scores).add(L::splat(-largest)));
            power.store(scores);
            *sum = sum.add(power);
        }
    }
    (largest, fold::<L>(&sums, |a, b| a + b))
}

/// Folds sixteen lanes pairwise.
#[inline(always)]
fn fold<L: Lanes>(vectors: &[L; SUM_LANES / 8], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; SUM_LANES];
    for (vector, lanes) in vectors.iter().zip(lanes.chunks_exact_mut(L::COUNT)) {
        vector.store(lanes);
    }
    let mut width = SUM_LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds the values of the positions that some query sees, times their powers.
///
/// Shapes: powers: [queries, SPLIT], sums: [queries, dim].
#[inline(always)]
fn add_values<L: Lanes>(tile: &Tile<'_>, split: u32, seen: &Range<usize>, powers: &[f32], sums: &mut [f32]) {
    let dim = tile.dim;
    let all = blocks(seen);
    for block in all.clone() {
        let within = |position: usize| position.saturating_sub(block * BLOCK).min(BLOCK);
        let tokens = within(seen.start)..within(seen.end);
        let values = &tile.block(split, block).values[tokens.start * dim..tokens.end * dim];
        let ahead = ahead(tile, split, &all, all.len() + block - all.start + AHEAD);
        let mut first = 0;
        while first < tile.queries() {
            let count = bundle::<L>(tile.queries() - first);
            let powers = &powers[first * SPLIT + block * BLOCK + tokens.start..];
            let sums = &mut sums[first * dim..(first + count) * dim];
            let ahead = if first == 0 { ahead } else { &[] };
            match count {
                WIDE => add_bundle::<L, WIDE>(powers, values, sums, ahead),
                NARROW => add_bundle::<L, NARROW>(powers, values, sums, ahead),
                _ => add_bundle::<L, 1>(powers, values, sums, ahead),
            }
            first += count;
        }
    }
}

/// Adds the values of some positions of a block.
///
/// Shapes: powers: [R, SPLIT], values: [positions, dim], sums: [R, dim]. `ahead` is what is read next, or nothing.
#[inline(always)]
fn add_bundle<L: Lanes, const R: usize>(powers: &[f32], values: &[bf16], sums: &mut [f32], ahead: &[bf16]) {
    let dim = sums.len() / R;
    let mut column = 0;
    if R == 1 {
        // One query alone keeps the units busy with more vectors of its own.
        while column + 4 * L::COUNT <= dim {
            add_stripe::<L, R, 4>(powers, values, sums, (column, ahead));
            column += 4 * L::COUNT;
        }
    }
    while column + 2 * L::COUNT <= dim {
        add_stripe::<L, R, 2>(powers, values, sums, (column, ahead));
        column += 2 * L::COUNT;
    }
    while column + L::COUNT <= dim {
        add_stripe::<L, R, 1>(powers, values, sums, (column, ahead));
        column += L::COUNT;
    }
    for column in column..dim {
        for (position, values) in values.chunks_exact(dim).enumerate() {
            for r in 0..R {
                let sum = &mut sums[r * dim + column];
                *sum = L::multiply_add_one(values[column].to_f32(), powers[r * SPLIT + position], *sum);
            }
        }
    }
}

/// Does so for `V` vectors of each head from a column on.
#[inline(always)]
fn add_stripe<L: Lanes, const R: usize, const V: usize>(
    powers: &[f32],
    values: &[bf16],
    sums: &mut [f32],
    (column, ahead): (usize, &[bf16]),
) {
    let dim = sums.len() / R;
    let stripe = column..column + V * L::COUNT;
    let mut added = [[L::splat(0.0); V]; R];
    for r in 0..R {
        for v in 0..V {
            added[r][v] = L::load(&sums[r * dim + column + v * L::COUNT..]);
        }
    }
    let positions = values.len() / dim;
    let powers: [&[f32]; R] = std::array::from_fn(|r| &powers[r * SPLIT..r * SPLIT + positions]);
    for (position, values) in values.chunks_exact(dim).enumerate() {
        // Bit by bit: asked for all at once, they would have to wait for each other.
        for line in (stripe.start..stripe.end).step_by(LINE) {
            if let Some(ahead) = ahead.get(position * dim + line..) {
                L::prefetch(ahead);
            }
        }
        let values = &values[stripe.clone()];
        let mut wide = [L::splat(0.0); V];
        for v in 0..V {
            wide[v] = L::load_bf16(&values[v * L::COUNT..]);
        }
        for r in 0..R {
            let power = L::splat(powers[r][position]);
            for v in 0..V {
                added[r][v] = wide[v].multiply_add(power, added[r][v]);
            }
        }
    }
    for (r, added) in added.iter().enumerate() {
        for (v, added) in added.iter().enumerate() {
            added.store(&mut sums[r * dim + column + v * L::COUNT..]);
        }
    }
}
