//! Integer products in vectors of 64 bytes: AVX-512 with VNNI. The scheme is that of `ymm`, with tiles of sixteen rows.
//!
//! `unsafe` stands here for loads and stores through pointers, and to call what was compiled for detected instructions.

use std::arch::x86_64::*;
use std::ops::Range;

use super::lines::{Coded, LANES, Line, OFFSET, Output, SEGMENT, SEGMENT_BYTES, Token};
use super::pool::Decoded;
use super::ymm;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Quads of a segment: those of high nibbles, then those of low ones.
pub(super) const QUADS: usize = SEGMENT / 4;

/// Scales of a row that are worked out at a time.
const SCALES: usize = 16 * LANES;

/// How far ahead of the codes that are multiplied memory is asked for more. Units: bytes.
const PREFETCH: usize = 8192;

/// Tokens that meet a tile together.
const TOKENS: usize = 8;

/// Computes rows for one token.
pub(super) fn one(coded: &Coded<'_>, token: &Token, rows: Range<usize>, out: &Output<'_>) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<const BLOCKS: usize>(coded: &Coded<'_>, token: &Token, rows: Range<usize>, out: &Output<'_>) {
        for row in rows {
            out.put(0, row, row_of_one::<BLOCKS>(coded, token, row));
        }
    }
    match coded.kind.blocks() {
        // SAFETY: the path that leads here was checked against the processor.
        1 => unsafe { inner::<1>(coded, token, rows, out) },
        // SAFETY: as above.
        _ => unsafe { inner::<2>(coded, token, rows, out) },
    }
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn row_of_one<const BLOCKS: usize>(coded: &Coded<'_>, token: &Token, row: usize) -> f32 {
    let table = _mm512_castsi256_si512(ymm::table(coded.kind, OFFSET as u8));
    let table = _mm512_shuffle_i64x2(table, table, 0);
    let (whole, rest) = coded.row(row);
    let mut lanes = _mm256_setzero_ps();
    let mut scales = [0.0f32; SCALES];
    let per_group = LANES / BLOCKS;
    for group in 0..coded.segments().div_ceil(per_group) {
        let block = group * LANES;
        if block % SCALES == 0 {
            let count = (coded.blocks() - block).min(SCALES);
            coded.write_scales(row, block, &mut scales[..count]);
            scales[count..].fill(0.0);
        }
        let first = group * per_group;
        let mut sums = [_mm512_setzero_si512(); LANES / 2];
        if first + per_group <= whole.len() {
            let codes = whole[first..first + per_group].as_chunks::<2>().0;
            let lines = token.lines[first..first + per_group].as_chunks::<2>().0;
            for i in 0..per_group / 2 {
                prefetch(&codes[i]);
                sums[i] = two_segments(table, &codes[i], [&lines[i][0], &lines[i][1]]);
            }
        } else {
            let line = |index: usize| token.lines.get(index).unwrap_or(&Line::ZERO);
            for (i, sum) in sums.iter_mut().enumerate().take(per_group / 2) {
                let index = first + 2 * i;
                let codes = [index, index + 1].map(|index| ymm::segment(whole, rest, index));
                *sum = two_segments(table, &codes, [line(index), line(index + 1)]);
            }
        }
        let blocks = if BLOCKS == 1 { add_across(sums) } else { add_across_halves(sums) };
        let blocks = _mm256_add_epi32(blocks, ymm::load_i32(&token.corrections[block..]));
        let scale = _mm256_mul_ps(ymm::load_f32(&scales[block % SCALES..]), ymm::load_f32(&token.scales[block..]));
        lanes = _mm256_fmadd_ps(_mm256_cvtepi32_ps(blocks), scale, lanes);
    }
    ymm::add_up(lanes)
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

/// Asks for the memory that is multiplied soon.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(codes: &[[u8; SEGMENT_BYTES]; 2]) {
    let ahead = codes.as_ptr().cast::<i8>().wrapping_add(PREFETCH);
    // SAFETY: prefetching an address does nothing that can be seen, also where nothing is mapped.
    #[allow(unused_unsafe, reason = "newer compilers know that this is safe")]
    unsafe {
        _mm_prefetch(ahead, _MM_HINT_T0);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// Gives the sum of each half of four vectors, in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_across([a, b, c, d]: [__m512i; LANES / 2]) -> __m256i {
    let (ab, cd) = (add_pairs(a, b), add_pairs(c, d));
    let quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let halves = _mm512_add_epi32(quarters, _mm512_shuffle_i32x4(quarters, quarters, 0b10_11_00_01));
    let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, halves))
}

/// Gives the sum of each quarter of the first two vectors, in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_across_halves([a, b, ..]: [__m512i; LANES / 2]) -> __m256i {
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
                (1, TOKENS) => tile_times::<1, TOKENS>(some, coded, scratch, products),
                (_, TOKENS) => tile_times::<2, TOKENS>(some, coded, scratch, products),
                (blocks, _) => {
                    let products = products;
                    for (token, one) in some.iter().enumerate() {
                        let one = std::slice::from_ref(one);
                        match blocks {
                            1 => tile_times::<1, 1>(one, coded, scratch, |_, tile| products(token, tile)),
                            _ => tile_times::<2, 1>(one, coded, scratch, |_, tile| products(token, tile)),
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

/// Multiplies the tile in `scratch` with as many tokens as `COUNT` says.
fn tile_times<const BLOCKS: usize, const COUNT: usize>(
    tokens: &[Token],
    coded: &Coded<'_>,
    scratch: &Decoded,
    products: impl FnMut(usize, [f32; TILE]),
) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<const BLOCKS: usize, const COUNT: usize>(
        tokens: &[Token; COUNT],
        coded: &Coded<'_>,
        scratch: &Decoded,
        mut products: impl FnMut(usize, [f32; TILE]),
    ) {
        let mut lanes = [[_mm512_setzero_ps(); COUNT]; LANES];
        let segments = scratch.lines.as_chunks::<QUADS>().0;
        for block in 0..coded.blocks() {
            let (segment, half) = (block / BLOCKS, block % BLOCKS);
            let lines = &segments[segment];
            let bytes: [&Line; COUNT] = std::array::from_fn(|token| &tokens[token].lines[segment]);
            let mut sums: [__m512i; COUNT] =
                std::array::from_fn(|token| _mm512_set1_epi32(tokens[token].corrections[block]));
            let quads = QUADS / 2 / BLOCKS;
            for quad in 0..2 * quads {
                // Quads of high nibbles, then those of low ones.
                let quad = quad / quads * (QUADS / 2) + half * quads + quad % quads;
                let weights = load_line(&lines[quad]);
                for token in 0..COUNT {
                    sums[token] =
                        _mm512_dpbusd_epi32(sums[token], weights, _mm512_set1_epi32(four(bytes[token], quad)));
                }
            }
            let weights = load_f32(&scratch.floats[block * TILE..]);
            for token in 0..COUNT {
                let scale = _mm512_mul_ps(weights, _mm512_set1_ps(tokens[token].scales[block]));
                let lane = &mut lanes[block % LANES][token];
                *lane = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[token]), scale, *lane);
            }
        }
        for token in 0..COUNT {
            products(token, store_f32(add_lanes(lanes.map(|lane| lane[token]))));
        }
    }
    let tokens = tokens.first_chunk().expect("as many tokens as asked for");
    // SAFETY: the path that leads here was checked against the processor.
    unsafe { inner::<BLOCKS, COUNT>(tokens, coded, scratch, products) }
}

/// Adds the lanes of sixteen products, in the order of `lines::add_up`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add_lanes([a, b, c, d, e, f, g, h]: [__m512; LANES]) -> __m512 {
    let left = _mm512_add_ps(_mm512_add_ps(a, e), _mm512_add_ps(c, g));
    let right = _mm512_add_ps(_mm512_add_ps(b, f), _mm512_add_ps(d, h));
    _mm512_add_ps(left, right)
}

/// The four activations that meet a quad.
#[inline(always)]
fn four(line: &Line, quad: usize) -> i32 {
    i32::from_le_bytes(line.0.as_chunks::<4>().0[quad].map(i8::cast_unsigned))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_line(line: &Line) -> __m512i {
    // SAFETY: 64 bytes are read from an array of as many.
    unsafe { _mm512_loadu_si512(line.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_f32(numbers: &[f32]) -> __m512 {
    let first = numbers.first_chunk::<TILE>().expect("scales come in whole vectors");
    // SAFETY: sixteen numbers are read from an array of as many.
    unsafe { _mm512_loadu_ps(first.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_f32(vector: __m512) -> [f32; TILE] {
    let mut numbers = [0.0; TILE];
    // SAFETY: sixteen numbers are written to an array of as many.
    unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), vector) };
    numbers
}
