//! The supervisor's own walls: what it gives up before it serves anybody.
//!
//! Owns: the descriptors, the user, the capabilities, and the rules for writing files, of this process and so of its
//! workers. Refuses: to start any thread; a wall stands around the calling thread and those that it starts later. Invariants:
//! a wall in the list was looked at from inside after it was put up; one that the system cannot give is a warning that
//! everyone sees, in the log, in `/health` and in `bulkheadctl status`.

mod files;
mod privileges;

use std::fs;
use std::io;
use std::path::PathBuf;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{self, Gid, Uid, User};
use serde_json::{Value, json};

pub use files::Writable;

/// One thing that this process has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wall {
    /// It holds no file that whoever started it had open.
    ClosedDescriptors,
    /// It became an ordinary user and cannot become root again.
    User,
    /// Its memory is closed to other processes of its user, and no core is written.
    NotDumpable,
    /// It holds no capability and cannot get one.
    NoCapabilities,
    /// No program that it starts gets more privileges.
    NoNewPrivileges,
    /// It and its workers write to few places only.
    WritesRestricted,
}

impl Wall {
    /// Gives the name in health, status and log.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Wall::ClosedDescriptors => "closed-descriptors",
            Wall::User => "user",
            Wall::NotDumpable => "not-dumpable",
            Wall::NoCapabilities => "no-capabilities",
            Wall::NoNewPrivileges => "no-new-privileges",
            Wall::WritesRestricted => "landlock-writes",
        }
    }
}

/// Why a wall cannot be put up, though it has to be.
#[derive(Debug, thiserror::Error)]
pub enum WallsError {
    /// There is no such user.
    #[error("user: there is no user {0:?} on this machine")]
    NoSuchUser(String),
    /// It is no ordinary user.
    #[error("user: {0:?} is root: name an ordinary user")]
    UserIsRoot(String),
    /// Another user would have to be changed to.
    #[error("user: only root can become {name:?}: start bulkhead as root, or as {name:?} without --user")]
    NotRoot {
        /// The user.
        name: String,
    },
    /// The list of users cannot be read.
    #[error("user: cannot look up {name:?}: {source}")]
    Users {
        /// The user.
        name: String,
        /// Why.
        source: nix::Error,
    },
    /// A thread is running that would stand outside.
    #[error("the supervisor's walls must stand before threads start, and {0} are running")]
    Threads(usize),
    /// The system refuses.
    #[error("cannot put up the supervisor's wall {}: {reason}", wall.as_str())]
    Refused {
        /// The wall.
        wall: Wall,
        /// What the system says.
        reason: String,
    },
}

/// What stands around this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walls {
    user: String,
    walls: Vec<Wall>,
    warnings: Vec<String>,
}

impl Walls {
    /// Gives the name of the user, or the number of one without a name.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Gives the walls that stand.
    #[must_use]
    pub fn walls(&self) -> &[Wall] {
        &self.walls
    }

    /// Gives what people should know about those that do not.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Describes all of it, for the public and the private door.
    #[must_use]
    pub fn describe(&self) -> Value {
        let walls: Vec<&str> = self.walls.iter().map(|wall| wall.as_str()).collect();
        json!({"user": self.user, "isolation": walls, "warnings": self.warnings})
    }
}

/// Proof that nothing was inherited and no memory is open.
#[derive(Debug)]
pub struct Begun(());

/// Closes what was inherited, and the memory of this process to others. The first thing of all, before any file is opened
/// and any secret read.
///
/// # Errors
/// `Refused` when the system refuses.
pub fn begin() -> Result<Begun, WallsError> {
    close_inherited().map_err(|error| refused(Wall::ClosedDescriptors, error))?;
    close_memory().map(Begun)
}

/// Closes every descriptor but standard input, output and error.
fn close_inherited() -> io::Result<()> {
    const FIRST_OTHER: i32 = 3;
    let entries = fs::read_dir("/proc/self/fd")?;
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    // The listing's own descriptor is among these, and closed once they are collected.
    let numbers: Vec<i32> = numbers.filter(|number| *number >= FIRST_OTHER).collect();
    for number in numbers {
        match unistd::close(number) {
            Ok(()) | Err(nix::errno::Errno::EBADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn close_memory() -> Result<(), WallsError> {
    let refuse = |error| refused(Wall::NotDumpable, error);
    prctl::set_dumpable(false).map_err(refuse)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refuse)
}

fn refused(wall: Wall, error: impl ToString) -> WallsError {
    WallsError::Refused { wall, reason: error.to_string() }
}

/// The user that this process will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What it is called.
    pub name: String,
    /// Its number.
    pub uid: Uid,
    /// Its group.
    pub gid: Gid,
    /// Whether it is not yet.
    is_other: bool,
}

/// Finds out who this process will be; `name` is the user that it is to become.
///
/// # Errors
/// `NoSuchUser`, `UserIsRoot`, `NotRoot`, `Users`.
pub fn identity(name: Option<&str>) -> Result<Identity, WallsError> {
    let (uid, gid) = (unistd::geteuid(), unistd::getegid());
    let Some(name) = name else {
        let name = User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
        return Ok(Identity { name, uid, gid, is_other: false });
    };
    let by_number = || name.parse().ok().map(Uid::from_raw).map_or(Ok(None), User::from_uid);
    let found = match User::from_name(name) {
        Ok(None) => by_number(),
        found => found,
    };
    let user = found.map_err(|source| WallsError::Users { name: name.to_owned(), source })?;
    let user = user.ok_or_else(|| WallsError::NoSuchUser(name.to_owned()))?;
    if user.uid.is_root() {
        return Err(WallsError::UserIsRoot(name.to_owned()));
    }
    if user.uid != uid && !uid.is_root() {
        return Err(WallsError::NotRoot { name: name.to_owned() });
    }
    Ok(Identity { name: user.name, uid: user.uid, gid: user.gid, is_other: user.uid != uid })
}

/// Puts up all walls, for good.
///
/// # Errors
/// `Threads` and `Refused`; the process must end then.
pub fn raise(_begun: Begun, identity: &Identity, writable: &Writable) -> Result<Walls, WallsError> {
    let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(WallsError::Threads(threads));
    }
    let mut walls = vec![Wall::ClosedDescriptors, Wall::NotDumpable, Wall::NoNewPrivileges];
    let mut warnings = Vec::new();
    // Takes a capability, and so comes first; what follows holds also where it was not there.
    privileges::limit();
    if identity.is_other {
        privileges::become_user(identity).map_err(|reason| refused(Wall::User, reason))?;
        walls.push(Wall::User);
    }
    privileges::drop_all().map_err(|reason| refused(Wall::NoCapabilities, reason))?;
    walls.push(Wall::NoCapabilities);
    // The kernel sets it back when the user changes.
    close_memory()?;
    prctl::set_no_new_privs().map_err(|error| refused(Wall::NoNewPrivileges, error))?;
    match files::restrict(writable).map_err(|reason| refused(Wall::WritesRestricted, reason))? {
        files::Enforced::Fully => walls.push(Wall::WritesRestricted),
        files::Enforced::Partly => {
            walls.push(Wall::WritesRestricted);
            warnings.push("this kernel knows Landlock in part: some ways of writing files are not restricted".into());
        }
        files::Enforced::Not => {
            warnings.push("this kernel has no Landlock: where bulkhead and its workers write is not restricted".into());
        }
    }
    if identity.uid.is_root() {
        warnings
            .insert(0, "bulkhead runs as root, though without capabilities: name an ordinary user with --user".into());
    }
    Ok(Walls { user: identity.name.clone(), walls, warnings })
}

/// Gives the places that a supervisor with this configuration has to write to.
#[must_use]
pub fn writable(runtime_dir: PathBuf, control_group: Option<PathBuf>, may_use_card: bool) -> Writable {
    Writable { folders: vec![runtime_dir], control_group, may_use_card }
}
