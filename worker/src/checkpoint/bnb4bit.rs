//! 4-bit matrices as bitsandbytes saves them, and Bulkhead's own fused form for experts.
//!
//! **One linear.** For a weight `W` of `[rows, cols]`:
//!
//! | tensor | type and shape |
//! | --- | --- |
//! | `W` | u8 `[ceil(rows * cols / 2), 1]`: codes, the first of a byte in the high nibble |
//! | `W.absmax` | u8 `[blocks]` if nested, else f32 `[blocks]` |
//! | `W.quant_map` | f32 `[16]`: the NF4 table |
//! | `W.nested_absmax`, `W.nested_quant_map` | f32 `[ceil(blocks / 256)]`, f32 `[256]`; if nested |
//! | `W.quant_state.bitsandbytes__nf4` | u8: JSON with quant_type, blocksize, dtype, shape and, if nested, nested_blocksize, nested_dtype, nested_offset |
//!
//! **Fused experts**, our own form, because thousands of small tensors make a header of megabytes. For the tensor
//! `T` = `...mlp.experts.gate_up_proj` (logically `[experts, 2 * intermediate, hidden]`: outputs first, gate and up rows
//! interleaved) or `...mlp.experts.down_proj` (logically `[experts, hidden, intermediate]`), every expert is quantised
//! alone, exactly as the linear above would be, and the results are stacked:
//!
//! | tensor | type and shape |
//! | --- | --- |
//! | `T` | u8 `[experts, ceil(rows * cols / 2)]` |
//! | `T.absmax` | u8 `[experts, blocks]` if nested, else f32 `[experts, blocks]` |
//! | `T.quant_map` | f32 `[16]` |
//! | `T.nested_absmax`, `T.nested_offset`, `T.nested_quant_map` | f32 `[experts, ceil(blocks / 256)]`, f32 `[experts]`, f32 `[256]`; if nested |
//! | `T.quant_state.bitsandbytes__nf4` | u8: the same JSON with shape `[experts, rows, cols]` and without nested_offset |
//!
//! Biases stay in `T_bias`, as in every layout of gpt-oss.
//!
//! Owns: finding these tensors and checking them against each other and the config. Refuses: FP4 and other code tables.
//! Source: bitsandbytes 0.50, `functional.QuantState.as_dict(packed=True)`.

use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;

use super::limits::QUANT_STATE_BYTES_MAX;
use super::{Checkpoint, CheckpointError, Region, Tensor};
use crate::quant::nf4::TABLE;
use crate::quant::{Nested, Nf4, Scales};

/// What the name of every quantisation state continues with, before the quantisation type.
const STATE_PREFIX: &str = "quant_state.bitsandbytes__";

/// The only quantisation type that is supported.
const NF4: &str = "nf4";

/// What bitsandbytes offers beside it.
const FP4: &str = "fp4";

/// Why a quantisation state is unusable.
#[derive(Debug, thiserror::Error)]
pub enum QuantStateError {
    /// The JSON is larger than any real one.
    #[error("the quantisation state has {bytes} bytes, more than the limit of {max}")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// It is not the JSON that it must be.
    #[error("the quantisation state is malformed: {0}")]
    Json(#[source] serde_json::Error),
    /// The codes mean something else.
    #[error("quantisation type {found:?} is not supported, only \"nf4\" is: convert the model to NF4 or MXFP4")]
    QuantType {
        /// What the file says.
        found: String,
    },
    /// The code table is not NF4's.
    #[error("code {code} of the quantisation map is {found}, expected NF4's {expected}")]
    QuantMap {
        /// The first code that differs.
        code: usize,
        /// NF4's value.
        expected: f32,
        /// The file's.
        found: f32,
    },
    /// A field contradicts the config or another tensor.
    #[error("{field} of the quantisation state is {found}, expected {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// What fits.
        expected: String,
        /// What is there.
        found: String,
    },
}

#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

/// Says whether a weight is stored in one of the layouts of this module.
#[must_use]
pub fn has(checkpoint: &Checkpoint, weight: &str) -> bool {
    [NF4, FP4].iter().any(|kind| checkpoint.has(&state_name(weight, kind)))
        || checkpoint.has(&part_name(weight, "absmax"))
}

/// Reads one linear's weight `[rows, cols]` over the mapped bytes.
///
/// # Errors
/// Those of `CheckpointError` that concern tensors.
pub fn linear(checkpoint: &Checkpoint, weight: &str, rows: usize, cols: usize) -> Result<Nf4, CheckpointError> {
    let parts = Parts::read(checkpoint, weight, &[rows, cols])?;
    let codes = (rows * cols).div_ceil(2);
    match parts.codes.shape() {
        [found] if *found == codes => {}
        _ => parts.codes.expect_shape(&[codes, 1])?,
    }
    let blocks = parts.expect_blocks(None, rows * cols)?;
    let scales = match &parts.nested {
        None => Scales::Plain(parts.absmax.region().clone()),
        Some(nested) => {
            let absmax = nested.absmax.finite_floats(&[blocks.div_ceil(nested.group)])?;
            let offset = match parts.state.nested_offset {
                Some(offset) => offset,
                None => return Err(parts.field_error("nested_offset", "a number", &"absent")),
            };
            nested.scales(parts.absmax.region().clone(), absmax, offset)
        }
    };
    parts.matrix([0, rows, cols], parts.codes.region().clone(), scales)
}

/// Reads the experts of a fused tensor, each as a matrix `[rows, cols]` over the mapped bytes.
///
/// # Errors
/// Those of `CheckpointError` that concern tensors.
pub fn experts(
    checkpoint: &Checkpoint,
    name: &str,
    [count, rows, cols]: [usize; 3],
) -> Result<Vec<Nf4>, CheckpointError> {
    let parts = Parts::read(checkpoint, name, &[count, rows, cols])?;
    parts.codes.expect_shape(&[count, (rows * cols).div_ceil(2)])?;
    let blocks = parts.expect_blocks(Some(count), rows * cols)?;
    let nested = match &parts.nested {
        None => None,
        Some(nested) => {
            let absmax = nested.absmax.finite_floats(&[count, blocks.div_ceil(nested.group)])?;
            let offsets = checkpoint.tensor(&part_name(name, "nested_offset"))?;
            offsets.expect_dtype(Dtype::F32, "F32")?;
            Some((nested, absmax, offsets.finite_floats(&[count])?))
        }
    };
    let expert = |e: usize| {
        let absmax = parts.absmax.part(e, count);
        let scales = match &nested {
            None => Scales::Plain(absmax),
            Some((nested, all, offsets)) => {
                let groups = all.len() / count;
                nested.scales(absmax, all[e * groups..(e + 1) * groups].to_vec(), offsets[e])
            }
        };
        parts.matrix([e, rows, cols], parts.codes.part(e, count), scales)
    };
    (0..count).map(expert).collect()
}

/// The tensors of one weight, with what can be checked without knowing whether it is fused.
struct Parts {
    codes: Tensor,
    absmax: Tensor,
    state_tensor: Tensor,
    state: QuantState,
    nested: Option<NestedParts>,
}

struct NestedParts {
    absmax: Tensor,
    map: Box<[f32; 256]>,
    group: usize,
}

impl Parts {
    fn read(checkpoint: &Checkpoint, weight: &str, shape: &[usize]) -> Result<Parts, CheckpointError> {
        let (state_tensor, state) = read_state(checkpoint, weight)?;
        let codes = checkpoint.tensor(weight)?;
        codes.expect_dtype(Dtype::U8, "U8")?;
        let absmax = checkpoint.tensor(&part_name(weight, "absmax"))?;
        check_quant_map(&checkpoint.tensor(&part_name(weight, "quant_map"))?)?;
        let mut parts = Parts { codes, absmax, state_tensor, state, nested: None };
        if parts.state.shape != shape {
            return Err(parts.field_error("shape", &format!("{shape:?}"), &format!("{:?}", parts.state.shape)));
        }
        if !matches!(parts.state.dtype.as_str(), "bfloat16" | "float16" | "float32") {
            return Err(parts.field_error("dtype", "a float type", &parts.state.dtype));
        }
        if !parts.state.blocksize.is_power_of_two() {
            return Err(parts.field_error("blocksize", "a power of two", &parts.state.blocksize));
        }
        parts.nested = parts.read_nested(checkpoint, weight)?;
        Ok(parts)
    }

    fn read_nested(&self, checkpoint: &Checkpoint, weight: &str) -> Result<Option<NestedParts>, CheckpointError> {
        let Some(group) = self.state.nested_blocksize else {
            self.absmax.expect_dtype(Dtype::F32, "F32, since its quantisation state is not nested")?;
            return Ok(None);
        };
        self.absmax.expect_dtype(Dtype::U8, "U8, since its quantisation state is nested")?;
        if !group.is_power_of_two() {
            return Err(self.field_error("nested_blocksize", "a power of two", &group));
        }
        if let Some(dtype) = self.state.nested_dtype.as_deref().filter(|dtype| *dtype != "float32") {
            return Err(self.field_error("nested_dtype", "float32", &dtype));
        }
        let absmax = checkpoint.tensor(&part_name(weight, "nested_absmax"))?;
        absmax.expect_dtype(Dtype::F32, "F32")?;
        let map = checkpoint.tensor(&part_name(weight, "nested_quant_map"))?;
        map.expect_dtype(Dtype::F32, "F32")?;
        let map = map.finite_floats(&[256])?.try_into().expect("the shape was checked");
        Ok(Some(NestedParts { absmax, map, group }))
    }

    /// Checks the number of scales of each expert, or of the only matrix, and gives it.
    fn expect_blocks(&self, experts: Option<usize>, weights: usize) -> Result<usize, CheckpointError> {
        let blocks = weights.div_ceil(self.state.blocksize);
        let shape: Vec<usize> = experts.into_iter().chain([blocks]).collect();
        self.absmax.expect_shape(&shape)?;
        Ok(blocks)
    }

    fn matrix(&self, [expert, rows, cols]: [usize; 3], codes: Region, scales: Scales) -> Result<Nf4, CheckpointError> {
        let blocks = (rows * cols).div_ceil(self.state.blocksize);
        Nf4::new(rows, cols, self.state.blocksize, codes, scales)
            .map_err(|source| self.absmax.format_error(source.at_part(expert, blocks)))
    }

    fn field_error(&self, field: &'static str, expected: &str, found: &dyn fmt::Display) -> CheckpointError {
        let (expected, found) = (expected.to_owned(), found.to_string());
        state_error(&self.state_tensor, QuantStateError::Field { field, expected, found })
    }
}

impl NestedParts {
    fn scales(&self, codes: Region, absmax: Vec<f32>, offset: f32) -> Scales {
        Scales::Nested(Nested { codes, map: self.map.clone(), absmax, group: self.group, offset })
    }
}

/// Gives the quantisation state of a weight with every field that the file has.
///
/// # Errors
/// `MissingTensor`, `WrongDtype`, `QuantState`.
pub fn state_json(checkpoint: &Checkpoint, weight: &str) -> Result<serde_json::Value, CheckpointError> {
    let (tensor, _) = read_state(checkpoint, weight)?;
    serde_json::from_slice(tensor.region().bytes())
        .map_err(|source| state_error(&tensor, QuantStateError::Json(source)))
}

fn read_state(checkpoint: &Checkpoint, weight: &str) -> Result<(Tensor, QuantState), CheckpointError> {
    let fp4 = state_name(weight, FP4);
    if checkpoint.has(&fp4) {
        let found = FP4.to_owned();
        return Err(state_error(&checkpoint.tensor(&fp4)?, QuantStateError::QuantType { found }));
    }
    let tensor = checkpoint.tensor(&state_name(weight, NF4))?;
    tensor.expect_dtype(Dtype::U8, "U8")?;
    let bytes = tensor.region().bytes();
    if bytes.len() > QUANT_STATE_BYTES_MAX {
        let (bytes, max) = (bytes.len(), QUANT_STATE_BYTES_MAX);
        return Err(state_error(&tensor, QuantStateError::TooLarge { bytes, max }));
    }
    let state: QuantState =
        serde_json::from_slice(bytes).map_err(|source| state_error(&tensor, QuantStateError::Json(source)))?;
    if state.quant_type != NF4 {
        return Err(state_error(&tensor, QuantStateError::QuantType { found: state.quant_type }));
    }
    Ok((tensor, state))
}

fn check_quant_map(map: &Tensor) -> Result<(), CheckpointError> {
    map.expect_dtype(Dtype::F32, "F32")?;
    let found = map.finite_floats(&[TABLE.len()])?;
    match found.iter().zip(TABLE).position(|(found, expected)| *found != expected) {
        None => Ok(()),
        Some(code) => {
            let error = QuantStateError::QuantMap { code, expected: TABLE[code], found: found[code] };
            Err(state_error(map, error))
        }
    }
}

fn state_error(tensor: &Tensor, source: QuantStateError) -> CheckpointError {
    CheckpointError::QuantState { file: tensor.file().to_owned(), tensor: tensor.name().to_owned(), source }
}

fn state_name(weight: &str, kind: &str) -> String {
    format!("{weight}.{STATE_PREFIX}{kind}")
}

fn part_name(weight: &str, part: &str) -> String {
    format!("{weight}.{part}")
}
