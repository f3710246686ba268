//! The layers that need no rules: signals, privileges, capabilities, descriptors, limits.

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

/// Descriptors that a worker may hold: the link and its copy, standard error, the shards of a large model (each is closed
/// once it is mapped), and what threads need.
const DESCRIPTORS_MAX: u64 = 256;

/// The first descriptor that is neither the link nor standard output or error.
const FIRST_SPARE_DESCRIPTOR: u32 = 3;

/// Leaves the terminal's session, so that its Ctrl-C reaches the supervisor alone, and asks for SIGKILL when the
/// supervisor's spawning thread ends. Should that have happened before this call, the end of the link tells.
pub(super) fn die_with_parent() -> Result<(), String> {
    // A process that leads its group cannot leave, and has no need to: it was not started from a terminal's group.
    let _ = nix::unistd::setsid();
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| error.to_string())
}

pub(super) fn not_dumpable() -> Result<(), String> {
    prctl::set_dumpable(false).map_err(|error| error.to_string())
}

pub(super) fn no_new_privileges() -> Result<(), String> {
    prctl::set_no_new_privs().map_err(|error| error.to_string())
}

/// Empties every capability set. The bounding set can be emptied by those alone who hold CAP_SETPCAP; for others it
/// grants nothing, since `no_new_privs` is set.
pub(super) fn no_capabilities() -> Result<(), String> {
    use caps::{CapSet, clear, read};
    let _ = clear(None, CapSet::Bounding);
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        clear(None, set).map_err(|error| error.to_string())?;
        let left = read(None, set).map_err(|error| error.to_string())?;
        if !left.is_empty() {
            return Err(format!("{} capabilities are left in the {set:?} set", left.len()));
        }
    }
    Ok(())
}

/// Closes whatever was inherited beyond standard input, output and error.
pub(super) fn close_descriptors() -> Result<(), String> {
    // SAFETY: this runs first in `main`, before any descriptor was opened, so no owner of a closed one exists. No safe
    // wrapper closes a range, and closing one by one would need the listing that this makes unnecessary.
    let result = unsafe { libc::close_range(FIRST_SPARE_DESCRIPTOR, u32::MAX, 0) };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().to_string()),
    }
}

pub(super) fn empty_environment() -> Result<(), String> {
    match std::env::vars_os().count() {
        0 => Ok(()),
        count => Err(format!("{count} environment variables were inherited")),
    }
}

pub(super) fn resource_limits() -> Result<(), String> {
    for (resource, limit) in
        [(Resource::RLIMIT_CORE, 0), (Resource::RLIMIT_FSIZE, 0), (Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX)]
    {
        setrlimit(resource, limit, limit).map_err(|error| format!("{resource:?}: {error}"))?;
    }
    Ok(())
}
