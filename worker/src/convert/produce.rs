//! From a tensor's bytes to those of the output, in slices that threads share out.
//!
//! Owns: the arithmetic of a conversion. Invariants: what is written does not depend on the number of threads: a slice ends
//! where a block ends, and sums are taken in the order of the slices. The source is read, not touched through its mapping,
//! so that no page of it counts as memory of this process; what is held is a slice for each thread and 16 bytes for each
//! block of one tensor.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use half::bf16;

use super::error::ConvertError;
use super::plan::{Dimensions, Item, STATE_BYTES, Source, Work};
use super::progress::Progress;
use crate::checkpoint::{CheckpointError, Region, Tensor};
use crate::quant::mxfp4::{GROUP, decode_group, quantize_group};
use crate::quant::nf4::{BLOCK_SIZE, NESTED_GROUP, TABLE};
use crate::quant::{FloatType, FormatError, Matrix, Mxfp4, Nested, quantize_absmax, quantize_block};

/// Weights of a slice: a multiple of every block size.
const SLICE_WEIGHTS: usize = 1 << 19;

/// Bytes of a slice that is copied. Bounds: a multiple of every element's size.
const SLICE_BYTES: usize = 4 << 20;

/// What a slice of weights became, beside its codes.
struct Quantized {
    blocks: Vec<Block>,
    /// Sum of squares of the weights.
    norm: f64,
}

/// What is needed of a block until the scales of its matrix are known. With s = `absmax` and the final scale s + d, the squared
/// error of the block is `s^2 square + 2 s d slope + d^2 energy`. The sums are of weights over s, so that neither tiny nor huge
/// ones leave the range of f32.
#[derive(Clone, Copy)]
struct Block {
    absmax: f32,
    /// Sum of (code - weight / s)^2.
    square: f32,
    /// Sum of code * (code - weight / s).
    slope: f32,
    /// Sum of code^2.
    energy: f32,
}

impl Block {
    fn error(&self, restored: f32) -> f64 {
        let [scale, square, slope, energy] = [self.absmax, self.square, self.slope, self.energy].map(f64::from);
        let change = f64::from(restored) - scale;
        (scale * scale * square + 2.0 * scale * change * slope + change * change * energy).max(0.0)
    }
}

/// The file that is written.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) file: File,
    pub(super) path: PathBuf,
}

impl Sink {
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), ConvertError> {
        self.file.write_all_at(bytes, at).map_err(ConvertError::write(&self.path))
    }
}

/// Squares of the error and of the weights.
#[derive(Clone, Copy, Debug, Default)]
struct Squares {
    error: f64,
    norm: f64,
}

impl Squares {
    fn sum(all: impl IntoIterator<Item = Squares>) -> Squares {
        let add = |sum: Squares, one: Squares| Squares { error: sum.error + one.error, norm: sum.norm + one.norm };
        all.into_iter().fold(Squares::default(), add)
    }

    /// Gives |found - expected| / |expected|.
    fn relative(self) -> f32 {
        if self.norm > 0.0 { (self.error / self.norm).sqrt() as f32 } else { 0.0 }
    }
}

/// Where the outputs of an item begin in the file, in their order.
pub(super) struct Places<'p> {
    pub(super) sink: &'p Sink,
    pub(super) offsets: &'p [u64],
}

/// Writes everything that an item makes; gives the relative error where a weight changed.
///
/// # Errors
/// `Checkpoint` for weights that are no numbers, `Write`.
pub(super) fn produce(
    item: &Item,
    places: &Places<'_>,
    threads: usize,
    progress: &Progress,
) -> Result<Option<f32>, ConvertError> {
    match &item.work {
        Work::Copy(tensor) => {
            let length = tensor.region().len();
            each(threads, length.div_ceil(SLICE_BYTES), |index| {
                let range = index * SLICE_BYTES..((index + 1) * SLICE_BYTES).min(length);
                let mut bytes = vec![0; range.len()];
                tensor.region().copy_to(range.clone(), &mut bytes);
                places.sink.write(&bytes, places.offsets[0] + range.start as u64)?;
                progress.add(range.len() as u64);
                Ok(())
            })?;
            Ok(None)
        }
        Work::Round(tensor) => round(tensor, places, threads, progress).map(Some),
        Work::Quantize { source, dimensions } => {
            quantize(item, (source, *dimensions), places, threads, progress).map(Some)
        }
        Work::Mxfp4 { source, dimensions } => {
            to_mxfp4(item, (source, *dimensions), places, threads, progress).map(Some)
        }
        Work::Nest { codes, absmax, block_size, dimensions } => {
            let found = nest(item, (codes, absmax), (*block_size, *dimensions), places, threads)?;
            progress.add(item.source_bytes());
            Ok(Some(found))
        }
    }
}

/// Rounds f32 to bf16, to even.
fn round(tensor: &Tensor, places: &Places<'_>, threads: usize, progress: &Progress) -> Result<f32, ConvertError> {
    let length = tensor.region().len();
    let all = each(threads, length.div_ceil(SLICE_BYTES), |index| {
        let range = index * SLICE_BYTES..((index + 1) * SLICE_BYTES).min(length);
        let (mut bytes, mut floats) = (vec![0; range.len()], vec![0.0; range.len() / size_of::<f32>()]);
        tensor.region().copy_to(range.clone(), &mut bytes);
        FloatType::F32.decode(&bytes, &mut floats);
        let rounded: Vec<bf16> = floats.iter().map(|value| bf16::from_f32(*value)).collect();
        let square = |value: f32| f64::from(value) * f64::from(value);
        let error = floats.iter().zip(&rounded).map(|(from, to)| square(to.to_f32() - from)).sum();
        let written: Vec<u8> = rounded.iter().flat_map(|value| value.to_le_bytes()).collect();
        places.sink.write(&written, places.offsets[0] + range.start as u64 / 2)?;
        progress.add(range.len() as u64);
        Ok(Squares { error, norm: floats.iter().map(|value| square(*value)).sum() })
    })?;
    Ok(Squares::sum(all).relative())
}

fn quantize(
    item: &Item,
    (source, dimensions): (&Source, Dimensions),
    places: &Places<'_>,
    threads: usize,
    progress: &Progress,
) -> Result<f32, ConvertError> {
    let weights = dimensions.weights();
    let slices = slices_of(dimensions);
    let code_bytes = weights.div_ceil(2) as u64;
    let (all, share) = (dimensions.count * slices, item.source_bytes());
    let done = each(threads, all, |task| {
        let (expert, range, floats) = read_slice(source, dimensions, task)?;
        let mut codes = Vec::with_capacity(range.len().div_ceil(2));
        let blocks = floats.chunks(BLOCK_SIZE).map(|block| quantize_one(block, &mut codes)).collect();
        let norm = floats.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
        places.sink.write(&codes, places.offsets[0] + expert as u64 * code_bytes + range.start as u64 / 2)?;
        progress.add(part_of(share, task, all));
        Ok(Quantized { blocks, norm })
    })?;
    let experts: Vec<&[Quantized]> = done.chunks(slices).collect();
    let nested = each(threads, dimensions.count, |expert| {
        let blocks = || experts[expert].iter().flat_map(|slice| &slice.blocks);
        let absmax: Vec<f32> = blocks().map(|block| block.absmax).collect();
        let nested = quantize_absmax(&absmax);
        let error = blocks().enumerate().map(|(index, block)| block.error(restored(&nested, index))).sum();
        let norm = experts[expert].iter().map(|slice| slice.norm).sum();
        Ok((nested, Squares { error, norm }))
    })?;
    places.sink.write(&floats_bytes(&TABLE), places.offsets[1])?;
    let (nested, squares): (Vec<Nested>, Vec<Squares>) = nested.into_iter().unzip();
    write_scales(item, dimensions, &nested, places, 2)?;
    Ok(Squares::sum(squares).relative())
}

/// Quantises to MXFP4. A slice ends where a group ends.
fn to_mxfp4(
    item: &Item,
    (source, dimensions): (&Source, Dimensions),
    places: &Places<'_>,
    threads: usize,
    progress: &Progress,
) -> Result<f32, ConvertError> {
    let weights = dimensions.weights();
    let slices = slices_of(dimensions);
    let (all, share) = (dimensions.count * slices, item.source_bytes());
    let squares = each(threads, all, |task| {
        let (expert, range, floats) = read_slice(source, dimensions, task)?;
        let (mut codes, mut scales) = (Vec::with_capacity(range.len() / 2), Vec::with_capacity(range.len() / GROUP));
        let mut squares = Squares::default();
        for group in floats.as_chunks::<GROUP>().0 {
            let (bytes, scale) = quantize_group(group);
            for (from, to) in group.iter().zip(decode_group(&bytes, scale)) {
                squares.error += (f64::from(to) - f64::from(*from)).powi(2);
                squares.norm += f64::from(*from).powi(2);
            }
            codes.extend(bytes);
            scales.push(scale);
        }
        let first = (expert * weights + range.start) as u64;
        places.sink.write(&codes, places.offsets[0] + first / 2)?;
        places.sink.write(&scales, places.offsets[1] + first / GROUP as u64)?;
        progress.add(part_of(share, task, all));
        Ok(squares)
    })?;
    Ok(Squares::sum(squares).relative())
}

/// Gives the share that one task of many has in something: all together make it up.
fn part_of(whole: u64, task: usize, all: usize) -> u64 {
    let until = |task: usize| (u128::from(whole) * task as u128 / all as u128) as u64;
    until(task + 1) - until(task)
}

/// Quantises a block, with what is needed to tell its error once its final scale is known.
fn quantize_one(block: &[f32], codes: &mut Vec<u8>) -> Block {
    let start = codes.len();
    let absmax = quantize_block(block, codes);
    let mut sums = Block { absmax, square: 0.0, slope: 0.0, energy: 0.0 };
    for (pair, byte) in block.chunks(2).zip(&codes[start..]) {
        for (weight, code) in pair.iter().zip([byte >> 4, byte & 15]) {
            let value = TABLE[usize::from(code)];
            let difference = if absmax > 0.0 { value - weight / absmax } else { value };
            sums.square += difference * difference;
            sums.slope += value * difference;
            sums.energy += value * value;
        }
    }
    sums
}

fn nest(
    item: &Item,
    (codes, absmax): (&Tensor, &Tensor),
    (block_size, dimensions): (usize, Dimensions),
    places: &Places<'_>,
    threads: usize,
) -> Result<f32, ConvertError> {
    let blocks = dimensions.weights().div_ceil(block_size);
    let code_bytes = dimensions.weights().div_ceil(2);
    let nested = each(threads, dimensions.count, |expert| {
        let mut bytes = vec![0; blocks * size_of::<f32>()];
        absmax.region().copy_to(expert * bytes.len()..(expert + 1) * bytes.len(), &mut bytes);
        let mut scales = vec![0.0; blocks];
        FloatType::F32.decode(&bytes, &mut scales);
        if let Some(index) = scales.iter().position(|value| !value.is_finite()) {
            let value = scales[index];
            let error = FormatError::NotFinite { part: "absmax", index: expert * blocks + index, value };
            return Err(absmax.format_error(error).into());
        }
        let nested = quantize_absmax(&scales);
        let mut squares = Squares::default();
        let mut packed = vec![0; block_size / 2];
        for (index, scale) in scales.iter().enumerate() {
            let start = index * block_size / 2;
            let packed = &mut packed[..(code_bytes - start).min(block_size / 2)];
            codes.region().copy_to(expert * code_bytes + start..expert * code_bytes + start + packed.len(), packed);
            let values = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|code| TABLE[usize::from(code)]);
            let energy: f64 = values.map(|value| f64::from(value) * f64::from(value)).sum();
            let (scale, change) = (f64::from(*scale), f64::from(restored(&nested, index)) - f64::from(*scale));
            squares.error += change * change * energy;
            squares.norm += scale * scale * energy;
        }
        Ok((nested, squares))
    })?;
    let (nested, squares): (Vec<Nested>, Vec<Squares>) = nested.into_iter().unzip();
    write_scales(item, dimensions, &nested, places, 0)?;
    Ok(Squares::sum(squares).relative())
}

/// Gives the scale of a block as it will be read.
fn restored(nested: &Nested, block: usize) -> f32 {
    let code = nested.codes.bytes()[block];
    nested.map[usize::from(code)] * nested.absmax[block / NESTED_GROUP] + nested.offset
}

/// Writes nested scales and the state, whose outputs begin with that of number `first`.
fn write_scales(
    item: &Item,
    dimensions: Dimensions,
    nested: &[Nested],
    places: &Places<'_>,
    first: usize,
) -> Result<(), ConvertError> {
    let Places { sink, offsets } = places;
    let (mut codes_at, mut absmax_at) = (offsets[first], offsets[first + 1]);
    for one in nested {
        sink.write(one.codes.bytes(), codes_at)?;
        codes_at += one.codes.len() as u64;
        sink.write(&floats_bytes(&one.absmax), absmax_at)?;
        absmax_at += size_of_val(&*one.absmax) as u64;
    }
    sink.write(&floats_bytes(&nested[0].map[..]), offsets[first + 2])?;
    let mut state = item.state.clone();
    if dimensions.is_fused {
        let offsets_of_all: Vec<f32> = nested.iter().map(|one| one.offset).collect();
        sink.write(&floats_bytes(&offsets_of_all), offsets[first + 4])?;
    } else {
        state["nested_offset"] = nested[0].offset.into();
    }
    let mut text = state.to_string().into_bytes();
    assert!(text.len() <= STATE_BYTES, "a state of seven short fields has room");
    text.resize(STATE_BYTES, b' ');
    sink.write(&text, offsets[first + 3])
}

fn floats_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Gives how many slices an expert's weights are cut into; tasks go through them expert by expert.
fn slices_of(dimensions: Dimensions) -> usize {
    dimensions.weights().div_ceil(SLICE_WEIGHTS)
}

/// Reads the slice of a task: whose it is, which of its weights, and these.
fn read_slice(
    source: &Source,
    dimensions: Dimensions,
    task: usize,
) -> Result<(usize, Range<usize>, Vec<f32>), ConvertError> {
    let slices = slices_of(dimensions);
    let start = task % slices * SLICE_WEIGHTS;
    let range = start..(start + SLICE_WEIGHTS).min(dimensions.weights());
    let expert = task / slices;
    Ok((expert, range.clone(), read(source, dimensions, expert, range)?))
}

/// Reads weights of one matrix, counted in its row-major order.
fn read(source: &Source, dimensions: Dimensions, expert: usize, range: Range<usize>) -> Result<Vec<f32>, ConvertError> {
    let Dimensions { rows, cols, .. } = dimensions;
    let first = expert * dimensions.weights();
    let (whole, skipped) = match source {
        Source::Rows(tensor) => {
            let floats = read_floats(tensor, first + range.start..first + range.end)?;
            return finite(tensor, floats, first + range.start);
        }
        Source::Transposed(tensor) => {
            let within = range.start / cols..range.end.div_ceil(cols);
            let mut whole = vec![0.0; within.len() * cols];
            for col in 0..cols {
                let start = first + col * rows + within.start;
                let column = read_floats(tensor, start..start + within.len())?;
                for (row, value) in column.into_iter().enumerate() {
                    whole[row * cols + col] = value;
                }
            }
            (finite(tensor, whole, first + within.start * cols)?, range.start - within.start * cols)
        }
        Source::Mxfp4 { blocks, scales } => {
            let within = range.start / cols..range.end.div_ceil(cols);
            let part = |tensor: &Tensor, row_bytes: usize| {
                let start = (expert * rows + within.start) * row_bytes;
                let mut bytes = vec![0; within.len() * row_bytes];
                tensor.region().copy_to(start..start + bytes.len(), &mut bytes);
                Region::from_vec(bytes)
            };
            let (blocks, scale_bytes) = (part(blocks, cols / 2), part(scales, cols / GROUP));
            let matrix = Mxfp4::new(within.len(), cols, blocks, scale_bytes).map_err(|source| {
                let at = source.at_part(expert * rows + within.start, cols / GROUP);
                ConvertError::Checkpoint(scales.format_error(at))
            })?;
            let decoded = Matrix::Mxfp4(matrix).decode_rows(0..within.len());
            (decoded, range.start - within.start * cols)
        }
    };
    Ok(whole[skipped..skipped + range.len()].to_vec())
}

fn read_floats(tensor: &Tensor, range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    let float_type = tensor.float_type()?;
    let mut bytes = vec![0; range.len() * float_type.bytes()];
    tensor.region().copy_to(range.start * float_type.bytes()..range.end * float_type.bytes(), &mut bytes);
    let mut floats = vec![0.0; range.len()];
    float_type.decode(&bytes, &mut floats);
    Ok(floats)
}

/// Refuses weights that are no finite numbers; `start` is where the first one stands.
fn finite(tensor: &Tensor, floats: Vec<f32>, start: usize) -> Result<Vec<f32>, ConvertError> {
    match floats.iter().position(|value| !value.is_finite()) {
        None => Ok(floats),
        Some(index) => {
            let error = FormatError::WeightNotFinite { index: start + index, value: floats[index] };
            Err(tensor.format_error(error).into())
        }
    }
}

/// Calls `task` with each number below `count` on threads that take the next one when they are free, and gives the results
/// in order.
///
/// # Errors
/// One of those that calls gave; no call begins after one.
pub(super) fn each<T: Send>(
    threads: usize,
    count: usize,
    task: impl Fn(usize) -> Result<T, ConvertError> + Sync,
) -> Result<Vec<T>, ConvertError> {
    if count <= 1 || threads <= 1 {
        return (0..count).map(task).collect();
    }
    let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done = Mutex::new(Vec::with_capacity(count));
    let work = || {
        while !has_failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            let result = task(index);
            has_failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.lock().expect("no call panics while it holds this").push((index, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(work);
        }
        work();
    });
    let mut done = done.into_inner().expect("no call panics while it holds this");
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
