//! The worker's own control group: a leaf below the supervisor's, where one can be made.
//!
//! It says for certain whether the kernel killed the worker for want of memory, for its counter counts that worker alone and
//! whatever the reason, a limit of its own, of a group above it, or of the machine. It also holds a limit, where one is
//! configured. Both versions of control groups are known. Owns: finding the place, making the leaf, moving a worker into it.
//! Invariants: it is made before the supervisor's walls stand, and used by an open descriptor from then on; where it cannot
//! be made, whatever was changed for it is changed back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bulkhead_shared::units::Bytes;

/// How the names of our leaves begin; the number of the supervisor's process follows.
const LEAF: &str = "bulkhead-";

/// The name of the group that the supervisor moves to: in version 2, groups with limits below them hold no process.
const OWN: &str = "bulkhead-supervisor";

/// Why a worker has no group of its own.
#[derive(Debug, thiserror::Error)]
pub enum NoLeaf {
    /// It is not wanted.
    #[error("worker_cgroup is off")]
    Off,
    /// The system shows no group that counts memory.
    #[error("this system gives no control group that counts memory")]
    NoController,
    /// A file of the group cannot be written.
    #[error("{}: {source}", path.display())]
    Refused {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The two versions of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

impl Version {
    /// Gives the file with the line `oom_kill N`.
    pub(super) const fn counter(self) -> &'static str {
        match self {
            Version::One => "memory.oom_control",
            Version::Two => "memory.events",
        }
    }
}

/// A control group of this process that may count memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) version: Version,
    pub(super) folder: PathBuf,
}

/// Lists where the control group of this process may lie, by the lines of `/proc/self/cgroup`. In a container the group's
/// name is often that of the host's tree, and its files stand at the root of what is mounted.
pub(super) fn places(groups: &str) -> Vec<Place> {
    let mut places = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(name)) = (parts.next(), parts.next()) else { continue };
        let (root, version) = match controllers {
            "" => ("/sys/fs/cgroup", Version::Two),
            list if list.split(',').any(|one| one == "memory") => ("/sys/fs/cgroup/memory", Version::One),
            _ => continue,
        };
        let name = name.trim_start_matches('/');
        places.push(Place { version, folder: Path::new(root).join(name) });
        if !name.is_empty() {
            places.push(Place { version, folder: root.into() });
        }
    }
    places
}

/// A worker's control group.
#[derive(Debug)]
pub struct Leaf {
    folder: PathBuf,
    counter: PathBuf,
    /// Takes the number of a process that is to move here.
    procs: File,
}

impl Leaf {
    /// Makes a leaf below the group of this process, with a limit where one is given.
    ///
    /// # Errors
    /// `NoLeaf`; nothing has changed then.
    pub fn make(limit: Option<Bytes>) -> Result<Leaf, NoLeaf> {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        // A system may have a tree of each version, and only one of them counts memory.
        let place = places(&groups).into_iter().find(counts_memory).ok_or(NoLeaf::NoController)?;
        Leaf::make_in(&place, std::process::id(), limit)
    }

    fn make_in(place: &Place, pid: u32, limit: Option<Bytes>) -> Result<Leaf, NoLeaf> {
        remove_stale(&place.folder);
        let moved = match place.version {
            Version::One => None,
            Version::Two => share_memory(&place.folder, pid)?,
        };
        let folder = place.folder.join(format!("{LEAF}{pid}"));
        let made = open(&folder, place.version, limit);
        if made.is_err() {
            // What is not there, or does not work, needs no undoing.
            let _ = fs::remove_dir(&folder);
            moved.iter().for_each(Moved::undo);
        }
        made
    }

    /// Moves a process here, with all its threads.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn take_in(&self, pid: u32) -> io::Result<()> {
        (&self.procs).write_all(pid.to_string().as_bytes())
    }

    /// Counts the kills here for want of memory; `None` when the leaf is gone.
    pub(super) fn kills(&self) -> Option<u64> {
        oom_kills(&self.counter)
    }

    /// Gives the group in which the leaf lies.
    #[must_use]
    pub fn parent(&self) -> Option<&Path> {
        self.folder.parent()
    }

    /// Removes the leaf, once its last process is gone. Where that is not allowed any more, the next supervisor does it.
    ///
    /// # Errors
    /// When it is not empty, or may not be removed.
    pub fn remove(&self) -> io::Result<()> {
        fs::remove_dir(&self.folder)
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        // It is gone already, or the next supervisor removes it.
        let _ = self.remove();
    }
}

/// Reads the line `oom_kill N` of a file.
pub(super) fn oom_kills(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

fn counts_memory(place: &Place) -> bool {
    match place.version {
        Version::One => place.folder.join(Version::One.counter()).is_file(),
        Version::Two => has_word(&place.folder.join("cgroup.controllers"), "memory"),
    }
}

fn has_word(path: &Path, word: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.split_whitespace().any(|one| one == word))
}

/// Removes the leaves of supervisors that are gone. One that still has a process stays.
fn remove_stale(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(LEAF)).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // It only saves a little memory: whoever may not do it goes on without.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// A move of the supervisor out of the group in which it was started.
struct Moved {
    from: PathBuf,
    to: PathBuf,
    pid: u32,
}

impl Moved {
    fn undo(&self) {
        // Best as it can be: a supervisor in a group of its own works as well.
        let _ = write(&self.from.join("cgroup.subtree_control"), "-memory");
        let _ = write(&self.from.join("cgroup.procs"), &self.pid.to_string());
        let _ = fs::remove_dir(&self.to);
    }
}

/// Has memory counted in the groups below this one, of version 2. The kernel wants it free of processes for that.
fn share_memory(folder: &Path, pid: u32) -> Result<Option<Moved>, NoLeaf> {
    let control = folder.join("cgroup.subtree_control");
    if has_word(&control, "memory") {
        return Ok(None);
    }
    // The root of the whole tree, which has no type, may have processes.
    if !folder.join("cgroup.type").exists() {
        return write(&control, "+memory").map(|()| None);
    }
    let moved = Moved { from: folder.to_owned(), to: folder.join(OWN), pid };
    make_dir(&moved.to)?;
    let shared = write(&moved.to.join("cgroup.procs"), &pid.to_string()).and_then(|()| write(&control, "+memory"));
    match shared {
        Ok(()) => Ok(Some(moved)),
        Err(error) => {
            moved.undo();
            Err(error)
        }
    }
}

fn open(folder: &Path, version: Version, limit: Option<Bytes>) -> Result<Leaf, NoLeaf> {
    make_dir(folder)?;
    let (memory, swap) = match version {
        Version::One => ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        Version::Two => ("memory.max", "memory.swap.max"),
    };
    if let Some(limit) = limit {
        write(&folder.join(memory), &limit.0.to_string())?;
        // What is swapped out is held too. Systems without swap have no such file.
        let of_swap = match version {
            Version::One => limit.0,
            Version::Two => 0,
        };
        let _ = write(&folder.join(swap), &of_swap.to_string());
    }
    if version == Version::Two {
        // A worker is one process; should that ever change, all of it goes at once. Linux before 4.19 has no such file.
        let _ = write(&folder.join("memory.oom.group"), "1");
    }
    let path = folder.join("cgroup.procs");
    let procs = OpenOptions::new().write(true).open(&path).map_err(|source| NoLeaf::Refused { path, source })?;
    let counter = folder.join(version.counter());
    match oom_kills(&counter) {
        Some(_) => Ok(Leaf { folder: folder.to_owned(), counter, procs }),
        None => Err(NoLeaf::NoController),
    }
}

fn make_dir(path: &Path) -> Result<(), NoLeaf> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(NoLeaf::Refused { path: path.to_owned(), source: error })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Writes a file of a control group, which is there or is not: none is ever made.
fn write(path: &Path, text: &str) -> Result<(), NoLeaf> {
    let written = OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| NoLeaf::Refused { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: u32 = 4_000_000_000;

    /// Plain files in the place of a control group's, made before the code under test makes the folders around them.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(version: Version, files: &[(&str, &str)]) -> (Tree, Place) {
            let tree = Tree(tempfile::tempdir().expect("a folder can be made"));
            for (name, text) in files {
                let path = tree.0.path().join(name);
                fs::create_dir_all(path.parent().expect("lies in a folder")).expect("a folder can be made");
                fs::write(path, text).expect("a file can be written");
            }
            let folder = tree.0.path().to_owned();
            (tree, Place { version, folder })
        }

        fn text(&self, name: &str) -> String {
            fs::read_to_string(self.0.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
        }
    }

    fn leaf_files(version: Version) -> Vec<(String, &'static str)> {
        let files = match version {
            Version::One => ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control"],
            Version::Two => ["memory.max", "memory.swap.max", "memory.events"],
        };
        let mut all = vec![("cgroup.procs", ""), ("memory.oom.group", "0")];
        all.extend(files.map(|name| {
            (name, if name.ends_with("oom_control") || name.ends_with("events") { "oom_kill 2\n" } else { "" })
        }));
        all.into_iter().map(|(name, text)| (format!("{LEAF}{PID}/{name}"), text)).collect()
    }

    fn tree(version: Version, own: &[(&str, &str)]) -> (Tree, Place) {
        let leaf = leaf_files(version);
        let all: Vec<_> = leaf.iter().map(|(name, text)| (name.as_str(), *text)).chain(own.iter().copied()).collect();
        Tree::new(version, &all)
    }

    #[test]
    fn the_places_of_both_versions_are_known() {
        let found = |groups| -> Vec<String> {
            places(groups).iter().map(|place| format!("{:?} {}", place.version, place.folder.display())).collect()
        };
        assert_eq!(found("0::/\n"), ["Two /sys/fs/cgroup/"]);
        assert_eq!(
            found("4:memory,cpu:/a/b\n1:cpu:/\n0::/c:d\n"),
            [
                "One /sys/fs/cgroup/memory/a/b",
                "One /sys/fs/cgroup/memory",
                "Two /sys/fs/cgroup/c:d",
                "Two /sys/fs/cgroup"
            ]
        );
        assert_eq!(found("nonsense"), Vec::<String>::new());
    }

    #[test]
    fn a_leaf_of_version_1_needs_nothing_of_its_parent() {
        let (tree, place) = tree(Version::One, &[]);
        let leaf = Leaf::make_in(&place, PID, Some(Bytes(7 << 20))).expect("can be made");
        assert_eq!(tree.text(&format!("{LEAF}{PID}/memory.limit_in_bytes")), (7 << 20).to_string());
        assert_eq!(tree.text(&format!("{LEAF}{PID}/memory.memsw.limit_in_bytes")), (7 << 20).to_string());
        leaf.take_in(123).expect("can be written");
        assert_eq!(tree.text(&format!("{LEAF}{PID}/cgroup.procs")), "123");
        assert_eq!(leaf.kills(), Some(2));
        assert_eq!(leaf.parent(), Some(place.folder.as_path()));
    }

    #[test]
    fn a_leaf_of_version_2_moves_the_supervisor_out_of_the_way() {
        let own = format!("{OWN}/cgroup.procs");
        let files =
            [("cgroup.type", "domain"), ("cgroup.subtree_control", ""), ("cgroup.procs", ""), (own.as_str(), "")];
        let (tree, place) = tree(Version::Two, &files);
        Leaf::make_in(&place, PID, Some(Bytes(1 << 30))).expect("can be made");
        assert_eq!((tree.text(&own), tree.text("cgroup.subtree_control")), (PID.to_string(), "+memory".into()));
        assert_eq!(tree.text(&format!("{LEAF}{PID}/memory.max")), (1 << 30).to_string());
        assert_eq!(tree.text(&format!("{LEAF}{PID}/memory.swap.max")), "0");
        assert_eq!(tree.text(&format!("{LEAF}{PID}/memory.oom.group")), "1");
    }

    #[test]
    fn nobody_moves_where_memory_is_shared_already_or_at_the_root() {
        for control in [("cgroup.subtree_control", "cpu memory"), ("cgroup.subtree_control", "")] {
            let (tree, place) = tree(Version::Two, &[control]);
            Leaf::make_in(&place, PID, None).expect("can be made");
            assert!(!tree.0.path().join(OWN).exists());
            assert!(tree.text("cgroup.subtree_control").contains("memory"));
            assert_eq!(tree.text(&format!("{LEAF}{PID}/memory.max")), "", "there is no limit");
        }
    }

    #[test]
    fn what_cannot_be_done_is_undone() {
        // Without the control file sharing fails behind the move.
        let own = format!("{OWN}/cgroup.procs");
        let files = [("cgroup.type", "domain"), ("cgroup.procs", ""), (own.as_str(), "")];
        let (moved, place) = tree(Version::Two, &files);
        let error = Leaf::make_in(&place, PID, None).expect_err("is refused");
        assert!(error.to_string().contains("cgroup.subtree_control"), "{error}");
        assert_eq!(moved.text("cgroup.procs"), PID.to_string(), "it is back");
        // A group that does not count.
        let (_tree, place) = Tree::new(Version::One, &[(&format!("{LEAF}{PID}/cgroup.procs"), "")]);
        assert!(matches!(Leaf::make_in(&place, PID, None), Err(NoLeaf::NoController)));
        let gone = Place { version: Version::One, folder: place.folder.join("nowhere") };
        assert!(matches!(Leaf::make_in(&gone, PID, None), Err(NoLeaf::Refused { .. })));
    }

    #[test]
    fn leaves_of_supervisors_that_are_gone_are_removed() {
        let (tree, place) = tree(Version::One, &[]);
        let alive = format!("{LEAF}{}", std::process::id());
        for name in [format!("{LEAF}3999999999"), alive.clone(), format!("{LEAF}x"), "other".into()] {
            fs::create_dir(tree.0.path().join(name)).expect("can be made");
        }
        Leaf::make_in(&place, PID, None).expect("can be made");
        let is_there = |name: &str| tree.0.path().join(name).exists();
        assert!(!is_there("bulkhead-3999999999") && is_there(&alive) && is_there("bulkhead-x") && is_there("other"));
    }
}
