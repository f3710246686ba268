//! Launches for tokens of prompts. A token's result has the same bits in whichever chunk it is computed.

use super::{Address, Attention, Float, Groups, Kernels, Number};
use crate::cuda::weights::{Experts, Form, Product};
use crate::device::DeviceError;

/// How a product of a prompt is cut into blocks.
struct Tile {
    /// That a block takes at a time.
    tokens: u32,
    threads: u32,
    /// For each multiprocessor.
    blocks: u32,
}

/// Where an expert has many tokens, and where it has few.
const MANY: Tile = Tile { tokens: 128, threads: 128, blocks: 2 };
const FEW: Tile = Tile { tokens: 32, threads: 128, blocks: 4 };

/// On Hopper, for any number: a block takes the last tokens of an expert in smaller tiles by itself.
const HOPPER: Tile = Tile { tokens: 256, threads: 256, blocks: 1 };

/// Tokens of an expert, on average, from which on tiles for many are faster.
const MANY_FROM_TOKENS: u32 = 32;

/// Queries that a block of attention takes at a time.
const ATTENTION_QUERIES: u32 = 128;

impl Kernels {
    /// Multiplies tokens with matrices; see `matvec`.
    ///
    /// # Errors
    /// The driver's.
    pub fn matmul(&self, product: &Product, x: u64, out: u64, tokens: u32) -> Result<(), DeviceError> {
        let arguments = [
            Address(product.matrices),
            Number(product.count),
            Address(x),
            Number(tokens),
            Number(product.columns),
            Address(out),
            Number(product.rows),
            Address(product.scale_values),
        ];
        let tile = if self.is_hopper() { HOPPER } else { MANY };
        let grid = [tile.blocks * self.card.facts().processors, 1, 1];
        let block = (tile.threads, self.tile_bytes(product.form, &tile));
        self.put(&self.form(product.form).matmul, grid, block, &arguments)
    }

    /// Multiplies tokens with both matrices of a dense layer's gate and gates the results: `silu(gate) * up`.
    ///
    /// Shapes: x: [tokens, columns] bf16, gate_up: [tokens, 2, inner] f32, in which it may work, out: [tokens, inner] bf16.
    ///
    /// # Errors
    /// The driver's.
    pub fn dense_gate(
        &self,
        product: &Product,
        (x, gate_up, out): (u64, u64, u64),
        tokens: u32,
    ) -> Result<(), DeviceError> {
        let Some(kernel) = &self.form(product.form).dense_gate else {
            self.matmul(product, x, gate_up, tokens)?;
            return self.silu_gate(gate_up, product.rows / 2, out, tokens);
        };
        let (columns, scale_values) = (Number(product.columns), Address(product.scale_values));
        let arguments = [Address(product.matrices), Address(x), Number(tokens), columns, Address(out), scale_values];
        let block = (HOPPER.threads, self.tile_bytes(product.form, &HOPPER));
        self.put(kernel, [HOPPER.blocks * self.card.facts().processors, 1, 1], block, &arguments)
    }

    /// Judges the experts and groups the tokens' choices by expert.
    ///
    /// Shapes: x: [tokens, hidden] f32.
    ///
    /// # Errors
    /// The driver's.
    pub fn route(&self, experts: &Experts, x: u64, groups: &Groups, tokens: u32) -> Result<(), DeviceError> {
        const TILE: u32 = 32;
        let (logits, chosen) = (Address(groups.logits), Address(groups.chosen));
        let (count, used) = (Number(experts.count), Number(experts.used));
        let arguments = [
            Address(experts.router),
            Address(experts.router_bias),
            Address(x),
            Number(tokens),
            count,
            Number(experts.hidden),
            logits,
        ];
        let grid = [tokens.div_ceil(TILE), experts.count.div_ceil(TILE), 1];
        self.put(&self.router, grid, (256, 0), &arguments)?;
        let arguments = [logits, Number(tokens), count, used, chosen, Address(groups.weights)];
        self.put(&self.choose_experts, [tokens.div_ceil(8), 1, 1], (256, 0), &arguments)?;
        let mut arguments = vec![chosen, Number(tokens), count, used];
        arguments.extend([groups.count, groups.experts, groups.firsts, groups.slots].map(Address));
        self.put(&self.group, [1, 1, 1], (1024, 0), &arguments)
    }

    /// Computes the chosen experts; see `experts`.
    ///
    /// # Errors
    /// The driver's.
    pub fn experts_many(
        &self,
        experts: &Experts,
        groups: &Groups,
        (x, inner, out): (u64, u64, u64),
        tokens: u32,
    ) -> Result<(), DeviceError> {
        let lists = [groups.count, groups.experts, groups.firsts, groups.slots].map(Address);
        let (up, down) = (&experts.gate_up, &experts.down);
        let is_many = self.is_hopper() || tokens * experts.used >= MANY_FROM_TOKENS * experts.count;
        let tile = if self.is_hopper() {
            HOPPER
        } else if is_many {
            MANY
        } else {
            FEW
        };
        let grid = [self.card.facts().processors * tile.blocks, 1, 1];
        let mut arguments = vec![Address(up.matrices)];
        arguments.extend(lists);
        arguments.extend([Address(x), Number(experts.used), Number(up.columns), Number(up.rows)]);
        arguments.extend([Float(experts.alpha), Float(experts.limit), Address(inner), Address(up.scale_values)]);
        let kernel = &self.form(up.form).gate_up_many[usize::from(is_many)];
        self.put(kernel, grid, (tile.threads, self.tile_bytes(up.form, &tile)), &arguments)?;
        let mut arguments = vec![Address(down.matrices)];
        arguments.extend(lists);
        arguments.extend([Address(inner), Number(down.columns), Number(down.rows), Address(out)]);
        arguments.push(Address(down.scale_values));
        let kernel = &self.form(down.form).down_many[usize::from(is_many)];
        self.put(kernel, grid, (tile.threads, self.tile_bytes(down.form, &tile)), &arguments)
    }

    /// Attends for rows that `rope_write` has rotated and written. `tiles` is the address of (first row, rows) of each
    /// tile: neighbouring rows of one sequence, at most `tile_rows` of them.
    ///
    /// # Errors
    /// The driver's.
    pub fn attend_prompt(&self, attention: &Attention, tiles: (u64, u32)) -> Result<(), DeviceError> {
        let (heads, cache) = (attention.heads, &attention.cache);
        let mut arguments = vec![Address(attention.qkv), Number(heads.query), Number(cache.window)];
        arguments.extend(attention.cached());
        arguments.extend([attention.sinks, tiles.0, attention.out].map(Address));
        let wide = if heads.dim <= 64 { 64 } else { 128 };
        let (stages, short_keys) = if self.is_turing() { (1, 32) } else { (2, 64) };
        let keys = if wide == 64 { short_keys } else { 16 };
        let shared = ATTENTION_QUERIES * wide * 2 + stages * keys * (wide * 4 + 8) + 512;
        self.put(&self.attend_prompt, [tiles.1, heads.kv, 1], (128, shared), &arguments)
    }

    /// Gives the shared memory of a product's block.
    fn tile_bytes(&self, form: Form, tile: &Tile) -> u32 {
        let (tokens, is_bf16) = (tile.tokens, form == Form::Bf16);
        if self.is_turing() {
            return tokens.min(64) * 132 + 16384 + 1024 + 2080;
        }
        if self.is_hopper() {
            return 4 * (tokens * 128 + 16384) + tokens * 4 + 5248;
        }
        3 * tokens * 128 + if is_bf16 { 3 } else { 2 } * 16384 + 2080
    }
}

/// Gives the rows of a tile of attention.
#[must_use]
pub fn tile_rows(query_heads: usize, kv_heads: usize) -> u32 {
    (ATTENTION_QUERIES / (query_heads / kv_heads).max(1) as u32).max(1)
}
