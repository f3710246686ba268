//! The layers that need no rules: signals, privileges, capabilities, descriptors, limits.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

use super::Starter;

/// Descriptors that a worker may hold: the link and its copy, standard error, the shards of a large model (each is closed
/// once it is mapped), and what threads need.
const DESCRIPTORS_MAX: u64 = 256;

/// The first descriptor that is neither the link nor standard output or error.
const FIRST_SPARE_DESCRIPTOR: u32 = 3;

/// Leaves the terminal's session, so that its Ctrl-C reaches the supervisor alone, and asks for SIGKILL when the
/// supervisor's spawning thread ends.
pub(super) fn die_with_parent(supervisor: i32) -> Result<(), String> {
    // A process that leads its group cannot leave, and has no need to: it was not started from a terminal's group.
    let _ = nix::unistd::setsid();
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| error.to_string())?;
    match nix::unistd::getppid().as_raw() {
        parent if parent == supervisor => Ok(()),
        parent => Err(format!("process {supervisor} is not the parent ({parent} is): it has ended")),
    }
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

/// Checks that no environment variable was inherited. A person's shell always passes some on, and the kernel shows them
/// for the life of the process, so the process then starts itself anew without.
pub(super) fn empty_environment(starter: Starter) -> Result<(), String> {
    match (std::env::vars_os().count(), starter) {
        (0, _) => Ok(()),
        (count, Starter::Supervisor(_)) => Err(format!("{count} environment variables were inherited")),
        (_, Starter::Person) => {
            let mut command = Command::new("/proc/self/exe");
            let mut arguments = std::env::args_os();
            if let Some(name) = arguments.next() {
                command.arg0(name);
            }
            Err(format!("the process cannot start anew: {}", command.args(arguments).env_clear().exec()))
        }
    }
}

/// Limits what the kernel would write, and descriptors. Results of a person's command may go to a file.
pub(super) fn resource_limits(starter: Starter) -> Result<(), String> {
    let limits = [(Resource::RLIMIT_CORE, 0), (Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX), (Resource::RLIMIT_FSIZE, 0)];
    let count = if starter == Starter::Person { 2 } else { 3 };
    for (resource, limit) in limits.into_iter().take(count) {
        setrlimit(resource, limit, limit).map_err(|error| format!("{resource:?}: {error}"))?;
    }
    Ok(())
}

/// Checks that there is no thread that was started before, which Landlock would leave free.
pub(super) fn one_thread() -> Result<(), String> {
    let tasks = std::fs::read_dir("/proc/self/task").map_err(|error| format!("/proc/self/task: {error}"))?;
    match tasks.count() {
        1 => Ok(()),
        count => Err(format!("{count} threads run already")),
    }
}
