//! The signals that end the supervisor, and the order in which it ends.

use std::io::IsTerminal;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::limits::STOP_TIMEOUT;

/// SIGTERM and SIGINT, and SIGHUP, which means one thing from people and another from a terminal that is closed.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    has_terminal: bool,
}

impl Signals {
    /// Takes over the signals from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            has_terminal: has_terminal(),
        })
    }

    /// Waits for the next one and says what it means.
    pub async fn next(&mut self) -> Meaning {
        tokio::select! {
            _ = self.terminate.recv() => Meaning::End("SIGTERM"),
            _ = self.interrupt.recv() => Meaning::End("SIGINT"),
            _ = self.hangup.recv() => match self.has_terminal && !has_terminal() {
                true => Meaning::End("SIGHUP"),
                false => Meaning::Reread,
            },
        }
    }

    /// Waits for the next one that means an end, and gives its name.
    pub async fn end(&mut self) -> &'static str {
        loop {
            if let Meaning::End(name) = self.next().await {
                return name;
            }
        }
    }
}

/// Says whether a terminal is there that could be closed.
fn has_terminal() -> bool {
    std::io::stdin().is_terminal() || std::io::stderr().is_terminal()
}

/// What a signal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// End in order; the name of the signal.
    End(&'static str),
    /// Read anew what can be read anew.
    Reread,
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
