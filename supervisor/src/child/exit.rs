//! Why an incarnation ended: told from its wait status and from what the supervisor did to it, never from text.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use bulkhead_shared::exit::WorkerExit;
use nix::sys::signal::Signal;

use super::oom::Sign;

/// Why the supervisor killed an incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KillReason {
    /// It did not say `Hello` in time.
    StartStalled,
    /// Its load did not move for too long.
    LoadStalled,
    /// It had work, or a question to answer, and did not move.
    Hang,
    /// It broke the protocol.
    Protocol,
    /// It speaks another version of the protocol: no restart will help.
    Version,
    /// It stands behind fewer walls than it must: no restart will help.
    Sandbox,
    /// It could not answer the first token that was asked of it.
    Canary,
    /// It closed its link and stayed.
    LinkClosed,
    /// It was asked to end and did not in time.
    StopTimeout,
    /// It held more memory than its plan allows.
    OverBudget,
    /// It held more memory than a load takes, before it had a plan: no restart will help.
    LoadOverBudget,
}

impl KillReason {
    /// Gives the words for logs and status lines.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            KillReason::StartStalled => "killed: it did not start in time",
            KillReason::LoadStalled => "killed: its load did not move",
            KillReason::Hang => "killed: it hung",
            KillReason::Protocol => "killed: it broke the protocol",
            KillReason::Version => "killed: it speaks another version of the protocol",
            KillReason::Sandbox => "refused: it has less sandbox than it must",
            KillReason::Canary => "killed: it could not generate its first token",
            KillReason::LinkClosed => "killed: it closed its link and stayed",
            KillReason::StopTimeout => "killed: it did not end in time",
            KillReason::OverBudget => "killed: it held more memory than planned",
            KillReason::LoadOverBudget => "killed: it held more memory than a load takes",
        }
    }
}

/// Why an incarnation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The process could not be started at all.
    NotStarted,
    /// The worker ended itself, for this reason.
    Exit(WorkerExit),
    /// An exit code that no worker chooses: 101 is a Rust panic.
    Crash {
        /// The code.
        code: i32,
    },
    /// A signal ended it, other than a SIGKILL.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// A SIGKILL that nobody here sent.
    KilledFromOutside,
    /// The kernel killed it for want of memory, by the counter of its own control group.
    OutOfMemory,
    /// A SIGKILL that nobody here sent, while the machine's kernel killed some process for want of memory.
    SuspectedOutOfMemory,
    /// The supervisor killed it.
    Killed(KillReason),
}

impl Cause {
    /// Tells the cause from the wait status, from the reason for which the supervisor had killed it, if it had, and from
    /// the kernel's counters.
    ///
    /// A worker that crashed before the kill arrived keeps its own cause, except after a breach of protocol: what such
    /// a worker says with its exit code is worth nothing.
    #[must_use]
    pub(crate) fn tell(status: ExitStatus, killed: Option<KillReason>, sign: Sign) -> Cause {
        match (killed, status.code(), status.signal()) {
            (Some(reason @ (KillReason::Protocol | KillReason::Version | KillReason::Sandbox)), _, _) => {
                Cause::Killed(reason)
            }
            (_, Some(code), _) => WorkerExit::from_code(code).map_or(Cause::Crash { code }, Cause::Exit),
            (Some(reason), None, Some(SIGKILL)) => Cause::Killed(reason),
            (None, None, Some(SIGKILL)) => match sign {
                Sign::None => Cause::KilledFromOutside,
                Sign::Suspected => Cause::SuspectedOutOfMemory,
                Sign::Certain => Cause::OutOfMemory,
            },
            (_, None, Some(signal)) => Cause::Signal { signal },
            (_, None, None) => Cause::Crash { code: status.into_raw() },
        }
    }

    /// Says whether the requests that the worker had been handed are suspects. A kill from outside never blames anybody,
    /// nor does the end of a worker that had no requests yet.
    #[must_use]
    pub fn blames(self) -> bool {
        match self {
            Cause::Exit(exit) => match exit {
                WorkerExit::OutOfDeviceMemory
                | WorkerExit::OutOfHostMemory
                | WorkerExit::DriverPoisoned
                | WorkerExit::NonFinite => true,
                WorkerExit::Orderly
                | WorkerExit::BadModel
                | WorkerExit::BadConfig
                | WorkerExit::DeviceLost
                | WorkerExit::Protocol
                | WorkerExit::SandboxIncomplete => false,
            },
            Cause::Killed(reason) => match reason {
                KillReason::Hang | KillReason::Protocol | KillReason::LinkClosed | KillReason::OverBudget => true,
                KillReason::StartStalled
                | KillReason::LoadStalled
                | KillReason::Version
                | KillReason::Sandbox
                | KillReason::Canary
                | KillReason::LoadOverBudget
                | KillReason::StopTimeout => false,
            },
            Cause::Crash { .. } | Cause::Signal { .. } | Cause::OutOfMemory => true,
            Cause::NotStarted | Cause::KilledFromOutside | Cause::SuspectedOutOfMemory => false,
        }
    }

    /// Gives the word for metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Cause::NotStarted => "not_started",
            Cause::Exit(exit) => match exit {
                WorkerExit::Orderly => "orderly",
                WorkerExit::BadModel => "bad_model",
                WorkerExit::BadConfig => "bad_config",
                WorkerExit::OutOfDeviceMemory => "out_of_device_memory",
                WorkerExit::OutOfHostMemory => "out_of_host_memory",
                WorkerExit::DriverPoisoned => "driver_poisoned",
                WorkerExit::DeviceLost => "device_lost",
                WorkerExit::NonFinite => "non_finite",
                WorkerExit::Protocol => "protocol",
                WorkerExit::SandboxIncomplete => "sandbox_incomplete",
            },
            Cause::Signal { signal: SIGSYS } => "sandbox_violation",
            Cause::Crash { .. } | Cause::Signal { .. } => "crash",
            Cause::KilledFromOutside => "killed_from_outside",
            Cause::OutOfMemory => "out_of_memory",
            Cause::SuspectedOutOfMemory => "suspected_out_of_memory",
            Cause::Killed(reason) => match reason {
                KillReason::StartStalled => "start_stalled",
                KillReason::LoadStalled => "load_stalled",
                KillReason::Hang => "hang",
                KillReason::Protocol | KillReason::LinkClosed => "broke_protocol",
                KillReason::Version => "version",
                KillReason::Sandbox => "sandbox_incomplete",
                KillReason::Canary => "canary",
                KillReason::StopTimeout => "stop_timeout",
                KillReason::OverBudget => "over_budget",
                KillReason::LoadOverBudget => "load_over_budget",
            },
        }
    }

    /// Says whether the next worker has to do with less memory.
    #[must_use]
    pub(crate) fn is_out_of_memory(self) -> bool {
        matches!(
            self,
            Cause::Exit(WorkerExit::OutOfDeviceMemory | WorkerExit::OutOfHostMemory)
                | Cause::OutOfMemory
                | Cause::SuspectedOutOfMemory
                | Cause::Killed(KillReason::OverBudget)
        )
    }

    /// Says whether no restart can help.
    #[must_use]
    pub fn is_final(self) -> bool {
        match self {
            Cause::Exit(exit) => match exit {
                WorkerExit::BadModel
                | WorkerExit::BadConfig
                | WorkerExit::Protocol
                | WorkerExit::SandboxIncomplete
                | WorkerExit::DeviceLost => true,
                WorkerExit::Orderly
                | WorkerExit::OutOfDeviceMemory
                | WorkerExit::OutOfHostMemory
                | WorkerExit::DriverPoisoned
                | WorkerExit::NonFinite => false,
            },
            // A first token that is refused is refused for what the model is, and a load is the same each time.
            Cause::Killed(reason) => match reason {
                KillReason::Version | KillReason::Sandbox | KillReason::Canary | KillReason::LoadOverBudget => true,
                KillReason::StartStalled
                | KillReason::LoadStalled
                | KillReason::Hang
                | KillReason::Protocol
                | KillReason::LinkClosed
                | KillReason::StopTimeout
                | KillReason::OverBudget => false,
            },
            // A system call that the sandbox forbids: no retry of a break-in.
            Cause::Signal { signal } => signal == SIGSYS,
            Cause::NotStarted
            | Cause::Crash { .. }
            | Cause::KilledFromOutside
            | Cause::OutOfMemory
            | Cause::SuspectedOutOfMemory => false,
        }
    }
}

const SIGKILL: i32 = Signal::SIGKILL as i32;
const SIGSYS: i32 = Signal::SIGSYS as i32;

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::NotStarted => f.write_str("could not be started"),
            Cause::Exit(exit) => f.write_str(exit.describe()),
            Cause::Crash { code: 0 } => f.write_str("crashed: it ended and left requests behind"),
            Cause::Crash { code: 101 } => f.write_str("crashed: it panicked"),
            Cause::Crash { code } => write!(f, "crashed with exit code {code}"),
            Cause::Signal { signal: SIGSYS } => {
                f.write_str("sandbox violation: it was ended at a system call that it has no use for")
            }
            Cause::Signal { signal } => match Signal::try_from(*signal) {
                Ok(name) => write!(f, "crashed by {name}"),
                Err(_) => write!(f, "crashed by signal {signal}"),
            },
            Cause::KilledFromOutside => f.write_str("killed from outside"),
            Cause::OutOfMemory => f.write_str("killed by the kernel for want of memory"),
            Cause::SuspectedOutOfMemory => f.write_str("killed, by the kernel for want of memory as it seems"),
            Cause::Killed(reason) => f.write_str(reason.describe()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_from_status_and_kill() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        let signalled = ExitStatus::from_raw;
        for (status, killed, expected) in [
            (exited(0), None, Cause::Exit(WorkerExit::Orderly)),
            (exited(20), None, Cause::Exit(WorkerExit::BadModel)),
            (exited(101), None, Cause::Crash { code: 101 }),
            (exited(1), Some(KillReason::Hang), Cause::Crash { code: 1 }),
            (exited(0), Some(KillReason::Protocol), Cause::Killed(KillReason::Protocol)),
            (signalled(9), None, Cause::KilledFromOutside),
            (signalled(9), Some(KillReason::Hang), Cause::Killed(KillReason::Hang)),
            (signalled(11), None, Cause::Signal { signal: 11 }),
            (signalled(11), Some(KillReason::StopTimeout), Cause::Signal { signal: 11 }),
            (signalled(6 | 0x80), None, Cause::Signal { signal: 6 }),
        ] {
            assert_eq!(Cause::tell(status, killed, Sign::None), expected, "{status:?} {killed:?}");
        }
        for (status, killed, sign, expected) in [
            (signalled(9), None, Sign::Certain, Cause::OutOfMemory),
            (signalled(9), None, Sign::Suspected, Cause::SuspectedOutOfMemory),
            (signalled(9), Some(KillReason::Hang), Sign::Certain, Cause::Killed(KillReason::Hang)),
            (signalled(11), None, Sign::Certain, Cause::Signal { signal: 11 }),
            (exited(23), None, Sign::Certain, Cause::Exit(WorkerExit::OutOfHostMemory)),
        ] {
            assert_eq!(Cause::tell(status, killed, sign), expected, "{status:?} {killed:?} {sign:?}");
        }
    }

    #[test]
    fn a_kill_from_outside_blames_nobody() {
        for (cause, blames) in [
            (Cause::KilledFromOutside, false),
            (Cause::SuspectedOutOfMemory, false),
            (Cause::OutOfMemory, true),
            (Cause::Crash { code: 101 }, true),
            (Cause::Signal { signal: Signal::SIGABRT as i32 }, true),
            (Cause::Killed(KillReason::Hang), true),
            (Cause::Killed(KillReason::StopTimeout), false),
            (Cause::Exit(WorkerExit::OutOfHostMemory), true),
            (Cause::Exit(WorkerExit::Orderly), false),
            (Cause::NotStarted, false),
        ] {
            assert_eq!(cause.blames(), blames, "{cause}");
        }
    }

    #[test]
    fn only_what_a_restart_cannot_help_is_final() {
        for (cause, is_final) in [
            (Cause::Exit(WorkerExit::BadModel), true),
            (Cause::Exit(WorkerExit::SandboxIncomplete), true),
            (Cause::Exit(WorkerExit::OutOfHostMemory), false),
            (Cause::Signal { signal: Signal::SIGSYS as i32 }, true),
            (Cause::Signal { signal: Signal::SIGSEGV as i32 }, false),
            (Cause::Killed(KillReason::Version), true),
            (Cause::Killed(KillReason::Sandbox), true),
            (Cause::Killed(KillReason::Canary), true),
            (Cause::Killed(KillReason::LoadOverBudget), true),
            (Cause::Killed(KillReason::OverBudget), false),
            (Cause::Killed(KillReason::Hang), false),
            (Cause::KilledFromOutside, false),
        ] {
            assert_eq!(cause.is_final(), is_final, "{cause}");
        }
    }
}
