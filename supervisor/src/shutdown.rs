//! The signals that end the supervisor, and the order in which it ends.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::limits::STOP_TIMEOUT;

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes over the two signals from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one and gives its name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// How the time of a shutdown is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// For running requests to end.
    pub drain: Duration,
    /// For the worker and the connections to end, after that.
    pub rest: Duration,
}

impl Budget {
    /// Divides a time so that the whole keeps within it: the worker and the last answers get what they need first.
    #[must_use]
    pub fn new(total: Duration) -> Budget {
        let rest = (STOP_TIMEOUT + Duration::from_millis(500)).min(total / 2);
        Budget { drain: total - rest, rest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_make_up_the_whole() {
        for ms in [0, 1, 1000, 5000, 90_000] {
            let total = Duration::from_millis(ms);
            let budget = Budget::new(total);
            assert_eq!(budget.drain + budget.rest, total);
            assert!(budget.rest <= total / 2);
        }
    }
}
