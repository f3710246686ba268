//! Keys and values of sequences that gave their blocks back, kept in host memory.
//!
//! Owns: one pinned buffer, made once, and which of its bytes are taken. A sequence that finds no room is computed anew
//! instead. Invariant: a range belongs to at most one sequence, and comes back when that is dropped.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::Card;
use super::transfer::HostBuffer;
use crate::device::DeviceError;
use crate::engine::pager::Held;

/// The buffer.
#[derive(Debug)]
pub struct SwapSpace {
    /// Where the bytes lie.
    pub buffer: HostBuffer,
    free: Arc<Mutex<FreeRanges>>,
}

/// A sequence's keys and values in the buffer.
#[derive(Debug)]
pub struct SwappedBlocks {
    /// The blocks that they came from, in their order: those of the whole context, then those of the window.
    pub held: Held,
    /// Where they lie. Units: bytes.
    pub range: Range<usize>,
    free: Arc<Mutex<FreeRanges>>,
}

impl SwapSpace {
    /// Takes the buffer.
    ///
    /// # Errors
    /// The driver's.
    pub fn take(card: &Card, bytes: usize) -> Result<SwapSpace, DeviceError> {
        let buffer = HostBuffer::take(card, bytes)?;
        Ok(SwapSpace { buffer, free: Arc::new(Mutex::new(FreeRanges::of(bytes))) })
    }

    /// Finds room for `bytes`; `None` where there is none.
    #[must_use]
    pub fn reserve(&self, held: Held, bytes: usize) -> Option<SwappedBlocks> {
        let range = self.free.lock().unwrap_or_else(PoisonError::into_inner).take(bytes)?;
        Some(SwappedBlocks { held, range, free: Arc::clone(&self.free) })
    }
}

impl Drop for SwappedBlocks {
    fn drop(&mut self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).give_back(self.range.clone());
    }
}

/// Ranges of bytes that nobody has: ascending, never touching.
#[derive(Debug)]
struct FreeRanges {
    ranges: Vec<Range<usize>>,
}

impl FreeRanges {
    /// All of a buffer.
    fn of(bytes: usize) -> FreeRanges {
        FreeRanges { ranges: std::iter::once(0..bytes).collect() }
    }

    /// Takes the first range that is long enough.
    fn take(&mut self, bytes: usize) -> Option<Range<usize>> {
        let index = self.ranges.iter().position(|range| range.len() >= bytes)?;
        let found = &mut self.ranges[index];
        let taken = found.start..found.start + bytes;
        found.start = taken.end;
        if found.start == found.end {
            self.ranges.remove(index);
        }
        Some(taken)
    }

    fn give_back(&mut self, range: Range<usize>) {
        if range.start == range.end {
            return;
        }
        let index = self.ranges.partition_point(|free| free.start < range.start);
        self.ranges.insert(index, range);
        let mut merged: Vec<Range<usize>> = Vec::with_capacity(self.ranges.len());
        for range in self.ranges.drain(..) {
            match merged.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                Some(_) | None => merged.push(range),
            }
        }
        self.ranges = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_back_is_one_range_again() {
        let mut free = FreeRanges::of(100);
        let parts: Vec<_> = [30, 20, 50].map(|bytes| free.take(bytes).expect("room")).into();
        assert_eq!((parts.as_slice(), free.take(1)), (&[0..30, 30..50, 50..100][..], None));
        for part in [1, 0, 2] {
            free.give_back(parts[part].clone());
        }
        assert_eq!(free.ranges, FreeRanges::of(100).ranges);
        assert_eq!(free.take(101), None);
    }

    #[test]
    fn a_gap_that_is_too_small_is_passed_over() {
        let mut free = FreeRanges::of(100);
        let first = free.take(10).expect("room");
        let _second = free.take(10).expect("room");
        free.give_back(first);
        assert_eq!(free.take(20), Some(20..40));
        assert_eq!(free.take(10), Some(0..10));
    }
}
