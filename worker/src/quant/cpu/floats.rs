//! What is done with floats in vectors of AVX2: activations are rounded to bytes, and rows of bf16 multiplied.
//!
//! `unsafe` stands here for loads and stores through pointers, and to call what was compiled for detected instructions.

#[allow(
    clippy::wildcard_imports,
    reason = "kernels name dozens of intrinsics, which say themselves what they are"
)]
use std::arch::x86_64::*;

use super::dot::{self, BF16_ROWS};
use super::lines::{self, LANES};
use super::ymm::{load_f32, prefetch_row, store_f32};

/// Rounds a block, as `lines::round_block` does, of 32 or 64 activations.
pub(super) fn round_block(x: &[f32], even: &mut [i8], odd: &mut [i8]) -> (f32, i32) {
    #[target_feature(enable = "avx2")]
    fn inner(x: &[f32], even: &mut [i8], odd: &mut [i8]) -> (f32, i32) {
        let (eights, _) = x.as_chunks::<LANES>();
        let magnitude = _mm256_set1_epi32(i32::MAX);
        let mut largest = _mm256_setzero_si256();
        for x in eights {
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(load_f32(x)), magnitude));
        }
        let four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        let two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b01_00_11_10));
        let one = _mm_max_epi32(two, _mm_shuffle_epi32(two, 0b10_11_00_01));
        let largest = f32::from_bits(_mm_cvtsi128_si32(one).cast_unsigned());
        let Some(steps) = lines::steps(largest) else { return lines::no_steps(largest, even, odd) };
        let (steps, ones) = (_mm256_set1_ps(steps), _mm256_set1_epi8(1));
        let mut sums = _mm256_setzero_si256();
        let places = even.as_chunks_mut::<16>().0.iter_mut().zip(odd.as_chunks_mut::<16>().0);
        for (x, (even, odd)) in eights.as_chunks::<4>().0.iter().zip(places) {
            let integers = |x| _mm256_cvtps_epi32(_mm256_mul_ps(load_f32(x), steps));
            let [a, b, c, d] = [integers(&x[0]), integers(&x[1]), integers(&x[2]), integers(&x[3])];
            let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, bytes), _mm256_set1_epi16(1)));
            let apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            let bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(apart));
            let bytes = _mm256_permute4x64_epi64(bytes, 0b11_01_10_00);
            // SAFETY: 16 bytes are written to an array of as many.
            unsafe { _mm_storeu_si128(even.as_mut_ptr().cast(), _mm256_castsi256_si128(bytes)) };
            // SAFETY: as above.
            unsafe { _mm_storeu_si128(odd.as_mut_ptr().cast(), _mm256_extracti128_si256(bytes, 1)) };
        }
        let four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01_00_11_10));
        let one = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0b10_11_00_01));
        (lines::step_of(largest), _mm_cvtsi128_si32(one))
    }
    // SAFETY: the path that leads here was checked against the processor.
    unsafe { inner(x, even, odd) }
}

/// Computes four rows of bf16, as `dot::bf16_in_lanes` does, for tokens one after the other.
pub(super) fn bf16(rows: [&[[u8; 2]]; BF16_ROWS], x: &[f32], out: &mut [[f32; BF16_ROWS]]) {
    #[target_feature(enable = "avx2,fma")]
    fn inner(rows: [&[[u8; 2]]; BF16_ROWS], x: &[f32]) -> [f32; BF16_ROWS] {
        let (x_lanes, x_rest) = x.as_chunks::<{ 2 * LANES }>();
        let lanes = rows.map(|row| &row.as_chunks::<{ 2 * LANES }>().0[..x_lanes.len()]);
        let mut sums = [[_mm256_setzero_ps(); 2]; BF16_ROWS];
        for (index, x) in x_lanes.iter().enumerate() {
            for (half, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
                let x = load_f32(x);
                for row in 0..BF16_ROWS {
                    if half == 0 {
                        prefetch_row(rows[row], index * 2 * LANES, BF16_ROWS);
                    }
                    let weights: &[[u8; 2]; LANES] = &lanes[row][index].as_chunks().0[half];
                    // SAFETY: 16 bytes are read from arrays of as many.
                    let weights = unsafe { _mm_loadu_si128(weights.as_ptr().cast()) };
                    let weights = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(weights), 16));
                    sums[row][half] = _mm256_fmadd_ps(weights, x, sums[row][half]);
                }
            }
        }
        std::array::from_fn(|row| {
            let [first, second] = sums[row].map(|sums| store_f32(sums));
            let mut sums = [0.0; 2 * LANES];
            sums[..LANES].copy_from_slice(&first);
            sums[LANES..].copy_from_slice(&second);
            dot::bf16_rest(&rows[row][x_lanes.len() * 2 * LANES..], x_rest, sums)
        })
    }
    for (x, out) in x.chunks_exact(rows[0].len()).zip(out) {
        // SAFETY: the path that leads here was checked against the processor.
        *out = unsafe { inner(rows, x) };
    }
}
