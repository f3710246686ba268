//! The kernels, found once, and how each is launched.
//!
//! Owns: names of entry points, grids and shared memory. Refuses: to know what is computed when. The contract of each
//! kernel stands in worker/kernels/README.md. `decode` has the launches for generated tokens, `prompt` those for prompts.

mod decode;
mod prompt;

use std::collections::HashMap;

use super::driver::Argument::{self, Address, Float, Number};
use super::driver::{Card, Kernel, Launch, Module};
use super::images;
use super::weights::Form;
use crate::device::DeviceError;

pub use decode::GeneratedRoute;
pub use prompt::tile_rows;

/// The widths of products for generated tokens.
const MATVEC_TOKENS: [u32; 3] = [8, 16, 32];
const EXPERT_TOKENS: [u32; 2] = [8, 16];

/// Tokens of the vocabulary that a block of the choice takes.
const CHOICE_CHUNK: u32 = 1024;

/// The compute capability from which on products use bf16 and copies past registers.
const AMPERE: (u32, u32) = (8, 0);

/// The compute capability whose own instructions prompts' products use: of it alone, older and newer ones have others. Their
/// bits differ from those of the general kernels, so a card always takes the same.
const HOPPER: (u32, u32) = (9, 0);

/// The kernels of products with one form of weights.
#[derive(Debug)]
struct FormKernels {
    matvec: [Kernel; 3],
    gate_up: [Kernel; 2],
    down: [Kernel; 2],
    matmul: Kernel,
    /// On Hopper alone.
    dense_gate: Option<Kernel>,
    gate_up_many: [Kernel; 2],
    down_many: [Kernel; 2],
}

/// Every kernel of a model.
#[derive(Debug)]
pub struct Kernels {
    card: Card,
    forms: HashMap<Form, FormKernels>,
    embed: Kernel,
    add_norm: Kernel,
    silu_gate: Kernel,
    norm_route: Kernel,
    router: Kernel,
    choose_experts: Kernel,
    group: Kernel,
    rope_write: Kernel,
    attend: Kernel,
    attend_prompt: Kernel,
    scan: Kernel,
    pick: Kernel,
    is_int8: bool,
    /// Kernels refer to them.
    _modules: Vec<Module>,
}

/// Where the groups of a mixture stand: slots by expert. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    /// [tokens, experts] f32.
    pub logits: u64,
    /// [tokens, used] u32.
    pub chosen: u64,
    /// [tokens, used] f32.
    pub weights: u64,
    /// [1] u32.
    pub count: u64,
    /// [experts] u32.
    pub experts: u64,
    /// [experts + 1] u32.
    pub firsts: u64,
    /// [tokens * used] u32.
    pub slots: u64,
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
    /// [sequences, stride] u32.
    pub blocks: u64,
    /// [sequences] u32.
    pub firsts: u64,
    /// Entries of a sequence.
    pub stride: u32,
    /// [rows] u32.
    pub sequences: u64,
    /// [rows] u32.
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

/// Where attention reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// The shape.
    pub heads: Heads,
    /// [rows, query heads + 2 kv heads, dim] f32.
    pub qkv: u64,
    /// [rows, dim / 2] f32.
    pub cosines: u64,
    /// [rows, dim / 2] f32.
    pub sines: u64,
    /// [query heads] f32.
    pub sinks: u64,
    /// [rows, query heads * dim] bf16.
    pub out: u64,
    /// Keys and values.
    pub cache: Cache,
}

/// A layer's change that is added before a norm: parts of a row with their weights.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// [rows, count, hidden] f32, or 0 for none.
    pub parts: u64,
    /// Parts of a row.
    pub count: u32,
    /// [rows, count] f32, or 0 where each is 1.
    pub weights: u64,
}

/// Where a norm reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct AddNorm {
    /// [rows, hidden] f32, changed in place.
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

/// Where the choice reads and writes. Addresses.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// [rows, vocabulary] f32.
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

impl Kernels {
    /// Loads what a model with these forms of weights needs.
    ///
    /// # Errors
    /// `Unusable` where this worker has no kernels for the card or its driver takes none of them; the driver's.
    pub fn load(card: &Card, forms: &[Form], is_int8: bool) -> Result<Kernels, DeviceError> {
        let image = |name| {
            let image = images::module(card.facts().capability, name);
            image.map_err(|error| DeviceError::Unusable(error.to_string()))
        };
        let load = |name| card.load_module(&image(name)?);
        let (matvec, moe, route, norm) = (load("matvec")?, load("moe")?, load("route")?, load("norm")?);
        let (decode, sample, prefill) = (load("decode")?, load("sample")?, load("prefill")?);
        let moe_many = load("moe_many")?;
        let prompt = load(if card.facts().capability == HOPPER { "prompt_90a" } else { "matmul" })?;
        let products = Products { matvec: &matvec, moe: &moe, prompt: &prompt, moe_many: &moe_many, card };
        let kv = if is_int8 { "int8" } else { "bf16" };
        let forms = forms.iter().map(|form| Ok((*form, products.of(*form)?)));
        Ok(Kernels {
            forms: forms.collect::<Result<_, DeviceError>>()?,
            embed: norm.kernel("embed", 5)?,
            add_norm: norm.kernel("add_norm", 10)?,
            silu_gate: norm.kernel("silu_gate", 3)?,
            norm_route: route.kernel("norm_route", 19)?,
            router: moe_many.kernel("moe_router_many", 7)?,
            choose_experts: moe_many.kernel("moe_choose_many", 6)?,
            group: moe_many.kernel("moe_group_many", 8)?,
            rope_write: decode.kernel(&format!("rope_write_{kv}"), 14)?,
            attend: decode.kernel(&format!("attend_decode_{kv}"), 20)?,
            attend_prompt: prefill.kernel(&format!("attend_prefill_{kv}"), 16)?,
            scan: sample.kernel("choose_scan", 4)?,
            pick: sample.kernel("choose_pick", 8)?,
            is_int8,
            card: card.clone(),
            _modules: vec![matvec, moe, route, norm, decode, sample, prefill, prompt, moe_many],
        })
    }

    fn form(&self, form: Form) -> &FormKernels {
        self.forms.get(&form).expect("the kernels of every form of the model were loaded")
    }

    fn is_turing(&self) -> bool {
        self.card.facts().capability < AMPERE
    }

    fn is_hopper(&self) -> bool {
        self.card.facts().capability == HOPPER
    }

    /// Puts a kernel on the stream that may prepare itself while the one before it ends.
    fn put(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: (u32, u32),
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        let (threads, shared_bytes) = block;
        self.card.launch(&Launch { kernel, grid, threads, shared_bytes, is_dependent: true }, arguments)
    }

    /// Gathers rows of an embedding: `x[i] = table[tokens[i]]`. It comes first, behind the copies of a step's inputs, which
    /// later kernels read before they wait: so this one starts when those are complete.
    ///
    /// # Errors
    /// The driver's, as for all launches.
    pub fn embed(&self, table: u64, tokens: u64, vocabulary: u32, x: (u64, u32), rows: u32) -> Result<(), DeviceError> {
        let arguments = [Address(table), Address(tokens), Number(vocabulary), Number(x.1), Address(x.0)];
        let kernel = &self.embed;
        let launch = Launch { kernel, grid: [rows, 1, 1], threads: 256, shared_bytes: 0, is_dependent: false };
        self.card.launch(&launch, &arguments)
    }

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
        // Sums depend on the number of threads, which follows from the width alone.
        let threads = norm.hidden.div_ceil(4).next_multiple_of(32).min(768);
        self.put(&self.add_norm, [count, 1, 1], (threads, 0), &arguments)
    }

    /// Gates a dense layer: `silu(gate) * up`.
    ///
    /// Shapes: gate_up: [rows, 2, inner] f32, out: [rows, inner] bf16.
    ///
    /// # Errors
    /// The driver's.
    pub fn silu_gate(&self, gate_up: u64, inner: u32, out: u64, rows: u32) -> Result<(), DeviceError> {
        let arguments = [Address(gate_up), Number(inner), Address(out)];
        self.put(&self.silu_gate, [inner.div_ceil(1024), rows, 1], (256, 0), &arguments)
    }

    /// Rotates queries and keys in place and writes keys and values to the cache.
    ///
    /// # Errors
    /// The driver's.
    pub fn rope_write(&self, attention: &Attention, rows: u32) -> Result<(), DeviceError> {
        let heads = attention.heads;
        let mut arguments =
            vec![Address(attention.qkv), Address(attention.cosines), Address(attention.sines), Number(heads.query)];
        arguments.extend(attention.cached());
        let blocks = (heads.query + 2 * heads.kv).div_ceil(8);
        self.put(&self.rope_write, [rows, blocks, 1], (256, 0), &arguments)
    }

    /// Chooses a token for each row of logits.
    ///
    /// # Errors
    /// The driver's.
    pub fn choose(&self, choice: &Choice, rows: u32) -> Result<(), DeviceError> {
        let chunks = choice.vocabulary.div_ceil(CHOICE_CHUNK);
        let (logits, temperatures) = (Address(choice.logits), Address(choice.temperatures));
        let arguments = [logits, Number(choice.vocabulary), temperatures, Address(choice.partials)];
        self.put(&self.scan, [chunks, rows, 1], (256, 0), &arguments)?;
        let arguments = [
            logits,
            Number(choice.vocabulary),
            temperatures,
            Address(choice.seeds),
            Address(choice.positions),
            Address(choice.partials),
            Number(chunks),
            Address(choice.chosen),
        ];
        self.put(&self.pick, [rows, 1, 1], (256, 0), &arguments)
    }
}

/// The modules of products.
struct Products<'m> {
    matvec: &'m Module,
    moe: &'m Module,
    /// `matmul`, or on Hopper `prompt_90a`, which has the experts' products of prompts too.
    prompt: &'m Module,
    moe_many: &'m Module,
    card: &'m Card,
}

impl Products<'_> {
    fn of(&self, form: Form) -> Result<FormKernels, DeviceError> {
        let name = form.name();
        let matvec = |tokens| self.matvec.kernel(&format!("matvec_{name}_{tokens}"), 9);
        let gate_up = |tokens| self.moe.kernel(&format!("moe_gate_up_{name}_{tokens}"), 15);
        let down = |tokens| self.moe.kernel(&format!("moe_down_{name}_{tokens}"), 12);
        let is_hopper = self.card.facts().capability == HOPPER;
        // On Hopper one kernel is best for any number of tokens.
        let (experts, few_tokens, ending) =
            if is_hopper { (self.prompt, "many", "_90a") } else { (self.moe_many, "few", "") };
        let gate_up_many = |kind| experts.kernel(&format!("moe_gate_up_{name}_{kind}{ending}"), 13);
        let down_many = |kind| experts.kernel(&format!("moe_down_{name}_{kind}{ending}"), 10);
        let [few, some, many] = MATVEC_TOKENS;
        let [narrow, wide] = EXPERT_TOKENS;
        Ok(FormKernels {
            matvec: [matvec(few)?, matvec(some)?, matvec(many)?],
            gate_up: [gate_up(narrow)?, gate_up(wide)?],
            down: [down(narrow)?, down(wide)?],
            matmul: self.prompt.kernel(&format!("matmul_{name}{ending}"), 8)?,
            dense_gate: match is_hopper {
                true => Some(self.prompt.kernel(&format!("dense_gate_{name}{ending}"), 6)?),
                false => None,
            },
            gate_up_many: [gate_up_many(few_tokens)?, gate_up_many("many")?],
            down_many: [down_many(few_tokens)?, down_many("many")?],
        })
    }
}

impl Attention {
    /// The arguments that tell where keys and values are.
    fn cached(&self) -> [Argument; 10] {
        let cache = &self.cache;
        [
            Address(cache.pool),
            Number(cache.layers),
            Number(cache.layer),
            Number(self.heads.kv),
            Number(self.heads.dim),
            Address(cache.blocks),
            Address(cache.firsts),
            Number(cache.stride),
            Address(cache.sequences),
            Address(cache.positions),
        ]
    }
}
