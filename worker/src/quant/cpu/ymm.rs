//! Integer products in vectors of 32 bytes, with AVX2, with AVX-VNNI and with their like of AVX-512: of one token.
//!
//! A segment's codes become two vectors of integers by a shuffle of the table, which are multiplied with the token's bytes; the
//! partial sums of eight blocks are transposed and added, so that one vector of eight block sums meets one vector of eight
//! scales. Many tokens: `ymm_many`.
//!
//! AVX2 multiplies unsigned with signed bytes and adds pairs in 16 bits, which saturate. So the weight gives its magnitude
//! (127 * 127 * 2 fits) and its sign moves to the activation. AVX-VNNI adds four products in 32 bits: the weight is made
//! unsigned by an offset, whose part is taken off by the token's corrections.
//!
//! `unsafe` stands here for loads and stores through pointers, and to call what was compiled for detected instructions.

/// Makes the kernels for one set of instructions. A macro, for the features that a function is compiled for cannot be a
/// parameter of it; `$add` is the one thing that differs, beside `$offset`, which is added to the table.
macro_rules! kernels {
    ($module:ident, $features:literal, $offset:literal, $add:ident, $finish:ident) => {
        pub(super) mod $module {
            use std::arch::x86_64::*;
            use std::ops::Range;

            use super::super::lines::{Coded, Kind, LANES, Line, Output, SEGMENT_BYTES, Token};
            use super::super::pool::Decoded;
            use super::{$add as add_products, $finish as finish, *};

            /// Whether sums are of weights with an offset.
            const HAS_OFFSET: bool = $offset != 0;

            /// Computes rows for one token.
            pub(in super::super) fn one(
                coded: &Coded<'_>,
                token: &Token,
                rows: Range<usize>,
                (scratch, out): (&mut Decoded, &Output<'_>),
            ) {
                #[target_feature(enable = $features)]
                fn inner<const BLOCKS: usize, const SEGMENTS: usize, const SMALL: bool>(
                    coded: &Coded<'_>,
                    token: &Token,
                    rows: Range<usize>,
                    (scratch, out): (&mut Decoded, &Output<'_>),
                ) {
                    let table = table(coded.kind, $offset);
                    scratch.floats.clear();
                    scratch.floats.resize(token.scales.len(), 0.0);
                    for row in rows {
                        coded.write_scales(row, 0, &mut scratch.floats[..coded.blocks()]);
                        out.put(
                            0,
                            row,
                            row_of_one::<BLOCKS, SEGMENTS, SMALL>(coded.row(row), token, table, &scratch.floats),
                        );
                    }
                }
                match coded.kind {
                    // SAFETY: the path that leads here was checked against the processor.
                    Kind::Nf4 => unsafe { inner::<1, 8, false>(coded, token, rows, (scratch, out)) },
                    // SAFETY: as above.
                    Kind::Nf4Halves => unsafe { inner::<2, 4, false>(coded, token, rows, (scratch, out)) },
                    // SAFETY: as above.
                    Kind::Mxfp4 => unsafe { inner::<2, 4, true>(coded, token, rows, (scratch, out)) },
                }
            }

            /// Multiplies a row; eight blocks are so many segments.
            #[target_feature(enable = $features)]
            fn row_of_one<const BLOCKS: usize, const SEGMENTS: usize, const SMALL: bool>(
                (whole, rest): (&[[u8; SEGMENT_BYTES]], &[u8]),
                token: &Token,
                table: __m256i,
                scales: &[f32],
            ) -> f32 {
                let (groups, last) = whole.as_chunks::<SEGMENTS>();
                let (lines, last_lines) = token.lines.as_chunks::<SEGMENTS>();
                let steps = scales.as_chunks::<LANES>().0.iter().zip(token.scales.as_chunks::<LANES>().0);
                let mut steps = steps.zip(token.corrections.as_chunks::<LANES>().0);
                let mut lanes = _mm256_setzero_ps();
                for ((codes, lines), steps) in groups.iter().zip(lines).zip(&mut steps) {
                    prefetch(codes);
                    let mut sums = [_mm256_setzero_si256(); SEGMENTS];
                    for i in 0..SEGMENTS {
                        sums[i] = segment_sums::<SMALL>(table, &codes[i], &lines[i]);
                    }
                    lanes = add_scaled::<BLOCKS, SEGMENTS>(lanes, sums, steps);
                }
                if let Some(steps) = steps.next() {
                    let mut sums = [_mm256_setzero_si256(); SEGMENTS];
                    for (i, line) in last_lines.iter().enumerate() {
                        sums[i] = segment_sums::<SMALL>(table, &segment(last, rest, i), line);
                    }
                    lanes = add_scaled::<BLOCKS, SEGMENTS>(lanes, sums, steps);
                }
                add_up(lanes)
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn segment_sums<const SMALL: bool>(table: __m256i, codes: &[u8; SEGMENT_BYTES], line: &Line) -> __m256i {
                let (high, low) = decode(table, codes);
                let sums = add_products::<SMALL>(_mm256_setzero_si256(), high, load_half(line, 0));
                finish::<SMALL>(add_products::<SMALL>(sums, low, load_half(line, 1)))
            }

            /// Adds the sums of eight blocks, scaled, to the lanes.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_scaled<const BLOCKS: usize, const SEGMENTS: usize>(
                lanes: __m256,
                sums: [__m256i; SEGMENTS],
                ((weights, activations), corrections): ((&[f32; LANES], &[f32; LANES]), &[i32; LANES]),
            ) -> __m256 {
                let mut blocks = if BLOCKS == 1 { add_across(&sums) } else { add_across_halves(&sums) };
                if HAS_OFFSET {
                    blocks = _mm256_add_epi32(blocks, load_i32(corrections));
                }
                let scale = _mm256_mul_ps(load_f32(weights), load_f32(activations));
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(blocks), scale, lanes)
            }
        }
    };
}

#[allow(
    clippy::wildcard_imports,
    reason = "kernels name dozens of intrinsics, which say themselves what they are"
)]
use std::arch::x86_64::*;

use super::lines::{Kind, LANES, Line, SEGMENT, SEGMENT_BYTES};

/// How far ahead of the codes that are multiplied memory is asked for more. Units: bytes.
const PREFETCH: usize = 4096;

kernels!(avx2, "avx2,fma", 0, add_by_sign, finish_by_sign);
kernels!(avx512, "avx2,fma,avx512f,avx512vl,avx512vnni", 128, add_by_avx512, finish_by_vnni);
kernels!(avxvnni, "avx2,fma,avxvnni", 128, add_by_vnni, finish_by_vnni);

/// Gives the integers of a kind, each with `offset` added, twice over.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn table(kind: Kind, offset: u8) -> __m256i {
    let integers = kind.integers().map(|integer| integer.cast_unsigned().wrapping_add(offset));
    // SAFETY: 16 bytes are read from an array of as many.
    let table = unsafe { _mm_loadu_si128(integers.as_ptr().cast()) };
    _mm256_broadcastsi128_si256(table)
}

/// Turns the codes of a segment into integers: those of high nibbles, and those of low ones.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn decode(table: __m256i, codes: &[u8; SEGMENT_BYTES]) -> (__m256i, __m256i) {
    // SAFETY: 32 bytes are read from an array of as many.
    let codes = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
    let nibble = _mm256_set1_epi8(15);
    let high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    let low = _mm256_and_si256(codes, nibble);
    (_mm256_shuffle_epi8(table, high), _mm256_shuffle_epi8(table, low))
}

/// Adds products of signed weights to sums; those of small weights are kept as pairs in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_by_sign<const SMALL: bool>(sums: __m256i, weights: __m256i, bytes: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(bytes, weights));
    if SMALL {
        return _mm256_add_epi16(sums, pairs);
    }
    _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Gives the sums in 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn finish_by_sign<const SMALL: bool>(sums: __m256i) -> __m256i {
    if SMALL { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) } else { sums }
}

// A block of MXFP4 adds up to so many pairs in one place.
const _: () = assert!(SEGMENT as i32 / 2 / 4 * 2 * 12 * 127 <= i16::MAX as i32);

/// Adds products of unsigned weights to sums.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
pub(super) fn add_by_vnni<const SMALL: bool>(sums: __m256i, weights: __m256i, bytes: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sums, weights, bytes)
}

/// The same, encoded as AVX-512.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512vnni")]
fn add_by_avx512<const SMALL: bool>(sums: __m256i, weights: __m256i, bytes: __m256i) -> __m256i {
    _mm256_dpbusd_epi32(sums, weights, bytes)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn finish_by_vnni<const SMALL: bool>(sums: __m256i) -> __m256i {
    sums
}

/// Gives a segment's codes; where the row ends in its middle, zeros follow, which meet activations of zero.
#[inline(always)]
pub(super) fn segment(whole: &[[u8; SEGMENT_BYTES]], rest: &[u8], index: usize) -> [u8; SEGMENT_BYTES] {
    whole.get(index).copied().unwrap_or_else(|| {
        let mut codes = [0; SEGMENT_BYTES];
        codes[..rest.len()].copy_from_slice(rest);
        codes
    })
}

/// Asks for the memory that is multiplied soon: as much of it as `codes` has.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(codes: &[[u8; SEGMENT_BYTES]]) {
    for two in codes.chunks(2) {
        prefetch_behind(two);
    }
}

/// Asks for the memory that is multiplied soon, a line of it.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch_behind<T>(now: &[T]) {
    let ahead = now.as_ptr().cast::<i8>().wrapping_add(PREFETCH);
    // SAFETY: prefetching an address does nothing that can be seen, also where nothing is mapped.
    #[allow(unused_unsafe, reason = "newer compilers know that this is safe")]
    unsafe {
        _mm_prefetch(ahead, _MM_HINT_T0);
    }
}

/// Asks for weights of bf16 that are multiplied soon: of the same row, or where that ends of the row that follows `rows` rows
/// later.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch_row(row: &[[u8; 2]], index: usize, rows: usize) {
    const NEAR: usize = 1024;
    let ahead = if index + NEAR < row.len() { index + NEAR } else { index + NEAR + (rows - 1) * row.len() };
    // SAFETY: prefetching an address does nothing that can be seen, also where nothing is mapped.
    #[allow(unused_unsafe, reason = "newer compilers know that this is safe")]
    unsafe {
        _mm_prefetch(row.as_ptr().wrapping_add(ahead).cast::<i8>(), _MM_HINT_T0);
    }
}

/// Asks for what stands `ahead` bytes behind a segment, to be near when the next tile is decoded.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn prefetch_far(segments: &[[u8; SEGMENT_BYTES]], index: usize, ahead: usize) {
    let ahead = segments.as_ptr().cast::<i8>().wrapping_add(index * SEGMENT_BYTES + ahead);
    // SAFETY: prefetching an address does nothing that can be seen, also where nothing is mapped.
    #[allow(unused_unsafe, reason = "newer compilers know that this is safe")]
    unsafe {
        _mm_prefetch(ahead, _MM_HINT_T1);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_half(line: &Line, half: usize) -> __m256i {
    let bytes: &[[i8; SEGMENT_BYTES]] = line.0.as_chunks().0;
    // SAFETY: 32 bytes are read from an array of as many.
    unsafe { _mm256_loadu_si256(bytes[half].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_f32(numbers: &[f32; LANES]) -> __m256 {
    // SAFETY: eight numbers are read from an array of as many.
    unsafe { _mm256_loadu_ps(numbers.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_i32(numbers: &[i32; LANES]) -> __m256i {
    // SAFETY: eight numbers are read from an array of as many.
    unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_f32(vector: __m256) -> [f32; LANES] {
    let mut numbers = [0.0; LANES];
    // SAFETY: eight numbers are written to an array of as many.
    unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), vector) };
    numbers
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_half(line: &mut Line, half: usize, bytes: __m256i) {
    let halves: &mut [[i8; SEGMENT_BYTES]] = line.0.as_chunks_mut().0;
    // SAFETY: 32 bytes are written to an array of as many.
    unsafe { _mm256_storeu_si256(halves[half].as_mut_ptr().cast(), bytes) };
}

/// Adds pairs of elements: of `a` and `b` in turns, in each half of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn add_pairs(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b))
}

/// Adds pairs of what `add_pairs` gave: in each half of the result the sums of that half of four vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn add_quads(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
}

/// Gives the sum of each of eight vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn add_across(vectors: &[__m256i]) -> __m256i {
    let [a, b, c, d, e, f, g, h] = *vectors.first_chunk::<8>().expect("eight segments");
    let first = add_quads(add_pairs(a, b), add_pairs(c, d));
    let second = add_quads(add_pairs(e, f), add_pairs(g, h));
    let low = _mm256_permute2x128_si256(first, second, 0x20);
    _mm256_add_epi32(low, _mm256_permute2x128_si256(first, second, 0x31))
}

/// Gives the sum of each half of four vectors, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn add_across_halves(vectors: &[__m256i]) -> __m256i {
    let [a, b, c, d] = *vectors.first_chunk::<4>().expect("four segments");
    let sums = add_quads(add_pairs(a, b), add_pairs(c, d));
    _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// Adds the lanes of a row, in the order of `lines::add_up`.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_up(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Turns eight rows of eight elements of 32 bits around.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn transpose([a, b, c, d, e, f, g, h]: [__m256i; LANES]) -> [__m256i; LANES] {
    let four = |a, b, c, d| {
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    };
    let (upper, lower) = (four(a, b, c, d), four(e, f, g, h));
    // Not by `from_fn` and the like, into which nothing that was compiled for more instructions is inlined.
    let mut turned = [_mm256_setzero_si256(); LANES];
    for i in 0..LANES / 2 {
        turned[i] = _mm256_permute2x128_si256(upper[i], lower[i], 0x20);
        turned[i + LANES / 2] = _mm256_permute2x128_si256(upper[i], lower[i], 0x31);
    }
    turned
}
