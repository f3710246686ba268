//! Random inputs, comparisons, and weights in the kernels' form.

use bulkhead_worker::checkpoint::Region;
use bulkhead_worker::quant::{
    Dense, FloatType, Matrix, Mxfp4, Nf4, Scales, Statistics, dynamic::dynamic_map, quantize_nf4_with,
};
use half::bf16;

use crate::emulator::{Buffer, Factors, Fault, Order, Program, Session};

/// Bytes of a weight's descriptor, `Matrix` in formats.cuh.
const DESCRIPTOR_BYTES: u32 = 48;

/// A generator that gives the same numbers on every machine.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        self.word() % bound
    }

    /// Floats of roughly normal distribution.
    pub(crate) fn floats(&mut self, count: usize, size: f32) -> Vec<f32> {
        let mut one = || (0..4).map(|_| self.word() as f32 / (1u32 << 30) as f32 - 1.0).sum::<f32>() * 0.866 * size;
        (0..count).map(|_| one()).collect()
    }

    /// The same, of values that bf16 holds.
    pub(crate) fn narrow(&mut self, count: usize, size: f32) -> Vec<f32> {
        self.floats(count, size).into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
    }
}

/// How a weight is stored, with the kernels' name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Nf4,
    Nf4Nested,
    Mxfp4,
    Bf16,
}

impl Format {
    pub(crate) const ALL: [Format; 4] = [Format::Nf4, Format::Nf4Nested, Format::Mxfp4, Format::Bf16];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::Nf4 => "nf4",
            Format::Nf4Nested => "nf4_nested",
            Format::Mxfp4 => "mxfp4",
            Format::Bf16 => "bf16",
        }
    }

    /// Relative error of a product: NF4's sixteen values are rounded to eight bits, the others are exact.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            Format::Nf4 | Format::Nf4Nested => 2.5e-3,
            Format::Mxfp4 | Format::Bf16 => 2e-6,
        }
    }

    pub(crate) fn random(self, random: &mut Random, rows: usize, cols: usize) -> Matrix {
        let weights = random.narrow(rows * cols, 0.05);
        match self {
            Format::Nf4 => Matrix::Nf4(quantized(Statistics::Plain, rows, cols, &weights)),
            Format::Nf4Nested => Matrix::Nf4(quantized(Statistics::Nested, rows, cols, &weights)),
            Format::Bf16 => {
                let bytes = weights.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
                let dense = Dense::row_major(FloatType::Bf16, rows, cols, Region::from_vec(bytes));
                Matrix::Dense(dense.expect("the lengths fit"))
            }
            Format::Mxfp4 => {
                let codes = (0..rows * cols / 2).map(|_| random.word() as u8).collect();
                let scales = (0..rows * cols / 32).map(|_| 117 + random.below(8) as u8).collect();
                let made = Mxfp4::new(rows, cols, Region::from_vec(codes), Region::from_vec(scales));
                Matrix::Mxfp4(made.expect("the lengths fit"))
            }
        }
    }
}

fn quantized(statistics: Statistics, rows: usize, cols: usize, weights: &[f32]) -> Nf4 {
    quantize_nf4_with(statistics, rows, cols, weights).expect("finite weights can be quantised")
}

/// A weight with its bias and the place of its rows in an output row.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) output: u32,
}

/// Puts weights and their descriptors into a session.
pub(crate) fn descriptors(session: &mut Session, layers: &[Layer]) -> Buffer {
    let mut bytes = Vec::new();
    for layer in layers {
        let offset = match &layer.weight {
            Matrix::Nf4(nf4) => match nf4.scales() {
                Scales::Plain(_) => 0.0f32,
                Scales::Nested(nested) => nested.offset,
            },
            Matrix::Mxfp4(_) | Matrix::Dense(_) => 0.0,
        };
        bytes.extend([0; 32]);
        bytes.extend(offset.to_le_bytes());
        bytes.extend((layer.weight.rows() as u32).to_le_bytes());
        bytes.extend(layer.output.to_le_bytes());
        bytes.extend([0; 4]);
    }
    let list = session.bytes(bytes);
    for (layer, at) in layers.iter().zip((0..).step_by(DESCRIPTOR_BYTES as usize)) {
        let mut parts: [Option<Buffer>; 4] = [None; 4];
        match &layer.weight {
            Matrix::Nf4(nf4) => {
                parts[0] = Some(session.bytes(nf4.packed().bytes().to_vec()));
                match nf4.scales() {
                    Scales::Plain(bytes) => parts[1] = Some(session.bytes(bytes.bytes().to_vec())),
                    Scales::Nested(nested) => {
                        parts[1] = Some(session.bytes(nested.codes.bytes().to_vec()));
                        parts[2] = Some(session.floats(&nested.absmax));
                    }
                }
            }
            Matrix::Mxfp4(mxfp4) => {
                parts[0] = Some(session.bytes(mxfp4.blocks().bytes().to_vec()));
                parts[1] = Some(session.bytes(mxfp4.scales().bytes().to_vec()));
            }
            Matrix::Dense(dense) => {
                let values = layer.weight.decode_rows(0..dense.rows());
                parts[0] = Some(session.narrow(&values));
            }
        }
        parts[3] = layer.bias.as_deref().map(|bias| session.floats(bias));
        for (part, offset) in parts.iter().zip((0..).step_by(8)) {
            if let Some(part) = part {
                session.point(list, at + offset, *part);
            }
        }
    }
    list
}

/// The values of nested scales' codes, as every kernel takes them.
pub(crate) fn scale_values(session: &mut Session) -> Buffer {
    session.floats(&dynamic_map())
}

/// Says by how much a result is off, if by more than it may be: relative to the size of the whole row.
pub(crate) fn compare(what: &str, found: &[f32], expected: &[f32], tolerance: f64) -> Result<(), String> {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size: f64 = expected.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let error: f64 =
        found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
    // Not `error > bound`: what is not a number must not pass.
    if error <= tolerance * size { Ok(()) } else { Err(format!("{what}: error {error:e}, size {size:e}")) }
}

/// Says whether two results differ in any bit.
pub(crate) fn same_bits(what: &str, found: &[f32], expected: &[f32]) -> Result<(), String> {
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    match found.iter().zip(expected).position(differs) {
        None => Ok(()),
        Some(index) => Err(format!("{what}: element {index} is {} and {}", found[index], expected[index])),
    }
}

/// What a file's checks ask of a build.
pub(crate) type Check = fn(&Program, Order) -> Result<(), String>;

/// Faults that are planted in a file where not all are asked for: each takes a compilation and a run.
const FAULTS_SAMPLED: usize = 1;

/// Says how many faults are planted in a file: all with `BULKHEAD_CUDA_FAULTS=all`, as `make cuda-faults` sets it.
fn faults_max() -> usize {
    let is_all = std::env::var("BULKHEAD_CUDA_FAULTS").is_ok_and(|value| value == "all");
    if is_all { usize::MAX } else { FAULTS_SAMPLED }
}

/// Checks a file as it is, in both orders, and that planted faults are noticed in one of them.
pub(crate) fn check_file(source: &str, kernels: &[&str], factors: &[Factors], check: Check, faults: &[Fault]) {
    for factors in factors {
        let Some(program) = Program::build(source, kernels, *factors, None) else { return };
        for order in [Order::Ascending, Order::Descending] {
            if let Err(error) = check(&program, order) {
                panic!("{source}.cu, {factors:?}, {order:?}: {error}");
            }
        }
    }
    let mut missed = Vec::new();
    for fault in faults.iter().take(faults_max()) {
        let Some(program) = Program::build(source, kernels, Factors::Bf16, Some(fault)) else { return };
        let found = [Order::Ascending, Order::Descending].into_iter().find_map(|order| check(&program, order).err());
        match found {
            Some(error) => println!("{source}.cu with {}: {error}", fault.name),
            None => missed.push(fault.name),
        }
    }
    assert!(missed.is_empty(), "{source}.cu: planted faults went unnoticed: {missed:?}");
}
