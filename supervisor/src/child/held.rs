//! What a worker holds of the host's memory, measured from outside, beside what its plan allows.
//!
//! Counted is what the kernel cannot take back by itself: anonymous and shared memory, in memory or swapped out. Pages of
//! mapped files, and so weights that lie in the page cache, do not count. A plan is what the worker says that it is: none is
//! believed beyond what the machine had to give when the worker was started. Reads two files below `/proc` and nothing else.

use std::fs;

use bulkhead_shared::message::MemoryKind;
use bulkhead_shared::units::Bytes;

use super::exit::KillReason;
use crate::limits::LOAD_BYTES_MAX;

const LOAD_MAX: Bytes = Bytes(LOAD_BYTES_MAX);

/// What a worker may hold beyond its plan: code, tables, what passes between allocations. One in so many, and at least this.
const SLACK_SHARE: u64 = 10;
const SLACK_MIN: Bytes = Bytes(512 << 20);

/// Gives what a process holds; `None` when it is gone.
pub(super) fn held_by(pid: u32) -> Option<Bytes> {
    parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn parse(status: &str) -> Option<Bytes> {
    let parts = [kib(status, "RssAnon")?, kib(status, "RssShmem")?, kib(status, "VmSwap").unwrap_or(0)];
    Some(Bytes(parts.iter().sum::<u64>() << 10))
}

/// Reads what the machine can give without swapping; where it does not say, there is no end to it.
pub(super) fn available() -> Bytes {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kib(&text, "MemAvailable").map_or(Bytes(u64::MAX), |kib| Bytes(kib << 10))
}

/// Finds a number of kB by the name of its line.
fn kib(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.trim().strip_suffix("kB")?.trim_end().parse().ok()
}

/// What a worker may hold on the host, and what it is for when it holds more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) bytes: Bytes,
    pub(super) reason: KillReason,
    /// For people.
    pub(super) what: &'static str,
}

impl Limit {
    /// Lowers the limit to what the configuration allows, where that is less.
    pub(super) fn within(self, most: Option<Bytes>) -> Limit {
        match most {
            Some(most) if most < self.bytes => Limit { bytes: most, what: "host_memory allows", ..self },
            Some(_) | None => self,
        }
    }
}

/// Gives the limit of a worker with this plan, or of one that is loading and has none yet. What a load for a card pins on the
/// host only the plan tells.
pub(super) fn limit(plan: Option<&[(MemoryKind, Bytes)]>, is_on_card: bool, available: Bytes) -> Option<Limit> {
    match plan {
        Some(plan) => {
            let bytes = allowed(plan, is_on_card, available);
            Some(Limit { bytes, reason: KillReason::OverBudget, what: "its plan allows" })
        }
        None if is_on_card => None,
        None => Some(Limit { bytes: LOAD_MAX, reason: KillReason::LoadOverBudget, what: "a load may hold" }),
    }
}

fn allowed(plan: &[(MemoryKind, Bytes)], is_on_card: bool, available: Bytes) -> Bytes {
    let counts = |kind: MemoryKind| match kind {
        MemoryKind::HostWeights | MemoryKind::HostKvCache | MemoryKind::Swap => true,
        MemoryKind::Weights | MemoryKind::KvCache | MemoryKind::Scratch => !is_on_card,
        MemoryKind::Reserve => false,
    };
    let counted = plan.iter().filter(|(kind, _)| counts(*kind)).map(|(_, bytes)| bytes.0);
    let planned = counted.fold(0, u64::saturating_add).min(available.0);
    Bytes(planned.saturating_add(SLACK_MIN.0.max(planned / SLACK_SHARE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_memory_that_the_kernel_cannot_take_back_counts() {
        let status = "Name:\tworker\nVmRSS:\t  900 kB\nRssAnon:\t  100 kB\nRssFile:\t  790 kB\nRssShmem:\t 10 kB\nVmSwap:\t 2 kB\n";
        assert_eq!(parse(status), Some(Bytes(112 << 10)));
        assert_eq!(parse(&status.replace("VmSwap:\t 2 kB\n", "")), Some(Bytes(110 << 10)));
        assert_eq!(parse("Name:\tzombie\n"), None);
        assert!(held_by(std::process::id()).is_some_and(|held| held.0 > 0));
        assert!(available().0 > 0);
    }

    #[test]
    fn a_plan_counts_where_it_says() {
        const GIB: u64 = 1 << 30;
        let plan = [
            (MemoryKind::Weights, Bytes(20 * GIB)),
            (MemoryKind::HostWeights, Bytes(2 * GIB)),
            (MemoryKind::Reserve, Bytes(GIB)),
            (MemoryKind::Swap, Bytes(GIB)),
        ];
        let plenty = Bytes(64 * GIB);
        assert_eq!(allowed(&plan, true, plenty), Bytes(3 * GIB + SLACK_MIN.0));
        assert_eq!(allowed(&plan, false, plenty), Bytes(23 * GIB + 23 * GIB / 10));
        assert_eq!(allowed(&[], false, plenty), SLACK_MIN);
        // What a worker says of itself ends where the machine does.
        let lie = [(MemoryKind::KvCache, Bytes(u64::MAX)), (MemoryKind::Scratch, Bytes(u64::MAX))];
        assert_eq!(allowed(&lie, false, Bytes(20 * GIB)), Bytes(22 * GIB));
    }

    #[test]
    fn a_load_has_a_limit_before_there_is_a_plan() {
        let of = |plan, is_on_card| limit(plan, is_on_card, Bytes(1 << 40)).map(|limit| (limit.bytes, limit.reason));
        assert_eq!(of(None, false), Some((Bytes(LOAD_BYTES_MAX), KillReason::LoadOverBudget)));
        assert_eq!(of(None, true), None);
        assert_eq!(of(Some(&[]), true), Some((SLACK_MIN, KillReason::OverBudget)));
        assert_eq!(of(Some(&[]), false), Some((SLACK_MIN, KillReason::OverBudget)));
        let bytes = |most| limit(None, false, Bytes(0)).map(|limit| limit.within(most).bytes);
        assert_eq!(bytes(Some(Bytes(1))), Some(Bytes(1)));
        assert_eq!(bytes(Some(Bytes(u64::MAX))), bytes(None));
    }
}
