//! What a worker does behind its first walls and before its last one: open the device, ask the kernel for what computing
//! takes, start the threads that compute.
//!
//! Owns: the order of a worker's start, the same for the service and for every command that reads a model. What the last
//! filter of system calls would forbid, and every thread that must be there before it, belongs into [`Prepared::start`].
//! Refuses: to read anything of a model.

use bulkhead_shared::message::{CpuChoice, DeviceChoice};

use crate::device::cpu_path;
use crate::loader::LoadError;
use crate::quant::cpu::{Cpu, cores};
use crate::sandbox::{self, Sealed, Walls};

/// What computing takes, but the model.
#[derive(Debug)]
pub struct Prepared {
    /// The threads and instructions of the processor.
    pub cpu: Cpu,
    /// The card, where one was asked for.
    #[cfg(feature = "cuda")]
    pub card: Option<crate::cuda::driver::Card>,
    /// What was asked for.
    pub device: DeviceChoice,
}

impl Prepared {
    /// Opens the device and starts `threads` threads that compute by the processor's instructions of choice; 0: one for each
    /// physical core that this process may use.
    ///
    /// # Errors
    /// `NoSuchDevice` and `Device` for the device, `Cpu` where the system refuses a thread or the processor has no such
    /// instructions.
    pub fn start(device: DeviceChoice, cpu: CpuChoice, threads: usize) -> Result<Prepared, LoadError> {
        #[cfg(not(feature = "cuda"))]
        if let DeviceChoice::Cuda(index) = device {
            return Err(LoadError::NoSuchDevice(index));
        }
        Ok(Prepared {
            #[cfg(feature = "cuda")]
            card: match device {
                DeviceChoice::Cpu => None,
                DeviceChoice::Cuda(index) => Some(crate::cuda::open(index)?),
            },
            cpu: Cpu::start_on(cpu_path(cpu), threads)?,
            device,
        })
    }
}

/// Puts every wall in force, and starts what computing takes in between. What could not be started keeps no wall away: whoever
/// stands behind them can say what is wrong.
///
/// # Errors
/// Of what was started, as `Prepared::start`. Walls that the system refused are told by the proof.
pub fn behind_walls(walls: Walls, cpu: CpuChoice, threads: usize) -> (Sealed, Result<Prepared, LoadError>) {
    let device = walls.device;
    let begun = sandbox::begin(walls);
    // Files that say how many cores a container has are closed by the walls.
    let threads = if threads == 0 { cores() } else { threads };
    let libraries = open_libraries(device);
    let walled = begun.wall_in();
    let prepared = libraries.and_then(|()| Prepared::start(device, cpu, threads));
    (walled.seal(), prepared)
}

/// Loads the libraries of a device, which the walls would keep from being read.
fn open_libraries(device: DeviceChoice) -> Result<(), LoadError> {
    match device {
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(_) => Ok(crate::cuda::driver::open_libraries()?),
        // Without the driver there is nothing to load, and `Prepared::start` says so.
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => Ok(()),
        DeviceChoice::Cpu => Ok(()),
    }
}
