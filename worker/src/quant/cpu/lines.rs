//! What integer products are made of: codes as they are stored, and activations rounded to bytes.
//!
//! A row is cut into segments of 64 inputs, which are 32 bytes of codes, and into blocks of 64 or 32 inputs, each under one
//! scale of the weights and one of the activations. With `w` and `q` the integers of a block, the product of a row is
//!
//! ```text
//! lane[b % 8] = fma(f32(sum of w * q over block b), weight_scale[b] * activation_scale[b], lane[b % 8]), b ascending
//! y = ((lane 0 + lane 4) + (lane 2 + lane 6)) + ((lane 1 + lane 5) + (lane 3 + lane 7)) + bias
//! ```
//!
//! The sums are exact, whatever their order, and below 2^24; so each step above has one result, and all kernels give equal
//! bits, for one token or many. `dot` computes it in plain Rust.
//!
//! Integers of weights: NF4: round(127 * value), which is off by up to half a step of 1/127. MXFP4: twice the value, exact.
//! Activations: round(127 * x / largest of the block), to even on a tie.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::quant::{Matrix, Scales, mxfp4, nf4};

/// Inputs in a segment, and the bytes of their codes.
pub(super) const SEGMENT: usize = 64;
pub(super) const SEGMENT_BYTES: usize = SEGMENT / 2;

/// Sums of a row that are kept apart until its end.
pub(super) const LANES: usize = 8;

/// The largest integer of an activation or weight.
const LARGEST: f32 = 127.0;

/// The factor by which corrections are scaled, see `Token::corrections`: the offset that makes a signed byte unsigned.
pub(super) const OFFSET: i32 = 128;

/// The NF4 values in steps of 1/127.
pub(super) const NF4_INTEGERS: [i8; 16] = [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127];

/// The MXFP4 values in steps of a half.
pub(super) const MXFP4_INTEGERS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Bytes as long as a line of the cache, and aligned to it. Of a segment of activations: those that meet the codes
/// in high nibbles, then those that meet the ones in low nibbles.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [i8; SEGMENT]);

impl Line {
    pub(super) const ZERO: Line = Line([0; SEGMENT]);
}

/// Which nibble of a byte belongs to the even element, and how many scales a segment has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// NF4 under one scale for a segment or more.
    Nf4,
    /// NF4 under a scale for each half of a segment.
    Nf4Halves,
    /// MXFP4, whose groups are halves of a segment.
    Mxfp4,
}

impl Kind {
    /// Gives the scales of a segment.
    pub(super) const fn blocks(self) -> usize {
        match self {
            Kind::Nf4 => 1,
            Kind::Nf4Halves | Kind::Mxfp4 => 2,
        }
    }

    /// Says whether the even element has the high nibble.
    pub(super) const fn is_high_first(self) -> bool {
        match self {
            Kind::Nf4 | Kind::Nf4Halves => true,
            Kind::Mxfp4 => false,
        }
    }

    pub(super) const fn integers(self) -> [i8; 16] {
        match self {
            Kind::Nf4 | Kind::Nf4Halves => NF4_INTEGERS,
            Kind::Mxfp4 => MXFP4_INTEGERS,
        }
    }

    /// The value of one step of a weight's integers, before its block's scale.
    const fn step(self) -> f32 {
        match self {
            Kind::Nf4 | Kind::Nf4Halves => 1.0 / LARGEST,
            Kind::Mxfp4 => 0.5,
        }
    }
}

/// A matrix of 4-bit codes whose rows are whole blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coded<'a> {
    pub(super) kind: Kind,
    codes: &'a [u8],
    cols: usize,
    scales: BlockScales<'a>,
    /// Blocks as they are cut here are these parts of the format's own: by so many bits.
    shift: u32,
}

#[derive(Clone, Copy, Debug)]
enum BlockScales<'a> {
    Plain(&'a [[u8; 4]]),
    Nested(&'a [u8], &'a nf4::Nested),
    Powers(&'a [u8]),
}

impl<'a> Coded<'a> {
    /// Takes a matrix, unless it has no codes or its rows begin or end within a block.
    pub(super) fn of(matrix: &'a Matrix) -> Option<Coded<'a>> {
        match matrix {
            Matrix::Dense(_) => None,
            Matrix::Mxfp4(mxfp4) => Some(Coded {
                kind: Kind::Mxfp4,
                codes: mxfp4.blocks().bytes(),
                cols: mxfp4.cols(),
                scales: BlockScales::Powers(mxfp4.scales().bytes()),
                shift: 0,
            }),
            Matrix::Nf4(nf4) => {
                let kind = if nf4.block_size() >= SEGMENT { Kind::Nf4 } else { Kind::Nf4Halves };
                let block = SEGMENT / kind.blocks();
                let scales = match nf4.scales() {
                    Scales::Plain(bytes) => BlockScales::Plain(bytes.bytes().as_chunks().0),
                    Scales::Nested(nested) => BlockScales::Nested(nested.codes.bytes(), nested),
                };
                let shift = (nf4.block_size() / block).trailing_zeros();
                let coded = Coded { kind, codes: nf4.packed().bytes(), cols: nf4.cols(), scales, shift };
                nf4.cols().is_multiple_of(block).then_some(coded)
            }
        }
    }

    /// Counts the segments of a row; the last one may be a half.
    pub(super) fn segments(&self) -> usize {
        self.cols.div_ceil(SEGMENT)
    }

    /// Counts the blocks of a row.
    pub(super) fn blocks(&self) -> usize {
        self.cols / (SEGMENT / self.kind.blocks())
    }

    /// Gives the bytes of a row's codes.
    pub(super) fn row_bytes(&self) -> usize {
        self.cols / 2
    }

    /// Gives the codes of a row: its whole segments, and what follows them.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> (&'a [[u8; SEGMENT_BYTES]], &'a [u8]) {
        let bytes = self.cols / 2;
        self.codes[row * bytes..(row + 1) * bytes].as_chunks()
    }

    /// Gives the scales of a row from a block on, as many as `out` takes.
    #[inline(always)]
    pub(super) fn write_scales(&self, row: usize, first: usize, out: &mut [f32]) {
        let start = row * self.blocks() + first;
        match self.scales {
            BlockScales::Plain(scales) => {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = f32::from_le_bytes(scales[(start + i) >> self.shift]);
                }
            }
            BlockScales::Nested(codes, nested) if self.shift == 0 => {
                let codes = &codes[start..start + out.len()];
                let group = nested.group.trailing_zeros();
                let mut done = 0;
                while done < out.len() {
                    let index = (start + done) >> group;
                    let end = (((index + 1) << group) - start).min(out.len());
                    let absmax = nested.absmax[index];
                    let out = &mut out[done..end];
                    for (out, code) in out.iter_mut().zip(&codes[done..end]) {
                        *out = nested.map[usize::from(*code)];
                    }
                    // A loop of its own, which is done in vectors.
                    out.iter_mut().for_each(|out| *out = *out * absmax + nested.offset);
                    done = end;
                }
            }
            BlockScales::Nested(codes, nested) => {
                for (i, out) in out.iter_mut().enumerate() {
                    let block = (start + i) >> self.shift;
                    *out = nested.restore(block, codes[block]);
                }
            }
            BlockScales::Powers(scales) => {
                for (out, scale) in out.iter_mut().zip(&scales[start..]) {
                    *out = mxfp4::power_of_two(*scale);
                }
            }
        }
    }
}

/// The activations of one token for one product, rounded to bytes block by block.
#[derive(Clone, Debug, Default)]
pub(super) struct Token {
    /// One for each segment; zero behind the end.
    pub(super) lines: Vec<Line>,
    /// The value of one step of product, for each block, and zeros until they are a multiple of `LANES`.
    pub(super) scales: Vec<f32>,
    /// -`OFFSET` times the sum of each block's integers: what remains to be added to a sum of products with weights that were
    /// made unsigned by adding `OFFSET`. As many as scales.
    pub(super) corrections: Vec<i32>,
}

impl Token {
    /// Rounds the activations of a token. A block that holds no number gets a scale that is none, so that what is computed
    /// from it is none either.
    ///
    /// Shapes: x: [cols] f32, a whole number of blocks.
    pub(super) fn round(&mut self, kind: Kind, x: &[f32], round_block: RoundBlock) {
        let per_segment = kind.blocks();
        let segments = x.len().div_ceil(SEGMENT);
        let blocks = (segments * per_segment).next_multiple_of(LANES);
        self.lines.resize(segments, Line::ZERO);
        self.scales.clear();
        self.scales.resize(blocks, 0.0);
        self.corrections.clear();
        self.corrections.resize(blocks, 0);
        let half = SEGMENT / per_segment;
        for (segment, (line, x)) in self.lines.iter_mut().zip(x.chunks(SEGMENT)).enumerate() {
            if x.len() < SEGMENT {
                *line = Line::ZERO;
            }
            for (index, x) in x.chunks_exact(half).enumerate() {
                let bytes = index * half / 2..(index + 1) * half / 2;
                let (high, low) = line.0.split_at_mut(SEGMENT / 2);
                let (high, low) = (&mut high[bytes.clone()], &mut low[bytes]);
                let (scale, sum) =
                    if kind.is_high_first() { round_block(x, high, low) } else { round_block(x, low, high) };
                let block = segment * per_segment + index;
                self.scales[block] = scale * kind.step();
                self.corrections[block] = -OFFSET * sum;
            }
        }
    }
}

/// Rounds a block of activations, its even and odd elements to places of their own; gives the value of a step and the sum of
/// the integers.
pub(super) type RoundBlock = fn(x: &[f32], even: &mut [i8], odd: &mut [i8]) -> (f32, i32);

/// Rounds a block in plain Rust.
pub(super) fn round_block(x: &[f32], even: &mut [i8], odd: &mut [i8]) -> (f32, i32) {
    // Bits of magnitudes are ordered as they are, with infinities and what is no number above all.
    let largest = f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.to_bits() & (u32::MAX >> 1))));
    let Some(steps) = steps(largest) else { return no_steps(largest, even, odd) };
    let mut sum = 0;
    let (pairs, _) = x.as_chunks::<2>();
    for ((pair, even), odd) in pairs.iter().zip(even).zip(odd) {
        let [first, second] = pair.map(|x| nearest(x * steps));
        (*even, *odd) = (first as i8, second as i8);
        sum += first + second;
    }
    (step_of(largest), sum)
}

/// Gives the steps in a unit of a block whose largest magnitude this is, where that is a finite number.
#[inline(always)]
pub(super) fn steps(largest: f32) -> Option<f32> {
    let steps = LARGEST / largest;
    (largest.is_finite() && steps.is_finite()).then_some(steps)
}

/// Rounds a block to zeros. It is all zero, or so small that what it adds is far below what f32 keeps of anything; or it holds
/// what is no finite number, and then a step is none either.
pub(super) fn no_steps(largest: f32, even: &mut [i8], odd: &mut [i8]) -> (f32, i32) {
    even.fill(0);
    odd.fill(0);
    (if largest.is_finite() { 0.0 } else { f32::NAN }, 0)
}

/// Gives the value of a step.
#[inline(always)]
pub(super) fn step_of(largest: f32) -> f32 {
    largest / LARGEST
}

/// Rounds a number of small magnitude to the nearest integer, the even one on a tie: by adding a number whose last bit is 1.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = (3 << 22) as f32;
    (x + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()).cast_signed()
}

/// Where products go: the results of all tokens, written by many threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output<'a> {
    /// Shapes: [tokens, rows].
    pub(super) cells: &'a [AtomicU32],
    pub(super) rows: usize,
    pub(super) bias: Option<&'a [f32]>,
}

impl Output<'_> {
    /// Writes a product, with its bias added.
    #[inline(always)]
    pub(super) fn put(&self, token: usize, row: usize, product: f32) {
        let product = self.bias.map_or(product, |bias| product + bias[row]);
        self.cells[token * self.rows + row].store(product.to_bits(), Ordering::Relaxed);
    }
}

/// Computes the product of a row and a token in plain Rust: the definition that all kernels equal bit by bit.
pub(super) fn dot(coded: &Coded<'_>, row: usize, token: &Token) -> f32 {
    let integers = coded.kind.integers();
    let (segments, rest) = coded.row(row);
    let mut codes = segments.as_flattened().iter().chain(rest);
    let mut lanes = [0.0f32; LANES];
    let half = SEGMENT_BYTES / coded.kind.blocks();
    for block in 0..coded.blocks() {
        let line = &token.lines[block / coded.kind.blocks()].0;
        let start = block % coded.kind.blocks() * half;
        let mut sum = 0i32;
        for (at, byte) in (start..start + half).zip(&mut codes) {
            let (high, low) = (integers[usize::from(byte >> 4)], integers[usize::from(byte & 15)]);
            sum += i32::from(high) * i32::from(line[at]) + i32::from(low) * i32::from(line[SEGMENT / 2 + at]);
        }
        let mut scale = [0.0];
        coded.write_scales(row, block, &mut scale);
        lanes[block % LANES] = (sum as f32).mul_add(scale[0] * token.scales[block], lanes[block % LANES]);
    }
    add_up(lanes)
}

/// Adds the lanes of a row, in the order of all kernels.
pub(super) fn add_up(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// Computes rows for tokens in plain Rust.
pub(super) fn products(coded: &Coded<'_>, tokens: &[Token], rows: std::ops::Range<usize>, out: &Output<'_>) {
    for row in rows {
        for (index, token) in tokens.iter().enumerate() {
            out.put(index, row, dot(coded, row, token));
        }
    }
}
