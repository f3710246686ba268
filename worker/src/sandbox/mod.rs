//! What a worker does to itself before it reads its first byte.
//!
//! The order is the point, and it is held by types: [`begin`] gives up privileges; [`Begun::wall_in`] closes the files and
//! the first system calls; between that and [`Walled::seal`] the device is opened and threads start (`prepare`); `seal` leaves a short
//! list of system calls; [`Sealed::demand`] gives the [`Sandboxed`] without which no model is loaded. Each step puts layers in force;
//! `Hello` reports them. Nothing of a model file, prompt or frame is read before. See README.md beside this file.

mod calls;
mod files;
#[expect(unsafe_code, reason = "no safe wrapper closes a range of descriptors")]
mod limits;
mod syscalls;
#[expect(unsafe_code, reason = "no safe wrapper installs a filter that asks")]
mod watch;

use bulkhead_shared::layers::{Layer, SandboxMode};
use bulkhead_shared::message::DeviceChoice;

pub use files::{ABI_MAX, Grant, of_model};
use syscalls::Needs;

/// Who started the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// A supervisor, whose process this is; its end is the worker's.
    Supervisor(i32),
    /// A person, who has a terminal, and files to write results to.
    Person,
}

/// What a process is to stand behind.
#[derive(Clone, Debug)]
pub struct Walls {
    /// How much is asked for.
    pub mode: SandboxMode,
    /// By whom.
    pub starter: Starter,
    /// Where it will compute.
    pub device: DeviceChoice,
    /// What it may read and write.
    pub grants: Vec<Grant>,
    /// Whether a grant is for writing.
    pub writes: bool,
    /// The least interface of Landlock that is enough.
    pub landlock_abi_min: u32,
    /// The newest interface of Landlock that is used: for tests of what holds on older kernels.
    pub landlock_abi_max: u32,
    /// Layers that are left out: for tests, which show that each is needed.
    pub left_out: Vec<Layer>,
}

impl Walls {
    /// Asks for walls around a process that a person started.
    #[must_use]
    pub fn of_person(mode: SandboxMode, device: DeviceChoice, grants: Vec<Grant>) -> Walls {
        Walls {
            mode,
            starter: Starter::Person,
            device,
            grants,
            writes: false,
            landlock_abi_min: 1,
            landlock_abi_max: ABI_MAX,
            left_out: Vec::new(),
        }
    }

    fn needs(&self) -> Needs {
        Needs { has_card: matches!(self.device, DeviceChoice::Cuda(_)), writes: self.writes }
    }
}

/// A layer that the system refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox layer {} could not be put in force: {reason}; --sandbox best-effort does without it", layer.as_str())]
pub struct SandboxError {
    /// The layer.
    pub layer: Layer,
    /// What the system said.
    pub reason: String,
}

/// What has been put in force so far.
#[derive(Debug)]
struct Progress {
    walls: Walls,
    layers: Vec<Layer>,
    refused: Vec<SandboxError>,
}

impl Progress {
    /// Puts a layer in force, unless it is not asked for.
    fn put<T>(&mut self, layer: Layer, step: impl FnOnce() -> Result<T, String>) -> Option<T> {
        let is_bare = matches!(layer, Layer::ParentDeathSignal | Layer::ClosedDescriptors);
        let is_asked = self.walls.mode != SandboxMode::Off || is_bare;
        if !is_asked || self.walls.left_out.contains(&layer) {
            return None;
        }
        match step() {
            Ok(made) => {
                self.layers.push(layer);
                Some(made)
            }
            Err(reason) => {
                self.refused.push(SandboxError { layer, reason });
                None
            }
        }
    }
}

/// A process that gave up its privileges. Libraries that a device needs are loaded now, or never.
#[derive(Debug)]
pub struct Begun(Progress);

/// A process that opens no files but those granted, and starts no program.
#[derive(Debug)]
pub struct Walled(Progress, files::Enforced);

/// A process behind all of its walls. Nothing was read that anybody else wrote.
#[derive(Debug)]
pub struct Sealed(Progress, files::Enforced);

/// Proof that the process stands behind every wall that was asked for: only `Sealed::demand` makes one, and whoever reads
/// from a model folder asks for it.
#[derive(Debug)]
pub struct Sandboxed {
    layers: Vec<Layer>,
    #[expect(dead_code, reason = "its rules last as long as what it holds")]
    enforced: files::Enforced,
}

/// Gives up what a worker does not need. A process that a person started is started anew without its environment.
#[must_use]
pub fn begin(walls: Walls) -> Begun {
    let starter = walls.starter;
    let mut progress = Progress { walls, layers: Vec::with_capacity(Layer::ALL.len()), refused: Vec::new() };
    progress.put(Layer::EmptyEnvironment, || limits::empty_environment(starter));
    if let Starter::Supervisor(supervisor) = starter {
        progress.put(Layer::ParentDeathSignal, || limits::die_with_parent(supervisor));
    }
    progress.put(Layer::ClosedDescriptors, limits::close_descriptors);
    progress.put(Layer::ResourceLimits, || limits::resource_limits(starter));
    progress.put(Layer::NoCapabilities, limits::no_capabilities);
    progress.put(Layer::NoNewPrivileges, limits::no_new_privileges);
    // After what reads about the process itself: its files are root's from here on.
    progress.put(Layer::NotDumpable, limits::not_dumpable);
    Begun(progress)
}

impl Begun {
    /// Closes all files but those granted, and refuses the system calls that nothing here needs.
    #[must_use]
    pub fn wall_in(mut self) -> Walled {
        let walls = self.0.walls.clone();
        let mut grants = walls.grants.clone();
        grants.extend(Grant::of_every_worker());
        #[cfg(feature = "cuda")]
        if let DeviceChoice::Cuda(index) = walls.device {
            grants.extend(Grant::of_card(index));
        }
        let restrict = || {
            limits::one_thread()?;
            files::restrict(&grants, walls.landlock_abi_min, walls.landlock_abi_max)
        };
        let enforced = self.0.put(Layer::Files, restrict).unwrap_or_default();
        for (layer, is_in_force) in [(Layer::Tcp, enforced.has_tcp), (Layer::Scope, enforced.has_scope)] {
            if is_in_force {
                self.0.layers.push(layer);
            }
        }
        let needs = walls.needs();
        let is_filtered = walls.mode != SandboxMode::Off && !walls.left_out.contains(&Layer::SystemCalls);
        let first = match walls.mode {
            SandboxMode::Full | SandboxMode::BestEffort if is_filtered => syscalls::refuse(needs),
            SandboxMode::Log if is_filtered => syscalls::name_others(needs),
            SandboxMode::Full | SandboxMode::BestEffort | SandboxMode::Log | SandboxMode::Off => Ok(()),
        };
        if let Err(reason) = first {
            self.0.refused.push(SandboxError { layer: Layer::SystemCalls, reason });
        }
        Walled(self.0, enforced)
    }
}

impl Walled {
    /// Leaves the process, with every thread that it has, the system calls that serving takes.
    #[must_use]
    pub fn seal(mut self) -> Sealed {
        let (mode, needs) = (self.0.walls.mode, self.0.walls.needs());
        let has_failed = self.0.refused.iter().any(|refused| refused.layer == Layer::SystemCalls);
        match mode {
            SandboxMode::Log => watch::seal(),
            SandboxMode::Full | SandboxMode::BestEffort if !has_failed => {
                self.0.put(Layer::SystemCalls, || syscalls::allow_only(needs));
            }
            SandboxMode::Full | SandboxMode::BestEffort | SandboxMode::Off => {}
        }
        Sealed(self.0, self.1)
    }
}

impl Sealed {
    /// Gives the layers in force.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.0.layers
    }

    /// Gives what the system refused.
    #[must_use]
    pub fn refused(&self) -> &[SandboxError] {
        &self.0.refused
    }

    /// Gives the proof, if all that was asked for is in force.
    ///
    /// # Errors
    /// The first required layer that the system refused.
    pub fn demand(self) -> Result<Sandboxed, SandboxError> {
        let is_demanded = matches!(self.0.walls.mode, SandboxMode::Full | SandboxMode::Log);
        match self.0.refused.into_iter().find(|refused| is_demanded && refused.layer.is_required()) {
            Some(refused) => Err(refused),
            None => Ok(Sandboxed { layers: self.0.layers, enforced: self.1 }),
        }
    }
}

impl Sandboxed {
    /// Stands for a process that asked for no walls at all, such as a test. It says so wherever it is asked.
    #[must_use]
    pub fn without_walls() -> Sandboxed {
        Sandboxed { layers: Vec::new(), enforced: files::Enforced::default() }
    }

    /// Gives the layers in force.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }
}
