//! What a device can say, as types: the causes by which the engine and the supervisor decide.
//!
//! Owns: the errors of computing on a device. Refuses: to know a driver; `cuda` turns its codes into these. On the
//! processor none of them occurs.

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use bulkhead_shared::units::Bytes;

use crate::quant::cpu::CpuPath;

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

/// Reads by which instructions to compute.
///
/// # Errors
/// A sentence for whoever wrote it.
pub fn parse_cpu(text: &str) -> Result<CpuChoice, String> {
    CpuChoice::parse(text).ok_or_else(|| format!("{text:?} is none of {}", CpuChoice::WORDS.join(", ")))
}

/// Gives the path that a choice stands for; it need not be one that the processor has.
#[must_use]
pub fn cpu_path(choice: CpuChoice) -> CpuPath {
    match choice {
        CpuChoice::Auto => CpuPath::detect(),
        CpuChoice::Scalar => CpuPath::Scalar,
        CpuChoice::Avx2 => CpuPath::Avx2,
        CpuChoice::AvxVnni => CpuPath::AvxVnni,
        CpuChoice::Avx512 => CpuPath::Avx512,
        CpuChoice::Amx => CpuPath::Amx,
    }
}

/// Reads the most that may be held on a device, such as `16GiB`; 0 leaves that to the plan.
///
/// # Errors
/// A sentence for whoever wrote it.
pub fn parse_memory(text: &str) -> Result<Bytes, String> {
    let (number, unit) = match (text.strip_suffix("GiB"), text.strip_suffix("MiB")) {
        (Some(number), _) => (number, 1 << 30),
        (None, Some(number)) => (number, 1 << 20),
        (None, None) if text == "0" => (text, 1),
        (None, None) => ("", 1),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.map(Bytes).ok_or_else(|| format!("{text:?} is no amount of memory: use a whole number of GiB or MiB, or 0"))
}

/// Reads how much isolation is asked for.
///
/// # Errors
/// A sentence for whoever wrote it.
pub fn parse_sandbox(text: &str) -> Result<SandboxMode, String> {
    SandboxMode::from_word(text).ok_or_else(|| format!("{text:?} is none of {}", SandboxMode::WORDS.join(", ")))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory() {
        let cases = [("0", 0), ("16GiB", 16 << 30), ("512MiB", 512 << 20), ("0GiB", 0)];
        for (text, bytes) in cases {
            assert_eq!(parse_memory(text), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "1", "GiB", "-1GiB", "1.5GiB", "16GB", "16 GiB", "17179869184GiB"] {
            let error = parse_memory(text).expect_err("no amount");
            assert!(error.contains("no amount of memory"), "{error}");
        }
    }
}
