//! Launches for generated tokens. A token's result has the same bits alone and among others, in every launch here.

use super::{Address, Argument, Attention, Float, Groups, Kernels, MATVEC_TOKENS, Number};
use crate::cuda::weights::{Experts, Form, Product};
use crate::device::DeviceError;

/// Rows that a block of a product takes at a time.
const PRODUCT_ROWS: u32 = 16;

/// What each block costs beside the shared memory that it asks for, and what a product declares itself. Units: bytes.
const BLOCK_COST: u32 = 1024;
const PRODUCT_LISTS: u32 = 64;
const EXPERT_LISTS: u32 = 2112;

/// Shared memory of attention beside what it is launched with. Units: bytes.
const ATTENTION_THREADS: u32 = 256;

/// Where routing reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct GeneratedRoute {
    /// [tokens, hidden] f32: the residual stream.
    pub x: u64,
    /// [tokens, hidden] f32: what attention adds.
    pub change: u64,
    /// [hidden] f32.
    pub norm_weight: u64,
    /// Added to the mean square.
    pub epsilon: f32,
    /// [tokens, hidden] f32: the residual stream from here on; not `x`.
    pub sum: u64,
    /// [tokens, hidden] bf16.
    pub out: u64,
    /// [tokens + 1] u32, 0 between launches.
    pub counters: u64,
}

impl Kernels {
    /// Multiplies tokens with matrices: `out[b, row] = x[b] . matrix[row] + bias[row]`.
    ///
    /// Shapes: x: [tokens, columns] bf16, out: [tokens, rows of all matrices] f32.
    ///
    /// # Errors
    /// The driver's.
    pub fn matvec(&self, product: &Product, x: u64, out: u64, tokens: u32) -> Result<(), DeviceError> {
        let width = MATVEC_TOKENS.iter().position(|width| tokens <= *width).unwrap_or(MATVEC_TOKENS.len() - 1);
        let width_tokens = MATVEC_TOKENS[width];
        let blocks = blocks_best(product.form, tokens);
        let wide = width_tokens > 16;
        let (room, mut shared) = self.stage(product.form, (product.columns, wide), blocks, PRODUCT_LISTS);
        let mut stage = room.min(width_tokens);
        if stage < tokens {
            stage = 0;
        }
        shared += stage * (product.columns + 8) * 2;
        let grid = product.tiles(PRODUCT_ROWS).min(self.card.facts().processors * blocks);
        let arguments = [
            Address(product.matrices),
            Number(product.count),
            Address(x),
            Number(tokens),
            Number(product.columns),
            Address(out),
            Number(product.rows),
            Address(product.scale_values),
            Number(stage),
        ];
        self.put(&self.form(product.form).matvec[width], [grid, 1, 1], (256, shared), &arguments)
    }

    /// Adds attention's change, normalises, judges the experts, and groups the tokens' choices by expert.
    ///
    /// # Errors
    /// The driver's.
    pub fn norm_route(
        &self,
        experts: &Experts,
        route: &GeneratedRoute,
        groups: &Groups,
        tokens: u32,
    ) -> Result<(), DeviceError> {
        let arguments = [
            Address(route.x),
            Address(route.change),
            Address(route.norm_weight),
            Float(route.epsilon),
            Number(experts.hidden),
            Address(route.sum),
            Address(route.out),
            Address(experts.router),
            Address(experts.router_bias),
            Number(experts.count),
            Number(experts.used),
            Address(groups.logits),
            Address(groups.chosen),
            Address(groups.weights),
            Address(groups.count),
            Address(groups.experts),
            Address(groups.firsts),
            Address(groups.slots),
            Address(route.counters),
        ];
        let pieces = match tokens {
            1 => 32,
            2..=4 => 16,
            _ => 8,
        };
        self.put(&self.norm_route, [pieces.min(experts.count), tokens, 1], (256, 0), &arguments)
    }

    /// Computes the chosen experts.
    ///
    /// Shapes: x: [tokens, hidden] bf16, inner: [tokens * used, intermediate] bf16, out: [tokens * used, hidden] f32.
    ///
    /// # Errors
    /// The driver's.
    pub fn experts(
        &self,
        experts: &Experts,
        groups: &Groups,
        (x, inner, out): (u64, u64, u64),
        tokens: u32,
    ) -> Result<(), DeviceError> {
        let lists = [groups.count, groups.experts, groups.firsts, groups.slots].map(Address);
        let (up, down) = (&experts.gate_up, &experts.down);
        let wide = usize::from(tokens > 32);
        let launch = |product: &Product, kernel, mut arguments: Vec<Argument>| {
            let blocks = if tokens <= 2 && product.form != Form::Bf16 { 3 } else { 2 };
            let (room, shared) = self.stage(product.form, (product.columns, false), blocks, EXPERT_LISTS);
            let stage = room.min(8 << wide);
            arguments.push(Number(stage));
            let shared = shared + stage * (product.columns + 8) * 2;
            self.put(kernel, [self.card.facts().processors * blocks, 1, 1], (256, shared), &arguments)
        };
        let mut arguments = vec![Address(up.matrices), Number(experts.count)];
        arguments.extend(lists);
        arguments.extend([Address(x), Number(experts.used), Number(up.columns), Number(up.rows)]);
        arguments.extend([Float(experts.alpha), Float(experts.limit), Address(inner), Address(up.scale_values)]);
        launch(up, &self.form(up.form).gate_up[wide], arguments)?;
        let mut arguments = vec![Address(down.matrices), Number(experts.count)];
        arguments.extend(lists);
        arguments.extend([Address(inner), Number(down.columns), Number(down.rows), Address(out)]);
        arguments.push(Address(down.scale_values));
        launch(down, &self.form(down.form).down[wide], arguments)
    }

    /// Attends: a row sees itself and what is before it. Unless `is_written`, the rows are of different sequences, and are
    /// rotated and written to the cache on the way.
    ///
    /// # Errors
    /// The driver's.
    pub fn attend(
        &self,
        attention: &Attention,
        (partial, counters, cuts): (u64, u64, u32),
        is_written: bool,
        rows: u32,
    ) -> Result<(), DeviceError> {
        let (heads, cache) = (attention.heads, &attention.cache);
        let mut arguments = vec![
            Address(attention.qkv),
            Address(attention.cosines),
            Address(attention.sines),
            Number(heads.query),
            Number(cache.window),
            Number(u32::from(is_written)),
        ];
        arguments.extend(attention.cached());
        arguments.extend([attention.sinks, partial, counters, attention.out].map(Address));
        let tile = if heads.dim <= 64 { 128 } else { 64 };
        let row = if self.is_int8 { heads.dim + 8 } else { 2 * heads.dim + 16 };
        let shared = (2 * tile * row).max(256 * heads.dim);
        self.put(&self.attend, [cuts, heads.kv, rows], (ATTENTION_THREADS, shared), &arguments)
    }

    /// Gives how many activations fit into shared memory where a multiprocessor is to hold `blocks` blocks, and the bytes
    /// that a block takes without them.
    fn stage(&self, form: Form, (columns, is_wide): (u32, bool), blocks: u32, fixed: u32) -> (u32, u32) {
        const PIPE: u32 = 24576;
        let facts = self.card.facts();
        let pipe = if form == Form::Bf16 || self.is_turing() { 0 } else { PIPE };
        let plain = form.table_bytes() + pipe + if is_wide { 16384 } else { 8192 };
        let each = (facts.shared_bytes_processor / blocks).saturating_sub(BLOCK_COST).min(facts.shared_bytes_max);
        (each.saturating_sub(fixed + plain) / (2 * (columns + 8)), plain)
    }
}

/// Gives the blocks of a dense product that a multiprocessor holds best, by measurement.
fn blocks_best(form: Form, tokens: u32) -> u32 {
    if form != Form::Bf16 && tokens <= 8 { 3 } else { 2 }
}
