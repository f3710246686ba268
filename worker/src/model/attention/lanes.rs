//! Vectors of floats, once for each instruction set, and the exponential on them.
//!
//! Owns: what attention needs of an instruction set, as a trait, so that its loops are written once. Every operation works
//! on each lane alone. The fused variants round a multiplication and an addition once, the plain one rounds twice where the
//! target has no fused instruction; AVX2 and AVX-512 agree bit by bit.
//!
//! `unsafe` stands here only to call instructions: who makes a vector of a variant has asked the processor before.

use half::bf16;

use crate::quant::cpu::CpuPath;

/// The widest vectors that this processor and this file both know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// Arrays, compiled for what every processor of the target has.
    Plain,
    /// AVX2 with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 foundation.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    /// Takes those that go with the path of the products: one that was checked brings their instructions along.
    #[must_use]
    pub fn of(path: CpuPath) -> Vectors {
        match path {
            CpuPath::Scalar | CpuPath::Portable => Vectors::Plain,
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 | CpuPath::AvxVnni => Vectors::Avx2,
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512 | CpuPath::Amx => Vectors::Avx512,
            #[cfg(not(target_arch = "x86_64"))]
            CpuPath::Avx2 | CpuPath::AvxVnni | CpuPath::Avx512 | CpuPath::Amx => Vectors::Plain,
        }
    }

    /// Lists the kinds that this machine can run; says which it cannot.
    #[cfg(test)]
    pub(super) fn here() -> Vec<Vectors> {
        let paths = [CpuPath::Portable, CpuPath::Avx2, CpuPath::Avx512];
        let (here, missing): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.check().is_ok());
        missing.iter().for_each(|path| eprintln!("skipped: this processor lacks {path}"));
        here.into_iter().map(Vectors::of).collect()
    }
}

/// Some code that is written for vectors of any kind.
pub(super) trait Vectorised {
    /// Runs it. Implementations are inlined into a function that is compiled for the instructions of `L`.
    fn run<L: Lanes>(self);
}

/// Runs code on the vectors of a kind that goes with a path of the processor that was checked.
pub(super) fn on(vectors: Vectors, code: impl Vectorised) {
    match vectors {
        Vectors::Plain => code.run::<Plain>(),
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 => x86::on_avx2(code),
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 => x86::on_avx512(code),
    }
}

/// A vector of floats.
pub(super) trait Lanes: Copy {
    /// The floats in it: 8 or 16.
    const COUNT: usize;
    /// Takes one value for all lanes.
    fn splat(value: f32) -> Self;
    /// Takes the first `COUNT` values.
    fn load(from: &[f32]) -> Self;
    /// Takes the first `COUNT` values, exactly.
    fn load_bf16(from: &[bf16]) -> Self;
    /// Writes the first `COUNT` values.
    fn store(self, to: &mut [f32]);
    /// Computes `self + other`.
    fn add(self, other: Self) -> Self;
    /// Computes `self * factor`.
    fn multiply(self, factor: Self) -> Self;
    /// Computes `self * factor + addend`.
    fn multiply_add(self, factor: Self, addend: Self) -> Self;
    /// Gives the larger of the two; `other` where one is no number.
    fn larger(self, other: Self) -> Self;
    /// Adds the low bits of `exponent`'s representation to the binary exponent of `self`.
    fn scale_by_bits(self, exponent: Self) -> Self;
    /// Gives 0 where `value` is below `bound`, and `self` elsewhere, also where `value` is no number.
    fn or_zero_below(self, value: Self, bound: Self) -> Self;
    /// Asks for the cache line in which these begin; there is no other effect.
    fn prefetch(from: &[bf16]);
    /// Computes `a * b + c` as one lane of `multiply_add` does.
    fn multiply_add_one(a: f32, b: f32, c: f32) -> f32;
}

/// The natural logarithm of 2 in two parts, the first so short that its product with an exponent is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 355.0 / 512.0) as f32;

/// What is added to round to a whole number, which then stands in the low bits: 1.5 * 2^23.
const ROUNDING: f32 = 12_582_912.0;

/// Below this, powers are taken for 0: the least whose power of 2 is a normal number.
pub(super) const EXP_LEAST: f32 = -87.0;

/// Computes `e^x` for x from minus infinity to 0, and 0 for x below `EXP_LEAST`; no number stays none.
///
/// `x = n ln 2 + r` with a whole n and |r| at most ln 2 / 2; `e^r` by the first eight terms of its series, whose rest is
/// below 6e-9 there. With roundings the relative error is below 2^-22.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    let clamped = L::splat(EXP_LEAST).larger(x);
    let shifted = clamped.multiply_add(L::splat(std::f32::consts::LOG2_E), L::splat(ROUNDING));
    let n = shifted.add(L::splat(-ROUNDING));
    let r = n.multiply_add(L::splat(-LN_2_LOW), n.multiply_add(L::splat(-LN_2_HIGH), clamped));
    let mut power = L::splat(1.0 / 5040.0);
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        power = power.multiply_add(r, L::splat(1.0 / factorial));
    }
    power.scale_by_bits(shifted).or_zero_below(x, L::splat(EXP_LEAST))
}

/// Arrays of eight, for every processor.
#[derive(Clone, Copy)]
struct Plain([f32; 8]);

impl Plain {
    #[inline(always)]
    fn each(lane: impl Fn(usize) -> f32) -> Plain {
        Plain(std::array::from_fn(lane))
    }
}

impl Lanes for Plain {
    const COUNT: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Plain {
        Plain([value; 8])
    }

    #[inline(always)]
    fn load(from: &[f32]) -> Plain {
        let from = &from[..8];
        Plain::each(|lane| from[lane])
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Plain {
        let from = &from[..8];
        Plain::each(|lane| f32::from_bits(u32::from(from[lane].to_bits()) << 16))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        to[..8].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn add(self, other: Plain) -> Plain {
        Plain::each(|lane| self.0[lane] + other.0[lane])
    }

    #[inline(always)]
    fn multiply(self, factor: Plain) -> Plain {
        Plain::each(|lane| self.0[lane] * factor.0[lane])
    }

    #[inline(always)]
    fn multiply_add(self, factor: Plain, addend: Plain) -> Plain {
        Plain::each(|lane| Plain::multiply_add_one(self.0[lane], factor.0[lane], addend.0[lane]))
    }

    #[inline(always)]
    fn larger(self, other: Plain) -> Plain {
        Plain::each(|lane| if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] })
    }

    #[inline(always)]
    fn scale_by_bits(self, exponent: Plain) -> Plain {
        Plain::each(|lane| f32::from_bits(self.0[lane].to_bits().wrapping_add(exponent.0[lane].to_bits() << 23)))
    }

    #[inline(always)]
    fn or_zero_below(self, value: Plain, bound: Plain) -> Plain {
        Plain::each(|lane| if value.0[lane] < bound.0[lane] { 0.0 } else { self.0[lane] })
    }

    #[inline(always)]
    fn prefetch(_: &[bf16]) {}

    #[inline(always)]
    fn multiply_add_one(a: f32, b: f32, c: f32) -> f32 {
        // Without the instruction, fusing is a call of a function.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _CMP_NLT_UQ, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps,
        _mm256_and_ps, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_slli_epi32,
        _mm256_storeu_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps,
        _mm512_cmp_ps_mask, _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_maskz_mov_ps,
        _mm512_max_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use half::bf16;

    use super::{Lanes, Vectorised};

    pub(super) fn on_avx2(code: impl Vectorised) {
        #[target_feature(enable = "avx2,fma")]
        fn compiled(code: impl Vectorised) {
            code.run::<Avx2>();
        }
        // SAFETY: this variant goes with paths that are taken only after the processor reported AVX2 and FMA.
        unsafe { compiled(code) }
    }

    pub(super) fn on_avx512(code: impl Vectorised) {
        #[target_feature(enable = "avx2,fma,avx512f")]
        fn compiled(code: impl Vectorised) {
            code.run::<Avx512>();
        }
        // SAFETY: this variant goes with paths that are taken only after the processor reported AVX-512F, which implies the others.
        unsafe { compiled(code) }
    }

    /// Only `on_avx2` makes these.
    #[derive(Clone, Copy)]
    struct Avx2(__m256);

    /// Only `on_avx512` makes these.
    #[derive(Clone, Copy)]
    struct Avx512(__m512);

    #[inline(always)]
    fn prefetch(from: &[bf16]) {
        // SAFETY: every processor of the target has the instruction, and it faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().cast()) }
    }

    // Every block below calls an instruction that `on_avx2` was compiled for, on values; loads and stores cover a slice
    // whose length was checked the line before.
    impl Lanes for Avx2 {
        const COUNT: usize = 8;

        #[inline(always)]
        fn splat(value: f32) -> Avx2 {
            // SAFETY: AVX is there, see above.
            Avx2(unsafe { _mm256_set1_ps(value) })
        }

        #[inline(always)]
        fn load(from: &[f32]) -> Avx2 {
            let from = &from[..Self::COUNT];
            // SAFETY: AVX is there, and the slice holds 32 bytes; alignment is not needed.
            Avx2(unsafe { _mm256_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Avx2 {
            let from = &from[..Self::COUNT];
            // SAFETY: the slice holds 16 bytes; alignment is not needed.
            let narrow = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
            // SAFETY: AVX2 is there, see above.
            let wide = unsafe { _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)) };
            // SAFETY: AVX is there, see above.
            Avx2(unsafe { _mm256_castsi256_ps(wide) })
        }

        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            let to = &mut to[..Self::COUNT];
            // SAFETY: AVX is there, and the slice holds 32 bytes; alignment is not needed.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn add(self, other: Avx2) -> Avx2 {
            // SAFETY: AVX is there, see above.
            Avx2(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn multiply(self, factor: Avx2) -> Avx2 {
            // SAFETY: AVX is there, see above.
            Avx2(unsafe { _mm256_mul_ps(self.0, factor.0) })
        }

        #[inline(always)]
        fn multiply_add(self, factor: Avx2, addend: Avx2) -> Avx2 {
            // SAFETY: FMA is there, see above.
            Avx2(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
        }

        #[inline(always)]
        fn larger(self, other: Avx2) -> Avx2 {
            // SAFETY: AVX is there, see above.
            Avx2(unsafe { _mm256_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn scale_by_bits(self, exponent: Avx2) -> Avx2 {
            // SAFETY: AVX2 is there, see above.
            let shifted = unsafe { _mm256_slli_epi32::<23>(_mm256_castps_si256(exponent.0)) };
            // SAFETY: AVX2 is there, see above.
            Avx2(unsafe { _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), shifted)) })
        }

        #[inline(always)]
        fn or_zero_below(self, value: Avx2, bound: Avx2) -> Avx2 {
            // SAFETY: AVX is there, see above.
            Avx2(unsafe { _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NLT_UQ>(value.0, bound.0)) })
        }

        #[inline(always)]
        fn prefetch(from: &[bf16]) {
            prefetch(from);
        }

        #[inline(always)]
        fn multiply_add_one(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
    }

    // As above, with the instructions of `on_avx512`.
    impl Lanes for Avx512 {
        const COUNT: usize = 16;

        #[inline(always)]
        fn splat(value: f32) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        fn load(from: &[f32]) -> Avx512 {
            let from = &from[..Self::COUNT];
            // SAFETY: AVX-512F is there, and the slice holds 64 bytes; alignment is not needed.
            Avx512(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Avx512 {
            let from = &from[..Self::COUNT];
            // SAFETY: AVX is there, and the slice holds 32 bytes; alignment is not needed.
            let narrow = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
            // SAFETY: AVX-512F is there, see above.
            let wide = unsafe { _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)) };
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_castsi512_ps(wide) })
        }

        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            let to = &mut to[..Self::COUNT];
            // SAFETY: AVX-512F is there, and the slice holds 64 bytes; alignment is not needed.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn add(self, other: Avx512) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn multiply(self, factor: Avx512) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_mul_ps(self.0, factor.0) })
        }

        #[inline(always)]
        fn multiply_add(self, factor: Avx512, addend: Avx512) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
        }

        #[inline(always)]
        fn larger(self, other: Avx512) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn scale_by_bits(self, exponent: Avx512) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            let shifted = unsafe { _mm512_slli_epi32::<23>(_mm512_castps_si512(exponent.0)) };
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shifted)) })
        }

        #[inline(always)]
        fn or_zero_below(self, value: Avx512, bound: Avx512) -> Avx512 {
            // SAFETY: AVX-512F is there, see above.
            let kept = unsafe { _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(value.0, bound.0) };
            // SAFETY: AVX-512F is there, see above.
            Avx512(unsafe { _mm512_maskz_mov_ps(kept, self.0) })
        }

        #[inline(always)]
        fn prefetch(from: &[bf16]) {
            prefetch(from);
        }

        #[inline(always)]
        fn multiply_add_one(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Powers<'a>(&'a mut [f32]);

    impl Vectorised for Powers<'_> {
        #[inline(always)]
        fn run<L: Lanes>(self) {
            for values in self.0.chunks_exact_mut(L::COUNT) {
                exp(L::load(values)).store(values);
            }
        }
    }

    #[test]
    fn powers_are_right_to_two_to_the_minus_22() {
        for kind in Vectors::here() {
            let x: Vec<f32> = (0..1 << 20).map(|i| EXP_LEAST * i as f32 / ((1 << 20) - 1) as f32).collect();
            let mut powers = x.clone();
            on(kind, Powers(&mut powers));
            let error = |(x, power): (&f32, &f32)| (f64::from(*power) / f64::from(*x).exp() - 1.0).abs();
            let worst = x.iter().zip(&powers).map(error).fold(0.0, f64::max);
            assert!(worst < 1.0 / f64::from(1 << 22), "{kind:?}: {worst:e}");
        }
    }

    #[test]
    fn powers_at_the_edges() {
        for kind in Vectors::here() {
            let mut values = [0.0; 16];
            values[..7].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, -87.1, f32::MIN, f32::NAN, -1e-30]);
            on(kind, Powers(&mut values));
            assert_eq!(values[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{kind:?}");
            assert!(values[5].is_nan(), "{kind:?}");
            assert_eq!(values[6], 1.0, "{kind:?}");
        }
    }
}
