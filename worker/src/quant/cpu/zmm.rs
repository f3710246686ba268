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
use super::lines::{Coded, LANES, Line, OFFSET, Output, SEGMENT, SEGMENT_BYTES, Token};
use super::pool::Decoded;
use super::ymm;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Quads of a segment: those of high nibbles, then those of low ones.
pub(super) const QUADS: usize = SEGMENT / 4;

/// Tokens that meet a tile together.
pub(super) const TOKENS: usize = 8;

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

/// Computes four rows of bf16, as `dot::bf16_in_lanes` does.
pub(super) fn bf16(rows: [&[[u8; 2]]; BF16_ROWS], x: &[f32]) -> [f32; BF16_ROWS] {
    #[target_feature(enable = "avx512f")]
    fn inner(rows: [&[[u8; 2]]; BF16_ROWS], x: &[f32]) -> [f32; BF16_ROWS] {
        let (x_lanes, x_rest) = x.as_chunks::<TILE>();
        let lanes = rows.map(|row| &row.as_chunks::<TILE>().0[..x_lanes.len()]);
        let mut sums = [_mm512_setzero_ps(); BF16_ROWS];
        for (index, x) in x_lanes.iter().enumerate() {
            let x = load_f32(x);
            for row in 0..BF16_ROWS {
                ymm::prefetch_behind(&lanes[row][index]);
                // SAFETY: 32 bytes are read from arrays of as many.
                let weights = unsafe { _mm256_loadu_si256(lanes[row][index].as_ptr().cast()) };
                let weights = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(weights), 16));
                sums[row] = _mm512_fmadd_ps(weights, x, sums[row]);
            }
        }
        std::array::from_fn(|row| dot::bf16_rest(&rows[row][x_lanes.len() * TILE..], x_rest, store_f32(sums[row])))
    }
    // SAFETY: the path that leads here was checked against the processor.
    unsafe { inner(rows, x) }
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

/// Computes rows for many tokens.
pub(super) fn many(
    coded: &Coded<'_>,
    tokens: &[Token],
    rows: Range<usize>,
    (scratch, out): (&mut Decoded, &Output<'_>),
) {
    for first in rows.clone().step_by(TILE) {
        let tile = first..rows.end.min(first + TILE);
        decode_tile::<{ OFFSET as u8 }, 1>(coded, tile.clone(), scratch);
        for (index, some) in tokens.chunks(TOKENS).enumerate() {
            let products = |token: usize, products: [f32; TILE]| {
                for (row, product) in tile.clone().zip(products) {
                    out.put(TOKENS * index + token, row, product);
                }
            };
            match (coded.kind.blocks(), some.len()) {
                (1, TOKENS) => tile_times::<1, 8, TOKENS>(some, coded, scratch, products),
                (_, TOKENS) => tile_times::<2, 4, TOKENS>(some, coded, scratch, products),
                (blocks, _) => {
                    for (token, one) in some.iter().enumerate() {
                        let one = std::slice::from_ref(one);
                        match blocks {
                            1 => tile_times::<1, 8, 1>(one, coded, scratch, |_, tile| products(token, tile)),
                            _ => tile_times::<2, 4, 1>(one, coded, scratch, |_, tile| products(token, tile)),
                        }
                    }
                }
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

/// Multiplies the tile in `scratch` with `COUNT` tokens; the high nibbles of a block are `PART` quads, and the low ones.
fn tile_times<const BLOCKS: usize, const PART: usize, const COUNT: usize>(
    tokens: &[Token],
    coded: &Coded<'_>,
    scratch: &Decoded,
    products: impl FnMut(usize, [f32; TILE]),
) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<const BLOCKS: usize, const PART: usize, const COUNT: usize>(
        tokens: &[Token; COUNT],
        coded: &Coded<'_>,
        scratch: &Decoded,
        mut products: impl FnMut(usize, [f32; TILE]),
    ) {
        let mut lanes = [[_mm512_setzero_ps(); COUNT]; LANES];
        let segments = scratch.lines.as_chunks::<QUADS>().0;
        // Unrolled as a whole, the loop over quads would need more registers than there are.
        let quads = std::hint::black_box(2 * PART);
        let scales = scratch.floats.as_chunks::<TILE>().0;
        for block in 0..coded.blocks() {
            let (segment, half) = (block / BLOCKS, block % BLOCKS);
            let mut sums = [_mm512_setzero_si512(); COUNT];
            for token in 0..COUNT {
                sums[token] = _mm512_set1_epi32(tokens[token].corrections[block]);
            }
            let lines = &segments[segment];
            let bytes: [&[[i8; 4]; QUADS]; COUNT] = std::array::from_fn(|token| {
                tokens[token].lines[segment].0.as_chunks().0.first_chunk().expect("a line has as many quads")
            });
            for quad in 0..quads {
                // Quads of high nibbles, then those of low ones; all are below `QUADS`.
                let quad = (quad / PART * (QUADS / 2) + half * PART + quad % PART) % QUADS;
                let weights = load_line(&lines[quad]);
                for token in 0..COUNT {
                    let [a, b, c, d] = bytes[token][quad];
                    let four = [a.cast_unsigned(), b.cast_unsigned(), c.cast_unsigned(), d.cast_unsigned()];
                    let four = _mm512_set1_epi32(i32::from_le_bytes(four));
                    sums[token] = _mm512_dpbusd_epi32(sums[token], weights, four);
                }
            }
            let weights = load_f32(&scales[block]);
            for token in 0..COUNT {
                let scale = _mm512_mul_ps(weights, _mm512_set1_ps(tokens[token].scales[block]));
                let lane = &mut lanes[block % LANES][token];
                *lane = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[token]), scale, *lane);
            }
        }
        for token in 0..COUNT {
            let [a, b, c, d, e, f, g, h] = &lanes;
            let [a, b, c, d] = [a[token], b[token], c[token], d[token]];
            let lanes = [a, b, c, d, e[token], f[token], g[token], h[token]];
            products(token, store_f32(add_lanes(lanes)));
        }
    }
    let tokens = tokens.first_chunk().expect("as many tokens as asked for");
    // SAFETY: the path that leads here was checked against the processor.
    unsafe { inner::<BLOCKS, PART, COUNT>(tokens, coded, scratch, products) }
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
