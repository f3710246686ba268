//! MXFP4: 4-bit floats (E2M1), 32 of them under one power of two (E8M0).
//!
//! Element `2i` of a group is the LOW nibble of its byte `i`, element `2i + 1` the HIGH one: the other way round than NF4.
//! value = FP4[nibble] * 2^(scale - 127).
//!
//! Source: OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1; the layout is that of transformers'
//! `integrations/mxfp4.py`. A scale of 255 is the format's NaN; transformers computes 2^128 from it, we refuse it.

use super::{FormatError, expect_length, weight_count};
use crate::checkpoint::Region;

/// The values of the sixteen codes; the high bit of a code is its sign.
pub const TABLE: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The two values of every byte of codes: groups are decoded a byte at a time.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < pairs.len() {
        pairs[byte] = [TABLE[byte & 15], TABLE[byte >> 4]];
        byte += 1;
    }
    pairs
};

/// Weights under one scale.
pub const GROUP: usize = 32;

/// Bytes of the codes of one group.
pub const GROUP_BYTES: usize = GROUP / 2;

/// The scale that means NaN.
const SCALE_NAN: u8 = 255;

/// The largest scale with which every code is finite in f32: 6 * 2^(252 - 127) < 2^128.
const SCALE_ALWAYS_FINITE_MAX: u8 = 252;

/// A matrix `[rows, cols]` in MXFP4.
#[derive(Clone, Debug)]
pub struct Mxfp4 {
    rows: usize,
    cols: usize,
    blocks: Region,
    scales: Region,
}

impl Mxfp4 {
    /// Takes codes `[rows, cols / 32, 16] u8` and scales `[rows, cols / 32] u8`.
    ///
    /// # Errors
    /// `Dimensions`, `PartialGroup`, `Length`; `ScaleNotFinite` for the NaN scale, and for a large one under which a
    /// weight overflows f32.
    pub fn new(rows: usize, cols: usize, blocks: Region, scales: Region) -> Result<Mxfp4, FormatError> {
        let weights = weight_count(rows, cols)?;
        if !cols.is_multiple_of(GROUP) {
            return Err(FormatError::PartialGroup { cols, group: GROUP });
        }
        expect_length("the codes", weights / 2, blocks.len())?;
        expect_length("the scales", weights / GROUP, scales.len())?;
        let matrix = Mxfp4 { rows, cols, blocks, scales };
        matrix.check_scales()?;
        Ok(matrix)
    }

    /// Gives the number of outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Gives the number of inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Gives the codes, `[rows, cols / 32, 16] u8`.
    #[must_use]
    pub fn blocks(&self) -> &Region {
        &self.blocks
    }

    /// Gives the scales, `[rows, cols / 32] u8`, biased by 127.
    #[must_use]
    pub fn scales(&self) -> &Region {
        &self.scales
    }

    /// Gives the bytes that codes and scales take.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        self.blocks.len() + self.scales.len()
    }

    /// Writes one row as floats.
    ///
    /// # Panics
    /// When `row` is not below `rows` or `out` is not `cols` long.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols);
        let groups = self.cols / GROUP;
        let scales = &self.scales.bytes()[row * groups..(row + 1) * groups];
        let (blocks, _) = self.blocks.bytes()[row * groups * GROUP_BYTES..].as_chunks::<GROUP_BYTES>();
        let (out, _) = out.as_chunks_mut::<GROUP>();
        for ((values, block), scale) in out.iter_mut().zip(blocks).zip(scales) {
            *values = decode_group(block, *scale);
        }
    }

    fn check_scales(&self) -> Result<(), FormatError> {
        // In a file that is well no scale has to be looked at with its codes.
        if self.scales.bytes().iter().fold(0, |most, scale| most.max(*scale)) <= SCALE_ALWAYS_FINITE_MAX {
            return Ok(());
        }
        let (blocks, _) = self.blocks.bytes().as_chunks::<GROUP_BYTES>();
        for (index, (scale, block)) in self.scales.bytes().iter().zip(blocks).enumerate() {
            if *scale <= SCALE_ALWAYS_FINITE_MAX {
                continue;
            }
            let overflows = !decode_group(block, *scale).iter().all(|value| value.is_finite());
            if *scale == SCALE_NAN || overflows {
                return Err(FormatError::ScaleNotFinite { index, scale: *scale });
            }
        }
        Ok(())
    }
}

/// Decodes one group, correctly rounded for every scale: subnormal at the lower end, infinite at the upper.
///
/// No product rounds, for the table has two bits of mantissa and even the smallest result a place in f32.
#[must_use]
pub fn decode_group(block: &[u8; GROUP_BYTES], scale: u8) -> [f32; GROUP] {
    if scale == SCALE_NAN {
        // 2^128 is no f32, but its products with halves and zeros are.
        return decode_group(block, SCALE_NAN - 1).map(|value| value * 2.0);
    }
    let power = power_of_two(scale);
    let mut values = [0.0; GROUP];
    let (pairs, _) = values.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(block) {
        *pair = PAIRS[usize::from(*byte)];
    }
    values.map(|value| value * power)
}

/// Quantises one group: gives its codes and its scale.
///
/// The scale is the largest power of two that the largest magnitude reaches, over that of the largest code, 2^2; weights are then
/// rounded to the nearest code, the even one of two, and what is above the largest code becomes that. A scale that the format
/// does not reach is its least.
///
/// Source: OCP Microscaling Formats v1.0, section 6.3, with the rounding of section 5.3.3.
#[must_use]
pub fn quantize_group(weights: &[f32; GROUP]) -> ([u8; GROUP_BYTES], u8) {
    const MANTISSA_BITS: u32 = 23;
    const LARGEST_CODE_EXPONENT: u32 = 2;
    let largest = weights.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    // The exponent as f32 stores it has the bias of a scale.
    let scale = (largest.to_bits() >> MANTISSA_BITS).saturating_sub(LARGEST_CODE_EXPONENT) as u8;
    // 2^(127 - scale), a normal number for each of these scales.
    let reciprocal = f32::from_bits((254 - u32::from(scale)) << MANTISSA_BITS);
    let mut codes = [0; GROUP_BYTES];
    for (byte, pair) in codes.iter_mut().zip(weights.as_chunks::<2>().0) {
        let [first, second] = pair.map(|weight| nearest_code(weight * reciprocal));
        *byte = first | second << 4;
    }
    (codes, scale)
}

/// Finds the code whose value is nearest, the even one of two.
fn nearest_code(value: f32) -> u8 {
    let magnitude = value.abs();
    let above = |code: usize| {
        let midpoint = (TABLE[code] + TABLE[code + 1]) / 2.0;
        magnitude > midpoint || magnitude == midpoint && code % 2 == 1
    };
    let code = (0..7).filter(|code| above(*code)).count() as u8;
    code | u8::from(value.is_sign_negative()) << 3
}

/// 2^(scale - 127), built from its bits: a scale below the NaN is the exponent of an f32 as it is stored, and 0 makes a
/// subnormal.
#[inline]
pub(super) fn power_of_two(scale: u8) -> f32 {
    const MANTISSA_BITS: u32 = 23;
    match scale {
        0 => f32::from_bits(1 << (MANTISSA_BITS - 1)),
        normal => f32::from_bits(u32::from(normal) << MANTISSA_BITS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_every_e2m1_float() {
        for (code, value) in TABLE.into_iter().enumerate() {
            let (sign, exponent, mantissa) = (code >> 3, (code >> 1) & 3, (code & 1) as f32);
            let magnitude = match exponent {
                0 => mantissa / 2.0,
                _ => (1.0 + mantissa / 2.0) * f32::powi(2.0, exponent as i32 - 1),
            };
            let expected = if sign == 1 { -magnitude } else { magnitude };
            assert_eq!(value.to_bits(), expected.to_bits(), "{code}");
        }
    }

    #[test]
    fn groups_take_the_nearest_codes_under_the_power_that_the_standard_says() {
        let group = |some: &[f32]| std::array::from_fn::<f32, GROUP, _>(|i| some.get(i).copied().unwrap_or(0.0));
        let cases: [(&[f32], &[f32], u8); 6] = [
            // Every code is its own, and every tie goes to the even one: 4, 0, 1, 1, 2, 2, 4, 4.
            (&[4.0, 0.5, -1.5, 6.0], &[4.0, 0.5, -1.5, 6.0], 127),
            (&[4.0, 0.25, 0.75, -1.25, 1.75, 2.5, 3.5, -5.0], &[4.0, 0.0, 1.0, -1.0, 2.0, 2.0, 4.0, -4.0], 127),
            // Above the largest code and below the next power.
            (&[7.9, -7.9, 0.3], &[6.0, -6.0, 0.5], 127),
            (&[8.0, 1.0], &[8.0, 1.0], 128),
            (&[], &[], 0),
            (&[f32::MAX, -f32::MAX], &[6.0 * 2f32.powi(125), -6.0 * 2f32.powi(125)], 252),
        ];
        for (weights, expected, scale) in cases {
            let (codes, found) = quantize_group(&group(weights));
            assert_eq!((decode_group(&codes, found), found), (group(expected), scale), "{weights:?}");
        }
        // Numbers below the least scale's codes vanish, and those of its range are halves of it.
        let tiny = 2f32.powi(-127);
        let (codes, scale) = quantize_group(&group(&[tiny, -tiny / 8.0]));
        assert_eq!((decode_group(&codes, scale)[0], scale), (tiny, 0));
    }

    #[test]
    fn what_is_mxfp4_already_stays() {
        for scale in [0, 1, 100, 127, 252] {
            let codes = std::array::from_fn(|i| (i * 16 + 7) as u8);
            let (found, again) = quantize_group(&decode_group(&codes, scale));
            assert_eq!((decode_group(&found, again), again), (decode_group(&codes, scale), scale));
        }
    }

    fn matrix(codes: u8, scale: u8) -> Result<Mxfp4, FormatError> {
        Mxfp4::new(1, GROUP, Region::from_vec(vec![codes; GROUP_BYTES]), Region::from_vec(vec![scale]))
    }

    #[test]
    fn the_low_nibble_comes_first() {
        let mut row = [0.0; GROUP];
        matrix(0x72, 128).expect("finite").decode_row(0, &mut row);
        assert_eq!(row[..4], [2.0, 12.0, 2.0, 12.0]);
    }

    #[test]
    fn every_code_under_every_scale_is_rounded_correctly() {
        for scale in 0..=SCALE_NAN {
            let power = 2f64.powi(i32::from(scale) - 127);
            for codes in 0..=255u8 {
                let exact = [codes & 15, codes >> 4].map(|code| f64::from(TABLE[usize::from(code)]) * power);
                let found = decode_group(&[codes; GROUP_BYTES], scale);
                assert_eq!([found[0], found[31]].map(f32::to_bits), exact.map(|value| (value as f32).to_bits()));
            }
        }
    }

    #[test]
    fn scales_that_make_no_number_are_refused() {
        for (codes, scale, finite) in [
            (0x77, 252, true),
            (0x77, 253, false),
            (0x11, 254, true),
            (0x44, 254, false),
            (0x00, 255, false),
            (0xff, 0, true),
        ] {
            let expected = if finite { None } else { Some(FormatError::ScaleNotFinite { index: 0, scale }) };
            assert_eq!(matrix(codes, scale).err(), expected, "{codes:x} {scale}");
        }
    }

    #[test]
    fn dimensions_must_fit_the_bytes() {
        let make = |cols, blocks: usize, scales: usize| {
            let (blocks, scales) = (Region::from_vec(vec![0; blocks]), Region::from_vec(vec![0; scales]));
            Mxfp4::new(2, cols, blocks, scales).map(|_| ())
        };
        assert_eq!(make(64, 64, 4), Ok(()));
        assert_eq!(make(63, 63, 4), Err(FormatError::PartialGroup { cols: 63, group: 32 }));
        assert!(matches!(make(64, 63, 4), Err(FormatError::Length { part: "the codes", expected: 64, found: 63 })));
        assert!(matches!(make(64, 64, 5), Err(FormatError::Length { part: "the scales", expected: 4, found: 5 })));
    }
}
