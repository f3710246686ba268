//! Loading a model: from a folder and a plan's wishes to everything that computing needs.
//!
//! Owns: the order of a load, the same for the service and for measuring it. Refuses: devices that this build cannot use,
//! and whatever the parts refuse. Invariant: nothing is computed before the memory plan was made.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::message::{DeviceChoice, Facts, LoadPlan};
use bulkhead_shared::units::Bytes;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::{DeviceError, cpu_path};
use crate::engine::backend::{Backend, StepTokens};
use crate::engine::kv_cache::KvCache;
use crate::engine::pager::KvShape;
use crate::memory::{self, PlanError};
use crate::model::config::{Config, ConfigError};
use crate::model::decoder::Decoder;
use crate::model::weights::{self, Progress, Quantize, Weights};
use crate::quant::cpu::{Cpu, CpuError};
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
    #[error("this worker computes on the processor and cannot use CUDA device {0}: bulkhead-worker-cuda can")]
    NoSuchDevice(u32),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The processor, or a thread on it.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

impl LoadError {
    /// Gives the exit code by which the supervisor tells the cause.
    #[must_use]
    pub fn exit(&self) -> WorkerExit {
        match self {
            LoadError::Checkpoint(_) | LoadError::Config(_) | LoadError::Text(_) => WorkerExit::BadModel,
            LoadError::Plan(_) | LoadError::NoSuchDevice(_) => WorkerExit::BadConfig,
            LoadError::Device(error) => error.exit(),
            LoadError::Cpu(CpuError::Missing(_)) => WorkerExit::BadConfig,
            LoadError::Cpu(CpuError::Thread(_)) => WorkerExit::OutOfHostMemory,
        }
    }
}

/// A model that is ready to compute, and the plan for the memory that it may use.
#[derive(Debug)]
pub struct LoadedModel {
    /// The weights in their places, and what computes with them.
    pub backend: Backend,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// What the model says about its own generation.
    pub defaults: GenerationConfig,
    /// What was loaded and what it may use.
    pub loaded: Loaded,
}

/// What a load came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What the supervisor is told.
    pub facts: Facts,
    /// Sequences in one batch.
    pub sequences: u32,
    /// What the plan had to give up, for people.
    pub given_up: Vec<String>,
    /// What the load spent its time on. Units: seconds.
    pub phases: Vec<(&'static str, f64)>,
}

/// Loads the model of a plan.
///
/// # Errors
/// See `LoadError`.
pub fn load(plan: &LoadPlan, progress: &mut Progress<'_>) -> Result<LoadedModel, LoadError> {
    let started = Instant::now();
    let dir = Path::new(&plan.model_dir);
    let checkpoint = Checkpoint::open(dir)?;
    let config = Config::read(dir)?;
    let tokenizer = Tokenizer::open(dir)?;
    let defaults = GenerationConfig::open(dir)?;
    let cpu = Cpu::start_on(cpu_path(plan.cpu), plan.threads as usize)?;
    let weights = weights::load(&checkpoint, &config, Quantize::File, progress)?;
    let files = started.elapsed().as_secs_f64();
    let (backend, mut loaded) = place(config, weights, cpu, plan, progress)?;
    loaded.phases.insert(0, ("files", files));
    Ok(LoadedModel { backend, tokenizer, defaults, loaded })
}

/// Plans the memory of the plan's device and brings the weights there.
///
/// # Errors
/// `Plan`, `NoSuchDevice` and `Device`.
pub fn place(
    config: Config,
    weights: Weights,
    cpu: Cpu,
    plan: &LoadPlan,
    progress: &mut Progress<'_>,
) -> Result<(Backend, Loaded), LoadError> {
    match plan.device {
        DeviceChoice::Cpu => on_processor(config, weights, cpu, plan),
        DeviceChoice::Cuda(index) => on_card(index, (config, weights, cpu), plan, progress),
    }
}

fn on_processor(config: Config, weights: Weights, cpu: Cpu, plan: &LoadPlan) -> Result<(Backend, Loaded), LoadError> {
    let available = memory::available_memory().unwrap_or(AVAILABLE_DEFAULT);
    let planned = memory::plan(&config, Bytes(weights.stored_bytes()), plan, available)?;
    let format = weights.format_name();
    let cache = KvCache::new(KvShape::of(&config), planned.full_blocks, planned.sequences, StepTokens::CPU.sum());
    let decoder = Arc::new(Decoder::new(config, weights, cpu));
    let facts = planned.facts(decoder.config(), decoder.describe_device(), format);
    let given_up = facts.given_up.clone();
    let loaded = Loaded { facts, sequences: planned.sequences, given_up, phases: Vec::new() };
    Ok((Backend::cpu(decoder, cache), loaded))
}

type Model = (Config, Weights, Cpu);

#[cfg(not(feature = "cuda"))]
fn on_card(index: u32, _: Model, _: &LoadPlan, _: &mut Progress<'_>) -> Result<(Backend, Loaded), LoadError> {
    Err(LoadError::NoSuchDevice(index))
}

#[cfg(feature = "cuda")]
fn on_card(
    index: u32,
    (config, weights, cpu): Model,
    plan: &LoadPlan,
    progress: &mut Progress<'_>,
) -> Result<(Backend, Loaded), LoadError> {
    let card = crate::cuda::driver::Card::open(index)?;
    crate::cuda::load(card, (config, weights, cpu), plan, progress)
}
