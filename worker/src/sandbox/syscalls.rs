//! The two filters of system calls: what is refused while the device is opened and threads start, and then a short list.
//!
//! The first answers with an error; the second ends the process (SIGSYS), which the supervisor takes for a break-in. Both
//! bind every thread there is, and every later one inherits them.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::calls::{ALLOWED, Entry, OPEN_TO_MAKE, OPEN_TO_WRITE, REFUSED, REFUSED_OLD, REFUSED_WITHOUT_CARD, When};

/// What the lists depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// There is a card, whose driver works by ioctl.
    pub(super) has_card: bool,
    /// The command has a file to write.
    pub(super) writes: bool,
}

/// Refuses what the start of a worker does not need.
///
/// # Errors
/// What the system says.
pub(super) fn refuse(needs: Needs) -> Result<(), String> {
    let mut rules = Rules::new();
    let without_card = if needs.has_card { &[] } else { REFUSED_WITHOUT_CARD };
    for entry in REFUSED.iter().chain(REFUSED_OLD).chain(without_card) {
        let (name, number, when, why) = *entry;
        // A card's driver makes one Unix socket when it starts.
        let is_sole = needs.has_card && number == libc::SYS_socket;
        let when = if is_sole { When::OtherThan(0, libc::AF_UNIX as u64) } else { when };
        add(&mut rules, (name, number, when, why), needs)?;
    }
    no_new_way_to_start()?;
    install(&compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?)
}

/// Answers clone3 as an old kernel does: its flags lie in memory, where no filter can look, and the C library then takes
/// clone. This is a filter of its own because of two that answer with an error the later one wins.
fn no_new_way_to_start() -> Result<(), String> {
    let rules = Rules::from([(libc::SYS_clone3, Vec::new())]);
    install(&compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?)
}

/// Ends the process at any call that is not on the list.
///
/// # Errors
/// What the system says.
pub(super) fn allow_only(needs: Needs) -> Result<(), String> {
    install(&allowing(needs, false)?)
}

/// As `allow_only`, but names what is not on the list, and lets it through.
///
/// # Errors
/// What the system says.
pub(super) fn name_others(needs: Needs) -> Result<(), String> {
    no_new_way_to_start()?;
    super::watch::install(allowing(needs, true)?)
}

/// Compiles the list; with `is_watched` for a process that looks at its own calls, which takes an ioctl.
fn allowing(needs: Needs, is_watched: bool) -> Result<BpfProgram, String> {
    let mut rules = Rules::new();
    for entry in ALLOWED {
        let is_needed = match entry.2 {
            When::Card => needs.has_card || (is_watched && entry.1 == libc::SYS_ioctl),
            When::Writes => needs.writes,
            When::Always
            | When::Clear(..)
            | When::Set(..)
            | When::OneOf(..)
            | When::OtherThan(..)
            | When::OwnProcess(_)
            | When::Reads(_) => true,
        };
        if is_needed {
            add(&mut rules, *entry, needs)?;
        }
    }
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// For each call the cases to which the filter's answer applies; none for all.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn add(rules: &mut Rules, (name, number, when, _): Entry, needs: Needs) -> Result<(), String> {
    let long = SeccompCmpArgLen::Qword;
    // The kernel takes these as 32 bits and leaves the others alone, so they must not be looked at.
    let short = SeccompCmpArgLen::Dword;
    let condition = |index, len, op, value| SeccompCondition::new(index, len, op, value);
    let conditions: Vec<Result<SeccompCondition, BackendError>> = match when {
        When::Always | When::Card | When::Writes => Vec::new(),
        When::Clear(index, bits) => vec![condition(index, long, SeccompCmpOp::MaskedEq(bits), 0)],
        When::Set(index, bits) => vec![condition(index, long, SeccompCmpOp::MaskedEq(bits), bits)],
        When::OneOf(index, values) => {
            values.iter().map(|value| condition(index, short.clone(), SeccompCmpOp::Eq, *value)).collect()
        }
        When::OtherThan(index, value) => vec![condition(index, short, SeccompCmpOp::Ne, value)],
        When::OwnProcess(index) => vec![condition(index, short, SeccompCmpOp::Eq, std::process::id().into())],
        When::Reads(_) if needs.writes => Vec::new(),
        // A driver opens its devices for both when it needs another channel; Landlock lets it write to nothing else.
        When::Reads(index) if needs.has_card => vec![condition(index, long, SeccompCmpOp::MaskedEq(OPEN_TO_MAKE), 0)],
        When::Reads(index) => vec![condition(index, long, SeccompCmpOp::MaskedEq(OPEN_TO_WRITE), 0)],
    };
    let cases = rules.entry(number).or_default();
    for condition in conditions {
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        cases.push(rule.map_err(|error| format!("{name}: {error}"))?);
    }
    Ok(())
}

fn compile(rules: Rules, others: SeccompAction, listed: SeccompAction) -> Result<BpfProgram, String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    let filter = SeccompFilter::new(rules, others, listed, arch).map_err(|error| error.to_string())?;
    filter.try_into().map_err(|error: BackendError| error.to_string())
}

fn install(filter: &BpfProgram) -> Result<(), String> {
    seccompiler::apply_filter_all_threads(filter).map_err(|error| format!("{error} (the kernel needs seccomp)"))
}
