//! Integer products in vectors of 32 bytes, with AVX2 and with AVX-VNNI: of many tokens.
//!
//! The codes of eight rows are decoded into a tile, four inputs of each row side by side, and meet each token's inputs four at a
//! time. A tile serves all tokens, and lies in the nearest caches meanwhile; the codes of the next one are asked for while this
//! one is decoded, for its rows lie apart, and no processor looks ahead along so many.
//!
//! `unsafe` stands here to call what was compiled for detected instructions.

/// Makes the kernels for one set of instructions, as the macro of `ymm` does.
macro_rules! kernels {
    ($module:ident, $features:literal, $offset:literal, $add:ident, $finish:ident) => {
        pub(super) mod $module {
            use std::arch::x86_64::*;
            use std::ops::Range;

            use super::super::lines::{Coded, Kind, LANES, Line, Output, Token};
            use super::super::pool::Decoded;
            use super::super::ymm::{$add as add_products, $finish as finish, *};
            use super::{QUADS, TILE, broadcast, store_quads};

            /// Whether sums are of weights with an offset.
            const HAS_OFFSET: bool = $offset != 0;

            /// Computes rows for many tokens.
            pub(in super::super) fn many(
                coded: &Coded<'_>,
                tokens: &[Token],
                rows: Range<usize>,
                (scratch, out): (&mut Decoded, &Output<'_>),
            ) {
                #[target_feature(enable = $features)]
                fn inner(
                    coded: &Coded<'_>,
                    tokens: &[Token],
                    rows: Range<usize>,
                    (scratch, out): (&mut Decoded, &Output<'_>),
                ) {
                    for first in rows.clone().step_by(TILE) {
                        let tile = first..rows.end.min(first + TILE);
                        decode_tile(coded, tile.clone(), scratch);
                        for (index, four) in tokens.chunks(4).enumerate() {
                            let products = |token: usize, products: [f32; TILE]| {
                                for (row, product) in tile.clone().zip(products) {
                                    out.put(4 * index + token, row, product);
                                }
                            };
                            match coded.kind {
                                Kind::Nf4 => some_times::<1, false>(four, coded, scratch, products),
                                Kind::Nf4Halves => some_times::<2, false>(four, coded, scratch, products),
                                Kind::Mxfp4 => some_times::<2, true>(four, coded, scratch, products),
                            }
                        }
                    }
                }
                // SAFETY: the path that leads here was checked against the processor.
                unsafe { inner(coded, tokens, rows, (scratch, out)) }
            }

            /// Multiplies the tile in `scratch` with one to four tokens.
            #[target_feature(enable = $features)]
            fn some_times<const BLOCKS: usize, const SMALL: bool>(
                tokens: &[Token],
                coded: &Coded<'_>,
                scratch: &Decoded,
                products: impl FnMut(usize, [f32; TILE]),
            ) {
                match tokens {
                    [a, b, c, d] => {
                        tile_times::<BLOCKS, SMALL, 4>([a, b, c, d], coded, scratch, products);
                    }
                    [a, b, c] => tile_times::<BLOCKS, SMALL, 3>([a, b, c], coded, scratch, products),
                    [a, b] => tile_times::<BLOCKS, SMALL, 2>([a, b], coded, scratch, products),
                    [a] => tile_times::<BLOCKS, SMALL, 1>([a], coded, scratch, products),
                    _ => unreachable!("tokens come four at a time"),
                }
            }

            /// Decodes up to eight rows into `scratch`: of each segment 16 quads, a quad being four bytes of each row, and of
            /// each block the scales of the rows. Rows that are missing repeat the last one.
            #[target_feature(enable = $features)]
            fn decode_tile(coded: &Coded<'_>, rows: Range<usize>, scratch: &mut Decoded) {
                let table = table(coded.kind, $offset);
                let (segments, blocks) = (coded.segments(), coded.blocks());
                scratch.lines.resize(segments * TILE, Line::ZERO);
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
                for (index, lines) in scratch.lines.chunks_exact_mut(TILE).enumerate() {
                    let mut high = [_mm256_setzero_si256(); TILE];
                    let mut low = high;
                    for (i, (whole, rest)) in sources.iter().enumerate() {
                        if index % 2 == 0 {
                            prefetch_far(whole, index, TILE * coded.row_bytes());
                        }
                        (high[i], low[i]) = decode(table, &segment(whole, rest, index));
                    }
                    let (first, second) = lines.split_at_mut(TILE / 2);
                    store_quads(first, transpose(high));
                    store_quads(second, transpose(low));
                }
            }

            /// Multiplies the tile in `scratch` with some tokens.
            #[target_feature(enable = $features)]
            fn tile_times<const BLOCKS: usize, const SMALL: bool, const TOKENS: usize>(
                tokens: [&Token; TOKENS],
                coded: &Coded<'_>,
                scratch: &Decoded,
                mut products: impl FnMut(usize, [f32; TILE]),
            ) {
                let mut lanes = [[_mm256_setzero_ps(); TOKENS]; LANES];
                let scales = scratch.floats.as_chunks::<TILE>().0;
                let tiles = scratch.lines.as_chunks::<TILE>().0;
                // Unrolled as a whole, the loop over quads would need more registers than there are.
                let quads = std::hint::black_box(2 * QUADS / BLOCKS);
                for block in 0..coded.blocks() {
                    let (segment, half) = (block / BLOCKS, block % BLOCKS);
                    let lines: &[Line; TILE] = &tiles[segment];
                    let bytes = tokens.map(|token| &token.lines[segment]);
                    let mut sums = [_mm256_setzero_si256(); TOKENS];
                    if HAS_OFFSET {
                        for token in 0..TOKENS {
                            sums[token] = _mm256_set1_epi32(tokens[token].corrections[block]);
                        }
                    }
                    let part = QUADS / BLOCKS;
                    for quad in 0..quads {
                        // Quads of high nibbles, then those of low ones; all are below twice `QUADS`.
                        let quad = (quad / part * QUADS + half * part + quad % part) % (2 * QUADS);
                        let weights = load_half(&lines[quad / 2], quad % 2);
                        for token in 0..TOKENS {
                            let four = broadcast(bytes[token], quad);
                            sums[token] = add_products::<SMALL>(sums[token], weights, four);
                        }
                    }
                    let weights = load_f32(&scales[block]);
                    for token in 0..TOKENS {
                        let scale = _mm256_mul_ps(weights, _mm256_set1_ps(tokens[token].scales[block]));
                        let lane = &mut lanes[block % LANES][token];
                        let sum = _mm256_cvtepi32_ps(finish::<SMALL>(sums[token]));
                        *lane = _mm256_fmadd_ps(sum, scale, *lane);
                    }
                }
                for token in 0..TOKENS {
                    let [a, b, c, d, e, f, g, h] = &lanes;
                    let [a, b, c, d] = [a[token], b[token], c[token], d[token]];
                    let [e, f, g, h] = [e[token], f[token], g[token], h[token]];
                    let left = _mm256_add_ps(_mm256_add_ps(a, e), _mm256_add_ps(c, g));
                    let right = _mm256_add_ps(_mm256_add_ps(b, f), _mm256_add_ps(d, h));
                    products(token, store_f32(_mm256_add_ps(left, right)));
                }
            }
        }
    };
}

#[allow(
    clippy::wildcard_imports,
    reason = "kernels name dozens of intrinsics, which say themselves what they are"
)]
use std::arch::x86_64::*;

use super::lines::{Line, SEGMENT};
use super::ymm::store_half;

/// Rows of a tile.
const TILE: usize = 8;

/// Quads of the high nibbles of a segment, and of the low ones.
const QUADS: usize = SEGMENT / 8;

kernels!(avx2, "avx2,fma", 0, add_by_sign, finish_by_sign);
kernels!(avxvnni, "avx2,fma,avxvnni", 128, add_by_vnni, finish_by_vnni);

/// Repeats the four activations that meet a quad.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(line: &Line, quad: usize) -> __m256i {
    let [a, b, c, d] = line.0.as_chunks::<4>().0[quad];
    let four = [a.cast_unsigned(), b.cast_unsigned(), c.cast_unsigned(), d.cast_unsigned()];
    _mm256_set1_epi32(i32::from_le_bytes(four))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_quads(lines: &mut [Line], quads: [__m256i; QUADS]) {
    for (quad, bytes) in quads.into_iter().enumerate() {
        store_half(&mut lines[quad / 2], quad % 2, bytes);
    }
}
