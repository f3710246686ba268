//! The layers that Landlock gives: which files a worker can open, and that it reaches no port and no other process.
//!
//! Rights are named one by one: what the crate calls reading includes running. Every right that the kernel knows is handled,
//! so whatever no rule grants is refused. Landlock binds the calling thread and those that it starts later, hence the
//! assertion that there is one.

use std::fs;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The interfaces of the kernel that are asked for, the newest first.
const ABIS: [ABI; 6] = [ABI::V6, ABI::V5, ABI::V4, ABI::V3, ABI::V2, ABI::V1];

/// The newest interface that is asked for.
pub const ABI_MAX: u32 = 6;

/// What a card's driver opens after its libraries were loaded; measured with release 580.
#[cfg(feature = "cuda")]
const CARD_DEVICES: [&str; 2] = ["/dev/nvidiactl", "/dev/nvidia-uvm"];

/// What it reads about itself and the machine. All of /proc would show the supervisor's files too.
#[cfg(feature = "cuda")]
const CARD_FACTS: [&str; 8] = [
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/devices",
    "/proc/driver",
    "/proc/modules",
    "/proc/sys/vm",
    "/sys/bus/pci",
    "/sys/devices",
];

/// What may be done with a path and everything beneath it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    path: PathBuf,
    rights: BitFlags<AccessFs>,
    /// A system without it is no fault.
    is_optional: bool,
}

impl Grant {
    /// Lists a folder and reads its files.
    #[must_use]
    pub fn read_folder(path: &Path) -> Grant {
        Grant { path: path.to_owned(), rights: AccessFs::ReadFile | AccessFs::ReadDir, is_optional: false }
    }

    /// Reads one file.
    #[must_use]
    pub fn read_file(path: &Path) -> Grant {
        Grant { path: path.to_owned(), rights: AccessFs::ReadFile.into(), is_optional: false }
    }

    /// Makes files in a folder, and writes to those that are there.
    #[must_use]
    pub fn write_folder(path: &Path) -> Grant {
        let rights = AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::Truncate;
        Grant { path: path.to_owned(), rights, is_optional: false }
    }

    /// Works in a folder: lists it, reads, makes and writes its files, and renames a finished one over its place.
    #[must_use]
    pub fn work_in_folder(path: &Path) -> Grant {
        // A file is renamed within the folder, which takes the right to remove its old name.
        let reads = AccessFs::ReadFile | AccessFs::ReadDir;
        let writes = AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::RemoveFile;
        Grant { path: path.to_owned(), rights: reads | writes, is_optional: false }
    }

    fn or_none(self) -> Grant {
        Grant { is_optional: true, ..self }
    }

    /// What every worker reads: how much memory is free, and how large the processor's caches are.
    pub(super) fn of_every_worker() -> Vec<Grant> {
        let memory = Grant::read_file(Path::new("/proc/meminfo")).or_none();
        vec![memory, Grant::read_folder(Path::new("/sys/devices/system/cpu")).or_none()]
    }

    /// What the driver of a card needs.
    #[cfg(feature = "cuda")]
    pub(super) fn of_card(index: u32) -> Vec<Grant> {
        // The numbers of the driver are not those of the files where some cards are hidden, so every card's file is granted.
        let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        let granted = |path: PathBuf| Grant { path, rights: device, is_optional: true };
        let names = fs::read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.path());
        let is_card = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("nvidia"));
            name.is_some_and(|number| number.parse::<u32>().is_ok())
        };
        let mut grants: Vec<Grant> = names.filter(is_card).map(granted).collect();
        if grants.is_empty() {
            grants.push(granted(PathBuf::from(format!("/dev/nvidia{index}"))));
        }
        grants.extend(CARD_DEVICES.map(|path| granted(path.into())));
        // The driver gives its threads names.
        let task = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile | AccessFs::Truncate;
        grants.push(Grant { path: "/proc/self/task".into(), rights: task, is_optional: false });
        grants.extend(CARD_FACTS.map(|path| Grant::read_folder(Path::new(path)).or_none()));
        grants
    }
}

/// Grants a model's folder, and the folder to which the links of the hub's cache lead; links to anywhere else lead nowhere.
#[must_use]
pub fn of_model(folder: &Path) -> Vec<Grant> {
    let mut grants = vec![Grant::read_folder(folder)];
    // models--NAME/snapshots/REVISION holds links to models--NAME/blobs.
    let whole = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    if let Some(snapshots) = whole.parent().filter(|parent| parent.ends_with("snapshots")) {
        let blobs = snapshots.with_file_name("blobs");
        // A link in its place would be granted with whatever it leads to, and whoever packed the model may have put it there.
        if fs::symlink_metadata(&blobs).is_ok_and(|metadata| metadata.is_dir()) {
            grants.push(Grant::read_folder(&blobs));
        }
    }
    grants
}

/// What is in force.
#[derive(Debug, Default)]
pub(super) struct Enforced {
    pub(super) has_tcp: bool,
    pub(super) has_scope: bool,
    /// Keeps the files of /proc, to which rules refer, from being made anew, which would void the rules.
    #[expect(dead_code, reason = "holding them is what they are for")]
    pinned: Vec<PathFd>,
}

/// Puts the rules in force for this thread and all that it starts.
///
/// # Errors
/// What is missing, for people: Landlock, an interface that is new enough, or a path.
pub(super) fn restrict(grants: &[Grant], abi_min: u32, abi_max: u32) -> Result<Enforced, String> {
    let offered = ABIS.into_iter().filter(|abi| *abi as u32 <= abi_max);
    let (abi, mut rules) = offered
        .filter_map(|abi| handle(abi).ok().map(|rules| (abi, rules)))
        .next()
        .ok_or("this kernel has no Landlock, or it is switched off (Linux 5.13 and `landlock` in its lsm= list)")?;
    if (abi as u32) < abi_min {
        return Err(format!(
            "this kernel has interface {} of Landlock, and {abi_min} is the least allowed",
            abi as u32
        ));
    }
    let mut pinned = Vec::new();
    for grant in grants {
        let path = match PathFd::new(&grant.path) {
            Ok(path) => path,
            Err(PathFdError::OpenCall { .. }) if grant.is_optional => continue,
            Err(error) => return Err(error.to_string()),
        };
        let is_file = !grant.path.is_dir();
        let known = AccessFs::from_all(abi) & grant.rights;
        let rights = if is_file { known & AccessFs::from_file(abi) } else { known };
        rules = rules.add_rule(PathBeneath::new(&path, rights)).map_err(|error| error.to_string())?;
        if grant.path.starts_with("/proc") {
            pinned.push(path);
        }
    }
    let status = rules.restrict_self().map_err(|error| error.to_string())?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(Enforced { has_tcp: abi >= ABI::V4, has_scope: abi >= ABI::V6, pinned }),
        RulesetStatus::PartiallyEnforced | RulesetStatus::NotEnforced => {
            Err(format!("Landlock is enforced in part only: {:?}", status.ruleset))
        }
    }
}

/// Makes a set of rules that handles everything that an interface knows; an error where the kernel does not have it.
fn handle(abi: ABI) -> Result<RulesetCreated, RulesetError> {
    let mut rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    rules = rules.handle_access(AccessFs::from_all(abi))?;
    if abi >= ABI::V4 {
        rules = rules.handle_access(AccessNet::from_all(abi))?;
    }
    if abi >= ABI::V6 {
        rules = rules.scope(Scope::from_all(abi))?;
    }
    rules.create()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_grant_lets_anything_run() {
        let folder = Path::new("/model");
        let grants = [
            Grant::read_folder(folder),
            Grant::read_file(folder),
            Grant::write_folder(folder),
            Grant::work_in_folder(folder),
        ];
        for grant in grants {
            assert!(!grant.rights.contains(AccessFs::Execute), "{grant:?}");
        }
    }

    #[test]
    fn the_cache_of_the_hub_is_a_folder_of_links() {
        let cache = tempfile::tempdir().expect("a temporary folder");
        let (snapshot, blobs) = (cache.path().join("snapshots/1"), cache.path().join("blobs"));
        fs::create_dir_all(&snapshot).expect("made");
        assert_eq!(of_model(&snapshot).len(), 1);
        fs::create_dir(&blobs).expect("made");
        assert_eq!(of_model(&snapshot)[1], Grant::read_folder(&fs::canonicalize(&blobs).expect("it is there")));
        assert_eq!(of_model(cache.path()).len(), 1);
        fs::rename(&blobs, cache.path().join("elsewhere")).expect("ours");
        std::os::unix::fs::symlink("elsewhere", &blobs).expect("ours");
        assert_eq!(of_model(&snapshot).len(), 1, "a link is no part of the cache");
    }
}
