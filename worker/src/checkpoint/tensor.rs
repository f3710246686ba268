//! One tensor of a checkpoint: typed, shaped bytes of a mapped file, with the checks that every reader needs.
//!
//! Invariant: there are as many bytes as shape and element type need; floats are little endian and unaligned.

use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::error::CheckpointError;
use super::map::Region;
use crate::quant::{Dense, FloatType, FormatError};

/// A tensor of a checkpoint; cloning copies no weight.
#[derive(Clone, Debug)]
pub struct Tensor {
    file: PathBuf,
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Region,
}

impl Tensor {
    pub(super) fn new(file: PathBuf, name: String, dtype: Dtype, shape: Vec<usize>, bytes: Region) -> Tensor {
        Tensor { file, name, dtype, shape, bytes }
    }

    /// Gives the file that holds it.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Gives its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives its element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Gives its dimensions, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Gives its bytes, row-major, little endian.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.bytes
    }

    /// Checks the shape against what the config calls for.
    ///
    /// # Errors
    /// `WrongShape` with both.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), CheckpointError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(CheckpointError::WrongShape {
            file: self.file.clone(),
            tensor: self.name.clone(),
            expected: expected.to_vec(),
            found: self.shape.clone(),
        })
    }

    /// Checks the element type against the only one that fits.
    ///
    /// # Errors
    /// `WrongDtype` with both.
    pub fn expect_dtype(&self, dtype: Dtype, expected: &'static str) -> Result<(), CheckpointError> {
        if self.dtype == dtype { Ok(()) } else { Err(self.wrong_dtype(expected)) }
    }

    /// Gives the element type as one of the floats that weights come in.
    ///
    /// # Errors
    /// `WrongDtype` for every other type.
    pub fn float_type(&self) -> Result<FloatType, CheckpointError> {
        let known = [(Dtype::F32, FloatType::F32), (Dtype::F16, FloatType::F16), (Dtype::BF16, FloatType::Bf16)];
        match known.into_iter().find(|(dtype, _)| *dtype == self.dtype) {
            Some((_, float_type)) => Ok(float_type),
            None => Err(self.wrong_dtype("BF16, F16 or F32")),
        }
    }

    /// Reads a small float tensor whole and checks that every number is finite: norms, biases, sinks, scales.
    ///
    /// # Errors
    /// `WrongDtype`, `WrongShape`, and `NotFinite` with the first such element.
    pub fn finite_floats(&self, expected_shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let float_type = self.float_type()?;
        self.expect_shape(expected_shape)?;
        let mut floats = vec![0.0; self.bytes.len() / float_type.bytes()];
        float_type.decode(self.bytes.bytes(), &mut floats);
        match floats.iter().position(|value| !value.is_finite()) {
            None => Ok(floats),
            Some(index) => Err(CheckpointError::NotFinite {
                file: self.file.clone(),
                tensor: self.name.clone(),
                index,
                value: floats[index],
            }),
        }
    }

    /// Gives a float tensor `[rows, cols]` as a matrix over the mapped bytes.
    ///
    /// # Errors
    /// `WrongDtype`, `WrongShape`.
    pub fn dense(&self, rows: usize, cols: usize) -> Result<Dense, CheckpointError> {
        let float_type = self.float_type()?;
        self.expect_shape(&[rows, cols])?;
        Dense::row_major(float_type, rows, cols, self.bytes.clone()).map_err(|source| self.format_error(source))
    }

    /// Gives one of the equally long parts along the first dimension: expert `index` of `count`.
    ///
    /// # Panics
    /// When the first dimension is not `count` or `index` is not below it: callers check the shape first.
    #[must_use]
    pub fn part(&self, index: usize, count: usize) -> Region {
        assert_eq!(self.shape.first(), Some(&count), "the shape was checked");
        let bytes = self.bytes.len() / count;
        self.bytes.slice(index * bytes..(index + 1) * bytes)
    }

    /// Wraps a fault of the bytes with the names of file and tensor.
    #[must_use]
    pub fn format_error(&self, source: FormatError) -> CheckpointError {
        CheckpointError::Format { file: self.file.clone(), tensor: self.name.clone(), source }
    }

    fn wrong_dtype(&self, expected: &'static str) -> CheckpointError {
        let (file, tensor) = (self.file.clone(), self.name.clone());
        CheckpointError::WrongDtype { file, tensor, expected, found: self.dtype }
    }
}
