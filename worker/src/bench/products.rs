//! `bulkhead-worker products`: how fast single products are here, beside what memory allows.
//!
//! Owns: the command's arguments and its table. Weights are random and larger than any cache; each figure is the median of
//! passes that alternate with passes over a buffer, so that both see the same machine.

use std::io;
use std::time::Instant;

use bulkhead_shared::message::CpuChoice;
use clap::{Args, value_parser};

use super::bandwidth::Buffer;
use super::report::Spread;
use super::{BenchError, LoadError};
use crate::checkpoint::Region;
use crate::device::{cpu_path, parse_cpu};
use crate::quant::cpu::Cpu;
use crate::quant::nf4::Nested;
use crate::quant::{Dense, FloatType, FormatError, Matrix, Mxfp4, Nf4, Scales, dynamic};

/// Tokens from which on products are bound by arithmetic, and the rows that they are measured with.
const MANY_TOKENS: u32 = 32;
const MANY_ROWS: usize = 4096;

/// The arguments of the command.
#[derive(Args, Clone, Debug)]
pub struct ProductsArgs {
    /// Inputs of the weights, a multiple of 64
    #[arg(long, value_name = "N", default_value_t = 2880, value_parser = value_parser!(u32).range(64..=1 << 16))]
    pub inputs: u32,
    /// Megabytes of the weights
    #[arg(long, value_name = "N", default_value_t = 192, value_parser = value_parser!(u32).range(1..=1 << 14))]
    pub megabytes: u32,
    /// Tokens in a product; may be given several times
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [1, 4, 16, 256], value_parser = value_parser!(u32).range(1..=4096))]
    pub batch: Vec<u32>,
    /// Threads that compute; 0 is one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: u32,
    /// Instructions to compute with: auto, scalar, avx2, avxvnni, avx512 or amx
    #[arg(long, value_name = "PATH", default_value = "auto", value_parser = parse_cpu)]
    pub cpu: CpuChoice,
    /// Measured passes, after one that is not
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = value_parser!(u32).range(1..))]
    pub repetitions: u32,
}

/// Runs the command and writes what it measured to `out`.
///
/// # Errors
/// `Load` for a processor that lacks what was asked for, `NoRoomForBuffer`, `Print`.
pub fn run(args: &ProductsArgs, out: &mut impl io::Write) -> Result<(), BenchError> {
    let cpu = Cpu::start_on(cpu_path(args.cpu), args.threads as usize).map_err(LoadError::Cpu)?;
    let mut buffer = Buffer::new(&cpu)?;
    let print = |result: io::Result<()>| result.map_err(BenchError::Print);
    print(writeln!(out, "{}; inputs {}", cpu.describe(), args.inputs))?;
    print(writeln!(out, "format  batch     GB/s  of bandwidth    GMAC/s"))?;
    let inputs = args.inputs.next_multiple_of(64) as usize;
    for format in ["nf4", "mxfp4", "bf16"] {
        for batch in &args.batch {
            let row_bytes = if format == "bf16" { inputs * 2 } else { inputs / 2 };
            let rows = ((args.megabytes as usize) << 20).div_ceil(row_bytes);
            let rows = if *batch >= MANY_TOKENS { rows.min(MANY_ROWS) } else { rows };
            let weight = random(format, rows, inputs).expect("the dimensions fit the format");
            let measured = measure(&cpu, &mut buffer, &weight, (*batch, args.repetitions));
            let macs = rows as f64 * inputs as f64 * f64::from(*batch);
            let rate = weight.stored_bytes() as f64 / measured.seconds;
            print(writeln!(
                out,
                "{format:6} {batch:6} {:8.2} {:12.1} % {:9.1}",
                rate / 1e9,
                100.0 * measured.share,
                macs / measured.seconds / 1e9
            ))?;
        }
    }
    Ok(())
}

struct Measured {
    seconds: f64,
    /// Of the bandwidth of the pass before.
    share: f64,
}

fn measure(cpu: &Cpu, buffer: &mut Buffer, weight: &Matrix, (batch, repetitions): (u32, u32)) -> Measured {
    let x: Vec<f32> = (0..batch as usize * weight.cols()).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut out = vec![0.0; batch as usize * weight.rows()];
    let (mut seconds, mut shares) = (Vec::new(), Vec::new());
    for repetition in 0..=repetitions {
        let bandwidth = buffer.read(cpu);
        let started = Instant::now();
        cpu.matmul(&x, weight, None, &mut out);
        let elapsed = started.elapsed().as_secs_f64();
        if repetition > 0 {
            seconds.push(elapsed);
            shares.push(weight.stored_bytes() as f64 / elapsed / bandwidth);
        }
    }
    Measured { seconds: Spread::of(&seconds).median, share: Spread::of(&shares).median }
}

/// Makes a matrix of random codes.
fn random(format: &str, rows: usize, cols: usize) -> Result<Matrix, FormatError> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = |count: usize| {
        let mut bytes = vec![0u8; count];
        for chunk in bytes.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
        }
        bytes
    };
    let weights = rows * cols;
    Ok(match format {
        "bf16" => {
            let mut values = bytes(2 * weights);
            // Exponents near that of one: every weight is a small number.
            values.as_chunks_mut::<2>().0.iter_mut().for_each(|value| value[1] = value[1] & 0x81 | 0x3c);
            Matrix::Dense(Dense::row_major(FloatType::Bf16, rows, cols, Region::from_vec(values))?)
        }
        "mxfp4" => {
            let scales = bytes(weights / 32).into_iter().map(|byte| 120 + byte % 8).collect();
            Matrix::Mxfp4(Mxfp4::new(rows, cols, Region::from_vec(bytes(weights / 2)), Region::from_vec(scales))?)
        }
        _ => {
            let (blocks, group) = (weights / 64, 256);
            let scales = Scales::Nested(Nested {
                codes: Region::from_vec(bytes(blocks)),
                map: Box::new(dynamic::dynamic_map()),
                absmax: vec![0.01; blocks.div_ceil(group)],
                group,
                offset: 0.05,
            });
            Matrix::Nf4(Nf4::new(rows, cols, 64, Region::from_vec(bytes(weights / 2)), scales)?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_and_batch_has_its_line() {
        let args = ProductsArgs {
            inputs: 128,
            megabytes: 1,
            batch: vec![1, 33],
            threads: 2,
            cpu: CpuChoice::Auto,
            repetitions: 1,
        };
        let mut out = Vec::new();
        run(&args, &mut out).expect("measured");
        let text = String::from_utf8(out).expect("text");
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(lines.len(), 6, "{text}");
        for (line, (format, batch)) in
            lines.iter().zip(["nf4", "mxfp4", "bf16"].iter().flat_map(|f| [(f, "1"), (f, "33")]))
        {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!((&words[0], words[1]), (format, batch));
            assert!(words[2].parse::<f64>().is_ok_and(|rate| rate >= 0.0) && words.len() == 6, "{line}");
        }
    }
}
