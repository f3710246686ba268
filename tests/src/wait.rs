//! Waiting for a condition, never for a time.

use std::thread;
use std::time::{Duration, Instant};

/// The longest that any single condition of a test may take. Far above what is normal: slow machines are no failures.
pub const DEADLINE: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Asks again and again until there is an answer.
///
/// # Panics
/// When there is none before `DEADLINE`; `what` names the condition.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    within(DEADLINE, condition).unwrap_or_else(|| panic!("gave up after {DEADLINE:?} waiting until {what}"))
}

/// Asks again and again until there is an answer or the time is over.
pub fn within<T>(time: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(answer) = condition() {
            return Some(answer);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(POLL_INTERVAL);
    }
}
