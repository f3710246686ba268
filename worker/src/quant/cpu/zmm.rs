//! Integer products in vectors of 64 bytes: AVX-512 with VNNI. The scheme is that of `ymm`, with tiles of sixteen rows.
//!
//! `unsafe` stands here for loads and stores through pointers, and to call what was compiled for detected instructions.

#[allow(
    clippy::wildcard_imports,
    reason = "kernels name dozens of intrinsics, which say themselves what they are"
)]
use std::arch::x86_64::*;
use std::ops::Range;

use super::dot::{self, BF16_ROWS};
use super::groups::{CORRECTIONS, Group, Groups, SCALES};
use super::lines::{Coded, LANES, Line, OFFSET, Output, SEGMENT, SEGMENT_BYTES, Token};
use super::pool::{Decoded, Scratch};
use super::ymm;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Quads of a segment: those of high nibbles, then those of low ones.
pub(super) const QUADS: usize = SEGMENT / 4;

/// Tokens that share the loads of rows of bf16.
const BF16_TOKENS: usize = 4;

/// Segments whose codes share a line of the cache.
const SEGMENTS_OF_LINE: usize = 2;

/// Tiles that are computed together: as many as a scratch has room for.
const SIDES: usize = 2;

/// Computes rows for one token.
pub(super) fn one(coded: &Coded<'_>, token: &Token, rows: Range<usize>, (scratch, out): (&mut Decoded, &Output<'_>)) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<const BLOCKS: usize, const PAIRS: usize>(
        coded: &Coded<'_>,
        token: &Token,
        rows: Range<usize>,
        (scratch, out): (&mut Decoded, &Output<'_>),
    ) {
        let table = _mm512_castsi256_si512(ymm::table(coded.kind, OFFSET as u8));
        let table = _mm512_shuffle_i64x2(table, table, 0);
        scratch.floats.clear();
        scratch.floats.resize(token.scales.len(), 0.0);
        for row in rows {
            coded.write_scales(row, 0, &mut scratch.floats[..coded.blocks()]);
            out.put(0, row, row_of_one::<BLOCKS, PAIRS>(coded.row(row), token, table, &scratch.floats));
        }
    }
    match coded.kind.blocks() {
        // SAFETY: the path that leads here was checked against the processor.
        1 => unsafe { inner::<1, 4>(coded, token, rows, (scratch, out)) },
        // SAFETY: as above.
        _ => unsafe { inner::<2, 2>(coded, token, rows, (scratch, out)) },
    }
}

/// Multiplies a row; eight blocks are so many pairs of segments.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn row_of_one<const BLOCKS: usize, const PAIRS: usize>(
    (whole, rest): (&[[u8; SEGMENT_BYTES]], &[u8]),
    token: &Token,
    table: __m512i,
    scales: &[f32],
) -> f32 {
    let (pairs, _) = whole.as_chunks::<2>();
    let (groups, last) = pairs.as_chunks::<PAIRS>();
    let (lines, _) = token.lines.as_chunks::<2>().0.as_chunks::<PAIRS>();
    let steps = scales.as_chunks::<LANES>().0.iter().zip(token.scales.as_chunks::<LANES>().0);
    let mut steps = steps.zip(token.corrections.as_chunks::<LANES>().0);
    let mut lanes = _mm256_setzero_ps();
    for ((codes, lines), steps) in groups.iter().zip(lines).zip(&mut steps) {
        let mut sums = [_mm512_setzero_si512(); PAIRS];
        for i in 0..PAIRS {
            ymm::prefetch_behind(&codes[i]);
            sums[i] = two_segments(table, &codes[i], [&lines[i][0], &lines[i][1]]);
        }
        lanes = add_scaled::<BLOCKS, PAIRS>(lanes, sums, steps);
    }
    if let Some(steps) = steps.next() {
        let first = (pairs.len() - last.len()) * 2;
        let mut sums = [_mm512_setzero_si512(); PAIRS];
        for (i, sum) in sums.iter_mut().enumerate() {
            let both = [first + 2 * i, first + 2 * i + 1];
            let codes = both.map(|index| ymm::segment(whole, rest, index));
            *sum = two_segments(table, &codes, both.map(|index| token.lines.get(index).unwrap_or(&Line::ZERO)));
        }
        lanes = add_scaled::<BLOCKS, PAIRS>(lanes, sums, steps);
    }
    ymm::add_up(lanes)
}

/// Adds the sums of eight blocks, scaled, to the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_scaled<const BLOCKS: usize, const PAIRS: usize>(
    lanes: __m256,
    sums: [__m512i; PAIRS],
    ((weights, activations), corrections): ((&[f32; LANES], &[f32; LANES]), &[i32; LANES]),
) -> __m256 {
    let blocks = if BLOCKS == 1 { add_across(&sums) } else { add_across_halves(&sums) };
    let blocks = _mm256_add_epi32(blocks, ymm::load_i32(corrections));
    let scale = _mm256_mul_ps(ymm::load_f32(weights), ymm::load_f32(activations));
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(blocks), scale, lanes)
}

/// Computes four rows of bf16, as `dot::bf16_in_lanes` does, for tokens side by side.
pub(super) fn bf16(rows: [&[[u8; 2]]; BF16_ROWS], x: &[f32], out: &mut [[f32; BF16_ROWS]]) {
    #[target_feature(enable = "avx512f")]
    fn inner<const COUNT: usize>(rows: [&[[u8; 2]]; BF16_ROWS], x: [&[f32]; COUNT], out: &mut [[f32; BF16_ROWS]]) {
        let columns = rows[0].len();
        let lanes = rows.map(|row| row[..columns].as_chunks::<TILE>().0);
        let x_lanes = x.map(|x| &x[..columns].as_chunks::<TILE>().0[..columns / TILE]);
        let mut sums = [[_mm512_setzero_ps(); COUNT]; BF16_ROWS];
        for index in 0..columns / TILE {
            for row in 0..BF16_ROWS {
                ymm::prefetch_row(rows[row], index * TILE, BF16_ROWS);
                // SAFETY: 32 bytes are read from arrays of as many.
                let weights = unsafe { _mm256_loadu_si256(lanes[row][index].as_ptr().cast()) };
                let weights = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(weights), 16));
                for token in 0..COUNT {
                    sums[row][token] = _mm512_fmadd_ps(weights, load_f32(&x_lanes[token][index]), sums[row][token]);
                }
            }
        }
        let whole = columns / TILE * TILE;
        for (token, out) in out.iter_mut().enumerate() {
            for row in 0..BF16_ROWS {
                out[row] = dot::bf16_rest(&rows[row][whole..], &x[token][whole..], store_f32(sums[row][token]));
            }
        }
    }
    let columns = rows[0].len();
    for (x, out) in x.chunks(BF16_TOKENS * columns).zip(out.chunks_mut(BF16_TOKENS)) {
        let mut tokens = x.chunks_exact(columns);
        if out.len() == BF16_TOKENS {
            let tokens = std::array::from_fn::<_, BF16_TOKENS, _>(|_| tokens.next().expect("as many as results"));
            // SAFETY: the path that leads here was checked against the processor.
            unsafe { inner(rows, tokens, out) };
        } else {
            for (x, out) in tokens.zip(out) {
                // SAFETY: as above.
                unsafe { inner(rows, [x], std::slice::from_mut(out)) };
            }
        }
    }
}

/// Gives the products of two segments: the sums of four neighbours in each element.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vnni")]
fn two_segments(table: __m512i, codes: &[[u8; SEGMENT_BYTES]; 2], [first, second]: [&Line; 2]) -> __m512i {
    // SAFETY: 64 bytes are read from arrays of as many.
    let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
    let nibble = _mm512_set1_epi8(15);
    let high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    let low = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
    let both = |half| {
        let first = _mm512_castsi256_si512(ymm::load_half(first, half));
        _mm512_inserti64x4(first, ymm::load_half(second, half), 1)
    };
    _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), high, both(0)), low, both(1))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// Gives the sum of each half of four vectors, in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_across(vectors: &[__m512i]) -> __m256i {
    let [a, b, c, d] = *vectors.first_chunk::<4>().expect("eight segments");
    let (ab, cd) = (add_pairs(a, b), add_pairs(c, d));
    let quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let halves = _mm512_add_epi32(quarters, _mm512_shuffle_i32x4(quarters, quarters, 0b10_11_00_01));
    let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, halves))
}

/// Gives the sum of each quarter of two vectors, in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_across_halves(vectors: &[__m512i]) -> __m256i {
    let [a, b] = *vectors.first_chunk::<2>().expect("four segments");
    let pairs = add_pairs(a, b);
    let quarters = _mm512_add_epi32(pairs, _mm512_shuffle_epi32(pairs, 0b01_00_11_10));
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, quarters))
}

/// Computes rows for many tokens: 32 rows and a group of tokens at a time.
pub(super) fn many(
    coded: &Coded<'_>,
    groups: &Groups,
    rows: Range<usize>,
    (scratches, out): (&mut Scratch, &Output<'_>),
) {
    for first in rows.clone().step_by(SIDES * TILE) {
        let mut sides = [first..rows.end.min(first + TILE), first + TILE..rows.end.min(first + SIDES * TILE)];
        if sides[1].is_empty() {
            // Computed a second time for nothing: only at the end of a weight.
            sides[1] = sides[0].clone();
        }
        for (scratch, side) in scratches.iter_mut().zip(&sides) {
            match coded.kind.blocks() {
                1 => decode_tile::<{ OFFSET as u8 }, 1>(coded, side.clone(), scratch),
                _ => decode_tile::<{ OFFSET as u8 }, 2>(coded, side.clone(), scratch),
            }
        }
        for group in groups.iter() {
            let products = |token: usize, side: usize, products: [f32; TILE]| {
                for (row, product) in sides[side].clone().zip(products) {
                    out.put(group.first + token, row, product);
                }
            };
            match coded.kind.blocks() {
                1 => some_times::<QUADS>(group, coded.blocks(), scratches, products),
                _ => some_times::<{ QUADS / 2 }>(group, coded.blocks(), scratches, products),
            }
        }
    }
}

/// Decodes up to sixteen rows into `scratch`, with `offset` added to each integer: of each segment 16 quads, a quad being four
/// bytes of each row, and of each block the scales of the rows. Rows that are missing repeat the last one.
///
/// With `PARTS` of 1 the quads of high nibbles come first; with 2 those of the segment's first half, high and low, and then
/// those of its second.
pub(super) fn decode_tile<const OFFSET: u8, const PARTS: usize>(
    coded: &Coded<'_>,
    rows: Range<usize>,
    scratch: &mut Decoded,
) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<const OFFSET: u8, const PARTS: usize>(coded: &Coded<'_>, rows: Range<usize>, scratch: &mut Decoded) {
        let table = ymm::table(coded.kind, OFFSET);
        let (segments, blocks) = (coded.segments(), coded.blocks());
        scratch.lines.resize(segments * QUADS, Line::ZERO);
        // Behind the tile's scales those of one row, before they are dealt out.
        scratch.floats.resize(blocks * (TILE + 1), 0.0);
        let (by_block, of_row) = scratch.floats.split_at_mut(blocks * TILE);
        let sources: [_; TILE] = std::array::from_fn(|i| coded.row((rows.start + i).min(rows.end - 1)));
        let ahead = SIDES * TILE * coded.row_bytes();
        for i in 0..TILE {
            coded.write_scales((rows.start + i).min(rows.end - 1), 0, of_row);
            for (block, scale) in of_row.iter().enumerate() {
                by_block[block * TILE + i] = *scale;
            }
        }
        for (index, lines) in scratch.lines.as_chunks_mut::<QUADS>().0.iter_mut().enumerate() {
            for (half, sources) in sources.as_chunks::<{ TILE / 2 }>().0.iter().enumerate() {
                let mut high = [_mm256_setzero_si256(); TILE / 2];
                let mut low = high;
                for (i, (whole, rest)) in sources.iter().enumerate() {
                    if index % SEGMENTS_OF_LINE == 0 {
                        ymm::prefetch_far(whole, index, ahead);
                    }
                    (high[i], low[i]) = ymm::decode(table, &ymm::segment(whole, rest, index));
                }
                let nibbles = [ymm::transpose(high), ymm::transpose(low)];
                for (nibble, quads) in nibbles.iter().enumerate() {
                    for (quad, bytes) in quads.iter().enumerate() {
                        // Half a segment has half the quads of either kind of nibble.
                        let part = QUADS / 2 / PARTS;
                        let place = quad / part * 2 * part + nibble * part + quad % part;
                        ymm::store_half(&mut lines[place], half, *bytes);
                    }
                }
            }
        }
    }
    // SAFETY: the path that leads here was checked against the processor.
    unsafe { inner::<OFFSET, PARTS>(coded, rows, scratch) }
}

/// Multiplies two tiles with a group, whose blocks have `PART` quads.
fn some_times<const PART: usize>(
    group: Group<'_>,
    blocks: usize,
    tiles: &Scratch,
    products: impl FnMut(usize, usize, [f32; TILE]),
) {
    match group.tokens {
        1 => tiles_times::<PART, 1>(group, blocks, tiles, products),
        2 => tiles_times::<PART, 2>(group, blocks, tiles, products),
        3 => tiles_times::<PART, 3>(group, blocks, tiles, products),
        4 => tiles_times::<PART, 4>(group, blocks, tiles, products),
        5 => tiles_times::<PART, 5>(group, blocks, tiles, products),
        6 => tiles_times::<PART, 6>(group, blocks, tiles, products),
        count => unreachable!("a group of {count} tokens"),
    }
}

/// Multiplies two tiles with `COUNT` tokens: as many sums as registers hold. The lanes are taken one after the other, for then
/// those that are added to stay in registers too.
fn tiles_times<const PART: usize, const COUNT: usize>(
    group: Group<'_>,
    blocks: usize,
    tiles: &Scratch,
    products: impl FnMut(usize, usize, [f32; TILE]),
) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<const PART: usize, const COUNT: usize>(
        words: &[[i32; COUNT]],
        blocks: usize,
        tiles: &Scratch,
        mut products: impl FnMut(usize, usize, [f32; TILE]),
    ) {
        let mut lanes = [[[_mm512_setzero_ps(); COUNT]; SIDES]; LANES];
        let scales = [tiles[0].floats.as_chunks::<TILE>().0, tiles[1].floats.as_chunks::<TILE>().0];
        for (lane, lanes) in lanes.iter_mut().enumerate() {
            let mut added = *lanes;
            for block in (lane..blocks).step_by(LANES) {
                let (quads, rest) = words[block * (PART + 2)..(block + 1) * (PART + 2)].split_at(PART);
                let mut sums = [[_mm512_setzero_si512(); COUNT]; SIDES];
                for token in 0..COUNT {
                    sums[0][token] = _mm512_set1_epi32(rest[CORRECTIONS][token]);
                    sums[1][token] = sums[0][token];
                }
                let lines = block * PART..(block + 1) * PART;
                let lines = tiles[0].lines[lines.clone()].iter().zip(&tiles[1].lines[lines]);
                for (quad, (first, second)) in quads.iter().zip(lines) {
                    let weights = [load_line(first), load_line(second)];
                    for token in 0..COUNT {
                        let four = _mm512_set1_epi32(quad[token]);
                        for side in 0..SIDES {
                            sums[side][token] = _mm512_dpbusd_epi32(sums[side][token], weights[side], four);
                        }
                    }
                }
                for side in 0..SIDES {
                    let weights = load_f32(&scales[side][block]);
                    for token in 0..COUNT {
                        let scale = _mm512_mul_ps(weights, _mm512_castsi512_ps(_mm512_set1_epi32(rest[SCALES][token])));
                        let sum = _mm512_cvtepi32_ps(sums[side][token]);
                        added[side][token] = _mm512_fmadd_ps(sum, scale, added[side][token]);
                    }
                }
            }
            *lanes = added;
        }
        let [a, b, c, d, e, f, g, h] = &lanes;
        for side in 0..SIDES {
            for token in 0..COUNT {
                let lanes = [a, b, c, d].map(|lane| lane[side][token]);
                let rest = [e, f, g, h].map(|lane| lane[side][token]);
                let lanes = [lanes[0], lanes[1], lanes[2], lanes[3], rest[0], rest[1], rest[2], rest[3]];
                products(token, side, store_f32(add_lanes(lanes)));
            }
        }
    }
    let words = group.words.as_chunks().0;
    // SAFETY: the path that leads here was checked against the processor.
    unsafe { inner::<PART, COUNT>(words, blocks, tiles, products) }
}

/// Adds the lanes of sixteen products, in the order of `lines::add_up`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add_lanes([a, b, c, d, e, f, g, h]: [__m512; LANES]) -> __m512 {
    let left = _mm512_add_ps(_mm512_add_ps(a, e), _mm512_add_ps(c, g));
    let right = _mm512_add_ps(_mm512_add_ps(b, f), _mm512_add_ps(d, h));
    _mm512_add_ps(left, right)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_line(line: &Line) -> __m512i {
    // SAFETY: 64 bytes are read from an array of as many.
    unsafe { _mm512_loadu_si512(line.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_f32(numbers: &[f32; TILE]) -> __m512 {
    // SAFETY: sixteen numbers are read from an array of as many.
    unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_f32(vector: __m512) -> [f32; TILE] {
    let mut numbers = [0.0; TILE];
    // SAFETY: sixteen numbers are written to an array of as many.
    unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), vector) };
    numbers
}
