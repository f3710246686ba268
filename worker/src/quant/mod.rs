//! Weight matrices as they are stored: floats, NF4 or MXFP4, and the plain way to read a row of each.
//!
//! Owns: the formats' tables and layouts, and quantising to NF4. Refuses: to know where bytes come from (a `Region` is
//! all it sees) or what a matrix is for; fast products are in `cpu`, beside these plain functions that they must agree
//! with.
//! Invariant: every matrix is logically row-major, `rows` outputs by `cols` inputs, whatever the order of its bytes; its
//! bytes are as long as that needs, and its block scales are finite.

pub mod cpu;
mod dense;
pub mod dynamic;
pub mod mxfp4;
pub mod nf4;
mod quantize;

pub use dense::{Dense, FloatType};
pub use mxfp4::Mxfp4;
pub use nf4::{Nested, Nf4, Scales};
pub use quantize::{Statistics, quantize_nf4, quantize_nf4_with};
pub(crate) use quantize::{quantize_absmax, quantize_block};

/// A weight matrix `[rows, cols]` in the form in which it is stored; cloning copies no weight.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Floats.
    Dense(Dense),
    /// 4-bit codes of the normal quantiles, with a scale for each block.
    Nf4(Nf4),
    /// 4-bit floats, with a power of two for each group of 32.
    Mxfp4(Mxfp4),
}

impl Matrix {
    /// Gives the number of outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Matrix::Dense(dense) => dense.rows(),
            Matrix::Nf4(nf4) => nf4.rows(),
            Matrix::Mxfp4(mxfp4) => mxfp4.rows(),
        }
    }

    /// Gives the number of inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        match self {
            Matrix::Dense(dense) => dense.cols(),
            Matrix::Nf4(nf4) => nf4.cols(),
            Matrix::Mxfp4(mxfp4) => mxfp4.cols(),
        }
    }

    /// Gives the bytes that codes and scales take.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        match self {
            Matrix::Dense(dense) => dense.stored_bytes(),
            Matrix::Nf4(nf4) => nf4.stored_bytes(),
            Matrix::Mxfp4(mxfp4) => mxfp4.stored_bytes(),
        }
    }

    /// Gives the name of the form, for people.
    #[must_use]
    pub fn format_name(&self) -> &'static str {
        match self {
            Matrix::Dense(dense) => dense.float_type().name(),
            Matrix::Nf4(_) => "nf4",
            Matrix::Mxfp4(_) => "mxfp4",
        }
    }

    /// Writes one row as floats: the plain reference of every format.
    ///
    /// Shapes: `out: [cols] f32`.
    ///
    /// # Panics
    /// When `row` is not below `rows` or `out` is not `cols` long.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        assert_eq!(out.len(), self.cols());
        match self {
            Matrix::Dense(dense) => dense.decode_row(row, out),
            Matrix::Nf4(nf4) => nf4.decode_row(row, out),
            Matrix::Mxfp4(mxfp4) => mxfp4.decode_row(row, out),
        }
    }

    /// Gives some rows as floats.
    ///
    /// Shapes: `-> [rows.len(), cols] f32`.
    ///
    /// # Panics
    /// When the rows are not all below `rows`.
    #[must_use]
    pub fn decode_rows(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        assert!(rows.end <= self.rows(), "rows {rows:?} of {}", self.rows());
        let mut out = vec![0.0; rows.len() * self.cols()];
        match self {
            Matrix::Dense(dense) => dense.decode_rows(rows, &mut out),
            Matrix::Nf4(_) | Matrix::Mxfp4(_) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(self.cols())) {
                    self.decode_row(row, out);
                }
            }
        }
        out
    }
}

/// Why bytes do not make a matrix.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FormatError {
    /// A dimension is zero, or the number of weights overflows.
    #[error("a matrix of {rows} rows and {cols} columns cannot be")]
    Dimensions {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// A part has the wrong length.
    #[error("{part} has {found} bytes, expected {expected}")]
    Length {
        /// Which part.
        part: &'static str,
        /// Bytes that the dimensions need.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// The block size is none that the format knows.
    #[error("{part} of {found} is not a power of two from {min} to {max}")]
    BlockSize {
        /// Which block size.
        part: &'static str,
        /// What is there.
        found: usize,
        /// The smallest.
        min: usize,
        /// The largest.
        max: usize,
    },
    /// The columns are no whole number of groups.
    #[error("{cols} columns are not a multiple of {group}")]
    PartialGroup {
        /// The columns.
        cols: usize,
        /// Columns in a group.
        group: usize,
    },
    /// A scale is not a number, or makes weights that are none.
    #[error("{part} {index} is {value}, expected a finite number")]
    NotFinite {
        /// Which kind of scale.
        part: &'static str,
        /// Which one, counted flat.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// An MXFP4 scale is the format's NaN, or so large that a weight is infinite.
    #[error("scale {index} is {scale}, which makes a weight that is not finite")]
    ScaleNotFinite {
        /// Which scale, counted flat.
        index: usize,
        /// Its byte.
        scale: u8,
    },
    /// A weight to be quantised is not finite.
    #[error("weight {index} is {value}, expected a finite number to quantise")]
    WeightNotFinite {
        /// Which weight, counted flat.
        index: usize,
        /// What it is.
        value: f32,
    },
}

impl FormatError {
    /// Counts a scale from the start of the tensor that holds it rather than from that of its matrix.
    #[must_use]
    pub fn at_part(self, part_index: usize, scales_per_part: usize) -> FormatError {
        let from_start = |index| part_index * scales_per_part + index;
        match self {
            FormatError::NotFinite { part, index, value } => {
                FormatError::NotFinite { part, index: from_start(index), value }
            }
            FormatError::ScaleNotFinite { index, scale } => {
                FormatError::ScaleNotFinite { index: from_start(index), scale }
            }
            other @ (FormatError::Dimensions { .. }
            | FormatError::Length { .. }
            | FormatError::BlockSize { .. }
            | FormatError::PartialGroup { .. }
            | FormatError::WeightNotFinite { .. }) => other,
        }
    }
}

/// Counts the weights of a matrix.
fn weight_count(rows: usize, cols: usize) -> Result<usize, FormatError> {
    let count = rows.checked_mul(cols).filter(|count| *count > 0 && *count <= isize::MAX as usize / 8);
    count.ok_or(FormatError::Dimensions { rows, cols })
}

/// Checks that a part of a matrix is as long as it must be.
fn expect_length(part: &'static str, expected: usize, found: usize) -> Result<(), FormatError> {
    if expected == found { Ok(()) } else { Err(FormatError::Length { part, expected, found }) }
}
