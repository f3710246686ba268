//! Matrix products on the processor.
//!
//! Owns the threads that compute and the choice of instructions. Refuses: to decode a weight whole; each stays as it is
//! stored, and rows of it are decoded into registers, or into a tile that lies in the nearest caches while it serves all tokens.
//!
//! Products of 4-bit codes are sums of bytes (see `lines`), those of floats are in f32 (see `dot`). Either way one row's
//! product with one token has one result, by one order of rounding, so its bits depend neither on the tokens beside it nor on
//! the number of threads; nor, among the paths other than `CpuPath::Scalar`, on the instructions.

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "tiles have no other form than assembly")]
mod amx;
#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod dot;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod floats;
#[cfg(target_arch = "x86_64")]
mod groups;
mod lines;
mod path;
#[expect(unsafe_code, reason = "threads share a closure and a slice for as long as a loop lasts")]
mod pool;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod ymm;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod ymm_many;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod zmm;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use self::dot::{BF16_ROWS, Dot, DotBf16, Instructions};
use self::lines::{Coded, Output, RoundBlock, Token};
pub use self::path::{CpuPath, MissingFeature};
use self::pool::{Decoded, Pool, Scratch};
use crate::quant::{FloatType, Matrix};

/// Rows of a weight that one task multiplies at least, and what its rows are a multiple of: the most that any tile has.
const TASK_ROWS: usize = 32;

/// Tasks for each thread, so that one that is held up leaves its part to the others.
const TASKS_PER_THREAD: usize = 8;

/// Tokens that meet rows of bf16 before those are read again.
const BF16_CHUNK: usize = 16;

/// Tokens that one task rounds to bytes, and the most that the caller's thread rounds alone.
const TASK_TOKENS: usize = 4;

/// Tokens from which on tiles of sixteen are worth it.
#[cfg(target_arch = "x86_64")]
const AMX_TOKENS_MIN: usize = 9;

/// Why the processor cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The path.
    #[error(transparent)]
    Missing(#[from] MissingFeature),
    /// A thread.
    #[error("a thread could not be started: {0}")]
    Thread(#[source] io::Error),
}

/// The processor as a place to compute: its threads and its widest instructions.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    path: CpuPath,
    dot: Dot,
    dot_bf16: DotBf16,
    /// Rounded activations of the products that are computed.
    rounded: Mutex<Vec<Rounded>>,
    /// Bytes of weights and biases that products have read so far.
    bytes_read: AtomicU64,
}

/// A batch times a weight, plus a bias: `out = x * weight^T + bias`.
///
/// Shapes: x: [batch, columns] f32, weight: [rows, columns], bias: [rows], out: [batch, rows], all row-major.
#[derive(Debug)]
pub struct Product<'a> {
    /// The batch.
    pub x: &'a [f32],
    /// The weight.
    pub weight: &'a Matrix,
    /// The bias.
    pub bias: Option<&'a [f32]>,
    /// The result.
    pub out: &'a mut [f32],
}

impl Cpu {
    /// Starts computing on `threads` threads, the caller's among them (0: one for each physical core that this process may use), by
    /// the best path that the processor has.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(threads: usize) -> Result<Cpu, CpuError> {
        Cpu::start_on(CpuPath::detect(), threads)
    }

    /// Starts computing by a path of choice.
    ///
    /// # Errors
    /// When the processor lacks an instruction that the path needs, or the system refuses a thread.
    pub fn start_on(path: CpuPath, threads: usize) -> Result<Cpu, CpuError> {
        path.check()?;
        let count = match threads {
            0 => cores(),
            given => given,
        };
        let pool = Pool::start(count).map_err(CpuError::Thread)?;
        let instructions = Instructions::of(path);
        let (dot, dot_bf16) = (instructions.dot(), instructions.dot_bf16());
        Ok(Cpu { pool, path, dot, dot_bf16, rounded: Mutex::default(), bytes_read: AtomicU64::new(0) })
    }

    /// Describes the processor for people: `cpu (avx2, 2 threads)`.
    #[must_use]
    pub fn describe(&self) -> String {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({}, {threads} thread{plural})", self.path)
    }

    /// Gives the path by which products are computed.
    #[must_use]
    pub fn path(&self) -> CpuPath {
        self.path
    }

    /// Gives the number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Gives the bytes of weights and biases that products have read so far: each as stored, once for a whole batch.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Multiplies a batch with a weight and adds the bias: `out = x * weight^T + bias`.
    ///
    /// Shapes: x: [batch, columns] f32, weight: [rows, columns], bias: [rows], out: [batch, rows], all row-major.
    ///
    /// # Panics
    /// When the lengths do not fit the weight's shape.
    pub fn matmul(&self, x: &[f32], weight: &Matrix, bias: Option<&[f32]>, out: &mut [f32]) {
        self.multiply(&mut [Product { x, weight, bias, out }]);
    }

    /// Computes several products at once: threads that are done with one go on with the next.
    ///
    /// # Panics
    /// When the lengths of one do not fit its weight's shape.
    pub fn multiply(&self, products: &mut [Product<'_>]) {
        let mut rounded = self.rounded.lock().unwrap_or_else(PoisonError::into_inner);
        if rounded.len() < products.len() {
            rounded.resize_with(products.len(), Rounded::default);
        }
        let mut places = Vec::with_capacity(products.len());
        for (index, product) in products.iter().enumerate() {
            product.check();
            let read = product.weight.stored_bytes() + product.bias.map_or(0, size_of_val);
            self.bytes_read.fetch_add(read as u64, Ordering::Relaxed);
            let coded = self.coded(product.weight);
            // Products of one batch with weights of one kind share what it is rounded to.
            let form = |product: &Product<'_>| {
                let kind = self.coded(product.weight).map(|coded| coded.kind);
                (product.weight.cols(), kind)
            };
            let is_same = |other: &Product<'_>| std::ptr::eq(other.x, product.x) && form(other) == form(product);
            let place = products[..index].iter().position(is_same).unwrap_or(index);
            places.push(place);
            if let Some(coded) = coded.filter(|_| place == index) {
                self.round(&coded, product, &mut rounded[index]);
            }
        }
        let jobs: Vec<Job<'_>> =
            products.iter_mut().zip(places).map(|(product, place)| self.job(product, &rounded[place])).collect();
        let count = jobs.iter().map(Job::tasks).sum();
        self.pool.for_each(count, &|mut task, scratch| {
            for job in &jobs {
                if task < job.tasks() {
                    return self.run_task(job, task, scratch);
                }
                task -= job.tasks();
            }
        });
    }

    /// Calls `task` for each chunk of `chunk_len` elements of `data`, on all threads.
    pub fn for_each_chunk(&self, data: &mut [f32], chunk_len: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
        self.pool.for_each_chunk(data, chunk_len, task);
    }

    /// Computes the dot product of two vectors of one length, in the order that every product of floats has.
    #[must_use]
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        (self.dot)(a, b)
    }

    /// Gives a weight's codes, unless it is computed in f32.
    fn coded<'a>(&self, weight: &'a Matrix) -> Option<Coded<'a>> {
        if self.path == CpuPath::Scalar { None } else { Coded::of(weight) }
    }

    /// Rounds the activations of a product.
    fn round(&self, coded: &Coded<'_>, product: &Product<'_>, rounded: &mut Rounded) {
        let tokens = &mut rounded.tokens;
        let columns = product.weight.cols();
        let count = product.x.len() / columns;
        tokens.resize_with(count, Token::default);
        let round_block = self.round_block();
        let round = |first: usize, tokens: &mut [Token]| {
            for (token, x) in tokens.iter_mut().zip(product.x.chunks_exact(columns).skip(first)) {
                token.round(coded.kind, x, round_block);
            }
        };
        if count <= TASK_TOKENS {
            round(0, tokens);
        } else {
            self.pool.for_each_chunk(tokens, TASK_TOKENS, |chunk, tokens| round(chunk * TASK_TOKENS, tokens));
        }
        #[cfg(target_arch = "x86_64")]
        match self.path {
            CpuPath::Amx if count >= AMX_TOKENS_MIN => rounded.packed.fill(coded, &rounded.tokens),
            CpuPath::Avx512 | CpuPath::Amx if count > 1 => rounded.groups.fill(&self.pool, coded, &rounded.tokens),
            CpuPath::Avx512 | CpuPath::Amx => {}
            CpuPath::Scalar | CpuPath::Portable | CpuPath::Avx2 | CpuPath::AvxVnni => {}
        }
    }

    fn round_block(&self) -> RoundBlock {
        match self.path {
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 | CpuPath::AvxVnni | CpuPath::Avx512 | CpuPath::Amx => floats::round_block,
            #[cfg(not(target_arch = "x86_64"))]
            CpuPath::Avx2 | CpuPath::AvxVnni | CpuPath::Avx512 | CpuPath::Amx => lines::round_block,
            CpuPath::Scalar | CpuPath::Portable => lines::round_block,
        }
    }

    fn job<'a>(&self, product: &'a mut Product<'_>, rounded: &'a Rounded) -> Job<'a> {
        let rows = product.weight.rows();
        let task_rows = rows.div_ceil(self.threads() * TASKS_PER_THREAD).next_multiple_of(TASK_ROWS);
        let out = Output { cells: pool::cells(product.out), rows, bias: product.bias };
        Job { x: product.x, weight: product.weight, coded: self.coded(product.weight), rounded, task_rows, out }
    }

    fn run_task(&self, job: &Job<'_>, task: usize, scratch: &mut Scratch) {
        let first = task * job.task_rows;
        let rows = first..job.out.rows.min(first + job.task_rows);
        match &job.coded {
            None => self.rows_in_floats(job, rows, &mut scratch[0]),
            Some(coded) => self.rows_in_bytes(coded, job.rounded, rows, (scratch, &job.out)),
        }
    }

    fn rows_in_bytes(
        &self,
        coded: &Coded<'_>,
        rounded: &Rounded,
        rows: Range<usize>,
        (scratch, out): (&mut Scratch, &Output<'_>),
    ) {
        let tokens = &rounded.tokens[..];
        #[cfg(target_arch = "x86_64")]
        match (self.path, tokens) {
            (CpuPath::Scalar | CpuPath::Portable, _) => lines::products(coded, tokens, rows, out),
            (CpuPath::Avx2, [token]) => ymm::avx2::one(coded, token, rows, (&mut scratch[0], out)),
            (CpuPath::Avx2, _) => ymm_many::avx2::many(coded, tokens, rows, (&mut scratch[0], out)),
            (CpuPath::AvxVnni, [token]) => ymm::avxvnni::one(coded, token, rows, (&mut scratch[0], out)),
            (CpuPath::AvxVnni, _) => ymm_many::avxvnni::many(coded, tokens, rows, (&mut scratch[0], out)),
            (CpuPath::Avx512 | CpuPath::Amx, [token]) if coded.kind.blocks() == 1 => {
                ymm::avx512::one(coded, token, rows, (&mut scratch[0], out));
            }
            (CpuPath::Avx512 | CpuPath::Amx, [token]) => zmm::one(coded, token, rows, (&mut scratch[0], out)),
            (CpuPath::Amx, tokens) if tokens.len() >= AMX_TOKENS_MIN => {
                amx::many(coded, (&rounded.packed, tokens.len()), rows, (scratch, out));
            }
            (CpuPath::Avx512 | CpuPath::Amx, _) => zmm::many(coded, &rounded.groups, rows, (scratch, out)),
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = scratch;
            lines::products(coded, tokens, rows, out);
        }
    }

    /// Gives the weights of a matrix that is multiplied in bf16.
    fn row_major_bf16<'a>(&self, weight: &'a Matrix) -> Option<&'a [[u8; 2]]> {
        match weight {
            Matrix::Dense(dense) if dense.float_type() == FloatType::Bf16 && dense.col_stride() == 1 => {
                (self.path != CpuPath::Scalar).then(|| dense.region().bytes().as_chunks().0)
            }
            Matrix::Dense(_) | Matrix::Nf4(_) | Matrix::Mxfp4(_) => None,
        }
    }

    /// Multiplies rows of bf16, several at a time, with so many tokens as stay near meanwhile.
    fn rows_in_bf16(&self, job: &Job<'_>, weights: &[[u8; 2]], rows: Range<usize>) {
        let columns = job.weight.cols();
        for (chunk, x) in job.x.chunks(BF16_CHUNK * columns).enumerate() {
            for first in rows.clone().step_by(BF16_ROWS) {
                // Rows behind the last one repeat it.
                let some: [usize; BF16_ROWS] = std::array::from_fn(|i| (first + i).min(rows.end - 1));
                let weights = some.map(|row| &weights[row * columns..(row + 1) * columns]);
                let mut products = [[0.0; BF16_ROWS]; BF16_CHUNK];
                let products = &mut products[..x.len() / columns];
                (self.dot_bf16)(weights, x, products);
                for (token, products) in products.iter().enumerate() {
                    for (row, product) in some.into_iter().zip(products) {
                        job.out.put(chunk * BF16_CHUNK + token, row, *product);
                    }
                }
            }
        }
    }

    /// Multiplies rows that are decoded to f32 one by one.
    fn rows_in_floats(&self, job: &Job<'_>, rows: Range<usize>, decoded: &mut Decoded) {
        let columns = job.weight.cols();
        if let Some(weights) = self.row_major_bf16(job.weight) {
            return self.rows_in_bf16(job, weights, rows);
        }
        decoded.floats.resize(columns, 0.0);
        for row in rows {
            job.weight.decode_row(row, &mut decoded.floats[..columns]);
            for (token, x) in job.x.chunks_exact(columns).enumerate() {
                job.out.put(token, row, self.dot(&decoded.floats[..columns], x));
            }
        }
    }
}

/// The activations of a product, rounded to bytes.
#[derive(Debug, Default)]
struct Rounded {
    tokens: Vec<Token>,
    #[cfg(target_arch = "x86_64")]
    packed: amx::Packed,
    #[cfg(target_arch = "x86_64")]
    groups: groups::Groups,
}

/// Counts the cores that this process may use: two threads on one core share what multiplies.
pub fn cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let siblings = |entry: io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(entry.ok()?.path().join("topology/thread_siblings_list")).ok()
    };
    let cores: BTreeSet<String> = match std::fs::read_dir("/sys/devices/system/cpu") {
        Ok(entries) => entries.filter_map(siblings).collect(),
        Err(_) => BTreeSet::new(),
    };
    if cores.is_empty() { allowed } else { allowed.min(cores.len()) }
}

/// A product that is being computed.
#[derive(Debug)]
struct Job<'a> {
    x: &'a [f32],
    weight: &'a Matrix,
    coded: Option<Coded<'a>>,
    rounded: &'a Rounded,
    task_rows: usize,
    out: Output<'a>,
}

impl Job<'_> {
    fn tasks(&self) -> usize {
        self.out.rows.div_ceil(self.task_rows)
    }
}

impl Product<'_> {
    fn check(&self) {
        let (rows, columns) = (self.weight.rows(), self.weight.cols());
        let batch = self.x.len() / columns;
        assert_eq!(self.x.len(), batch * columns, "the batch is no multiple of the weight's columns");
        assert_eq!(self.out.len(), batch * rows, "the result does not fit batch and rows");
        assert!(self.bias.is_none_or(|bias| bias.len() == rows), "the bias does not fit the weight's rows");
    }
}

#[cfg(test)]
mod tests;
