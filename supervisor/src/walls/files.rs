//! Where files may be written (Landlock).
//!
//! Only what changes files is restricted, and nothing that reads or runs them: the rules hold for every worker too, whose
//! own are far stricter, and can never be loosened. What a worker on a card needs is among them: its driver opens the
//! card's devices for writing, and names its threads below `/proc`. For root without capabilities that last rule is wide:
//! `/proc/sys` stands below it; so it is there only where a card may be used.

use std::fs;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, RulesetStatus,
};

/// The last version that knew a further way of changing files.
const VERSION: ABI = ABI::V3;

/// The places that stay writable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writable {
    /// Folders, with all below.
    pub folders: Vec<PathBuf>,
    /// The folder in which a control group may be removed.
    pub control_group: Option<PathBuf>,
    /// Whether a worker may compute on a card.
    pub may_use_card: bool,
}

/// How much of the rules the kernel keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enforced {
    Fully,
    Partly,
    Not,
}

/// Restricts this thread and all that it starts.
pub(super) fn restrict(writable: &Writable) -> Result<Enforced, String> {
    match rules(writable).and_then(RulesetCreated::restrict_self) {
        Ok(status) => Ok(match status.ruleset {
            RulesetStatus::FullyEnforced => Enforced::Fully,
            RulesetStatus::PartiallyEnforced => Enforced::Partly,
            RulesetStatus::NotEnforced => Enforced::Not,
        }),
        Err(error) => Err(error.to_string()),
    }
}

fn rules(writable: &Writable) -> Result<RulesetCreated, RulesetError> {
    let all = AccessFs::from_write(VERSION);
    let content = AccessFs::WriteFile | AccessFs::Truncate;
    let mut rules = Ruleset::default().handle_access(all)?.create()?;
    for folder in &writable.folders {
        rules = allow(rules, folder, all)?;
    }
    if let Some(folder) = &writable.control_group {
        rules = allow(rules, folder, AccessFs::RemoveDir.into())?;
    }
    // What a started program gets in place of an input or output.
    rules = allow(rules, Path::new("/dev/null"), content)?;
    if writable.may_use_card {
        for device in devices() {
            rules = allow(rules, &device, content)?;
        }
        rules = allow(rules, Path::new("/proc"), content)?;
    }
    Ok(rules)
}

/// Allows what is there; what is not needs no rule.
fn allow(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(opened) => rules.add_rule(PathBeneath::new(opened, access)),
        Err(_) => Ok(rules),
    }
}

/// Lists the card's devices, and the folder with its further ones.
fn devices() -> Vec<PathBuf> {
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let is_card = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.starts_with("nvidia"));
    entries.filter(is_card).map(|entry| entry.path()).collect()
}
