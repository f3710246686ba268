//! What the bytes of a random tensor are, and drawing any slice of them on its own.
//!
//! Invariant: a slice's bytes follow from the seed, the tensor's name and the slice's number alone.
//!
//! 4-bit weights are drawn as codes and scales, not quantised from floats: the codes as often as a normal distribution
//! would round to them, and the scales so that the weights have the deviation that was asked for.

use std::f64::consts::PI;

use bulkhead_worker::quant::dynamic::dynamic_map;
use bulkhead_worker::quant::{mxfp4, nf4};
use half::bf16;

/// Bytes of a slice, at most: what one thread holds.
pub(super) const SLICE_BYTES: usize = 1 << 20;

/// The deviation of weights in units of their block's largest, which is what 64 normal numbers have.
const NF4_DEVIATION: f64 = 0.4;

/// How far restored NF4 scales lie from their mean at most, as a share of it.
const NF4_SCALE_SPREAD: f64 = 0.25;

/// The deviation of MXFP4 weights in units of their group's power of two: the largest of 32 comes near the largest code.
const MXFP4_DEVIATION: f64 = 2.0;

/// What a tensor holds.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// Normally distributed bf16.
    Normal { mean: f32, deviation: f32 },
    /// Two codes of 4 bits in a byte, each any of the 256 listed ones.
    Codes(Box<[u8; 256]>),
    /// Any of the 256 listed bytes.
    Bytes(Box<[u8; 256]>),
    /// These bytes.
    Stored(Vec<u8>),
}

/// The parts of a double quantised NF4 matrix whose weights have one deviation.
#[derive(Clone, Debug)]
pub(super) struct Nf4Parts {
    pub(super) codes: Content,
    pub(super) absmax: Content,
    /// The value of every nested scale.
    pub(super) nested_absmax: f32,
    pub(super) nested_offset: f32,
}

/// The parts of an MXFP4 matrix whose weights have one deviation.
#[derive(Clone, Debug)]
pub(super) struct Mxfp4Parts {
    pub(super) codes: Content,
    pub(super) scales: Content,
}

impl Nf4Parts {
    pub(super) fn of_deviation(deviation: f64) -> Nf4Parts {
        let codes = rounded_codes(&nf4::TABLE, NF4_DEVIATION);
        let map = dynamic_map().map(f64::from);
        // A scale is offset * (1 + spread * m) with any m of the map.
        let scale_square = mean(map.map(|m| (1.0 + NF4_SCALE_SPREAD * m).powi(2)));
        let offset = deviation / (code_square(&nf4::TABLE, &codes) * scale_square).sqrt();
        Nf4Parts {
            codes: Content::Codes(codes),
            absmax: Content::Bytes(Box::new(std::array::from_fn(|byte| byte as u8))),
            nested_absmax: (offset * NF4_SCALE_SPREAD) as f32,
            nested_offset: offset as f32,
        }
    }
}

impl Mxfp4Parts {
    pub(super) fn of_deviation(deviation: f64) -> Mxfp4Parts {
        const BIAS: f64 = 127.0;
        let codes = rounded_codes(&mxfp4::TABLE, MXFP4_DEVIATION);
        // Scales are powers of two: the right mean square comes from mixing the two next to it, 4^low and 4^(low + 1).
        let wanted = deviation.powi(2) / code_square(&mxfp4::TABLE, &codes);
        let low = (wanted.log2() / 2.0).floor();
        let share_above = (wanted / 4f64.powf(low) - 1.0) / 3.0;
        let byte = |above: f64| (low + above + BIAS).clamp(0.0, 2.0 * BIAS) as u8;
        let scales = std::array::from_fn(|i| byte(if (i as f64 + 0.5) / 256.0 < share_above { 1.0 } else { 0.0 }));
        Mxfp4Parts { codes: Content::Codes(codes), scales: Content::Bytes(Box::new(scales)) }
    }
}

/// Draws bytes.
#[derive(Debug)]
pub(super) struct Generator {
    seed: u64,
    /// Equally likely values of the normal distribution, one for each of 16 random bits.
    normal: Vec<f32>,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Generator {
        let count = 1 << 16;
        let normal = (0..count).map(|i| normal_quantile((f64::from(i) + 0.5) / f64::from(count)) as f32).collect();
        Generator { seed, normal }
    }

    /// Writes slice `index` of a tensor: its bytes from `index * SLICE_BYTES` on, as many as `out` takes.
    pub(super) fn fill(&self, name: &str, content: &Content, index: usize, out: &mut [u8]) {
        let mut random = Random::new(self.seed, name, index);
        match content {
            Content::Normal { mean, deviation } => {
                for numbers in out.chunks_mut(8) {
                    let bits = random.next();
                    for (lane, number) in numbers.chunks_exact_mut(2).enumerate() {
                        let value = self.normal[usize::from((bits >> (16 * lane)) as u16)] * deviation + mean;
                        number.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                    }
                }
            }
            Content::Codes(codes) => {
                for pairs in out.chunks_mut(4) {
                    let bits = random.next().to_le_bytes();
                    for (pair, bytes) in pairs.iter_mut().zip(bits.as_chunks::<2>().0) {
                        *pair = codes[usize::from(bytes[0])] | codes[usize::from(bytes[1])] << 4;
                    }
                }
            }
            Content::Bytes(bytes) => {
                for drawn in out.chunks_mut(8) {
                    for (byte, bits) in drawn.iter_mut().zip(random.next().to_le_bytes()) {
                        *byte = bytes[usize::from(bits)];
                    }
                }
            }
            Content::Stored(bytes) => {
                let start = index * SLICE_BYTES;
                out.copy_from_slice(&bytes[start..start + out.len()]);
            }
        }
    }
}

/// A stream of random bits. Source: Steele et al. 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
struct Random(u64);

impl Random {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    fn new(seed: u64, name: &str, slice: usize) -> Random {
        let mut random = Random(seed);
        for part in name.bytes().map(u64::from).chain([slice as u64]) {
            random.0 = random.next() ^ part;
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Random::STEP);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Lists the codes to which 256 equally likely normal numbers round.
fn rounded_codes(table: &[f32; 16], deviation: f64) -> Box<[u8; 256]> {
    Box::new(std::array::from_fn(|i| {
        let value = normal_quantile((i as f64 + 0.5) / 256.0) * deviation;
        let distance = |code: &u8| (f64::from(table[usize::from(*code)]) - value).abs();
        (0..16u8).min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("sixteen codes")
    }))
}

fn code_square(table: &[f32; 16], codes: &[u8; 256]) -> f64 {
    mean(codes.map(|code| f64::from(table[usize::from(code)]).powi(2)))
}

fn mean(values: [f64; 256]) -> f64 {
    values.iter().sum::<f64>() / 256.0
}

/// Finds the x at which the normal distribution reaches `probability`, by Newton's method on the lower half, where the
/// distribution is convex: from 0 on every step stops short of the goal.
///
/// Bounds: from 1e-6 to 1 - 1e-6.
fn normal_quantile(probability: f64) -> f64 {
    const STEPS_MAX: u32 = 64;
    const PRECISION: f64 = 1e-10;
    let tail = probability.min(1.0 - probability);
    let mut x = 0.0f64;
    for _ in 0..STEPS_MAX {
        let density = (-x * x / 2.0).exp() / (2.0 * PI).sqrt();
        let step = (lower_tail(x) - tail) / density;
        x -= step;
        if step.abs() < PRECISION {
            break;
        }
    }
    if probability < 0.5 { x } else { -x }
}

/// Computes the normal distribution at `x` by its Taylor series around 0.
///
/// Bounds: -5 to 0; beyond, the series cancels too much. Source: Abramowitz and Stegun, 26.2.10.
fn lower_tail(x: f64) -> f64 {
    let (mut power, mut sum, mut n) = (x, x, 0.0);
    loop {
        n += 1.0;
        power *= -x * x / (2.0 * n);
        let term = power / (2.0 * n + 1.0);
        sum += term;
        if term.abs() <= f64::EPSILON * sum.abs() {
            return 0.5 + sum / (2.0 * PI).sqrt();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        for (probability, expected) in [
            (0.5, 0.0),
            (0.975, 1.959_963_985),
            (0.025, -1.959_963_985),
            (0.999, 3.090_232_306),
            (1e-5, -4.264_890_794),
        ] {
            let found = normal_quantile(probability);
            assert!((found - expected).abs() < 1e-6, "{probability}: {found}");
        }
    }

    fn moments(values: &[f64]) -> (f64, f64) {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt())
    }

    fn drawn(content: &Content, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        Generator::new(3).fill("weight", content, 0, &mut out);
        out
    }

    /// Half a million weights: their deviation is known to a part in a thousand.
    const COUNT: usize = 1 << 19;

    #[test]
    fn floats_have_their_mean_and_deviation() {
        let bytes = drawn(&Content::Normal { mean: 1.0, deviation: 0.25 }, 2 * COUNT);
        let values: Vec<f64> =
            bytes.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f64()).collect();
        let (mean, deviation) = moments(&values);
        assert!((mean - 1.0).abs() < 2e-3 && (deviation - 0.25).abs() < 1e-3, "{mean} {deviation}");
    }

    #[test]
    fn codes_and_scales_of_nf4_make_weights_of_the_deviation() {
        let parts = Nf4Parts::of_deviation(0.02);
        let (codes, absmax) = (drawn(&parts.codes, COUNT / 2), drawn(&parts.absmax, COUNT / 64));
        let map = dynamic_map();
        let scale = |i: usize| map[usize::from(absmax[i / 64])] * parts.nested_absmax + parts.nested_offset;
        let code = |i: usize| if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
        let weight = |i: usize| f64::from(nf4::TABLE[usize::from(code(i))] * scale(i));
        let (mean, deviation) = moments(&(0..COUNT).map(weight).collect::<Vec<_>>());
        assert!(mean.abs() < 0.02 * 0.02 && (deviation / 0.02 - 1.0).abs() < 0.01, "{mean} {deviation}");
    }

    #[test]
    fn codes_and_scales_of_mxfp4_make_weights_of_the_deviation() {
        for target in [0.0186, 0.02, 0.5, 1.0] {
            let parts = Mxfp4Parts::of_deviation(target);
            let (codes, scales) = (drawn(&parts.codes, COUNT / 2), drawn(&parts.scales, COUNT / 32));
            let groups = codes.as_chunks::<16>().0.iter().zip(&scales);
            let weights: Vec<f64> =
                groups.flat_map(|(block, scale)| mxfp4::decode_group(block, *scale)).map(f64::from).collect();
            let (mean, deviation) = moments(&weights);
            assert!(mean.abs() < target * 0.02 && (deviation / target - 1.0).abs() < 0.02, "{mean} {deviation}");
        }
    }

    #[test]
    fn slices_differ_by_seed_name_and_number() {
        let fill = |seed, name, index| {
            let mut out = [0; 64];
            Generator::new(seed).fill(name, &Nf4Parts::of_deviation(1.0).codes, index, &mut out);
            out
        };
        let first = fill(1, "a", 0);
        assert_eq!(first, fill(1, "a", 0));
        assert!([fill(2, "a", 0), fill(1, "b", 0), fill(1, "a", 1)].iter().all(|other| *other != first));
    }
}
