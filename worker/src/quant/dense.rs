//! Matrices of floats over bytes that may lie anywhere and in either order of dimensions.
//!
//! Invariant: every element that `rows`, `cols` and the strides reach lies inside the region.

use std::ops::Range;

use half::f16;

use super::{FormatError, expect_length, weight_count};
use crate::checkpoint::Region;

/// The floats that weights come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl FloatType {
    /// Gives the bytes of one number.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::Bf16 => 2,
        }
    }

    /// Gives the type's name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "f32",
            FloatType::F16 => "f16",
            FloatType::Bf16 => "bf16",
        }
    }

    /// Reads numbers from little endian bytes, as many as `out` takes.
    ///
    /// # Panics
    /// When there are fewer bytes than `out` needs.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert!(bytes.len() >= out.len() * self.bytes(), "the bytes reach");
        match self {
            FloatType::F32 => read_each(bytes, out, f32::from_le_bytes),
            FloatType::F16 => read_each(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
            FloatType::Bf16 => {
                read_each(bytes, out, |bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
            }
        }
    }
}

fn read_each<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    let (numbers, _) = bytes.as_chunks::<N>();
    for (value, number) in out.iter_mut().zip(numbers) {
        *value = read(*number);
    }
}

/// A matrix of floats.
#[derive(Clone, Debug)]
pub struct Dense {
    float_type: FloatType,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    bytes: Region,
}

impl Dense {
    /// Takes `[rows, cols]` floats whose rows follow each other.
    ///
    /// # Errors
    /// `Dimensions`, `Length`.
    pub fn row_major(float_type: FloatType, rows: usize, cols: usize, bytes: Region) -> Result<Dense, FormatError> {
        Dense::new(float_type, (rows, cols), (cols, 1), bytes)
    }

    /// Takes a matrix whose bytes are its transpose: `[cols, rows]` floats, as Hugging Face stores fused experts.
    ///
    /// # Errors
    /// `Dimensions`, `Length`.
    pub fn transposed(float_type: FloatType, rows: usize, cols: usize, bytes: Region) -> Result<Dense, FormatError> {
        Dense::new(float_type, (rows, cols), (1, rows), bytes)
    }

    /// Takes floats that were computed here, `[rows, cols]`.
    ///
    /// # Errors
    /// `Dimensions`, `Length`.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Dense, FormatError> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Dense::row_major(FloatType::F32, rows, cols, Region::from_vec(bytes))
    }

    fn new(
        float_type: FloatType,
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
        bytes: Region,
    ) -> Result<Dense, FormatError> {
        expect_length("the matrix", weight_count(rows, cols)? * float_type.bytes(), bytes.len())?;
        Ok(Dense { float_type, rows, cols, row_stride, col_stride, bytes })
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

    /// Gives the type of the numbers.
    #[must_use]
    pub fn float_type(&self) -> FloatType {
        self.float_type
    }

    /// Gives the distance from a row to the next. Units: elements.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Gives the distance from a column to the next: 1 unless the matrix is stored transposed. Units: elements.
    #[must_use]
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// Gives the bytes, unaligned.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.bytes
    }

    /// Gives the bytes that the matrix takes.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Writes one row as floats.
    ///
    /// # Panics
    /// When `row` is not below `rows` or `out` is not `cols` long.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols);
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let size = self.float_type.bytes();
        let bytes = &self.bytes.bytes()[row * self.row_stride * size..];
        if self.col_stride == 1 {
            return self.float_type.decode(bytes, out);
        }
        for (col, value) in out.iter_mut().enumerate() {
            let at = col * self.col_stride * size;
            self.float_type.decode(&bytes[at..], std::slice::from_mut(value));
        }
    }

    /// Writes rows as floats, reading the bytes in their own order.
    pub(super) fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        if self.col_stride == 1 {
            let start = rows.start * self.cols * self.float_type.bytes();
            return self.float_type.decode(&self.bytes.bytes()[start..], out);
        }
        let mut column = vec![0.0; rows.len()];
        for col in 0..self.cols {
            let start = (col * self.col_stride + rows.start) * self.float_type.bytes();
            self.float_type.decode(&self.bytes.bytes()[start..], &mut column);
            for (row, value) in column.iter().enumerate() {
                out[row * self.cols + col] = *value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::quant::Matrix;

    #[test]
    fn every_bf16_that_is_a_number_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (expected, mut found) = (bf16::from_bits(bits).to_f32(), [0.0]);
            FloatType::Bf16.decode(&bits.to_le_bytes(), &mut found);
            let is_equal = found[0].to_bits() == expected.to_bits() || (found[0].is_nan() && expected.is_nan());
            assert!(is_equal, "{bits:#x}");
        }
    }

    #[test]
    fn both_orders_of_storage_give_the_same_rows_in_every_type() {
        let values = [[1.0f32, -2.0, 0.5], [4.0, 0.25, -8.0]];
        let encode = |float_type: FloatType, value: f32| match float_type {
            FloatType::F32 => value.to_le_bytes().to_vec(),
            FloatType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            FloatType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        };
        for float_type in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
            let straight: Vec<u8> = values.iter().flatten().flat_map(|v| encode(float_type, *v)).collect();
            let turned: Vec<u8> =
                (0..3).flat_map(|col| [values[0][col], values[1][col]]).flat_map(|v| encode(float_type, v)).collect();
            let straight = Dense::row_major(float_type, 2, 3, Region::from_vec(straight)).expect("fits");
            let turned = Dense::transposed(float_type, 2, 3, Region::from_vec(turned)).expect("fits");
            for matrix in [Matrix::Dense(straight), Matrix::Dense(turned)] {
                let mut row = [0.0; 3];
                for (index, expected) in values.iter().enumerate() {
                    matrix.decode_row(index, &mut row);
                    assert_eq!(row, *expected, "{float_type:?}");
                    assert_eq!(matrix.decode_rows(index..index + 1), expected, "{float_type:?}");
                }
                assert_eq!(matrix.decode_rows(0..2), values.as_flattened());
            }
        }
    }

    #[test]
    fn dimensions_must_fit_the_bytes() {
        let bytes = |length| Region::from_vec(vec![0; length]);
        let make = |rows, cols, length| Dense::row_major(FloatType::Bf16, rows, cols, bytes(length)).map(|_| ());
        assert_eq!(make(2, 3, 12), Ok(()));
        let part = "the matrix";
        assert_eq!(make(2, 3, 11), Err(FormatError::Length { part, expected: 12, found: 11 }));
        assert_eq!(make(0, 3, 0), Err(FormatError::Dimensions { rows: 0, cols: 3 }));
        let rows = usize::MAX;
        assert_eq!(make(rows, 2, 0), Err(FormatError::Dimensions { rows, cols: 2 }));
    }
}
