//! Prompts by AMX: tiles of sixteen tokens by sixteen rows, one block of inputs at a time.
//!
//! A block's sums come out of the tile registers as integers and are scaled in vectors, as in `zmm`: the order of rounding is
//! that of all paths. Sums of 32 tokens and 32 rows are computed together. The lanes of a row are taken one after the other,
//! so that the sums that are added to stay in the nearest cache.
//!
//! `unsafe` stands here for the instructions, which have no safe form, and for the system call that asks for them.
//! The tile registers are named as clobbers; a thread configures them when it begins and gives them back when it ends.

use std::arch::asm;
#[allow(
    clippy::wildcard_imports,
    reason = "kernels name dozens of intrinsics, which say themselves what they are"
)]
use std::arch::x86_64::*;
use std::ops::Range;

use super::lines::{Coded, LANES, Line, Output, SEGMENT, Token};
use super::pool::Scratch;
use super::zmm::{self, QUADS, TILE};

/// Tiles in either direction that are computed together: as many as a scratch has room for.
const SIDE: usize = 2;

/// Asks Linux for the tile registers, once per process: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). Must come before a
/// filter of system calls.
fn has_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    // SAFETY: this call takes numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// Says which of the features are there.
pub(super) fn features() -> [(&'static str, bool); 3] {
    const EXTENDED_FEATURES: u32 = 7;
    // SAFETY: every processor with AVX2, which is asked for first, has this leaf; others answer with what has no meaning.
    #[allow(unused_unsafe, reason = "newer compilers know that this is safe")]
    let bits = unsafe { __cpuid_count(EXTENDED_FEATURES, 0) }.edx;
    let (tile, int8) = (bits & 1 << 24 != 0, bits & 1 << 25 != 0);
    [("amx_tile", tile), ("amx_int8", int8), ("the system's permission for AMX", tile && int8 && has_permission())]
}

/// The activations of many tokens, sixteen side by side, the last of them zero where there are fewer.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// Shapes: [groups, segments, 16]. A line has the bytes of its segment's blocks one after the other, each block's high
    /// nibbles before its low ones.
    lines: Vec<Line>,
    /// Shapes: [groups, blocks, 16].
    scales: Vec<f32>,
}

impl Packed {
    /// Takes the activations of a product's tokens.
    pub(super) fn fill(&mut self, coded: &Coded<'_>, tokens: &[Token]) {
        let (segments, blocks) = (coded.segments(), coded.blocks());
        let groups = tokens.len().div_ceil(TILE);
        self.lines.clear();
        self.lines.resize(groups * segments * TILE, Line::ZERO);
        self.scales.clear();
        self.scales.resize(groups * blocks * TILE, 0.0);
        for (index, token) in tokens.iter().enumerate() {
            let (group, place) = (index / TILE, index % TILE);
            for (segment, line) in token.lines.iter().enumerate() {
                let packed = &mut self.lines[(group * segments + segment) * TILE + place];
                *packed = if coded.kind.blocks() == 1 { *line } else { by_halves(line) };
            }
            for (block, scale) in token.scales[..blocks].iter().enumerate() {
                self.scales[(group * blocks + block) * TILE + place] = *scale;
            }
        }
    }
}

/// Puts the bytes of a segment's first half before those of its second.
fn by_halves(line: &Line) -> Line {
    const QUARTER: usize = SEGMENT / 4;
    let mut halves = Line::ZERO;
    for (to, from) in [0, 2, 1, 3].into_iter().enumerate() {
        halves.0[to * QUARTER..(to + 1) * QUARTER].copy_from_slice(&line.0[from * QUARTER..(from + 1) * QUARTER]);
    }
    halves
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration([u8; 64]);

impl Configuration {
    /// Shapes the tiles for blocks of so many inputs: sums in 0 to 3, activations in 4 and 5, weights in 6 and 7.
    fn new(inputs: usize) -> Configuration {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        for tile in 0..8 {
            let (rows, row_bytes) = match tile {
                0..4 => (TILE, TILE * size_of::<i32>()),
                4..6 => (TILE, inputs),
                _ => (inputs / 4, TILE * 4),
            };
            // Both fit: neither is above 64.
            bytes[16 + 2 * tile] = row_bytes as u8;
            bytes[48 + tile] = rows as u8;
        }
        Configuration(bytes)
    }
}

/// Block sums: [tile of tokens, tile of rows, token, row].
#[repr(align(64))]
struct Sums([[[[i32; TILE]; TILE]; SIDE]; SIDE]);

/// Lanes of products, or products: as above.
#[repr(align(64))]
struct Lane([[[[f32; TILE]; TILE]; SIDE]; SIDE]);

const NO_LANE: Lane = Lane([[[[0.0; TILE]; TILE]; SIDE]; SIDE]);

/// Computes rows for many tokens.
pub(super) fn many(
    coded: &Coded<'_>,
    (packed, count): (&Packed, usize),
    rows: Range<usize>,
    (scratches, out): (&mut Scratch, &Output<'_>),
) {
    let configuration = Configuration::new(SEGMENT / coded.kind.blocks());
    // SAFETY: the path that leads here was checked against the processor and the system; the shapes are within the bounds.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
    for first in rows.clone().step_by(SIDE * TILE) {
        let mut sides = [first..rows.end.min(first + TILE), first + TILE..rows.end.min(first + SIDE * TILE)];
        if sides[1].is_empty() {
            // Computed a second time for nothing: only at the end of a weight.
            sides[1] = sides[0].clone();
        }
        for (scratch, side) in scratches.iter_mut().zip(&sides) {
            match coded.kind.blocks() {
                1 => zmm::decode_tile::<0, 1>(coded, side.clone(), scratch),
                _ => zmm::decode_tile::<0, 2>(coded, side.clone(), scratch),
            }
        }
        for group in (0..count.div_ceil(TILE)).step_by(SIDE) {
            let mut products = NO_LANE;
            let tiles = Tiles { coded, packed, groups: [group, (group + 1).min(count.div_ceil(TILE) - 1)] };
            tiles.multiply(scratches, &mut products);
            for (token_side, products) in products.0.iter().enumerate() {
                for (products, rows) in products.iter().zip(&sides) {
                    for (token, products) in products.iter().enumerate() {
                        let token = (group + token_side) * TILE + token;
                        for (row, product) in rows.clone().zip(products).filter(|_| token < count) {
                            out.put(token, row, *product);
                        }
                    }
                }
            }
        }
    }
    // SAFETY: as above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// The tokens of 32 rows' product.
struct Tiles<'a> {
    coded: &'a Coded<'a>,
    packed: &'a Packed,
    groups: [usize; SIDE],
}

impl Tiles<'_> {
    fn multiply(&self, weights: &Scratch, products: &mut Lane) {
        let mut lanes = [NO_LANE; LANES];
        let mut sums = Sums([[[[0; TILE]; TILE]; SIDE]; SIDE]);
        for (lane, sums_of_lane) in lanes.iter_mut().enumerate() {
            for block in (lane..self.coded.blocks()).step_by(LANES) {
                self.block_sums(weights, block, &mut sums);
                // SAFETY: the path that leads here was checked against the processor.
                unsafe { self.add_scaled(weights, block, &sums, sums_of_lane) };
            }
        }
        // SAFETY: as above.
        unsafe { add_up(&lanes, products) };
    }

    /// Multiplies one block of inputs.
    fn block_sums(&self, weights: &Scratch, block: usize, sums: &mut Sums) {
        let blocks = self.coded.kind.blocks();
        let (segment, half) = (block / blocks, block % blocks);
        let segments = self.coded.segments();
        let half_bytes = half * SEGMENT / blocks;
        let tokens = self.groups.map(|group| {
            let lines = &self.packed.lines[(group * segments + segment) * TILE..][..TILE];
            lines.as_ptr().cast::<u8>().wrapping_add(half_bytes)
        });
        let quads = QUADS / blocks;
        let rows = [0, 1].map(|side| weights[side].lines[segment * QUADS + half * quads..][..quads].as_ptr());
        let [[a, b], [c, d]] = &mut sums.0;
        // SAFETY: the tiles were configured by `many`. Activations are 16 lines apart by 64 bytes, of which each gives the
        // bytes of its block; weights are `quads` lines; each sum is 16 lines of 16 integers.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{x0} + {stride} * 1]",
                "tileloadd tmm6, [{w0} + {stride} * 1]",
                "tileloadd tmm7, [{w1} + {stride} * 1]",
                "tileloadd tmm5, [{x1} + {stride} * 1]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "tilestored [{a} + {stride} * 1], tmm0",
                "tilestored [{b} + {stride} * 1], tmm1",
                "tilestored [{c} + {stride} * 1], tmm2",
                "tilestored [{d} + {stride} * 1], tmm3",
                x0 = in(reg) tokens[0],
                x1 = in(reg) tokens[1],
                w0 = in(reg) rows[0],
                w1 = in(reg) rows[1],
                a = in(reg) a.as_mut_ptr(),
                b = in(reg) b.as_mut_ptr(),
                c = in(reg) c.as_mut_ptr(),
                d = in(reg) d.as_mut_ptr(),
                stride = in(reg) size_of::<Line>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Adds a block's sums, scaled, to its lane.
    #[target_feature(enable = "avx512f")]
    fn add_scaled(&self, weights: &Scratch, block: usize, sums: &Sums, lane: &mut Lane) {
        let [first, second] = weights.each_ref().map(|side| &side.floats.as_chunks::<TILE>().0[block]);
        let scales = [zmm::load_f32(first), zmm::load_f32(second)];
        for (side, (sums, lane)) in sums.0.iter().zip(&mut lane.0).enumerate() {
            let tokens = &self.packed.scales[(self.groups[side] * self.coded.blocks() + block) * TILE..][..TILE];
            for ((sums, lane), rows) in sums.iter().zip(lane).zip(scales) {
                for ((sums, lane), token) in sums.iter().zip(lane).zip(tokens) {
                    // SAFETY: sixteen integers are read from an array of as many.
                    let sums = _mm512_cvtepi32_ps(unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) });
                    let scale = _mm512_mul_ps(rows, _mm512_set1_ps(*token));
                    *lane = zmm::store_f32(_mm512_fmadd_ps(sums, scale, zmm::load_f32(lane)));
                }
            }
        }
    }
}

/// Adds the lanes up.
#[target_feature(enable = "avx512f")]
fn add_up(lanes: &[Lane; LANES], products: &mut Lane) {
    let products = products.0.as_flattened_mut().as_flattened_mut();
    for (index, products) in products.iter_mut().enumerate() {
        let mut vectors = [_mm512_setzero_ps(); LANES];
        for (vector, lane) in vectors.iter_mut().zip(lanes) {
            *vector = zmm::load_f32(&lane.0.as_flattened().as_flattened()[index]);
        }
        *products = zmm::store_f32(zmm::add_lanes(vectors));
    }
}
