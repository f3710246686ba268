//! The forms that a matrix may have on a card, each with kernels of its own.

use crate::quant::nf4::{BLOCK_SIZE, NESTED_GROUP};
use crate::quant::{Matrix, Scales};

/// How a matrix is stored on the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// NF4 with f32 scales.
    Nf4,
    /// NF4 with scales that are quantised themselves.
    Nf4Nested,
    /// MXFP4.
    Mxfp4,
    /// 16-bit floats.
    Bf16,
}

impl Form {
    /// Gives the name that kernels have for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Form::Nf4 => "nf4",
            Form::Nf4Nested => "nf4_nested",
            Form::Mxfp4 => "mxfp4",
            Form::Bf16 => "bf16",
        }
    }

    /// Gives the shared memory that a product's tables take. Units: bytes.
    #[must_use]
    pub fn table_bytes(self) -> u32 {
        const SCALES: u32 = 1024;
        match self {
            Form::Nf4 | Form::Nf4Nested | Form::Mxfp4 => 32768 + SCALES,
            Form::Bf16 => SCALES,
        }
    }

    pub(super) fn of(matrix: &Matrix) -> Form {
        match matrix {
            Matrix::Mxfp4(_) => Form::Mxfp4,
            Matrix::Nf4(nf4) if nf4.block_size() == BLOCK_SIZE => match nf4.scales() {
                Scales::Plain(_) => Form::Nf4,
                Scales::Nested(nested) if nested.group == NESTED_GROUP => Form::Nf4Nested,
                Scales::Nested(_) => Form::Bf16,
            },
            Matrix::Nf4(_) | Matrix::Dense(_) => Form::Bf16,
        }
    }
}
