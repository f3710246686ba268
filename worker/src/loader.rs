//! Loading a model: from a folder and a plan's wishes to everything that computing needs.
//!
//! Owns: the order of a load, the same for the service and for measuring it. Refuses: devices that this build cannot use,
//! and whatever the parts refuse. Invariant: nothing is computed before the memory plan was made.

use std::path::Path;

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::message::{DeviceChoice, LoadPlan};
use bulkhead_shared::units::Bytes;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::memory::{self, MemoryPlan, PlanError};
use crate::model::config::{Config, ConfigError};
use crate::model::decoder::Decoder;
use crate::model::weights::{self, Progress, Quantize};
use crate::quant::cpu::Cpu;
use crate::text::error::TextError;
use crate::text::generation_config::GenerationConfig;
use crate::text::tokenizer::Tokenizer;

/// Memory taken for granted where the system does not say how much is free.
const AVAILABLE_DEFAULT: Bytes = Bytes(4 << 30);

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model's text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device that this build cannot use.
    #[error("this worker computes on the processor and cannot use CUDA device {0}")]
    NoSuchDevice(u32),
    /// A thread that the system refused.
    #[error("a thread could not be started: {0}")]
    Thread(#[source] rayon::ThreadPoolBuildError),
}

impl LoadError {
    /// Gives the exit code by which the supervisor tells the cause.
    #[must_use]
    pub fn exit(&self) -> WorkerExit {
        match self {
            LoadError::Checkpoint(_) | LoadError::Config(_) | LoadError::Text(_) => WorkerExit::BadModel,
            LoadError::Plan(_) | LoadError::NoSuchDevice(_) => WorkerExit::BadConfig,
            LoadError::Thread(_) => WorkerExit::OutOfHostMemory,
        }
    }
}

/// A model that is ready to compute, and the plan for the memory that it may use.
#[derive(Debug)]
pub struct LoadedModel {
    /// The weights, and the threads that compute with them.
    pub decoder: Decoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// What the model says about its own generation.
    pub defaults: GenerationConfig,
    /// What goes where in memory.
    pub planned: MemoryPlan,
}

/// Loads the model of a plan.
///
/// # Errors
/// See `LoadError`.
pub fn load(plan: &LoadPlan, progress: &mut Progress<'_>) -> Result<LoadedModel, LoadError> {
    if let DeviceChoice::Cuda(index) = plan.device {
        return Err(LoadError::NoSuchDevice(index));
    }
    let dir = Path::new(&plan.model_dir);
    let checkpoint = Checkpoint::open(dir)?;
    let config = Config::read(dir)?;
    let tokenizer = Tokenizer::open(dir)?;
    let defaults = GenerationConfig::open(dir)?;
    let cpu = Cpu::start(plan.threads as usize).map_err(LoadError::Thread)?;
    let weights = weights::load(&checkpoint, &config, Quantize::File, progress)?;
    let available = memory::available_memory().unwrap_or(AVAILABLE_DEFAULT);
    let planned = memory::plan(&config, Bytes(weights.stored_bytes()), plan, available)?;
    Ok(LoadedModel { decoder: Decoder::new(config, weights, cpu), tokenizer, defaults, planned })
}
