//! Whether the kernel killed for want of memory: told by its counters, before and after.
//!
//! Three counters are read. That of the worker's own control group counts its kills alone and all of them, so it settles the
//! question. Without one, that of the supervisor's control group counts the kills in it, so of its workers: when it rose, the
//! kernel killed the worker. The one of the whole machine only says that some process was killed: with a SIGKILL that nobody
//! here sent it is a suspicion. Reads a few lines below `/proc` and `/sys` and nothing else.

use std::fs;
use std::path::Path;

use super::cgroup::{self, Leaf};

/// The counters at one moment; `None` where the system has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kills {
    leaf: Option<u64>,
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
    /// The kernel killed in the worker's or the supervisor's control group for want of memory.
    Certain,
}

/// Which counter tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// That of the worker's own control group.
    Worker,
    /// That of the supervisor's control group.
    Supervisor,
    /// That of the machine, which can only be a reason for suspicion.
    Machine,
    /// There is none.
    Nothing,
}

impl Source {
    /// Gives the words for health and log.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::Worker => "worker's control group",
            Source::Supervisor => "supervisor's control group",
            Source::Machine => "machine",
            Source::Nothing => "nothing",
        }
    }
}

impl Kills {
    /// Reads the counters; `leaf` is the worker's own control group.
    pub(crate) fn read(leaf: Option<&Leaf>) -> Kills {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let counter = |place: &cgroup::Place| cgroup::oom_kills(&place.folder.join(place.version.counter()));
        let own = cgroup::places(&groups).iter().find_map(counter);
        Kills { leaf: leaf.and_then(Leaf::kills), own, machine: cgroup::oom_kills(Path::new("/proc/vmstat")) }
    }

    /// Tells what has happened since then.
    pub(crate) fn since(self, before: Kills) -> Sign {
        let has_risen = |now: Option<u64>, then: Option<u64>| now.zip(then).is_some_and(|(now, then)| now > then);
        if let (Some(now), Some(then)) = (self.leaf, before.leaf) {
            return if now > then { Sign::Certain } else { Sign::None };
        }
        match (has_risen(self.own, before.own), has_risen(self.machine, before.machine)) {
            (true, _) => Sign::Certain,
            // A group with a counter would have counted a kill of its own.
            (false, true) if self.own.is_none() => Sign::Suspected,
            (false, _) => Sign::None,
        }
    }

    /// Says which counter tells.
    pub(crate) fn source(self) -> Source {
        match self {
            Kills { leaf: Some(_), .. } => Source::Worker,
            Kills { own: Some(_), .. } => Source::Supervisor,
            Kills { machine: Some(_), .. } => Source::Machine,
            Kills { leaf: None, own: None, machine: None } => Source::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_counter_that_rose_is_a_sign() {
        let kills = |own, machine| Kills { leaf: None, own, machine };
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
    fn the_workers_own_group_has_the_last_word() {
        let kills = |leaf, own, machine| Kills { leaf, own, machine };
        for (before, after, sign, source) in [
            (kills(Some(1), None, Some(5)), kills(Some(2), None, Some(6)), Sign::Certain, Source::Worker),
            // Another process of the supervisor's group, or of the machine.
            (kills(Some(1), Some(1), Some(5)), kills(Some(1), Some(2), Some(6)), Sign::None, Source::Worker),
            (kills(Some(1), None, Some(5)), kills(Some(1), None, Some(6)), Sign::None, Source::Worker),
            // A group that is gone says nothing.
            (kills(Some(1), Some(1), Some(5)), kills(None, Some(2), Some(6)), Sign::Certain, Source::Supervisor),
            (kills(Some(1), None, Some(5)), kills(None, None, Some(6)), Sign::Suspected, Source::Machine),
            (kills(None, None, None), kills(None, None, None), Sign::None, Source::Nothing),
        ] {
            assert_eq!((after.since(before), after.source()), (sign, source), "{before:?} {after:?}");
        }
    }

    #[test]
    fn a_linux_system_counts_for_the_machine() {
        assert!(Kills::read(None).machine.is_some());
    }
}
