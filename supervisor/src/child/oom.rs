//! Whether the kernel killed for want of memory: told by its counters, before and after.
//!
//! Two counters are read. That of the supervisor's own control group counts the kills in it and below, so of its workers:
//! when it rose, the kernel killed the worker. The one of the whole machine only says that some process was killed: with a
//! SIGKILL that nobody here sent it is a suspicion. Reads a few lines below `/proc` and `/sys` and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

/// The two counters at one moment; `None` where the system has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kills {
    own: Option<u64>,
    machine: Option<u64>,
}

/// What the counters say of a SIGKILL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// Nothing points to the kernel.
    None,
    /// Somewhere on the machine the kernel killed for want of memory.
    Suspected,
    /// The kernel killed in the supervisor's control group for want of memory.
    Certain,
}

impl Kills {
    /// Reads both counters.
    pub(crate) fn read() -> Kills {
        let group = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = counter_files(&group).iter().find_map(|path| field(path));
        Kills { own, machine: field(Path::new("/proc/vmstat")) }
    }

    /// Tells what has happened since then.
    pub(crate) fn since(self, before: Kills) -> Sign {
        let has_risen = |now: Option<u64>, then: Option<u64>| now.zip(then).is_some_and(|(now, then)| now > then);
        match (has_risen(self.own, before.own), has_risen(self.machine, before.machine)) {
            (true, _) => Sign::Certain,
            // A group with a counter would have counted a kill of its own.
            (false, true) if self.own.is_none() => Sign::Suspected,
            (false, _) => Sign::None,
        }
    }
}

/// Lists where the counter of the control group may stand, by the lines of `/proc/self/cgroup`. In a container the group's
/// name is often that of the host's tree, and its files stand at the root of what is mounted.
fn counter_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(name)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.events"),
            list if list.split(',').any(|controller| controller == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.oom_control")
            }
            _ => continue,
        };
        let name = name.trim_start_matches('/');
        files.push(Path::new(root).join(name).join(file));
        if !name.is_empty() {
            files.push(Path::new(root).join(file));
        }
    }
    files
}

/// Reads the line `oom_kill N` of a file.
fn field(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_counter_that_rose_is_a_sign() {
        let kills = |own, machine| Kills { own, machine };
        for (before, after, sign) in [
            (kills(Some(1), Some(5)), kills(Some(2), Some(6)), Sign::Certain),
            (kills(Some(1), Some(5)), kills(Some(1), Some(6)), Sign::None),
            (kills(None, Some(5)), kills(None, Some(6)), Sign::Suspected),
            (kills(None, Some(5)), kills(None, Some(5)), Sign::None),
            (kills(None, None), kills(None, None), Sign::None),
            (kills(None, Some(5)), kills(Some(1), Some(5)), Sign::None),
        ] {
            assert_eq!(after.since(before), sign, "{before:?} {after:?}");
        }
    }

    #[test]
    fn the_files_of_both_versions_are_known() {
        let files =
            |groups| -> Vec<String> { counter_files(groups).iter().map(|path| path.display().to_string()).collect() };
        assert_eq!(files("0::/\n"), ["/sys/fs/cgroup/memory.events"]);
        assert_eq!(
            files("4:memory,cpu:/a/b\n1:cpu:/\n0::/c:d\n"),
            [
                "/sys/fs/cgroup/memory/a/b/memory.oom_control",
                "/sys/fs/cgroup/memory/memory.oom_control",
                "/sys/fs/cgroup/c:d/memory.events",
                "/sys/fs/cgroup/memory.events",
            ]
        );
        assert_eq!(files("nonsense"), Vec::<String>::new());
    }

    #[test]
    fn a_linux_system_counts_for_the_machine() {
        assert!(Kills::read().machine.is_some());
    }
}
