//! MXFP4 experts as gpt-oss is published: `T_blocks` u8 [experts, rows, cols / 32, 16] and `T_scales` u8
//! [experts, rows, cols / 32], where `T` is a fused expert tensor and rows are outputs.
//!
//! Owns: finding and checking these tensors. Refuses: to decode them; `quant::mxfp4` does.

use safetensors::Dtype;

use super::{Checkpoint, CheckpointError};
use crate::quant::mxfp4::{GROUP, GROUP_BYTES};
use crate::quant::{FormatError, Mxfp4};

/// Says whether a fused expert tensor is stored as MXFP4.
#[must_use]
pub fn has(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.has(&blocks_name(name)) || checkpoint.has(&scales_name(name))
}

/// Reads the experts of a fused tensor, each as a matrix `[rows, cols]` over the mapped bytes.
///
/// # Errors
/// `MissingTensor`, `WrongDtype`, `WrongShape`; `Format` for columns that make no whole groups and for NaN scales.
pub fn experts(
    checkpoint: &Checkpoint,
    name: &str,
    [count, rows, cols]: [usize; 3],
) -> Result<Vec<Mxfp4>, CheckpointError> {
    let blocks = checkpoint.tensor(&blocks_name(name))?;
    let scales = checkpoint.tensor(&scales_name(name))?;
    if !cols.is_multiple_of(GROUP) {
        return Err(blocks.format_error(FormatError::PartialGroup { cols, group: GROUP }));
    }
    blocks.expect_dtype(Dtype::U8, "U8")?;
    scales.expect_dtype(Dtype::U8, "U8")?;
    blocks.expect_shape(&[count, rows, cols / GROUP, GROUP_BYTES])?;
    scales.expect_shape(&[count, rows, cols / GROUP])?;
    let expert = |e| {
        Mxfp4::new(rows, cols, blocks.part(e, count), scales.part(e, count))
            .map_err(|source| scales.format_error(source.at_part(e, rows * cols / GROUP)))
    };
    (0..count).map(expert).collect()
}

fn blocks_name(name: &str) -> String {
    format!("{name}_blocks")
}

fn scales_name(name: &str) -> String {
    format!("{name}_scales")
}
