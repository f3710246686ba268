//! The kernels, found once, and how each is launched.
//!
//! Owns: names of entry points, grids and shared memory. Refuses: to know what is computed when. The contract of each
//! kernel stands in worker/kernels/README.md.

use std::collections::HashMap;

use super::driver::{Argument, Card, Kernel, Launch, Module};
use super::images;
use super::weights::{Experts, Form, Product};
use crate::device::DeviceError;

/// The most tokens that one launch of a product for generated tokens takes.
const MATVEC_TOKENS_MAX: u32 = 16;

/// Above this many tokens activations stay out of shared memory: that is quicker.
const STAGED_TOKENS_MAX: u32 = 8;

/// Rows that a block of a product takes at a time.
const PRODUCT_ROWS: u32 = 16;

/// Warps of a product's block, and tokens that a block of a prompt's product takes at a time.
const PRODUCT_WARPS: u32 = 8;
const MANY_TOKENS: u32 = 64;

/// Blocks of a product for each multiprocessor.
const BLOCKS_PER_PROCESSOR: u32 = 2;

/// The kernels of products with one form of weights.
#[derive(Debug)]
struct FormKernels {
    matvec: [Kernel; 2],
    gate_up: [Kernel; 2],
    down: [Kernel; 2],
    matmul: Kernel,
    gate_up_many: Kernel,
    down_many: Kernel,
}

/// Every kernel of a model.
#[derive(Debug)]
pub struct Kernels {
    card: Card,
    forms: HashMap<Form, FormKernels>,
    embed: Kernel,
    add_norm: Kernel,
    router: Kernel,
    route: Kernel,
    rope_write: Kernel,
    attend: Kernel,
    combine: Kernel,
    scan: Kernel,
    pick: Kernel,
    /// Kernels refer to them.
    _modules: Vec<Module>,
}

/// Where the groups of a mixture stand: slots by expert. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    /// [1].
    pub count: u64,
    /// [experts].
    pub experts: u64,
    /// [experts + 1].
    pub firsts: u64,
    /// [tokens * used].
    pub slots: u64,
    /// [tokens, used].
    pub chosen: u64,
    /// [tokens, used].
    pub weights: u64,
}

/// One layer's part of a pool of keys and values, and the tables of a step.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// The pool.
    pub pool: u64,
    /// Layers in it.
    pub layers: u32,
    /// The layer's place among them.
    pub layer: u32,
    /// [sequences, stride].
    pub blocks: u64,
    /// [sequences].
    pub firsts: u64,
    /// Entries of a sequence.
    pub stride: u32,
    /// [rows].
    pub sequences: u64,
    /// [rows].
    pub positions: u64,
    /// What a token sees, or 0 for all.
    pub window: u32,
}

/// The shape of attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub query: u32,
    /// Heads of keys and values.
    pub kv: u32,
    /// Elements of a head.
    pub dim: u32,
}

/// A layer's change that is added before a norm: parts of a row with their weights.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// [rows, count, hidden], or 0 for none.
    pub parts: u64,
    /// Parts of a row.
    pub count: u32,
    /// [rows, count], or 0 where each is 1.
    pub weights: u64,
}

use Argument::{Address, Float, Number};

impl Kernels {
    /// Loads what a model with these forms of weights needs.
    ///
    /// # Errors
    /// `Unusable` where this worker has no kernels for the card or its driver takes none of them; the driver's.
    pub fn load(card: &Card, forms: &[Form], kv: &str) -> Result<Kernels, DeviceError> {
        let image = |name| {
            let image = images::module(card.facts().capability, name);
            image.map_err(|error| DeviceError::Unusable(error.to_string()))
        };
        let load = |name| card.load_module(&image(name)?);
        let (matvec, moe, norm) = (load("matvec")?, load("moe")?, load("norm")?);
        let (decode, sample) = (load("decode")?, load("sample")?);
        let most = card.facts().shared_bytes_max;
        let of_form = |form: Form| -> Result<FormKernels, DeviceError> {
            let find = |module: &Module, name: String, arguments| module.kernel(&name, arguments, most);
            let name = form.name();
            let matvec_of = |tokens| find(&matvec, format!("matvec_{name}_{tokens}"), 9);
            let gate_up_of = |tokens| find(&moe, format!("moe_gate_up_{name}_{tokens}"), 14);
            let down_of = |tokens| find(&moe, format!("moe_down_{name}_{tokens}"), 11);
            Ok(FormKernels {
                matvec: [matvec_of(8)?, matvec_of(16)?],
                gate_up: [gate_up_of(8)?, gate_up_of(16)?],
                down: [down_of(8)?, down_of(16)?],
                matmul: find(&matvec, format!("matmul_{name}"), 8)?,
                gate_up_many: find(&moe, format!("moe_gate_up_{name}_many"), 13)?,
                down_many: find(&moe, format!("moe_down_{name}_many"), 10)?,
            })
        };
        Ok(Kernels {
            forms: forms.iter().map(|form| Ok((*form, of_form(*form)?))).collect::<Result<_, DeviceError>>()?,
            embed: norm.kernel("embed", 5, 0)?,
            add_norm: norm.kernel("add_norm", 10, 0)?,
            router: moe.kernel("moe_router", 5, 0)?,
            route: moe.kernel("moe_route", 10, 0)?,
            rope_write: decode.kernel(&format!("rope_write_{kv}"), 14, 0)?,
            attend: decode.kernel(&format!("attend_decode_{kv}"), 14, 0)?,
            combine: decode.kernel("attend_combine", 7, 0)?,
            scan: sample.kernel("choose_scan", 4, 0)?,
            pick: sample.kernel("choose_pick", 8, 0)?,
            card: card.clone(),
            _modules: vec![matvec, moe, norm, decode, sample],
        })
    }

    fn put(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        (threads, shared_bytes): (u32, u32),
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        self.card.launch(&Launch { kernel, grid, threads, shared_bytes, is_dependent: true }, arguments)
    }

    /// Gathers rows of an embedding: `x[i] = table[tokens[i]]`. It is the first of a pass, behind copies.
    ///
    /// # Errors
    /// The driver's, as all of these.
    pub fn embed(&self, table: u64, tokens: u64, vocabulary: u32, x: (u64, u32), rows: u32) -> Result<(), DeviceError> {
        let arguments = [Address(table), Address(tokens), Number(vocabulary), Number(x.1), Address(x.0)];
        let kernel = &self.embed;
        let launch = Launch { kernel, grid: [rows, 1, 1], threads: 256, shared_bytes: 0, is_dependent: false };
        self.card.launch(&launch, &arguments)
    }

    fn form(&self, form: Form) -> &FormKernels {
        self.forms.get(&form).expect("the kernels of every form of the model were loaded")
    }

    /// Gives the shared memory of a product for `tokens` tokens, and whether the activations stand there.
    fn staging(&self, form: Form, tokens: u32, columns: u32) -> (u32, u32) {
        let tiles = if tokens <= 8 { 1 } else { 2 };
        let plain = form.table_bytes() + tiles * 4096;
        let staged = plain + tokens * (columns + 8) * 2;
        let fits = tokens <= STAGED_TOKENS_MAX && staged <= self.card.facts().shared_bytes_max;
        if fits { (staged, 1) } else { (plain, 0) }
    }
}

/// Products.
impl Kernels {
    /// Multiplies generated tokens with matrices: `out[b, row] = x[b] . matrix[row] + bias[row]`.
    ///
    /// Shapes: x: [tokens, columns] bf16, out: [tokens, rows of all matrices] f32.
    ///
    /// # Errors
    /// The driver's.
    pub fn matvec(&self, product: &Product, x: u64, out: u64, tokens: u32) -> Result<(), DeviceError> {
        const BF16_BYTES: u64 = 2;
        for first in (0..tokens).step_by(MATVEC_TOKENS_MAX as usize) {
            let batch = (tokens - first).min(MATVEC_TOKENS_MAX);
            let (shared, is_staged) = self.staging(product.form, batch, product.columns);
            let kernel = &self.form(product.form).matvec[usize::from(batch > 8)];
            let most = self.card.facts().processors * BLOCKS_PER_PROCESSOR;
            let blocks = product.tiles(PRODUCT_ROWS).min(most);
            let arguments = [
                Address(product.matrices),
                Number(product.count),
                Address(x + u64::from(first) * u64::from(product.columns) * BF16_BYTES),
                Number(batch),
                Number(product.columns),
                Address(out + u64::from(first) * u64::from(product.rows) * 4),
                Number(product.rows),
                Address(product.scale_values),
                Number(is_staged),
            ];
            self.put(kernel, [blocks, 1, 1], (256, shared), &arguments)?;
        }
        Ok(())
    }

    /// The same for tokens of prompts.
    ///
    /// # Errors
    /// The driver's.
    pub fn matmul(&self, product: &Product, x: u64, out: u64, tokens: u32) -> Result<(), DeviceError> {
        let kernel = &self.form(product.form).matmul;
        let grid = [product.tiles(PRODUCT_ROWS).div_ceil(PRODUCT_WARPS), tokens.div_ceil(MANY_TOKENS), 1];
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
        self.put(kernel, grid, (256, product.form.table_bytes()), &arguments)
    }

    /// Judges the experts and groups the tokens' choices by expert.
    ///
    /// Shapes: x: [tokens, hidden] f32, logits: [tokens, experts] f32.
    ///
    /// # Errors
    /// The driver's.
    pub fn route(&self, experts: &Experts, x: u64, logits: u64, groups: &Groups, tokens: u32) -> Result<(), DeviceError> {
        let arguments = [
            Address(experts.router),
            Address(experts.router_bias),
            Address(x),
            Number(experts.hidden),
            Address(logits),
        ];
        self.put(&self.router, [experts.count, tokens, 1], (128, 0), &arguments)?;
        let arguments = [
            Address(logits),
            Number(tokens),
            Number(experts.count),
            Number(experts.used),
            Address(groups.chosen),
            Address(groups.weights),
            Address(groups.count),
            Address(groups.experts),
            Address(groups.firsts),
            Address(groups.slots),
        ];
        self.put(&self.route, [1, 1, 1], (256, 0), &arguments)
    }

    /// Computes the chosen experts of generated tokens (at most as many as a launch takes) or of prompts.
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
        tokens: ProductTokens,
    ) -> Result<(), DeviceError> {
        let lists = [groups.count, groups.experts, groups.firsts, groups.slots].map(Address);
        let (up, down) = (&experts.gate_up, &experts.down);
        let mut first = vec![Address(up.matrices)];
        first.extend(lists);
        first.extend([Address(x), Number(experts.used), Number(up.columns), Number(up.rows)]);
        first.extend([Float(experts.alpha), Float(experts.limit), Address(inner), Address(up.scale_values)]);
        let mut second = vec![Address(down.matrices)];
        second.extend(lists);
        second.extend([Address(inner), Number(down.columns), Number(down.rows), Address(out)]);
        second.push(Address(down.scale_values));
        let blocks = self.card.facts().processors * BLOCKS_PER_PROCESSOR;
        let (up_kernels, down_kernels) = (self.form(up.form), self.form(down.form));
        match tokens {
            ProductTokens::Generated(count) => {
                let wide = usize::from(count > 8);
                let (shared, is_staged) = self.staging(up.form, count, up.columns);
                first.push(Number(is_staged));
                self.put(&up_kernels.gate_up[wide], [blocks, 1, 1], (256, shared), &first)?;
                let (shared, is_staged) = self.staging(down.form, count, down.columns);
                second.push(Number(is_staged));
                self.put(&down_kernels.down[wide], [blocks, 1, 1], (256, shared), &second)
            }
            ProductTokens::Prompt(count) => {
                let grid = [blocks, count.div_ceil(MANY_TOKENS), 1];
                self.put(&up_kernels.gate_up_many, grid, (256, up.form.table_bytes()), &first)?;
                self.put(&down_kernels.down_many, grid, (256, down.form.table_bytes()), &second)
            }
        }
    }
}

/// How many tokens a product has, by role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductTokens {
    /// Generated ones.
    Generated(u32),
    /// Those of prompts.
    Prompt(u32),
}

/// What lies between the products.
impl Kernels {
    /// Adds a change to rows of x and normalises them: output row i is made of row `rows[i]`, or of row i where `rows` is 0.
    ///
    /// Shapes: x: [rows, hidden] f32; out_bf16, out_f32: [count, hidden], either may be 0.
    ///
    /// # Errors
    /// The driver's.
    pub fn add_norm(&self, norm: &AddNorm, change: &Change, count: u32) -> Result<(), DeviceError> {
        let arguments = [
            Address(norm.x),
            Address(change.parts),
            Number(change.count),
            Address(change.weights),
            Address(norm.rows),
            Address(norm.weight),
            Float(norm.epsilon),
            Number(norm.hidden),
            Address(norm.out_bf16),
            Address(norm.out_f32),
        ];
        self.put(&self.add_norm, [count, 1, 1], (512, 0), &arguments)
    }

    /// Rotates queries and keys, writes keys and values to the cache, and attends: a row sees itself and what is before it.
    ///
    /// Shapes: qkv: [rows, query heads + 2 kv heads, dim] f32, out: [rows, query heads * dim] bf16, partial: room for the
    /// cuts of `rows_at_once` rows.
    ///
    /// # Errors
    /// The driver's.
    pub fn attend(&self, attention: &Attention, cache: &Cache, rows: u32) -> Result<(), DeviceError> {
        let heads = attention.heads;
        let cached = |row: u64| {
            [
                Address(cache.pool),
                Number(cache.layers),
                Number(cache.layer),
                Number(heads.kv),
                Number(heads.dim),
                Address(cache.blocks),
                Address(cache.firsts),
                Number(cache.stride),
                Address(cache.sequences + row * 4),
                Address(cache.positions + row * 4),
            ]
        };
        let all_heads = heads.query + 2 * heads.kv;
        let mut arguments =
            vec![Address(attention.qkv), Address(attention.cosines), Address(attention.sines), Number(heads.query)];
        arguments.extend(cached(0));
        self.put(&self.rope_write, [rows, all_heads.div_ceil(8), 1], (256, 0), &arguments)?;
        for first in (0..rows).step_by(attention.rows_at_once as usize) {
            let (count, row) = ((rows - first).min(attention.rows_at_once), u64::from(first));
            let qkv = attention.qkv + row * u64::from(all_heads * heads.dim) * 4;
            let mut arguments = vec![Address(qkv), Number(heads.query), Number(cache.window)];
            arguments.extend(cached(row));
            arguments.push(Address(attention.partial));
            self.put(&self.attend, [attention.cuts, heads.kv, count], (128, 0), &arguments)?;
            let arguments = [
                Address(attention.partial),
                Address(attention.sinks),
                Address(cache.positions + row * 4),
                Number(cache.window),
                Number(attention.cuts),
                Number(heads.dim),
                Address(attention.out + row * u64::from(heads.query * heads.dim) * 2),
            ];
            self.put(&self.combine, [heads.query, count, 1], (64, 0), &arguments)?;
        }
        Ok(())
    }

    /// Chooses a token for each row of logits.
    ///
    /// # Errors
    /// The driver's.
    pub fn choose(&self, choice: &Choice, rows: u32) -> Result<(), DeviceError> {
        let chunks = choice.vocabulary.div_ceil(CHOICE_CHUNK);
        let arguments = [
            Address(choice.logits),
            Number(choice.vocabulary),
            Address(choice.temperatures),
            Address(choice.partials),
        ];
        self.put(&self.scan, [chunks, rows, 1], (256, 0), &arguments)?;
        let arguments = [
            Address(choice.logits),
            Number(choice.vocabulary),
            Address(choice.temperatures),
            Address(choice.seeds),
            Address(choice.positions),
            Address(choice.partials),
            Number(chunks),
            Address(choice.chosen),
        ];
        self.put(&self.pick, [rows, 1, 1], (256, 0), &arguments)
    }
}

/// Tokens of the vocabulary that a block of the choice takes.
pub const CHOICE_CHUNK: u32 = 1024;

/// Where a norm reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct AddNorm {
    /// Changed in place.
    pub x: u64,
    /// Which rows, or 0.
    pub rows: u64,
    /// [hidden] f32.
    pub weight: u64,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Width of a row.
    pub hidden: u32,
    /// 16-bit result, or 0.
    pub out_bf16: u64,
    /// 32-bit result, or 0.
    pub out_f32: u64,
}

/// Where attention reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// The shape.
    pub heads: Heads,
    /// Queries, keys and values.
    pub qkv: u64,
    /// [rows, dim / 2].
    pub cosines: u64,
    /// [rows, dim / 2].
    pub sines: u64,
    /// [query heads].
    pub sinks: u64,
    /// Room for the cuts' results.
    pub partial: u64,
    /// The most cuts of a row's context.
    pub cuts: u32,
    /// Rows that there is room for at once.
    pub rows_at_once: u32,
    /// The result.
    pub out: u64,
}

/// Where the choice reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// [rows, vocabulary].
    pub logits: u64,
    /// Its width.
    pub vocabulary: u32,
    /// [rows] f32.
    pub temperatures: u64,
    /// [rows] u64.
    pub seeds: u64,
    /// [rows] u64.
    pub positions: u64,
    /// [rows, chunks] of 24 bytes.
    pub partials: u64,
    /// [rows] of two u32.
    pub chosen: u64,
}
