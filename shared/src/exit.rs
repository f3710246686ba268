//! How a worker ends by its own decision: one exit code for each cause that the supervisor treats differently.

/// The cause with which a worker ended itself.
///
/// The codes stay clear of 1 and 2 (a shell's and clap's), of 101 (a Rust panic, which is a crash) and of 128 and up
/// (a shell's word for signals).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkerExit {
    /// The supervisor closed the link and the worker had nothing left to do.
    Orderly,
    /// The model folder cannot be served: malformed, incomplete or contradictory.
    BadModel,
    /// The plan or the command line asks for what this worker cannot do.
    BadConfig,
    /// The device has no memory left, by the driver's own error.
    OutOfDeviceMemory,
    /// The host refused memory that the plan had granted.
    OutOfHostMemory,
    /// The driver reported a sticky error; only a new process can use the device again.
    DriverPoisoned,
    /// The device is gone.
    DeviceLost,
    /// The model produced a logit that is not a number.
    NonFinite,
    /// The supervisor sent a frame that breaks the protocol.
    Protocol,
    /// A layer of the sandbox could not be put in force.
    SandboxIncomplete,
}

impl WorkerExit {
    /// Every cause, for tables and tests.
    pub const ALL: [WorkerExit; 10] = [
        WorkerExit::Orderly,
        WorkerExit::BadModel,
        WorkerExit::BadConfig,
        WorkerExit::OutOfDeviceMemory,
        WorkerExit::OutOfHostMemory,
        WorkerExit::DriverPoisoned,
        WorkerExit::DeviceLost,
        WorkerExit::NonFinite,
        WorkerExit::Protocol,
        WorkerExit::SandboxIncomplete,
    ];

    /// Gives the process exit code of this cause.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            WorkerExit::Orderly => 0,
            WorkerExit::BadModel => 20,
            WorkerExit::BadConfig => 21,
            WorkerExit::OutOfDeviceMemory => 22,
            WorkerExit::OutOfHostMemory => 23,
            WorkerExit::DriverPoisoned => 24,
            WorkerExit::DeviceLost => 25,
            WorkerExit::NonFinite => 26,
            WorkerExit::Protocol => 27,
            WorkerExit::SandboxIncomplete => 28,
        }
    }

    /// Finds the cause of an exit code; `None` for a code that no worker chooses.
    #[must_use]
    pub fn from_code(code: i32) -> Option<WorkerExit> {
        Self::ALL.into_iter().find(|exit| i32::from(exit.code()) == code)
    }

    /// Gives the words for logs and status lines.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            WorkerExit::Orderly => "ended in order",
            WorkerExit::BadModel => "the model cannot be served",
            WorkerExit::BadConfig => "the worker cannot do what its plan asks",
            WorkerExit::OutOfDeviceMemory => "out of device memory",
            WorkerExit::OutOfHostMemory => "out of host memory",
            WorkerExit::DriverPoisoned => "the driver reported an error that only a new process clears",
            WorkerExit::DeviceLost => "the device is lost: a restart of the worker will not help",
            WorkerExit::NonFinite => "the model produced a value that is not a number",
            WorkerExit::Protocol => "the supervisor broke the protocol",
            WorkerExit::SandboxIncomplete => "a sandbox layer could not be put in force",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_and_comes_back() {
        for exit in WorkerExit::ALL {
            assert_eq!(WorkerExit::from_code(i32::from(exit.code())), Some(exit));
        }
        for code in [1, 2, 101, 137, -1, 256] {
            assert_eq!(WorkerExit::from_code(code), None, "{code}");
        }
    }
}
