//! Quantising floats to NF4, byte for byte as bitsandbytes' CPU build does.
//!
//! Source: bitsandbytes 0.50, `functional.quantize_4bit` and its CPU kernels; the mean is that of PyTorch 2.15 on one
//! thread with eight lanes (`aten/src/ATen/native/cpu/SumKernel.cpp`), because the offset's last bit depends on the order
//! of that sum.

use super::dynamic::dynamic_map;
use super::nf4::{BLOCK_SIZE, NESTED_GROUP, Nested, Nf4, Scales, TABLE};
use super::{FormatError, expect_length, weight_count};
use crate::checkpoint::Region;

/// How the scales of the blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistics {
    /// As f32: half a bit per weight.
    Plain,
    /// As 8-bit codes: an eighth of a bit per weight (double quantisation).
    Nested,
}

/// Scales at or below this divide as if they were this, so that a block of zeros has a finite reciprocal.
const ABSMAX_MIN: f32 = 1e-38;

/// Quantises `[rows, cols]` floats to NF4 with double quantisation, in blocks of 64.
///
/// # Errors
/// `Dimensions`, `Length`; `WeightNotFinite` with the first such weight.
pub fn quantize_nf4(rows: usize, cols: usize, weights: &[f32]) -> Result<Nf4, FormatError> {
    quantize_nf4_with(Statistics::Nested, rows, cols, weights)
}

/// Quantises `[rows, cols]` floats to NF4 in blocks of 64, with plain or nested scales.
///
/// # Errors
/// As `quantize_nf4`.
pub fn quantize_nf4_with(
    statistics: Statistics,
    rows: usize,
    cols: usize,
    weights: &[f32],
) -> Result<Nf4, FormatError> {
    expect_length("the weights", weight_count(rows, cols)?, weights.len())?;
    if let Some(index) = weights.iter().position(|weight| !weight.is_finite()) {
        return Err(FormatError::WeightNotFinite { index, value: weights[index] });
    }
    let mut packed = Vec::with_capacity(weights.len().div_ceil(2));
    let mut absmax = Vec::with_capacity(weights.len().div_ceil(BLOCK_SIZE));
    for block in weights.chunks(BLOCK_SIZE) {
        absmax.push(quantize_block(block, &mut packed));
    }
    let scales = match statistics {
        Statistics::Plain => Scales::Plain(Region::from_vec(absmax.iter().flat_map(|a| a.to_le_bytes()).collect())),
        Statistics::Nested => Scales::Nested(quantize_absmax(&absmax)),
    };
    Nf4::new(rows, cols, BLOCK_SIZE, Region::from_vec(packed), scales)
}

/// Quantises one block of at most `BLOCK_SIZE` weights, appends its bytes, and gives its scale. A block is full but for the last of a matrix, which
/// bitsandbytes treats apart: it divides instead of multiplying with the reciprocal, and its scale is never zero.
pub(crate) fn quantize_block(block: &[f32], packed: &mut Vec<u8>) -> f32 {
    let largest = block.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    let divisor = largest.max(ABSMAX_MIN);
    let mut codes = [nearest_code(0.0); BLOCK_SIZE];
    if block.len() == BLOCK_SIZE {
        let reciprocal = 1.0 / divisor;
        for (code, weight) in codes.iter_mut().zip(block) {
            *code = nearest_code(weight * reciprocal);
        }
    } else {
        for (code, weight) in codes.iter_mut().zip(block) {
            *code = nearest_code(weight / divisor);
        }
    }
    let pairs = codes.as_chunks::<2>().0.iter().take(block.len().div_ceil(2));
    packed.extend(pairs.map(|[first, second]| first << 4 | second));
    if block.len() == BLOCK_SIZE { largest } else { divisor }
}

/// Finds the code whose value is nearest: the number of midpoints strictly below, so that a tie takes the lower code.
fn nearest_code(value: f32) -> u8 {
    const MIDPOINTS: [f32; 15] = {
        let mut midpoints = [0.0; 15];
        let mut i = 0;
        while i < 15 {
            midpoints[i] = (TABLE[i] + TABLE[i + 1]) / 2.0;
            i += 1;
        }
        midpoints
    };
    MIDPOINTS.iter().map(|midpoint| u8::from(*midpoint < value)).sum()
}

/// Quantises the scales: centred on their mean, then the dynamic code in groups of 256.
pub(crate) fn quantize_absmax(absmax: &[f32]) -> Nested {
    let map = Box::new(dynamic_map());
    let offset = mean(absmax);
    let mut codes = Vec::with_capacity(absmax.len());
    let mut nested = Vec::with_capacity(absmax.len().div_ceil(NESTED_GROUP));
    for group in absmax.chunks(NESTED_GROUP) {
        let largest = group.iter().fold(0.0f32, |largest, value| largest.max((value - offset).abs()));
        nested.push(largest);
        codes.extend(group.iter().map(|value| dynamic_code(value - offset, largest, &map)));
    }
    Nested { codes: Region::from_vec(codes), map, absmax: nested, group: NESTED_GROUP, offset }
}

/// Finds the dynamic code of a centred scale. The CPU build first rounds to a grid of 65536 points over [-1, 1].
fn dynamic_code(value: f32, largest: f32, map: &[f32; 256]) -> u8 {
    const GRID_HALF: f32 = 32767.5;
    const GRID_LAST: f32 = 65535.0;
    if largest == 0.0 {
        return 0;
    }
    let scaled = (value * (1.0 / largest)).clamp(-1.0, 1.0);
    let point = ((scaled + 1.0) * GRID_HALF + 0.5).floor();
    let scaled = f64::from(2.0 * point / GRID_LAST - 1.0);
    let above = map.partition_point(|entry| f64::from(*entry) < scaled);
    let distance = |index: usize| (scaled - f64::from(map[index])).abs();
    let nearest = match above {
        0 => 0,
        256 => 255,
        _ if distance(above - 1) <= distance(above) => above - 1,
        _ => above,
    };
    u8::try_from(nearest).expect("the map has 256 entries")
}

/// PyTorch's mean of a contiguous tensor of f32.
fn mean(values: &[f32]) -> f32 {
    sum(values) / values.len() as f32
}

/// Lanes of the vectors in which PyTorch sums: its AVX2 kernels serve AVX-512 machines too.
const LANES: usize = 8;

/// Vectors that PyTorch sums side by side.
const COLUMNS: usize = 4;

/// Levels of its cascade.
const LEVELS: usize = 4;

type Row = [[f32; LANES]; COLUMNS];

/// PyTorch's sum of contiguous f32: a cascade over rows of four vectors of eight lanes, then the lanes, then the rest.
fn sum(values: &[f32]) -> f32 {
    if values.len() < LANES {
        return scalar_sum(values);
    }
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (rows, left) = vectors.as_chunks::<COLUMNS>();
    let mut columns = cascade(rows);
    for vector in left {
        add(&mut columns[0], vector);
    }
    let [mut total, others @ ..] = columns;
    for column in &others {
        add(&mut total, column);
    }
    let tail = rest.iter().fold(0.0, |sum, value| sum + value);
    total.iter().fold(tail, |sum, lane| sum + lane)
}

/// The same for fewer values than a vector has lanes: four single columns; so few rows never cascade.
fn scalar_sum(values: &[f32]) -> f32 {
    let (rows, left) = values.as_chunks::<COLUMNS>();
    let mut columns = [0.0; COLUMNS];
    for row in rows {
        columns.iter_mut().zip(row).for_each(|(column, value)| *column += value);
    }
    for value in left {
        columns[0] += value;
    }
    let [first, others @ ..] = columns;
    others.iter().fold(first, |sum, column| sum + column)
}

/// Sums rows in levels: each level takes over the one below after a power of two of rows.
fn cascade(rows: &[Row]) -> Row {
    let power = (ceil_log2(rows.len()) / LEVELS).max(4);
    let step = 1usize << power;
    let mut levels = [Row::default(); LEVELS];
    let (whole, left) = rows.split_at(rows.len() / step * step);
    for (done, chunk) in whole.chunks_exact(step).enumerate() {
        chunk.iter().for_each(|row| add_row(&mut levels[0], row));
        let summed = (done + 1) * step;
        for level in 1..LEVELS {
            let below = std::mem::take(&mut levels[level - 1]);
            add_row(&mut levels[level], &below);
            if summed & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    left.iter().for_each(|row| add_row(&mut levels[0], row));
    let [mut total, upper @ ..] = levels;
    upper.iter().for_each(|level| add_row(&mut total, level));
    total
}

fn ceil_log2(value: usize) -> usize {
    value.next_power_of_two().trailing_zeros() as usize
}

fn add_row(sum: &mut Row, row: &Row) {
    sum.iter_mut().zip(row).for_each(|(sum, vector)| add(sum, vector));
}

fn add(sum: &mut [f32; LANES], vector: &[f32; LANES]) {
    sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_nearest_and_ties_take_the_lower() {
        for (code, value) in TABLE.into_iter().enumerate() {
            assert_eq!(usize::from(nearest_code(value)), code);
        }
        for code in 0..15u8 {
            let midpoint = (TABLE[usize::from(code)] + TABLE[usize::from(code) + 1]) / 2.0;
            assert_eq!(nearest_code(midpoint), code);
            assert_eq!(nearest_code(midpoint.next_up()), code + 1);
        }
    }

    #[test]
    fn the_cascade_counts_every_value_once() {
        // Small integers sum exactly in any order, so this catches a value dropped or added twice at every length where
        // the shape of the cascade changes.
        for count in (1..200).chain([511, 512, 513, 8191, 8192, 8193, 70_000]) {
            let values: Vec<f32> = (0..count).map(|i| (i % 7) as f32).collect();
            let expected: usize = (0..count).map(|i| i % 7).sum();
            assert_eq!(sum(&values), expected as f32, "{count}");
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_refused() {
        let mut weights = [0.5; 128];
        weights[70] = f32::INFINITY;
        let error = quantize_nf4(2, 64, &weights).expect_err("refused");
        assert_eq!(error, FormatError::WeightNotFinite { index: 70, value: f32::INFINITY });
        assert!(matches!(quantize_nf4(2, 64, &[0.5; 127]), Err(FormatError::Length { .. })));
        assert!(matches!(quantize_nf4(0, 64, &[]), Err(FormatError::Dimensions { .. })));
    }

    #[test]
    fn zeros_stay_zeros() {
        let matrix = quantize_nf4(2, 64, &[0.0; 128]).expect("quantised");
        let mut row = [1.0; 64];
        matrix.decode_row(1, &mut row);
        assert_eq!(row, [0.0; 64]);
    }
}
