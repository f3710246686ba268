//! Processes from outside, by what `/proc` tells.

use std::collections::HashMap;
use std::fs;
use std::io;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a line of `/proc/PID/stat` tells about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The process.
    pub pid: i32,
    /// The name of its program, at most 15 bytes of it.
    pub name: String,
    /// `Z` for a zombie.
    pub state: char,
    /// Its parent.
    pub parent: i32,
}

/// Looks at a process; `None` when there is none.
#[must_use]
pub fn stat(pid: i32) -> Option<Stat> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets and may hold anything, brackets too.
    let (head, tail) = line.rsplit_once(") ")?;
    let name = head.split_once('(')?.1.to_owned();
    let mut fields = tail.split(' ');
    let state = fields.next()?.chars().next()?;
    Some(Stat { pid, name, state, parent: fields.next()?.parse().ok()? })
}

/// Lists the direct children of a process, zombies too.
#[must_use]
pub fn children(parent: i32) -> Vec<Stat> {
    let entries = fs::read_dir("/proc").expect("a Linux system has /proc");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(stat).filter(|child| child.parent == parent).collect()
}

/// Says whether a process exists and is no zombie.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|stat| stat.state != 'Z')
}

/// Reads `/proc/PID/status`: names without the colon, values trimmed.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn status(pid: i32) -> HashMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Reads the soft and the hard value of one line of `/proc/PID/limits`.
///
/// # Panics
/// When there is no such process or no such limit.
#[must_use]
pub fn limit(pid: i32, name: &str) -> (String, String) {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).expect("the process runs");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel has this limit");
    let mut values = line.split_whitespace().map(str::to_owned);
    let mut next = || values.next().expect("a limit has two values");
    (next(), next())
}

/// Counts the open descriptors of a process of ours.
///
/// # Errors
/// When the process forbids it or is gone.
pub fn descriptors(pid: i32) -> io::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Gives the resident memory of a process. Units: KiB.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn resident_kib(pid: i32) -> u64 {
    let status = status(pid);
    let value = status.get("VmRSS").expect("a living process has memory");
    value.split(' ').next().and_then(|number| number.parse().ok()).expect("the kernel writes a number of kB")
}

/// Sends a signal; a process that is gone already is no fault.
pub fn signal(pid: i32, signal: Signal) {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
        Err(error) => panic!("cannot send {signal} to {pid}: {error}"),
    }
}
