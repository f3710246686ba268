//! The log: `tracing` to standard error, for people or as JSON, and the last of it in memory for `bulkheadctl tail`.
//!
//! Fields that appear on log lines, one name each: `incarnation`, `pid`, `request`, `http_request`, `tokens`, `state`,
//! `cause`, `reason`, `model`, `address`, `line`, `error`. Whatever is said of a request carries `request`, whatever is said
//! of a worker carries `incarnation`. Text of prompts and completions, keys and headers never appear.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::config::{LogFormat, LogLevel};
use crate::limits::{LOG_LINE_BYTES_MAX, LOG_LINES_MAX};

/// Sends the log to standard error from now on, and gives what remembers the last of it. Later calls change nothing, and
/// what they give stays empty.
pub fn start(format: LogFormat, level: &LogLevel) -> Arc<Recent> {
    let recent = Arc::new(Recent::default());
    let filter = EnvFilter::new(level.as_str());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Both(recent.clone()))
        .with_target(false)
        .with_timer(SystemTime);
    // A second start happens in tests only, where the first one is as good.
    drop(match format {
        LogFormat::Human => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    });
    recent
}

/// The last lines of the log.
#[derive(Debug, Default)]
pub struct Recent {
    lines: Mutex<Lines>,
    /// Counts the lines so far.
    count: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<String>,
    /// How many were dropped in front of `kept`.
    dropped: u64,
}

impl Recent {
    /// Gives the lines from this one on, counted from 0, as far as they are kept, and the number of the next one.
    #[must_use]
    pub fn since(&self, number: u64) -> (Vec<String>, u64) {
        let lines = self.lock();
        let skipped = usize::try_from(number.saturating_sub(lines.dropped)).unwrap_or(usize::MAX);
        (lines.kept.iter().skip(skipped).cloned().collect(), lines.next())
    }

    /// Gives the number of the line so many before the next one.
    #[must_use]
    pub fn last(&self, count: u64) -> u64 {
        self.lock().next().saturating_sub(count)
    }

    /// Waits until there is a line of this number.
    pub async fn wait_for(&self, number: u64) {
        // The sender lives in `self`, so waiting cannot fail.
        drop(self.count.subscribe().wait_for(|count| *count > number).await);
    }

    fn add(&self, line: &str) {
        let mut lines = self.lock();
        lines.kept.push_back(line[..line.floor_char_boundary(LOG_LINE_BYTES_MAX)].to_owned());
        if lines.kept.len() > LOG_LINES_MAX {
            lines.kept.pop_front();
            lines.dropped += 1;
        }
        let next = lines.next();
        drop(lines);
        self.count.send_replace(next);
    }

    /// Lines are whole at any time, whatever happened to who added them.
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn next(&self) -> u64 {
        self.dropped + self.kept.len() as u64
    }
}

/// Writes each line to standard error and into memory.
#[derive(Clone, Debug)]
struct Both(Arc<Recent>);

impl Write for Both {
    /// A line comes in one piece, and goes out so.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(String::from_utf8_lossy(line).trim_end_matches('\n'));
        io::stderr().write_all(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for Both {
    type Writer = Both;

    fn make_writer(&'a self) -> Both {
        self.clone()
    }
}

/// Makes text from another process fit for a log line: control characters become escapes.
#[must_use]
pub(crate) fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().collect() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_cannot_reach_a_terminal() {
        assert_eq!(printable("a\u{1b}[31mé\r\n\t"), "a\\u{1b}[31mé\\r\\n\\t");
    }

    #[test]
    fn the_last_lines_are_kept_and_no_more() {
        let recent = Recent::default();
        assert_eq!((recent.since(0), recent.last(5)), ((Vec::new(), 0), 0));
        for number in 0..LOG_LINES_MAX + 3 {
            recent.add(&number.to_string());
        }
        let next = LOG_LINES_MAX as u64 + 3;
        let (lines, at) = recent.since(0);
        assert_eq!((lines.len(), lines[0].as_str(), at), (LOG_LINES_MAX, "3", next));
        let last = [(next - 2).to_string(), (next - 1).to_string()];
        assert_eq!(recent.since(recent.last(2)), (last.to_vec(), next));
        assert_eq!(recent.since(next + 9), (Vec::new(), next));
        recent.add(&"é".repeat(LOG_LINE_BYTES_MAX));
        assert_eq!(recent.since(next).0[0].len(), LOG_LINE_BYTES_MAX);
    }
}
