//! How far a conversion is, on standard error: a line that is redrawn on a terminal, else one every few seconds.

use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two lines on a terminal, and elsewhere.
const TERMINAL_PAUSE: Duration = Duration::from_millis(200);
const FILE_PAUSE: Duration = Duration::from_secs(5);

/// A phase of the work, counted in bytes of the source.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    done: AtomicU64,
    is_terminal: bool,
    started: Instant,
    printed: Mutex<Instant>,
}

impl Progress {
    pub(super) fn start(what: &'static str, total: u64, is_terminal: bool) -> Progress {
        let now = Instant::now();
        Progress { what, total, done: AtomicU64::new(0), is_terminal, started: now, printed: Mutex::new(now) }
    }

    /// Counts bytes, and prints when it is time.
    pub(super) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let pause = if self.is_terminal { TERMINAL_PAUSE } else { FILE_PAUSE };
        // Whoever finds another thread printing has nothing to add.
        let Ok(mut printed) = self.printed.try_lock() else { return };
        if printed.elapsed() >= pause {
            *printed = Instant::now();
            self.print(done);
        }
    }

    /// Ends the redrawn line.
    pub(super) fn finish(&self) {
        if self.is_terminal {
            self.print(self.done.load(Ordering::Relaxed));
            eprintln!();
        }
    }

    fn print(&self, done: u64) {
        let line = line(self.what, done, self.total, self.started.elapsed().as_secs_f64());
        // Where nobody reads any more the work goes on.
        let mut to = std::io::stderr();
        let _ = if self.is_terminal { write!(to, "\r{line}\x1b[K") } else { writeln!(to, "{line}") };
    }
}

/// Writes a line: share, speed, and the time left at that speed.
fn line(what: &str, done: u64, total: u64, seconds: f64) -> String {
    let percent = if total == 0 { 100.0 } else { 100.0 * done as f64 / total as f64 };
    let speed = done as f64 / seconds.max(1e-3);
    let left = (total.saturating_sub(done)) as f64 / speed.max(1.0);
    let (minutes, seconds) = (left as u64 / 60, left as u64 % 60);
    format!(
        "{what}: {percent:.0} % of {:.2} GB, {:.0} MB/s, {minutes}:{seconds:02} left",
        total as f64 / 1e9,
        speed / 1e6
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_share_speed_and_time_left() {
        assert_eq!(line("converting", 250, 1000, 1e-6), "converting: 25 % of 0.00 GB, 0 MB/s, 0:00 left");
        let half = line("converting", 5_000_000_000, 10_000_000_000, 50.0);
        assert_eq!(half, "converting: 50 % of 10.00 GB, 100 MB/s, 0:50 left");
        assert!(line("converting", 1_000_000_000, 13_000_000_000, 10.0).ends_with("2:00 left"));
    }
}
