//! The search for the layout that gives up least, and the plan that follows from it.

use bulkhead_shared::message::LoadPlan;
use bulkhead_shared::units::Bytes;

use super::{CardLimits, CardPlan, GivenUp, KvType, RESERVE, WeightSizes};
use super::{layer_block_bytes, scratch_bytes_card, step};
use crate::engine::pager::{BLOCK_TOKENS, Kind, KvShape, Span};
use crate::memory::{PlanError, context_asked, sequences_asked};
use crate::model::config::Config;

/// Prompt tokens of one step, largest first. What is smaller than the fifth is only tried when a wish ends there.
const STEPS: [u32; 6] = [8192, 4096, 2048, 1024, 512, 256];
const STEPS_EASY: usize = 5;

/// Sequences below which a plan does not go as long as experts or networks could move instead: another sequence takes little room.
const SEQUENCES_EASY: u32 = 8;

/// The contexts that an open wish stops at on its way down, if larger steps are to be had for them.
const CONTEXT_STOP: u32 = 32_768;

/// The context below which experts or networks move to the host instead.
const CONTEXT_FLOOR: u32 = 8192;

/// A context that the plan chooses is a multiple of this many tokens, or the model's own.
const CONTEXT_GRAIN: u32 = 1024;

/// The share of the free host memory that preempted sequences may take: one in so many.
const SWAP_SHARE: u64 = 4;

/// Where the embedding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Card,
    Host,
}

/// One way to lay a model out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    context: u32,
    sequences: u32,
    step_tokens: u32,
    /// The last so many layers leave their experts or networks on the host.
    host_layers: usize,
    /// The last so many layers are on the host altogether.
    whole_layers: usize,
    embedding: Place,
}

/// A model, the wishes for it, and the limits.
pub(super) struct Planner<'p> {
    config: &'p Config,
    sizes: &'p WeightSizes,
    kv_type: KvType,
    shape: KvShape,
    /// Bytes of one block of one layer: on the card, and on the host.
    layer_block: u64,
    layer_block_host: u64,
    limits: CardLimits,
    /// Blocks that the plan may have at most.
    blocks_max: u64,
    /// The context where nothing is given up.
    context_wished: u32,
    /// The context that the plan may have at most.
    context: u32,
    /// The context below which the plan may not go.
    floor: u32,
    /// The sequences that are wished for.
    sequences: u32,
}

impl<'p> Planner<'p> {
    pub(super) fn new(
        config: &'p Config,
        sizes: &'p WeightSizes,
        asked: &LoadPlan,
        kv_type: KvType,
        limits: CardLimits,
    ) -> Result<Planner<'p>, PlanError> {
        let shape = KvShape::of(config);
        let context = context_asked(config, asked)?;
        let mut planner = Planner {
            config,
            sizes,
            kv_type,
            layer_block: layer_block_bytes(&shape, kv_type),
            layer_block_host: layer_block_bytes(&shape, KvType::Bf16),
            shape,
            limits,
            blocks_max: u64::MAX,
            context_wished: context,
            context,
            floor: if asked.context_tokens == 0 { context.min(CONTEXT_FLOOR) } else { context },
            sequences: sequences_asked(asked),
        };
        if asked.kv_bytes.0 > 0 {
            planner.keep_to(asked.kv_bytes)?;
        }
        Ok(planner)
    }

    /// Bounds the keys and values to a size that was asked for.
    fn keep_to(&mut self, granted: Bytes) -> Result<(), PlanError> {
        let windows = self.window_bytes(self.sequences, STEPS[0], 0);
        let block = self.block_bytes(0);
        self.blocks_max = granted.0.saturating_sub(windows).checked_div(block).unwrap_or(u64::MAX);
        let fits = u32::try_from(self.blocks_max.saturating_mul(u64::from(BLOCK_TOKENS))).unwrap_or(u32::MAX);
        if fits < self.floor {
            let (context, needed) = (self.floor, Bytes(blocks_of(self.floor) * block + windows));
            return Err(PlanError::ContextTooLarge { context, needed, granted, fits });
        }
        self.context = self.context.min(fits);
        Ok(())
    }

    /// Finds the layout that gives up least.
    pub(super) fn search(&self) -> Option<Choice> {
        let (context, sequences) = (self.context, self.sequences);
        let all = Choice {
            context,
            sequences,
            step_tokens: STEPS[0],
            host_layers: 0,
            whole_layers: 0,
            embedding: Place::Card,
        };
        let whole_pool = (blocks_of(context) * u64::from(sequences)).min(self.blocks_max) * self.block_bytes(0);
        if self.fixed_bytes(all) + whole_pool <= self.limits.budget.0 {
            return Some(all);
        }
        let layers = self.sizes.layers.len();
        let mlps = || (0..=layers).find_map(|count| self.with_host_layers(count));
        // The first layer stays: without any there would be nothing to use the card for.
        let found = mlps().or_else(|| (0..layers).find_map(|whole| self.with_whole_layers(whole)))?;
        Some(Choice { context: self.largest_context(found), ..found })
    }

    /// Finds the layout that gives up least when the last so many layers leave their experts or networks on the host.
    fn with_host_layers(&self, host_layers: usize) -> Option<Choice> {
        let mut contexts = vec![self.context, CONTEXT_STOP, self.floor];
        contexts.retain(|context| (self.floor..=self.context).contains(context));
        contexts.dedup();
        let sequences: Vec<u32> =
            halvings(self.sequences).take_while(|count| *count >= self.sequences.min(SEQUENCES_EASY)).collect();
        for context in contexts {
            let steps = if context == self.floor { &STEPS[..] } else { &STEPS[..STEPS_EASY] };
            for sequences in sequences.iter().copied() {
                let choice = |step_tokens: &u32| Choice {
                    context,
                    sequences,
                    step_tokens: *step_tokens,
                    host_layers,
                    whole_layers: 0,
                    embedding: self.embedding_off_card(),
                };
                if let Some(choice) = steps.iter().map(choice).find(|choice| self.fits(*choice)) {
                    return Some(choice);
                }
            }
        }
        None
    }

    /// Tries fewer sequences still when all of those and so many whole layers have moved.
    fn with_whole_layers(&self, whole_layers: usize) -> Option<Choice> {
        let least = Choice { whole_layers, ..self.least() };
        halvings(self.sequences).map(|sequences| Choice { sequences, ..least }).find(|choice| self.fits(*choice))
    }

    fn least(&self) -> Choice {
        let layers = self.sizes.layers.len();
        Choice {
            context: self.floor,
            sequences: 1,
            step_tokens: STEPS[STEPS.len() - 1],
            host_layers: layers,
            whole_layers: layers.saturating_sub(1),
            embedding: self.embedding_off_card(),
        }
    }

    fn embedding_off_card(&self) -> Place {
        if self.sizes.is_tied { Place::Card } else { Place::Host }
    }

    /// Gives the largest context that fits in place of the chosen one, which does.
    fn largest_context(&self, choice: Choice) -> u32 {
        if self.fits(Choice { context: self.context, ..choice }) {
            return self.context;
        }
        let grains = self.context / CONTEXT_GRAIN;
        let fitting = (choice.context / CONTEXT_GRAIN + 1..=grains)
            .collect::<Vec<_>>()
            .partition_point(|grains| self.fits(Choice { context: grains * CONTEXT_GRAIN, ..choice }));
        choice.context.max((choice.context / CONTEXT_GRAIN + fitting as u32) * CONTEXT_GRAIN)
    }

    fn fits(&self, choice: Choice) -> bool {
        let blocks = blocks_of(choice.context) * self.block_bytes(choice.whole_layers);
        self.fixed_bytes(choice) + blocks <= self.limits.budget.0
    }

    /// Everything on the card but the blocks of layers that see the whole context.
    fn fixed_bytes(&self, choice: Choice) -> u64 {
        let windows = self.window_bytes(choice.sequences, choice.step_tokens, choice.whole_layers);
        self.weights_card(choice) + windows + self.scratch_bytes(choice) + RESERVE.0
    }

    fn weights_card(&self, choice: Choice) -> u64 {
        let layers: u64 = self.sizes.layers.iter().map(|layer| layer.attention + layer.mlp).sum();
        let embedding = if choice.embedding == Place::Card { self.sizes.embedding } else { 0 };
        self.sizes.lm_head + layers - self.host_mlps(choice) - self.host_attention(choice) + embedding
    }

    fn weights_host(&self, choice: Choice) -> u64 {
        let embedding = if choice.embedding == Place::Host { self.sizes.embedding } else { 0 };
        self.host_mlps(choice) + self.host_attention(choice) + embedding
    }

    fn host_mlps(&self, choice: Choice) -> u64 {
        self.sizes.layers.iter().rev().take(choice.host_layers).map(|layer| layer.mlp).sum()
    }

    fn host_attention(&self, choice: Choice) -> u64 {
        self.sizes.layers.iter().rev().take(choice.whole_layers).map(|layer| layer.attention).sum()
    }

    fn scratch_bytes(&self, choice: Choice) -> u64 {
        let step = step(choice.sequences, choice.step_tokens);
        scratch_bytes_card(self.config, step.generated, step.prompt, choice.context)
    }

    /// Counts the layers of a kind that are on the card, and those on the host, when the last so many have moved.
    fn layers(&self, kind: Kind, whole_layers: usize) -> (u64, u64) {
        let (card, host) = self.shape.spans.split_at(self.shape.spans.len() - whole_layers);
        let count = |spans: &[Span]| spans.iter().filter(|span| Kind::of(**span) == kind).count() as u64;
        (count(card), count(host))
    }

    /// Bytes on the card of a block for layers that see the whole context.
    fn block_bytes(&self, whole_layers: usize) -> u64 {
        self.layer_block * self.layers(Kind::Full, whole_layers).0
    }

    fn window_bytes(&self, sequences: u32, step_tokens: u32, whole_layers: usize) -> u64 {
        self.window_blocks(sequences, step_tokens) * self.window_block_bytes(whole_layers)
    }

    fn window_blocks(&self, sequences: u32, step_tokens: u32) -> u64 {
        u64::from(self.shape.window_blocks(sequences, step(sequences, step_tokens).sum()))
    }

    fn window_block_bytes(&self, whole_layers: usize) -> u64 {
        self.layer_block * self.layers(Kind::Window, whole_layers).0
    }

    /// Bytes on the host: of a block for layers that see the whole context, and of all windows.
    fn host_kv(&self, choice: Choice) -> (u64, u64) {
        let layers = |kind| self.layers(kind, choice.whole_layers).1 * self.layer_block_host;
        let windows = self.window_blocks(choice.sequences, choice.step_tokens) * layers(Kind::Window);
        (layers(Kind::Full), windows)
    }

    pub(super) fn too_small(&self) -> PlanError {
        let least = self.least();
        let blocks = blocks_of(least.context) * self.block_bytes(least.whole_layers);
        let needed = Bytes(self.fixed_bytes(least) + blocks);
        let grains: Vec<u32> = (1..=self.floor / CONTEXT_GRAIN).collect();
        let fitting = grains.partition_point(|grains| self.fits(Choice { context: grains * CONTEXT_GRAIN, ..least }));
        let fits = fitting as u32 * CONTEXT_GRAIN;
        PlanError::CardTooSmall { context: self.floor, needed, budget: self.limits.budget, fits }
    }

    /// Turns the choice into a plan: what room is left goes to blocks, and what the blocks lack to swap.
    pub(super) fn finish(&self, choice: Choice) -> Result<CardPlan, PlanError> {
        let (budget, available) = (self.limits.budget, self.limits.host_available);
        let weights_host = Bytes(self.weights_host(choice));
        let (host_block, host_windows) = self.host_kv(choice);
        let one_context = blocks_of(choice.context);
        let needed = Bytes(weights_host.0 + host_windows + one_context * host_block);
        if needed > available {
            return Err(PlanError::HostTooSmall { needed, available, budget });
        }
        let fixed = self.fixed_bytes(choice);
        let block = self.block_bytes(choice.whole_layers);
        let host_left = available.0 - weights_host.0 - host_windows;
        let host_room = (host_left / SWAP_SHARE).checked_div(host_block).unwrap_or(u64::MAX).max(one_context);
        let room = budget.0.saturating_sub(fixed).checked_div(block).unwrap_or(u64::MAX);
        let wanted = one_context * u64::from(choice.sequences);
        let blocks = room.min(self.blocks_max).min(host_room).min(wanted);
        let kv = blocks * block + self.window_bytes(choice.sequences, choice.step_tokens, choice.whole_layers);
        // Sequences that hold all they could ever want never make room for each other. Where the host holds a part of their
        // keys and values they are computed again: copies would save less than half.
        let windows = u64::from(self.shape.window_blocks(choice.sequences, 0)) * self.window_block_bytes(0);
        let lacking = if blocks < wanted && choice.whole_layers == 0 { (wanted - blocks) * block + windows } else { 0 };
        let swap = lacking.min(kv).min(host_left / SWAP_SHARE);
        let layers = self.sizes.layers.len();
        Ok(CardPlan {
            context_tokens: choice.context,
            context_given_up: (choice.context < self.context_wished).then_some(self.context_wished),
            sequences: choice.sequences,
            full_blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
            step_tokens: choice.step_tokens,
            kv_type: self.kv_type,
            is_embedding_on_card: choice.embedding == Place::Card,
            host_layers: (0..layers).map(|layer| layer >= layers - choice.host_layers).collect(),
            whole_layers: choice.whole_layers,
            kv_host: Bytes(blocks * host_block + host_windows),
            weights_card: Bytes(self.weights_card(choice)),
            weights_host,
            kv: Bytes(kv),
            scratch: Bytes(self.scratch_bytes(choice)),
            reserve: RESERVE,
            swap: Bytes(swap),
            given_up: self.given_up(choice),
        })
    }

    fn given_up(&self, choice: Choice) -> Vec<GivenUp> {
        let smaller = |from: u32, to: u32| (to < from).then_some((from, to));
        let of = u32::try_from(self.sizes.layers.len()).unwrap_or(u32::MAX);
        let mlps = GivenUp::MlpsOnHost {
            what: if self.config.experts().is_some() { "experts" } else { "dense networks" },
            layers: u32::try_from(choice.host_layers).unwrap_or(u32::MAX),
            of,
            bytes: Bytes(self.host_mlps(choice)),
        };
        let whole = u32::try_from(choice.whole_layers).unwrap_or(u32::MAX);
        [
            (choice.embedding == Place::Host).then_some(GivenUp::EmbeddingOnHost),
            smaller(STEPS[0], choice.step_tokens).map(|(from, to)| GivenUp::StepTokens { from, to }),
            smaller(self.sequences, choice.sequences).map(|(from, to)| GivenUp::Sequences { from, to }),
            smaller(self.context_wished, choice.context).map(|(from, to)| GivenUp::Context { from, to }),
            (choice.host_layers > 0).then_some(mlps),
            (whole > 0).then_some(GivenUp::LayersOnHost { layers: whole, of }),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

fn blocks_of(tokens: u32) -> u64 {
    u64::from(tokens.div_ceil(BLOCK_TOKENS))
}

/// Counts down from a number to 1 by halves.
fn halvings(from: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(from), |count| (*count > 1).then_some(count / 2))
}
