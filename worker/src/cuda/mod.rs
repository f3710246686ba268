//! The model on an NVIDIA card, through the driver alone: libcuda is opened at run time and nothing of CUDA is linked.
//!
//! From the top: `load` plans the card's memory, brings the weights there and makes everything that steps need; `pass`
//! computes the tokens of one role; `kernels` knows how each kernel is launched, `weights` what lies where, `driver` and
//! `transfer` the driver. Owns: keys and values on the card, and all that a step works in, made once from the plan.
//! Refuses: to allocate while it computes (recorded graphs excepted), and to go on after an error of the driver.
//!
//! A token's arithmetic follows from its role and position. Generated tokens go through kernels whose sums are the same
//! alone and among others; those of prompts through kernels for many tokens, whose sums do not depend on the chunks. A step
//! with both computes them one after the other, and waits for the card once for each.

pub mod devices;
#[expect(unsafe_code, reason = "calls the driver")]
pub mod driver;
mod form;
mod host_part;
pub mod images;
pub mod kernels;
mod pass;
pub mod swap;
pub mod tables;
#[expect(unsafe_code, reason = "calls the driver")]
pub mod transfer;
pub mod upload;
pub mod weights;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bulkhead_shared::message::{LoadPlan, device_budget};
use bulkhead_shared::units::Bytes;

use self::driver::Card;
use self::host_part::HostPart;
use self::kernels::Kernels;
use self::pass::{Graphs, Pass};
use self::swap::{SwapSpace, SwappedBlocks};
use self::tables::{BlockTables, InputPlaces, Inputs};
use self::transfer::{HostBuffer, Memory};
use self::weights::{CardWeights, Places, Planned};
use crate::device::DeviceError;
use crate::engine::backend::{Backend, StepTokens};
use crate::engine::pager::{BLOCK_TOKENS, Blocks, Kind, KvShape, Pager};
use crate::loader::{LoadError, Loaded};
use crate::memory::card::{self, CardLimits, CardPlan, KvType, LayerSizes, WeightSizes};
use crate::memory::scratch::{Scratch, StepSize};
use crate::memory::{PlanError, available_memory};
use crate::model::batch::{Batch, Outcome, Role, Wanted};
use crate::model::config::Config;
use crate::model::rope::RopeTable;
use crate::model::weights::{Progress, Weights};
use crate::quant::Matrix;
use crate::quant::cpu::Cpu;

/// Host memory taken for granted where the system does not say how much is free.
const AVAILABLE_DEFAULT: Bytes = Bytes(4 << 30);

/// A model on a card with everything that its steps need.
pub struct CardModel {
    card: Card,
    config: Config,
    rope: RopeTable,
    /// Cosines and then sines of each position so far: [positions, head] f32, at most as many as the context has.
    angles: Vec<f32>,
    kernels: Kernels,
    weights: CardWeights,
    /// The embedding, where the host gathers its rows.
    embedding: Option<Matrix>,
    host: HostPart,
    pager: Pager,
    pools: [Pool; 2],
    step_tokens: StepTokens,
    scratch: Scratch,
    scratch_memory: Memory,
    generated: Inputs,
    prompt: Inputs,
    /// Rows of the embedding on their way, then results of experts that the host computed.
    rows: HostBuffer,
    results: Results,
    graphs: Graphs,
    swap: SwapSpace,
    progress: Arc<AtomicU64>,
    weight_bytes_read: u64,
}

impl fmt::Debug for CardModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CardModel").field("card", self.card.facts()).finish_non_exhaustive()
    }
}

/// Keys and values of the layers of one kind.
#[derive(Debug)]
struct Pool {
    memory: Memory,
    tables: BlockTables,
    layers: u32,
    block_bytes: u64,
}

/// What comes back from a pass.
#[derive(Debug)]
struct Results {
    /// [outputs] of two u32, then [layers] u32: groups of experts.
    chosen: HostBuffer,
    /// [outputs, vocabulary] f32.
    logits: HostBuffer,
}

/// Opens a card and has it do a little of everything, so that its driver opens what it opens but once: the last filter of
/// system calls comes next.
///
/// # Errors
/// `Unusable` where the card or its driver cannot be used; the driver's.
pub fn open(index: u32) -> Result<Card, DeviceError> {
    const BYTES: u32 = 4096;
    let card = Card::open(index)?;
    let image = images::module(card.facts().capability, "norm");
    let _module = card.load_module(&image.map_err(|error| DeviceError::Unusable(error.to_string()))?)?;
    let (memory, host) =
        (Memory::take(&card, BYTES.into(), "a first buffer")?, HostBuffer::take(&card, BYTES as usize)?);
    memory.clear()?;
    memory.copy_out(0, &host, 0, BYTES as usize)?;
    card.wait()?;
    Ok(card)
}

/// Plans what a card holds of a model.
///
/// # Errors
/// See `card::plan_card`.
pub fn plan(card: &Card, config: &Config, weights: &Weights, asked: &LoadPlan) -> Result<CardPlan, PlanError> {
    let limits = CardLimits {
        budget: device_budget(asked.device_budget, card.facts().memory),
        host_available: available_memory().unwrap_or(AVAILABLE_DEFAULT),
    };
    card::plan_card(config, &sizes_of_loaded(weights, config.heads), asked, asked.kv_type, limits)
}

/// Loads a model onto a card, as planned.
///
/// # Errors
/// `Device` for what the driver says.
pub fn load(
    card: Card,
    (config, weights, cpu): (Config, Weights, Cpu),
    planned: &CardPlan,
    progress: &mut Progress<'_>,
) -> Result<(Backend, Loaded), LoadError> {
    let format = weights.format_name();
    let mut clock = Clock { since: Instant::now(), phases: Vec::new() };
    let model = CardModel::make(card, (config, weights, cpu), planned, (progress, &mut clock))?;
    let facts = planned.facts(&model.config, model.describe(), format);
    let given_up = facts.given_up.clone();
    let loaded = Loaded { facts, sequences: planned.sequences, given_up, phases: clock.phases };
    Ok((Backend::Cuda(Box::new(model)), loaded))
}

/// What a load spends its time on.
struct Clock {
    since: Instant,
    phases: Vec<(&'static str, f64)>,
}

impl Clock {
    /// Ends a phase; the next begins.
    fn end(&mut self, phase: &'static str) {
        self.phases.push((phase, self.since.elapsed().as_secs_f64()));
        self.since = Instant::now();
    }
}

/// Sizes the parts of a model as the card will hold them.
fn sizes_of_loaded(weights: &Weights, heads: usize) -> WeightSizes {
    let linear = |linear: &crate::model::weights::Linear| {
        linear.weight.stored_bytes() as u64 + linear.bias.as_deref().map_or(0, size_of_val) as u64
    };
    let layers = weights.layers.iter().map(|layer| {
        let attention = &layer.attention;
        let router = layer.mlp.experts().map_or(0, |mixture| linear(&mixture.router));
        let projections: u64 = [&attention.q, &attention.k, &attention.v, &attention.o].into_iter().map(linear).sum();
        let floats = layer.attention_norm.len() + layer.mlp_norm.len() + heads;
        LayerSizes {
            attention: projections + router + 4 * floats as u64,
            mlp: layer.mlp.linears().map(linear).sum::<u64>() - router,
        }
    });
    let is_tied = weights.is_tied();
    WeightSizes {
        embedding: if is_tied { 0 } else { weights.embedding.stored_bytes() as u64 },
        lm_head: weights.lm_head.stored_bytes() as u64 + 4 * weights.final_norm.len() as u64,
        layers: layers.collect(),
        is_tied,
    }
}

impl CardModel {
    /// Brings the weights to the card and makes what steps need, as planned.
    fn make(
        card: Card,
        (config, weights, cpu): (Config, Weights, Cpu),
        planned: &CardPlan,
        (progress, clock): (&mut Progress<'_>, &mut Clock),
    ) -> Result<CardModel, DeviceError> {
        let is_tied = planned.is_embedding_on_card && config.has_tied_embeddings;
        let places = Places {
            host_mlps: planned.host_layers[..config.layers.len() - planned.whole_layers].to_vec(),
            is_embedding_on_card: planned.is_embedding_on_card && !is_tied,
        };
        let layout = Planned::new(&config, &weights, &places)?;
        let kernels = Kernels::load(&card, &layout.forms(), planned.kv_type == KvType::Int8)?;
        clock.end("kernels");
        let on_card = layout.bring(&card, &mut |done, total| progress(done, total, "weights to the card"))?;
        clock.end("weights");
        let step_tokens = planned.step();
        let size = StepSize {
            generated_rows: step_tokens.generated,
            prompt_rows: step_tokens.prompt,
            context_tokens: planned.context_tokens,
        };
        let scratch = Scratch::new(&config, size);
        let scratch_memory = Memory::take(&card, scratch.bytes.0, "the buffers of a step")?;
        // Counters are zero between launches.
        scratch_memory.clear()?;
        let host = HostPart::new(&config, &weights, cpu, planned);
        let pager = Pager::new(KvShape::of(&config), planned.full_blocks, planned.sequences, step_tokens.sum());
        assert!(host.agrees_with(&pager), "one book keeps the blocks of both");
        let pool = |kind: Kind| Pool::take(&card, kind, &pager, planned);
        let pools = [pool(Kind::Full)?, pool(Kind::Window)?];
        let inputs = |rows: u32| {
            let (rows, outputs) = (rows as usize, step_tokens.generated as usize);
            Inputs::take(&card, InputPlaces::new(rows, outputs, config.head_dim / 2, rows))
        };
        let (generated, prompt) = (inputs(step_tokens.generated)?, inputs(step_tokens.prompt)?);
        let rows = step_tokens.of_sequence() as usize;
        let mut model = CardModel {
            rows: HostBuffer::take(&card, rows * config.hidden_size * size_of::<f32>())?,
            results: Results::take(&card, &config, step_tokens.generated as usize)?,
            swap: SwapSpace::take(&card, usize::try_from(planned.swap.0).unwrap_or(0))?,
            embedding: on_card.embedding.is_none().then(|| weights.embedding.clone()),
            rope: RopeTable::new(&config.rope),
            angles: Vec::new(),
            graphs: Graphs::default(),
            progress: Arc::default(),
            weight_bytes_read: 0,
            weights: on_card,
            config,
            host,
            kernels,
            pager,
            pools,
            step_tokens,
            scratch,
            scratch_memory,
            generated,
            prompt,
            card,
        };
        clock.end("buffers");
        model.warm_up()?;
        clock.end("first steps");
        Ok(model)
    }

    /// Computes one token of either role, so that the first request finds every kernel loaded and one graph recorded.
    fn warm_up(&mut self) -> Result<(), DeviceError> {
        for role in [Role::Prompt, Role::Generated] {
            let mut blocks = Blocks::default();
            self.pager.reserve(&mut blocks, 1).expect("an empty cache has a block");
            let row = crate::model::batch::Row { sequence: 0, position: 0, token: 0, role };
            let batch = Batch { rows: vec![row], blocks: vec![&blocks], outputs: vec![0] };
            self.forward(&batch, &[Wanted::Token { temperature: 0.0, seed: 0, position: 1 }])?;
            self.pager.release(&mut blocks);
        }
        Ok(())
    }

    /// Gives the model's configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Gives the books of the cache.
    pub fn pager(&mut self) -> &mut Pager {
        &mut self.pager
    }

    /// Gives the largest step.
    #[must_use]
    pub fn step_tokens(&self) -> StepTokens {
        self.step_tokens
    }

    /// Gives the counter of layers computed so far.
    #[must_use]
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.progress)
    }

    /// Describes the card, for people: `cuda:0 (NVIDIA H100 80GB HBM3)`.
    #[must_use]
    pub fn describe(&self) -> String {
        let facts = self.card.facts();
        let cpu = self.host.cpu().describe();
        let what = if self.config.experts().is_some() { "experts" } else { "dense networks" };
        let rest = match self.host.counts() {
            (0, 0) => String::new(),
            (parts, 0) => format!(", {what} of {parts} layers on the {cpu}"),
            (parts, layers) => format!(", {what} of {parts} layers and {layers} whole layers on the {cpu}"),
        };
        format!("cuda:{} ({}{rest})", facts.index, facts.name)
    }

    /// Gives the card.
    #[must_use]
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Gives the bytes of weights that steps have read so far.
    #[must_use]
    pub fn weight_bytes_read(&self) -> u64 {
        self.weight_bytes_read + self.host.cpu().bytes_read()
    }

    /// Measures copies of `bytes` within the card's memory, after one that is not measured. Units: bytes read and written
    /// per second.
    ///
    /// # Errors
    /// `OutOfMemory` and the driver's.
    pub fn measure_copy(&self, bytes: u64, passes: usize) -> Result<Vec<f64>, DeviceError> {
        /// Copies between two readings of the clock: waiting for the card must not count.
        const COPIES: u32 = 16;
        const NOISE_BYTES: usize = 16 << 20;
        self.card.enter()?;
        let (from, to) = (Memory::take(&self.card, bytes, "a copy")?, Memory::take(&self.card, bytes, "a copy")?);
        // Numbers that no compression makes smaller.
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let noise: Vec<u8> = (0..NOISE_BYTES).map(|_| random()).collect();
        for at in (0..bytes / NOISE_BYTES as u64).map(|index| index * NOISE_BYTES as u64) {
            from.copy_in_plain(at, &noise)?;
        }
        let mut rates = Vec::new();
        for pass in 0..=passes {
            self.card.wait()?;
            let started = Instant::now();
            for _ in 0..COPIES {
                to.copy_from(&from, bytes)?;
            }
            self.card.wait()?;
            if pass > 0 {
                rates.push(2.0 * bytes as f64 * f64::from(COPIES) / started.elapsed().as_secs_f64());
            }
        }
        Ok(rates)
    }

    /// Computes a batch; see `Backend::forward`.
    ///
    /// # Errors
    /// The driver's.
    pub fn forward(&mut self, batch: &Batch<'_>, wanted: &[Wanted]) -> Result<Vec<Outcome>, DeviceError> {
        self.card.enter()?;
        for pool in &mut self.pools {
            pool.tables.update(&batch.blocks)?;
        }
        let mut outcomes: Vec<Option<Outcome>> = vec![None; wanted.len()];
        for role in [Role::Generated, Role::Prompt] {
            let pass = Pass::of(batch, wanted, role);
            if pass.batch.rows.is_empty() {
                continue;
            }
            for (place, outcome) in self.run_pass(&pass)? {
                outcomes[place] = Some(outcome);
            }
            self.progress.fetch_add(self.config.layers.len() as u64, Ordering::Relaxed);
        }
        Ok(outcomes.into_iter().map(|outcome| outcome.expect("every output row is of one role")).collect())
    }

    /// Copies a sequence's keys and values to host memory; `None` where there is no room for them.
    ///
    /// # Errors
    /// The driver's.
    pub fn swap_out(&mut self, blocks: &Blocks) -> Result<Option<SwappedBlocks>, DeviceError> {
        self.card.enter()?;
        let held = blocks.count();
        let [full, window] = &self.pools;
        let bytes = u64::from(held.full) * full.block_bytes + u64::from(held.window) * window.block_bytes;
        let Some(swapped) = self.swap.reserve(held, bytes as usize) else { return Ok(None) };
        self.each_block(blocks, swapped.range.start, |pool, block, at| {
            pool.memory.copy_out(u64::from(block) * pool.block_bytes, &self.swap.buffer, at, pool.block_bytes as usize)
        })?;
        self.card.wait()?;
        Ok(Some(swapped))
    }

    /// Copies a sequence's keys and values back into blocks of the cache; `None` while that would leave fewer than `spare`.
    ///
    /// # Errors
    /// The driver's.
    pub fn swap_in(&mut self, swapped: &SwappedBlocks, spare: u32) -> Result<Option<Blocks>, DeviceError> {
        self.card.enter()?;
        if self.pager.blocks().1 < swapped.held.full.saturating_add(spare) {
            return Ok(None);
        }
        let Ok(blocks) = self.pager.restore(swapped.held) else { return Ok(None) };
        self.each_block(&blocks, swapped.range.start, |pool, block, at| {
            pool.memory.copy_in(u64::from(block) * pool.block_bytes, &self.swap.buffer, at, pool.block_bytes as usize)
        })?;
        self.card.wait()?;
        Ok(Some(blocks))
    }

    /// Calls `copy` for each block with its place in host memory, one behind the other.
    fn each_block(
        &self,
        blocks: &Blocks,
        start: usize,
        copy: impl Fn(&Pool, u32, usize) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut at = start;
        for (pool, kind) in self.pools.iter().zip([Kind::Full, Kind::Window]) {
            for block in blocks.table(kind).held() {
                copy(pool, block, at)?;
                at += pool.block_bytes as usize;
            }
        }
        Ok(())
    }
}

impl Results {
    fn take(card: &Card, config: &Config, outputs: usize) -> Result<Results, DeviceError> {
        Ok(Results {
            chosen: HostBuffer::take(card, outputs * 8 + config.layers.len() * size_of::<u32>())?,
            logits: HostBuffer::take(card, outputs * config.vocab_size * size_of::<f32>())?,
        })
    }
}

impl Pool {
    fn take(card: &Card, kind: Kind, pager: &Pager, planned: &CardPlan) -> Result<Pool, DeviceError> {
        let stride = match kind {
            Kind::Full => planned.context_tokens.div_ceil(BLOCK_TOKENS),
            Kind::Window => {
                let most = pager.shape().window_blocks(1, planned.step().of_sequence());
                most.min(pager.pool_blocks(kind))
            }
        };
        let on_card = pager.shape().spans.len() - planned.whole_layers;
        let layers = pager.shape().spans[..on_card].iter().filter(|span| Kind::of(**span) == kind).count() as u32;
        let block_bytes = u64::from(layers) * card::layer_block_bytes(pager.shape(), planned.kv_type);
        let memory = Memory::take(card, u64::from(pager.pool_blocks(kind)) * block_bytes, "keys and values")?;
        // What was never written is read where a tile of keys ends within a block, and must be numbers.
        memory.clear()?;
        let tables = BlockTables::take(card, kind, planned.sequences as usize, stride as usize)?;
        Ok(Pool { memory, tables, layers, block_bytes })
    }
}
