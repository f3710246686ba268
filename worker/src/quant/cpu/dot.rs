//! The dot product, once for each instruction set.
//!
//! All variants add in one order: sixteen partial sums, element `i` to sum `i % 16`, then the sums pairwise. The fused
//! variants round once where the plain one rounds twice, so results are equal bit by bit on one machine and within
//! rounding across machines.
//!
//! `unsafe` stands here only to call a function compiled for instructions that were detected before.

use super::path::CpuPath;

/// A dot product of two vectors of one length.
pub(super) type Dot = fn(&[f32], &[f32]) -> f32;

/// The dot products of four rows of bf16, in little endian bytes, with vectors of their length that follow each other, as many
/// as there are results: the bits are those of `Dot` on the widened rows.
pub(super) type DotBf16 = fn([&[[u8; 2]]; BF16_ROWS], &[f32], &mut [[f32; BF16_ROWS]]);

/// Rows of bf16 that are multiplied together: their sums do not wait for each other, as the partial sums of one row do.
pub(super) const BF16_ROWS: usize = 4;

const LANES: usize = 16;

/// The widest instructions that this processor and this file both know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instructions {
    /// What every processor of the target has, rounding products before they are added.
    Baseline,
    /// The same, rounding once.
    Fused,
    /// AVX2 with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 foundation.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Instructions {
    /// Gives those of a path that was checked against the processor.
    pub(super) fn of(path: CpuPath) -> Instructions {
        match path {
            CpuPath::Scalar => Instructions::Baseline,
            CpuPath::Portable => Instructions::Fused,
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 | CpuPath::AvxVnni => Instructions::Avx2,
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512 | CpuPath::Amx => Instructions::Avx512,
            #[cfg(not(target_arch = "x86_64"))]
            CpuPath::Avx2 | CpuPath::AvxVnni | CpuPath::Avx512 | CpuPath::Amx => Instructions::Fused,
        }
    }

    pub(super) fn dot_bf16(self) -> DotBf16 {
        match self {
            Instructions::Baseline => |rows, x, out| each(rows, x, out, |x, y, sum| x * y + sum),
            Instructions::Fused => |rows, x, out| each(rows, x, out, f32::mul_add),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => super::floats::bf16,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => super::zmm::bf16,
        }
    }

    pub(super) fn dot(self) -> Dot {
        match self {
            Instructions::Baseline => dot_plain,
            Instructions::Fused => dot_fused,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => x86::dot_avx2,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => x86::dot_avx512,
        }
    }
}

fn dot_plain(a: &[f32], b: &[f32]) -> f32 {
    dot_in_lanes(a, b, |x, y, sum| x * y + sum)
}

fn dot_fused(a: &[f32], b: &[f32]) -> f32 {
    dot_in_lanes(a, b, f32::mul_add)
}

#[inline(always)]
fn dot_in_lanes(a: &[f32], b: &[f32], multiply_add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len(), "a dot product takes two vectors of one length");
    let mut sums = [0.0f32; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] = multiply_add(x[lane], y[lane], sums[lane]);
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] = multiply_add(*x, *y, sums[lane]);
    }
    add_up(sums)
}

#[inline(always)]
fn each(
    rows: [&[[u8; 2]]; BF16_ROWS],
    x: &[f32],
    out: &mut [[f32; BF16_ROWS]],
    multiply_add: impl Fn(f32, f32, f32) -> f32,
) {
    for (x, out) in x.chunks_exact(rows[0].len()).zip(out) {
        *out = bf16_in_lanes(rows, x, &multiply_add);
    }
}

#[inline(always)]
fn bf16_in_lanes(
    rows: [&[[u8; 2]]; BF16_ROWS],
    x: &[f32],
    multiply_add: impl Fn(f32, f32, f32) -> f32,
) -> [f32; BF16_ROWS] {
    let rows = rows.map(|row| &row[..x.len()]);
    let mut sums = [[0.0f32; LANES]; BF16_ROWS];
    let (x_lanes, x_rest) = x.as_chunks::<LANES>();
    let row_lanes = rows.map(|row| &row.as_chunks::<LANES>().0[..x_lanes.len()]);
    for (index, x) in x_lanes.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(row_lanes) {
            for lane in 0..LANES {
                sums[lane] = multiply_add(widen(row[index][lane]), x[lane], sums[lane]);
            }
        }
    }
    std::array::from_fn(|row| {
        sums[row] = x_rest.iter().zip(rows[row].as_chunks::<LANES>().1).enumerate().fold(
            sums[row],
            |mut sums, (lane, (x, weight))| {
                sums[lane] = multiply_add(widen(*weight), *x, sums[lane]);
                sums
            },
        );
        add_up(sums[row])
    })
}

/// Multiplies what is left of a row and adds everything up.
pub(super) fn bf16_rest(row: &[[u8; 2]], x: &[f32], mut sums: [f32; LANES]) -> f32 {
    for (sum, (x, weight)) in sums.iter_mut().zip(x.iter().zip(row)) {
        *sum = widen(*weight).mul_add(*x, *sum);
    }
    add_up(sums)
}

fn widen(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Adds partial sums pairwise.
#[inline(always)]
fn add_up(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::dot_in_lanes;

    pub(super) fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
        #[target_feature(enable = "avx2,fma")]
        fn fused(a: &[f32], b: &[f32]) -> f32 {
            dot_in_lanes(a, b, f32::mul_add)
        }
        // SAFETY: `Instructions::of` hands this function out only for a path that was checked against the processor.
        unsafe { fused(a, b) }
    }

    pub(super) fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        #[target_feature(enable = "avx512f")]
        fn fused(a: &[f32], b: &[f32]) -> f32 {
            dot_in_lanes(a, b, f32::mul_add)
        }
        // SAFETY: `Instructions::of` hands this function out only for a path that was checked against the processor.
        unsafe { fused(a, b) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn every_instruction_set_of_this_machine_agrees_with_plain_f64() {
        let variants: Vec<(&str, Dot)> = CpuPath::ALL
            .into_iter()
            .filter(|path| path.check().is_ok())
            .map(|path| (path.as_str(), Instructions::of(path).dot()))
            .collect();
        for len in [0, 1, 15, 16, 17, 64, 100, 2880] {
            let (a, b) = (vector(len, 1), vector(len, 2));
            let exact: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            let size: f64 = a.iter().zip(&b).map(|(x, y)| (f64::from(*x) * f64::from(*y)).abs()).sum();
            for (name, dot) in &variants {
                let error = (f64::from(dot(&a, &b)) - exact).abs();
                // Each partial sum rounds len / 16 times, half a unit in the last place each.
                let tolerance = size * (len as f64 / 16.0 + 5.0) * f64::from(f32::EPSILON);
                assert!(error <= tolerance, "{name}, length {len}: error {error:e} above {tolerance:e}");
            }
        }
    }
}
