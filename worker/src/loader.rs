//! Loading a model: from a folder and a plan's wishes to everything that computing needs.
//!
//! Owns: the order of a load, the same for the service and for measuring it. Refuses: devices that this build cannot use,
//! and whatever the parts refuse. Invariant: nothing is computed before the memory plan was made.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_shared::exit::WorkerExit;
#[cfg(feature = "cuda")]
use bulkhead_shared::message::{DeviceChoice, KvType};
use bulkhead_shared::message::{Facts, LoadPlan};
use bulkhead_shared::units::Bytes;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::device::DeviceError;
use crate::engine::backend::{Backend, StepTokens};
use crate::engine::kv_cache::KvCache;
use crate::engine::pager::KvShape;
use crate::memory::{self, PlanError};
use crate::model::config::{Architecture, Config, ConfigError};
use crate::model::decoder::Decoder;
use crate::model::weights::{self, Progress, Quantize, Weights};
use crate::prepare::Prepared;
use crate::quant::cpu::{Cpu, CpuError};
use crate::sandbox::Sandboxed;
use crate::text::chat::{ChatFormat, ChatSource};
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
    /// Something here or in a library does not stand what a file holds: the next worker would not either.
    #[error("{what} brings this program into a state that it has no answer to: {panic}")]
    Panicked {
        /// What was being loaded.
        what: String,
        /// Where it happened and what was said.
        panic: String,
    },
}

impl LoadError {
    /// Gives the exit code by which the supervisor tells the cause.
    #[must_use]
    pub fn exit(&self) -> WorkerExit {
        match self {
            LoadError::Checkpoint(_) | LoadError::Config(_) | LoadError::Text(_) | LoadError::Panicked { .. } => {
                WorkerExit::BadModel
            }
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
    /// How conversations are written.
    pub chat: ChatFormat,
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

/// Loads the model of a plan, with what was prepared for its device. The proof says that nothing was read before the walls.
///
/// # Errors
/// See `LoadError`.
pub fn load(
    _proof: &Sandboxed,
    prepared: Prepared,
    plan: &LoadPlan,
    progress: &mut Progress<'_>,
) -> Result<LoadedModel, LoadError> {
    let started = Instant::now();
    let dir = Path::new(&plan.model_dir);
    progress(0, 0, "the headers of the weights");
    let checkpoint = Checkpoint::open(dir)?;
    let bytes = checkpoint.tensor_bytes();
    progress(0, bytes, "config.json");
    let config = Config::read(dir)?;
    progress(0, bytes, "tokenizer.json");
    let tokenizer = Tokenizer::open(dir)?;
    progress(0, bytes, "the settings of texts");
    let conversations = match config.architecture {
        Architecture::GptOss => ChatSource::Harmony,
        Architecture::Llama => ChatSource::Folder,
    };
    let chat = ChatFormat::open(conversations, dir, &tokenizer)?;
    let defaults = GenerationConfig::open(dir)?;
    progress(0, bytes, "the weights");
    let weights = weights::load(&checkpoint, &config, Quantize::File, progress)?;
    let files = started.elapsed().as_secs_f64();
    let (backend, mut loaded) = place(config, weights, prepared, plan, progress)?;
    loaded.phases.insert(0, ("files", files));
    Ok(LoadedModel { backend, tokenizer, chat, defaults, loaded })
}

/// Plans the memory of the plan's device and brings the weights there.
///
/// A model that the card cannot take goes to the processor where the plan allows it, and the facts say so.
///
/// # Errors
/// `Plan` and `Device`.
///
/// # Panics
/// When the plan is for another device than was prepared.
pub fn place(
    config: Config,
    weights: Weights,
    prepared: Prepared,
    plan: &LoadPlan,
    progress: &mut Progress<'_>,
) -> Result<(Backend, Loaded), LoadError> {
    assert_eq!(plan.device, prepared.device, "what was prepared is what is used");
    #[cfg(feature = "cuda")]
    if let Some(card) = prepared.card {
        let reason = match crate::cuda::plan(&card, &config, &weights, plan) {
            Ok(planned) => return crate::cuda::load(card, (config, weights, prepared.cpu), &planned, progress),
            Err(error) if plan.may_use_processor => format!("the card: {error}"),
            Err(error) => return Err(error.into()),
        };
        // The type of keys and values was chosen for the card.
        let plan = LoadPlan { device: DeviceChoice::Cpu, kv_type: KvType::Bf16, ..plan.clone() };
        let (backend, mut loaded) = on_processor(config, weights, prepared.cpu, &plan)?;
        loaded.facts.given_up.insert(0, reason.clone());
        loaded.given_up.insert(0, reason);
        return Ok((backend, loaded));
    }
    // Only a card has anything to report on the way.
    let _ = progress;
    on_processor(config, weights, prepared.cpu, plan)
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
