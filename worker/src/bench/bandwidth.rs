//! How fast the device reads memory: what decode could reach if computing were free.
//!
//! On the processor a plain sum over a buffer that no cache holds, on the threads that compute the model, several times; on a card copies from
//! one buffer to another, of which each byte counts twice, as read and as written.

use std::hint::black_box;
use std::time::Instant;

use bulkhead_shared::units::Bytes;
use serde::Serialize;

use super::BenchError;
use super::report::Spread;
use crate::memory::{available_memory, last_level_cache};
use crate::quant::cpu::Cpu;

/// Passes that are measured, after one that is not.
const PASSES: usize = 9;

/// The buffer, in units of the last cache's size, its least and its most.
const CACHES: u64 = 4;
const BUFFER_BYTES_MIN: u64 = 256 << 20;
const BUFFER_BYTES_MAX: u64 = 2 << 30;

/// The last cache's size where the system does not say.
const CACHE_DEFAULT: Bytes = Bytes(64 << 20);

/// What one task reads. Units: elements.
const CHUNK: usize = 1 << 18;

/// The bandwidth that was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Bandwidth {
    /// The buffer that was read.
    pub(super) buffer_bytes: u64,
    /// Of the passes.
    pub(super) bytes_per_second: Spread,
}

/// Memory to be read, larger than any cache.
#[derive(Debug)]
pub(super) struct Buffer {
    numbers: Vec<f32>,
}

impl Buffer {
    /// Takes the memory.
    pub(super) fn new(cpu: &Cpu) -> Result<Buffer, BenchError> {
        let cache = last_level_cache().unwrap_or(CACHE_DEFAULT);
        let bytes = (CACHES * cache.0).clamp(BUFFER_BYTES_MIN, BUFFER_BYTES_MAX);
        if let Some(available) = available_memory().filter(|available| available.0 < 2 * bytes) {
            return Err(BenchError::NoRoomForBuffer { needed: Bytes(bytes), available });
        }
        let mut numbers = vec![0.0f32; bytes as usize / size_of::<f32>()];
        // Written on the threads that read it, so that it lies near them.
        cpu.for_each_chunk(&mut numbers, CHUNK, |index, chunk| chunk.fill(index as f32));
        Ok(Buffer { numbers })
    }

    /// Reads all of it on all threads. Units: bytes per second.
    pub(super) fn read(&mut self, cpu: &Cpu) -> f64 {
        let started = Instant::now();
        cpu.for_each_chunk(&mut self.numbers, CHUNK, |_, chunk| {
            black_box(chunk.iter().fold(0u32, |sum, value| sum.wrapping_add(value.to_bits())));
        });
        size_of_val(&self.numbers[..]) as f64 / started.elapsed().as_secs_f64()
    }
}

/// Measures how fast all threads together read.
pub(super) fn measure(cpu: &Cpu) -> Result<Bandwidth, BenchError> {
    let mut buffer = Buffer::new(cpu)?;
    buffer.read(cpu);
    let rates: Vec<f64> = (0..PASSES).map(|_| buffer.read(cpu)).collect();
    Ok(Bandwidth { buffer_bytes: size_of_val(&buffer.numbers[..]) as u64, bytes_per_second: Spread::of(&rates) })
}

/// Measures how fast a card copies within its memory.
#[cfg(feature = "cuda")]
pub(super) fn measure_card(card: &crate::cuda::CardModel) -> Result<Bandwidth, BenchError> {
    /// Far beyond any card's cache.
    const BUFFER_BYTES: u64 = 1 << 30;
    let rates = card.measure_copy(BUFFER_BYTES, PASSES).map_err(crate::loader::LoadError::Device)?;
    Ok(Bandwidth { buffer_bytes: BUFFER_BYTES, bytes_per_second: Spread::of(&rates) })
}
