//! NF4: 4-bit codes whose sixteen values are quantiles of the normal distribution, with one scale (absmax) per block.
//!
//! The matrix is cut into blocks along its flattened row-major elements; a block may cross rows where the columns are no
//! multiple of the block size. The first element of a byte is its HIGH nibble. value = TABLE[code] * absmax[block].
//! The scales are plain f32, or themselves 8-bit codes (double quantisation):
//! absmax[i] = map[code[i]] * nested_absmax[i / group] + offset.
//!
//! Source: Dettmers et al., "QLoRA" (2023), section 3 and appendix E; bitsandbytes 0.50, `functional.py`.

use super::{FormatError, expect_length, weight_count};
use crate::checkpoint::Region;

/// The values of the sixteen codes.
pub const TABLE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The two values of every byte of codes: rows are decoded a byte at a time.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < pairs.len() {
        pairs[byte] = [TABLE[byte >> 4], TABLE[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Weights under one scale, unless a file says otherwise.
pub const BLOCK_SIZE: usize = 64;

/// Scales under one nested scale, unless a file says otherwise.
pub const NESTED_GROUP: usize = 256;

/// The block sizes that bitsandbytes knows: powers of two between these.
const BLOCK_SIZE_MIN: usize = 32;
const BLOCK_SIZE_MAX: usize = 4096;

/// A matrix `[rows, cols]` in NF4.
#[derive(Clone, Debug)]
pub struct Nf4 {
    rows: usize,
    cols: usize,
    block_size: usize,
    packed: Region,
    scales: Scales,
}

/// The scales of the blocks.
#[derive(Clone, Debug)]
pub enum Scales {
    /// One f32 per block: little endian bytes, unaligned.
    Plain(Region),
    /// One 8-bit code per block.
    Nested(Nested),
}

/// Scales that are quantised themselves.
#[derive(Clone, Debug)]
pub struct Nested {
    /// One code per block.
    pub codes: Region,
    /// The values of the 256 codes.
    pub map: Box<[f32; 256]>,
    /// One scale per `group` codes.
    pub absmax: Vec<f32>,
    /// Codes under one scale.
    pub group: usize,
    /// Added to every restored scale.
    pub offset: f32,
}

impl Nf4 {
    /// Takes codes `[ceil(rows * cols / 2)] u8` and scales for `ceil(rows * cols / block_size)` blocks.
    ///
    /// # Errors
    /// `Dimensions`, `BlockSize`, `Length`, `NotFinite`.
    pub fn new(
        rows: usize,
        cols: usize,
        block_size: usize,
        packed: Region,
        scales: Scales,
    ) -> Result<Nf4, FormatError> {
        let weights = weight_count(rows, cols)?;
        check_block_size("the block size", block_size)?;
        expect_length("the codes", weights.div_ceil(2), packed.len())?;
        scales.check(weights.div_ceil(block_size))?;
        Ok(Nf4 { rows, cols, block_size, packed, scales })
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

    /// Gives the number of weights under one scale.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Gives the number of blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        (self.rows * self.cols).div_ceil(self.block_size)
    }

    /// Gives the codes, two in a byte, the first one high.
    #[must_use]
    pub fn packed(&self) -> &Region {
        &self.packed
    }

    /// Gives the scales.
    #[must_use]
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Gives the bytes that codes and scales take.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        self.packed.len() + self.scales.stored_bytes()
    }

    /// Gives the scale of a block, restored where it is quantised itself.
    ///
    /// # Panics
    /// When there are not so many blocks.
    #[must_use]
    pub fn absmax(&self, block: usize) -> f32 {
        self.scales.absmax(block)
    }

    /// Writes one row as floats.
    ///
    /// # Panics
    /// When `row` is not below `rows` or `out` is not `cols` long.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols);
        let packed = self.packed.bytes();
        let mut element = row * self.cols;
        let mut rest = out;
        while !rest.is_empty() {
            // A shift, for block sizes are powers of two and a division would cost as much as the rest of the block.
            let block = element >> self.block_size.trailing_zeros();
            let in_block = (self.block_size - (element & (self.block_size - 1))).min(rest.len());
            let (values, after) = rest.split_at_mut(in_block);
            decode_codes(packed, element, self.absmax(block), values);
            element += in_block;
            rest = after;
        }
    }
}

/// Writes the values of the codes from element `start` on, all of one block.
fn decode_codes(packed: &[u8], start: usize, absmax: f32, values: &mut [f32]) {
    let (second_half, whole) = values.split_at_mut(start % 2);
    if let [value] = second_half {
        *value = PAIRS[usize::from(packed[start / 2])][1];
    }
    let bytes = &packed[start.div_ceil(2)..];
    let (pairs, first_half) = whole.as_chunks_mut::<2>();
    if let [value] = first_half {
        *value = PAIRS[usize::from(bytes[pairs.len()])][0];
    }
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = PAIRS[usize::from(*byte)];
    }
    // A pass of its own: copies of eight bytes and products of whole vectors, where one loop would do neither.
    values.iter_mut().for_each(|value| *value *= absmax);
}

impl Scales {
    fn stored_bytes(&self) -> usize {
        match self {
            Scales::Plain(bytes) => bytes.len(),
            Scales::Nested(nested) => nested.codes.len() + size_of_val(&*nested.absmax) + size_of_val(&*nested.map),
        }
    }

    fn absmax(&self, block: usize) -> f32 {
        match self {
            Scales::Plain(bytes) => f32::from_le_bytes(bytes.bytes().as_chunks::<4>().0[block]),
            Scales::Nested(nested) => nested.restore(block, nested.codes.bytes()[block]),
        }
    }

    fn check(&self, blocks: usize) -> Result<(), FormatError> {
        match self {
            Scales::Plain(bytes) => {
                expect_length("absmax", blocks * size_of::<f32>(), bytes.len())?;
                let values = bytes.bytes().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                expect_finite("absmax", values)
            }
            Scales::Nested(nested) => nested.check(blocks),
        }
    }
}

impl Nested {
    /// Restores the scale of a block from its code.
    pub(super) fn restore(&self, block: usize, code: u8) -> f32 {
        self.map[usize::from(code)] * self.absmax[block >> self.group.trailing_zeros()] + self.offset
    }

    fn check(&self, blocks: usize) -> Result<(), FormatError> {
        check_block_size("the nested block size", self.group)?;
        expect_length("absmax", blocks, self.codes.len())?;
        let (expected, found) = (blocks.div_ceil(self.group), self.absmax.len());
        expect_length("nested_absmax", expected * size_of::<f32>(), found * size_of::<f32>())?;
        expect_finite("nested_absmax", self.absmax.iter().copied())?;
        expect_finite("nested_quant_map", self.map.iter().copied())?;
        expect_finite("nested_offset", [self.offset].into_iter())?;
        // Finite parts can still make an infinite product: what the codes restore must be finite too. Where even the largest
        // values restore a finite scale, no code has to be looked at.
        let largest = |values: &[f32]| values.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
        if (largest(&*self.map) * largest(&self.absmax) + self.offset.abs()).is_finite() {
            return Ok(());
        }
        let restored = self.codes.bytes().iter().enumerate().map(|(block, code)| self.restore(block, *code));
        expect_finite("restored absmax", restored)
    }
}

fn check_block_size(part: &'static str, found: usize) -> Result<(), FormatError> {
    if found.is_power_of_two() && (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&found) {
        return Ok(());
    }
    Err(FormatError::BlockSize { part, found, min: BLOCK_SIZE_MIN, max: BLOCK_SIZE_MAX })
}

fn expect_finite(part: &'static str, values: impl Iterator<Item = f32>) -> Result<(), FormatError> {
    match values.enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((index, value)) => Err(FormatError::NotFinite { part, index, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finds the x at which the normal distribution reaches `probability`, by bisection over Simpson's rule.
    fn normal_quantile(probability: f64) -> f64 {
        let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let distribution = |x: f64| {
            let steps = 2000;
            let width = x / f64::from(steps);
            let weight = |i| if i == 0 || i == steps { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
            0.5 + (0..=steps).map(|i| weight(i) * density(f64::from(i) * width)).sum::<f64>() * width / 3.0
        };
        let (mut low, mut high) = (0.0, 5.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if distribution(middle) < probability { low = middle } else { high = middle }
        }
        low
    }

    #[test]
    fn the_table_is_the_normal_quantiles() {
        // Eight positive and seven negative quantiles, evenly spaced in probability down to a half, and an exact zero;
        // scaled to end at one. The outermost probability lies halfway between those of 15 and of 16 even steps.
        let outermost = (2.0 - 1.0 / 30.0 - 1.0 / 32.0) / 2.0;
        let side = |count: usize| {
            let step = (outermost - 0.5) / count as f64;
            (0..count).map(move |i| normal_quantile(outermost - step * i as f64))
        };
        let mut quantiles: Vec<f64> = side(8).chain(side(7).map(|q| -q)).chain([0.0]).collect();
        quantiles.sort_by(f64::total_cmp);
        let largest = quantiles[15];
        for (value, quantile) in TABLE.into_iter().zip(quantiles) {
            // The published table has single precision, and its constant 0.9677083 has seven digits.
            assert!((f64::from(value) - quantile / largest).abs() < 2e-7, "{value} {}", quantile / largest);
        }
    }

    fn plain(values: &[f32]) -> Scales {
        Scales::Plain(Region::from_vec(values.iter().flat_map(|value| value.to_le_bytes()).collect()))
    }

    #[test]
    fn the_high_nibble_comes_first_and_blocks_cross_rows() {
        // Three rows of 25 columns: the second block of 32 starts in the middle of row 1, at an even element.
        let packed = Region::from_vec(vec![0xf0; 38]);
        let matrix = Nf4::new(3, 25, 32, packed, plain(&[2.0, 3.0, 5.0])).expect("fits");
        let mut row = [0.0; 25];
        matrix.decode_row(0, &mut row);
        assert_eq!(row[..3], [2.0, -2.0, 2.0]);
        matrix.decode_row(1, &mut row);
        assert_eq!(row[..10], [-2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 3.0, -3.0, 3.0]);
        matrix.decode_row(2, &mut row);
        assert_eq!(row[10..16], [3.0, -3.0, 3.0, -3.0, 5.0, -5.0]);
    }

    #[test]
    fn rows_that_start_and_end_within_bytes_are_decoded_code_by_code() {
        for (rows, cols) in [(5usize, 7usize), (4, 33), (3, 64), (9, 1), (2, 130)] {
            let packed: Vec<u8> = (0..(rows * cols).div_ceil(2)).map(|i| (i * 73 + 11) as u8).collect();
            let scales: Vec<f32> = (0..(rows * cols).div_ceil(32)).map(|block| 0.7 + block as f32).collect();
            let matrix = Nf4::new(rows, cols, 32, Region::from_vec(packed.clone()), plain(&scales)).expect("fits");
            let mut row = vec![0.0; cols];
            for index in 0..rows {
                matrix.decode_row(index, &mut row);
                for (element, value) in (index * cols..).zip(&row) {
                    let byte = packed[element / 2];
                    let code = if element.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                    let expected = TABLE[usize::from(code)] * scales[element / 32];
                    assert_eq!(value.to_bits(), expected.to_bits(), "[{rows}, {cols}], element {element}");
                }
            }
        }
    }

    fn nested(absmax: Vec<f32>, offset: f32, group: usize, codes: usize) -> Scales {
        let mut map = Box::new([0.0; 256]);
        map[1] = 0.5;
        Scales::Nested(Nested { codes: Region::from_vec(vec![1; codes]), map, absmax, group, offset })
    }

    #[test]
    fn nested_scales_are_restored_by_group() {
        let scales = nested(vec![4.0, 8.0], 1.0, 32, 33);
        let matrix = Nf4::new(33, 64, 64, Region::from_vec(vec![0; 33 * 32]), scales).expect("fits");
        assert_eq!((matrix.absmax(31), matrix.absmax(32)), (3.0, 5.0));
        assert_eq!(matrix.blocks(), 33);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let make = |block_size, bytes, scales| {
            Nf4::new(2, 64, block_size, Region::from_vec(vec![0; bytes]), scales).expect_err("refused").to_string()
        };
        let two = || plain(&[1.0, 1.0]);
        let table = [
            (make(48, 64, two()), "the block size of 48 is not a power of two"),
            (make(16, 64, two()), "the block size of 16"),
            (make(8192, 64, two()), "the block size of 8192"),
            (make(64, 63, two()), "the codes has 63 bytes, expected 64"),
            (make(64, 64, plain(&[1.0])), "absmax has 4 bytes, expected 8"),
            (make(64, 64, plain(&[1.0, f32::NAN])), "absmax 1 is NaN"),
            (make(64, 64, nested(vec![1.0], 0.0, 256, 3)), "absmax has 3 bytes, expected 2"),
            (make(64, 64, nested(vec![1.0; 2], 0.0, 256, 2)), "nested_absmax has 8 bytes, expected 4"),
            (make(64, 64, nested(vec![1.0], 0.0, 100, 2)), "the nested block size of 100"),
            (make(64, 64, nested(vec![f32::INFINITY], 0.0, 256, 2)), "nested_absmax 0 is inf"),
            (make(64, 64, nested(vec![1.0], f32::NAN, 256, 2)), "nested_offset 0 is NaN"),
            (make(64, 64, nested(vec![f32::MAX], f32::MAX, 256, 2)), "restored absmax 0 is inf"),
        ];
        for (error, words) in table {
            assert!(error.contains(words), "{error}");
        }
    }
}
