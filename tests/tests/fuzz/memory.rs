//! How much memory a call takes at its height, counted by the allocator of this test.

use std::sync::{Mutex, PoisonError};

use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Held by the target that runs: the allocator counts for the whole process, and targets may run in threads.
static ALONE: Mutex<()> = Mutex::new(());

/// Lets one target at a time run.
pub(crate) fn alone<T>(target: impl FnOnce() -> T) -> T {
    let _guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    target()
}

/// Runs a call and checks that it held at most `bytes_max` at once.
pub(crate) fn bounded<T>(bytes_max: usize, call: impl FnOnce() -> T) -> T {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = call();
    let taken = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(taken <= bytes_max, "{taken} bytes were allocated where {bytes_max} are allowed");
    result
}

#[test]
fn the_count_sees_what_a_call_takes() {
    alone(|| {
        bounded(1 << 16, || drop(std::hint::black_box(vec![1u8; 1 << 15])));
        let over = std::panic::catch_unwind(|| bounded(1 << 16, || drop(std::hint::black_box(vec![1u8; 1 << 20]))));
        assert!(over.is_err(), "a call above the bound is found");
    });
}
