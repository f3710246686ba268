use std::sync::atomic::Ordering;

use super::lines::{self, Coded, Output, SEGMENT, Token};
use super::{Cpu, CpuPath, Product, pool};
use crate::checkpoint::Region;
use crate::quant::nf4::Nested;
use crate::quant::{Dense, FloatType, Matrix, Mxfp4, Nf4, Scales, dynamic, mxfp4, nf4};

/// Paths that give equal bits.
const EQUAL: [CpuPath; 5] = [CpuPath::Portable, CpuPath::Avx2, CpuPath::AvxVnni, CpuPath::Avx512, CpuPath::Amx];

/// Starts a path, or says what the machine lacks for it.
fn start(path: CpuPath, threads: usize) -> Option<Cpu> {
    match path.check() {
        Ok(()) => Some(Cpu::start_on(path, threads).expect("threads start")),
        Err(missing) => {
            println!("skipped: {missing}");
            None
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Gives a number from -1 to 1.
    fn signed(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn bytes(&mut self, count: usize) -> Region {
        Region::from_vec((0..count).map(|_| self.next() as u8).collect())
    }

    /// Activations with what rounding must cope with: blocks of zeros, outliers, tiny numbers, ties.
    fn activations(&mut self, count: usize) -> Vec<f32> {
        let mut x: Vec<f32> = (0..count).map(|_| self.signed() * self.signed() * 3.0).collect();
        for (block, x) in x.chunks_mut(32).enumerate() {
            match (block + count) % 7 {
                0 => x.fill(0.0),
                1 => x[x.len() / 2] = 1e6 * self.signed(),
                2 => x.iter_mut().for_each(|x| *x *= 1e-38),
                3 => x.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32 - 15.5),
                4 => x[0] = f32::from_bits(1),
                _ => {}
            }
        }
        x
    }

    fn nf4(&mut self, rows: usize, cols: usize, block_size: usize, is_nested: bool) -> Matrix {
        let blocks = (rows * cols).div_ceil(block_size);
        let group = 32;
        let scales = if is_nested {
            Scales::Nested(Nested {
                codes: self.bytes(blocks),
                map: Box::new(dynamic::dynamic_map()),
                absmax: (0..blocks.div_ceil(group)).map(|_| 0.2 + 0.1 * self.signed()).collect(),
                group,
                offset: 0.25,
            })
        } else {
            let scales = (0..blocks).flat_map(|block| (if block % 5 == 0 { 0.0 } else { self.signed() }).to_le_bytes());
            Scales::Plain(Region::from_vec(scales.collect()))
        };
        let packed = self.bytes((rows * cols).div_ceil(2));
        Matrix::Nf4(Nf4::new(rows, cols, block_size, packed, scales).expect("fits"))
    }

    fn mxfp4(&mut self, rows: usize, cols: usize) -> Matrix {
        let scales = (0..rows * cols / 32).map(|_| (self.next() % 20) as u8 + 117).collect();
        let blocks = self.bytes(rows * cols / 2);
        Matrix::Mxfp4(Mxfp4::new(rows, cols, blocks, Region::from_vec(scales)).expect("fits"))
    }

    /// Matrices of every kind, with rows that end anywhere; the second part says whether products are of bytes.
    fn matrices(&mut self) -> Vec<(String, Matrix, bool)> {
        let mut matrices = Vec::new();
        for (rows, cols) in [(1, 64), (7, 64), (8, 128), (33, 512), (17, 576), (70, 1088), (41, 2880)] {
            for is_nested in [false, true] {
                for block_size in [32, 64, 128, 4096] {
                    let matrix = self.nf4(rows, cols, block_size, is_nested);
                    matrices.push((format!("nf4 [{rows}, {cols}] in blocks of {block_size}"), matrix, true));
                }
            }
        }
        for (rows, cols) in [(1, 32), (9, 96), (5, 64), (33, 256), (40, 2880), (3, 4192)] {
            matrices.push((format!("mxfp4 [{rows}, {cols}]"), self.mxfp4(rows, cols), true));
            matrices.push((format!("nf4 [{rows}, {cols}] in blocks of 32"), self.nf4(rows, cols, 32, true), true));
        }
        for (rows, cols) in [(5, 63), (4, 33), (9, 1), (2, 130), (33, 100)] {
            matrices.push((format!("nf4 [{rows}, {cols}]"), self.nf4(rows, cols, 64, true), false));
        }
        for (rows, cols) in [(1, 1), (3, 17), (40, 64), (9, 100), (33, 2880)] {
            for float_type in [FloatType::F32, FloatType::Bf16, FloatType::F16] {
                let values: Vec<f32> = (0..rows * cols).map(|_| self.signed()).collect();
                let bytes = values.iter().flat_map(|value| match float_type {
                    FloatType::F32 => value.to_le_bytes().to_vec(),
                    FloatType::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
                    FloatType::Bf16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
                });
                let bytes = Region::from_vec(bytes.collect());
                let straight = Dense::row_major(float_type, rows, cols, bytes.clone()).expect("fits");
                let turned = Dense::transposed(float_type, rows, cols, bytes).expect("fits");
                let name = float_type.name();
                matrices.push((format!("{name} [{rows}, {cols}]"), Matrix::Dense(straight), false));
                matrices.push((format!("{name} [{rows}, {cols}], transposed"), Matrix::Dense(turned), false));
            }
        }
        matrices
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn product(cpu: &Cpu, x: &[f32], matrix: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / matrix.cols() * matrix.rows()];
    cpu.matmul(x, matrix, bias, &mut out);
    out
}

#[test]
fn integers_of_weights_are_the_nearest_to_their_values() {
    for (code, value) in nf4::TABLE.into_iter().enumerate() {
        assert_eq!(f32::from(lines::NF4_INTEGERS[code]), (127.0 * value).round(), "{code}");
    }
    for (code, value) in mxfp4::TABLE.into_iter().enumerate() {
        assert_eq!(f32::from(lines::MXFP4_INTEGERS[code]), 2.0 * value, "{code}");
    }
}

#[test]
fn every_path_gives_equal_bits_whatever_the_batch_and_the_threads() {
    let mut random = Random(1);
    let cpus: Vec<Cpu> = EQUAL.into_iter().flat_map(|path| [start(path, 1), start(path, 3)]).flatten().collect();
    for (name, matrix, _) in random.matrices() {
        let batches = [1, 2, 3, 4, 5, 9, 33];
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let x = random.activations(33 * cols);
        let bias: Vec<f32> = (0..rows).map(|_| random.signed()).collect();
        // The definition, one token at a time.
        let expected: Vec<u32> =
            x.chunks_exact(cols).flat_map(|x| bits(&product(&cpus[0], x, &matrix, Some(&bias)))).collect();
        for cpu in &cpus {
            for batch in batches {
                let found = bits(&product(cpu, &x[..batch * cols], &matrix, Some(&bias)));
                assert!(found == expected[..batch * rows], "{name}, {batch} tokens, {}", cpu.describe());
            }
        }
    }
}

/// The most by which a product of bytes may be off: half a step of each activation and of each weight.
fn error_max(matrix: &Matrix, row: &[f32], steps: &[f32], x: &[f32]) -> f64 {
    let nf4_step = |index: usize| match matrix {
        Matrix::Nf4(nf4) => f64::from(nf4.absmax(index / nf4.block_size()).abs()) / 254.0,
        Matrix::Mxfp4(_) | Matrix::Dense(_) => 0.0,
    };
    let mut sum = 0.0;
    for (i, (weight, x)) in row.iter().zip(x).enumerate() {
        let weight_error = nf4_step(steps[i] as usize);
        let half_step = f64::from(steps[i + row.len()]) / 254.0;
        let (weight, x) = (f64::from(weight.abs()), f64::from(x.abs()));
        sum += weight * half_step + weight_error * (x + half_step);
        // Scales, products and sums round a few times each.
        sum += 64.0 * f64::from(f32::EPSILON) * (weight + weight_error) * (x + half_step);
    }
    sum + f64::from(f32::MIN_POSITIVE)
}

#[test]
fn products_of_bytes_are_off_by_no_more_than_half_a_step_of_each_factor() {
    let mut random = Random(2);
    let cpu = Cpu::start(2).expect("threads start");
    for (name, matrix, is_bytes) in random.matrices() {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let x = random.activations(2 * cols);
        let found = product(&cpu, &x, &matrix, None);
        for (x, found) in x.chunks_exact(cols).zip(found.chunks_exact(rows)) {
            for (row, found) in found.iter().enumerate() {
                let weights = matrix.decode_rows(row..row + 1);
                let products = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let exact: f64 = products.clone().sum();
                let allowed = if is_bytes {
                    let block = match &matrix {
                        Matrix::Nf4(nf4) if nf4.block_size() >= SEGMENT => SEGMENT,
                        Matrix::Nf4(_) | Matrix::Mxfp4(_) | Matrix::Dense(_) => SEGMENT / 2,
                    };
                    let largest = x.chunks(block).flat_map(|x| {
                        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                        std::iter::repeat_n(largest, x.len())
                    });
                    let steps: Vec<f32> = (row * cols..(row + 1) * cols).map(|i| i as f32).chain(largest).collect();
                    error_max(&matrix, &weights, &steps, x)
                } else {
                    products.map(f64::abs).sum::<f64>() * (cols as f64 / 16.0 + 5.0) * f64::from(f32::EPSILON)
                        + f64::from(f32::MIN_POSITIVE)
                };
                let error = (f64::from(*found) - exact).abs();
                assert!(error <= allowed, "{name}, row {row}: {error:e} above {allowed:e}");
            }
        }
    }
}

#[test]
fn every_byte_of_codes_meets_every_path() {
    // Byte i of a row is i, so that each nibble stands in each place; activations pick one column each.
    let codes: Vec<u8> = (0..4 * 256).map(|i| (i % 256) as u8).collect();
    let scales = Region::from_vec((0..32).flat_map(|_| 127f32.to_le_bytes()).collect());
    let nf4 = Nf4::new(4, 512, 64, Region::from_vec(codes.clone()), Scales::Plain(scales)).expect("fits");
    let powers = Region::from_vec(vec![128; 64]);
    let mxfp4 = Mxfp4::new(4, 512, Region::from_vec(codes.clone()), powers).expect("fits");
    for cpu in EQUAL.into_iter().filter_map(|path| start(path, 2)) {
        let x: Vec<f32> = (0..512 * 512).map(|i| if i / 512 == i % 512 { 127.0 } else { 0.0 }).collect();
        let nf4 = product(&cpu, &x, &Matrix::Nf4(nf4.clone()), None);
        let mxfp4 = product(&cpu, &x, &Matrix::Mxfp4(mxfp4.clone()), None);
        for column in 0..512 {
            let byte = codes[column / 2];
            let nibbles = [byte >> 4, byte & 15].map(usize::from);
            let (first, second) = if column % 2 == 0 { (0, 1) } else { (1, 0) };
            // 127 times the integer in steps of 127 / 127 / 127 times 127, and of 2^1 / 2 times 127 / 127.
            let integer = f32::from(lines::NF4_INTEGERS[nibbles[first]]);
            assert!((nf4[4 * column] - 127.0 * integer).abs() < 0.01, "{} {column}", cpu.path());
            let integer = f32::from(lines::MXFP4_INTEGERS[nibbles[second]]);
            assert_eq!(mxfp4[4 * column], 127.0 * integer, "{} {column}", cpu.path());
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut random = Random(3);
    let matrix = random.nf4(16, 576, 64, true);
    for cpu in CpuPath::ALL.into_iter().filter_map(|path| start(path, 1)) {
        for bad in [f32::NAN, f32::INFINITY] {
            for batch in [1, 5] {
                let mut x = vec![1.0; batch * 576];
                x[570] = bad;
                let found = product(&cpu, &x, &matrix, None);
                assert!(found[..16].iter().all(|product| !product.is_finite()), "{}", cpu.path());
                assert!(found[16..].iter().all(|product| product.is_finite()), "{}", cpu.path());
            }
        }
    }
}

#[test]
fn several_products_at_once_are_what_each_is_alone() {
    let mut random = Random(4);
    let cpu = Cpu::start(2).expect("threads start");
    let matrices: Vec<Matrix> = random.matrices().into_iter().map(|(_, matrix, _)| matrix).collect();
    // One batch for weights of all kinds that can take it; of some, several rows and of others one.
    let shared = random.activations(1 << 14);
    let inputs: Vec<&[f32]> =
        matrices.iter().map(|matrix| &shared[..5760usize.next_multiple_of(matrix.cols())]).collect();
    let alone: Vec<Vec<f32>> = matrices.iter().zip(&inputs).map(|(matrix, x)| product(&cpu, x, matrix, None)).collect();
    let mut together: Vec<Vec<f32>> = alone.iter().map(|out| vec![0.0; out.len()]).collect();
    let mut products: Vec<Product<'_>> = matrices
        .iter()
        .zip(&inputs)
        .zip(&mut together)
        .map(|((weight, x), out)| Product { x, weight, bias: None, out })
        .collect();
    let before = cpu.bytes_read();
    cpu.multiply(&mut products);
    assert_eq!(alone, together);
    let bytes: usize = matrices.iter().map(Matrix::stored_bytes).sum();
    assert_eq!(cpu.bytes_read() - before, bytes as u64);
}

#[test]
fn the_plain_twin_is_what_the_portable_path_computes() {
    let mut random = Random(5);
    let matrix = random.nf4(9, 576, 64, true);
    let coded = Coded::of(&matrix).expect("whole blocks");
    let x = random.activations(576);
    let mut token = Token::default();
    token.round(coded.kind, &x, lines::round_block);
    let mut out = vec![0.0; 9];
    let cells = pool::cells(&mut out);
    lines::products(&coded, &[token], 0..9, &Output { cells, rows: 9, bias: None });
    let found: Vec<u32> = cells.iter().map(|cell| cell.load(Ordering::Relaxed)).collect();
    let cpu = Cpu::start_on(CpuPath::Portable, 1).expect("no feature is needed");
    assert_eq!(found, bits(&product(&cpu, &x, &matrix, None)));
}

#[test]
fn a_path_that_the_processor_lacks_is_named_with_what_is_missing() {
    for path in CpuPath::ALL {
        match Cpu::start_on(path, 1) {
            Ok(cpu) => assert_eq!(cpu.describe(), format!("cpu ({path}, 1 thread)")),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(path.as_str()) && text.contains("lacks"), "{text}");
            }
        }
    }
    assert!(CpuPath::detect() >= CpuPath::Portable);
}
