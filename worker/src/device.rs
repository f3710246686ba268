//! What a device can say, as types: the causes by which the engine and the supervisor decide.
//!
//! Owns: the errors of computing on a device. Refuses: to know a driver; `cuda` turns its codes into these. On the
//! processor none of them occurs.

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::message::DeviceChoice;
use bulkhead_shared::units::Bytes;

/// Reads a device's name: `cpu` or `cuda:N`.
///
/// # Errors
/// A sentence for whoever wrote it.
pub fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    match (text, number) {
        ("cpu", _) => Ok(DeviceChoice::Cpu),
        (_, Some(number)) => Ok(DeviceChoice::Cuda(number)),
        (_, None) => Err(format!("{text:?} is not a device: use cpu or cuda:N, such as cuda:0")),
    }
}

/// Why a device cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver, no such card, or the card or its driver is none that this worker supports.
    #[error("{0}")]
    Unusable(String),
    /// The device has no room for a buffer. The device itself is fine.
    #[error("the device has no room for {wanted} of {what}: {free} are free")]
    OutOfMemory {
        /// The buffer.
        wanted: Bytes,
        /// What it was for.
        what: &'static str,
        /// What the device has left.
        free: Bytes,
    },
    /// The driver refused a call, and nothing that this process does on the device can be trusted any more.
    #[error("the CUDA driver failed with {name} ({code}) in {call}")]
    Poisoned {
        /// The driver's name of the error.
        name: String,
        /// Its number.
        code: u32,
        /// The driver's function.
        call: &'static str,
    },
    /// The device is gone: another process on it would fail too.
    #[error("the device is lost: the CUDA driver says {name} ({code}) in {call}")]
    Lost {
        /// The driver's name of the error.
        name: String,
        /// Its number.
        code: u32,
        /// The driver's function.
        call: &'static str,
    },
}

impl DeviceError {
    /// Gives the exit code by which the supervisor tells the cause.
    #[must_use]
    pub fn exit(&self) -> WorkerExit {
        match self {
            DeviceError::Unusable(_) => WorkerExit::BadConfig,
            DeviceError::OutOfMemory { .. } => WorkerExit::OutOfDeviceMemory,
            DeviceError::Poisoned { .. } => WorkerExit::DriverPoisoned,
            DeviceError::Lost { .. } => WorkerExit::DeviceLost,
        }
    }
}
