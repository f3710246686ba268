//! Matrix products on the processor.
//!
//! Owns the threads that compute and the choice of instructions. A product's every element is one dot product over the
//! whole inner dimension, taken in one fixed order by one thread, so the bits of a result depend neither on the number of
//! rows in the batch nor on the number of threads. Weights stay as they are stored: each row is decoded into a buffer
//! that lives in the cache while the batch's rows are multiplied with it.

#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod dot;

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use self::dot::{Dot, Instructions};
use crate::quant::Matrix;

/// Rows of a weight that one task multiplies: enough to outweigh the cost of starting a task.
const TASK_ROWS: usize = 32;

/// The processor as a place to compute: its threads and its widest instructions.
#[derive(Debug)]
pub struct Cpu {
    pool: ThreadPool,
    instructions: Instructions,
    dot: Dot,
    /// Bytes of weights and biases that products have read so far.
    bytes_read: AtomicU64,
}

impl Cpu {
    /// Starts `threads` threads (0: one for each core that this process may use) and picks the instructions.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(threads: usize) -> Result<Cpu, ThreadPoolBuildError> {
        let count = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let pool = ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("compute-{i}")).build()?;
        let instructions = Instructions::detect();
        Ok(Cpu { pool, instructions, dot: instructions.dot(), bytes_read: AtomicU64::new(0) })
    }

    /// Describes the processor for people: `cpu (avx2, 2 threads)`.
    #[must_use]
    pub fn describe(&self) -> String {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({}, {threads} thread{plural})", self.instructions.as_str())
    }

    /// Gives the number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
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
        let (rows, columns) = (weight.rows(), weight.cols());
        let batch = x.len() / columns;
        assert_eq!(x.len(), batch * columns, "the batch is no multiple of the weight's columns");
        assert_eq!(out.len(), batch * rows, "the result does not fit batch and rows");
        assert!(bias.is_none_or(|bias| bias.len() == rows), "the bias does not fit the weight's rows");
        let read = weight.stored_bytes() + bias.map_or(0, size_of_val);
        self.bytes_read.fetch_add(read as u64, Ordering::Relaxed);
        if batch == 1 {
            self.rows_times_batch(x, weight, bias, out);
            return;
        }
        let mut by_row = vec![0.0; out.len()];
        self.rows_times_batch(x, weight, bias, &mut by_row);
        for (row, products) in by_row.chunks_exact(batch).enumerate() {
            for (position, product) in products.iter().enumerate() {
                out[position * rows + row] = *product;
            }
        }
    }

    /// Runs something that computes on the threads themselves: its products then need no hand-over from the caller's thread.
    ///
    /// Blocking: until it returns.
    pub fn run<R: Send>(&self, compute: impl FnOnce() -> R + Send) -> R {
        self.pool.install(compute)
    }

    /// Calls `task` for each chunk of `chunk_len` elements of `data`, on all threads.
    pub fn for_each_chunk(&self, data: &mut [f32], chunk_len: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
        self.pool.install(|| data.par_chunks_mut(chunk_len).enumerate().for_each(|(index, chunk)| task(index, chunk)));
    }

    /// Computes the dot product of two vectors of one length, in the order that every product here has.
    #[must_use]
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        (self.dot)(a, b)
    }

    /// Shapes: x: [batch, columns], out: [rows, batch].
    fn rows_times_batch(&self, x: &[f32], weight: &Matrix, bias: Option<&[f32]>, out: &mut [f32]) {
        let columns = weight.cols();
        let batch = x.len() / columns;
        self.for_each_chunk(out, TASK_ROWS * batch, |task, chunk| {
            let mut decoded = vec![0.0; columns];
            for (offset, products) in chunk.chunks_exact_mut(batch).enumerate() {
                let row = task * TASK_ROWS + offset;
                weight.decode_row(row, &mut decoded);
                let start = bias.map_or(0.0, |bias| bias[row]);
                for (product, input) in products.iter_mut().zip(x.chunks_exact(columns)) {
                    *product = self.dot(&decoded, input) + start;
                }
            }
        });
    }
}
