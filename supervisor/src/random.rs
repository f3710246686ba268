//! Random numbers for ids, seeds and jitter. Not for secrets.
//!
//! Each is a keyed hash of a counter, with keys that the standard library took from the operating system: enough to be
//! unlike any other, and no dependency.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Gives a number that stands for these bytes as long as the process lives, and tells nothing about them.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    KEYS.hash_one(bytes)
}

/// Gives 64 random bits.
pub(crate) fn bits() -> u64 {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    KEYS.hash_one(COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Gives a number from 0, inclusive, to 1, exclusive.
pub(crate) fn fraction() -> f64 {
    (bits() >> 11) as f64 / (1u64 << 53) as f64
}

/// Gives 24 random hexadecimal digits behind a prefix: an id for clients.
pub(crate) fn id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:08x}", bits(), bits() >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_length_and_differ() {
        let (first, second) = (id("call_"), id("call_"));
        assert_eq!(first.len(), "call_".len() + 24);
        assert_ne!(first, second);
    }

    #[test]
    fn fractions_stay_in_bounds() {
        for _ in 0..1000 {
            assert!((0.0..1.0).contains(&fraction()));
        }
    }
}
