//! The log: `tracing` to standard error, for people or as JSON.
//!
//! Fields that appear on log lines, one name each: `incarnation`, `pid`, `request`, `state`, `cause`, `reason`, `model`,
//! `address`, `line`, `error`. Text of prompts and completions, keys and headers never appear.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::config::{LogFormat, LogLevel};

/// Sends the log to standard error from now on. Later calls change nothing.
pub fn start(format: LogFormat, level: &LogLevel) {
    let filter = EnvFilter::new(level.as_str());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_timer(SystemTime);
    // A second start happens in tests only, where the first one is as good.
    drop(match format {
        LogFormat::Human => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    });
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
}
