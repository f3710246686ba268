//! `bulkhead-worker plan`: what a model would hold on a card, without loading it and without a card.
//!
//! Owns: the command's arguments and its table. Refuses: to plan by itself (`memory::card` does) and to read weights: a
//! folder's headers say how large they are, a lone config.json what they would be in a format.

use std::io;
use std::path::{Path, PathBuf};

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::limits::{CONTEXT_TOKENS_MAX, WORKER_REQUESTS_MAX};
use bulkhead_shared::message::{DeviceChoice, Faults, KvType, LoadPlan, device_budget};
use bulkhead_shared::units::Bytes;
use clap::{Args, ValueEnum, value_parser};
use serde::Serialize;

use crate::checkpoint::limits::CONFIG_BYTES_MAX;
use crate::checkpoint::{Checkpoint, CheckpointError, read_limited};
use crate::memory::card::{CardLimits, CardPlan, WeightSizes, plan_card, sizes_in, sizes_of};
use crate::memory::{PlanError, available_memory};
use crate::model::config::{Config, ConfigError, Quantization};
use crate::sandbox::{Grant, Sandboxed, Walls, of_model};

/// Cards that are planned for when none is named. Units: GiB.
const CARDS_DEFAULT: [f64; 4] = [8.0, 12.0, 16.0, 24.0];

/// The largest memory that is believed. Units: GiB.
const GIB_MAX: f64 = 65_536.0;

const GIB: f64 = (1u64 << 30) as f64;

/// The arguments of the command.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// The model folder; only the headers of its files are read
    #[arg(value_name = "MODEL", required_unless_present_any = ["model", "config"])]
    pub folder: Option<PathBuf>,
    /// The model folder too
    #[arg(long, value_name = "DIR", conflicts_with = "folder", hide = true)]
    pub model: Option<PathBuf>,
    /// A config.json alone, in place of a folder
    #[arg(long, value_name = "CONFIG.json", conflicts_with_all = ["folder", "model"])]
    pub config: Option<PathBuf>,
    /// The format of the weights of --config [what config.json says]
    #[arg(long, value_enum, conflicts_with_all = ["folder", "model"])]
    pub format: Option<WeightFormat>,
    /// Memory of the card; may be given several times [8 12 16 24]
    #[arg(long, value_name = "GIB", value_parser = parse_gib, num_args = 1..)]
    pub vram: Vec<f64>,
    /// What the worker may hold on the card [the smaller of 22 GiB and 90 % of the card]
    #[arg(long, value_name = "GIB", value_parser = parse_gib)]
    pub budget: Option<f64>,
    /// Memory of the host that is available [what this machine has now]
    #[arg(long, value_name = "GIB", value_parser = parse_gib)]
    pub host: Option<f64>,
    /// Context in tokens; 0 is the model's own, or what fits; may be given several times [0]
    #[arg(long, value_name = "N", num_args = 1.., value_parser = value_parser!(u32).range(..=i64::from(CONTEXT_TOKENS_MAX)))]
    pub context: Vec<u32>,
    /// Sequences that run at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..=WORKER_REQUESTS_MAX as i64))]
    pub sequences: u32,
    /// How keys and values are kept
    #[arg(long, value_enum, default_value_t = KvChoice::Bf16)]
    pub kv: KvChoice,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// The format of a model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightFormat {
    /// bitsandbytes' NF4, with double quantisation
    Nf4,
    /// As gpt-oss is published
    Mxfp4,
    /// Unquantised
    Bf16,
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvChoice {
    /// As 16-bit floats
    Bf16,
    /// As bytes with a scale for each head and token
    Int8,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanCommandError {
    /// The files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The configuration of the model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No row of the table has a plan.
    #[error("the model fits in none of these: {0}")]
    NothingFits(#[source] PlanError),
    /// The result cannot be printed.
    #[error("the result cannot be printed: {0}")]
    Print(#[source] io::Error),
}

fn parse_gib(text: &str) -> Result<f64, String> {
    let gib: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if gib > 0.0 && gib <= GIB_MAX { Ok(gib) } else { Err(format!("not above 0 and at most {GIB_MAX} GiB")) }
}

fn bytes(gib: f64) -> Bytes {
    // In range: `parse_gib` bounds it.
    Bytes((gib * GIB) as u64)
}

/// Says what the command's walls leave open: the model's folder, or the lone file.
#[must_use]
pub fn walls(args: &PlanArgs, mode: SandboxMode) -> Walls {
    let mut grants: Vec<Grant> = args.folder.iter().chain(&args.model).flat_map(|folder| of_model(folder)).collect();
    grants.extend(args.config.iter().map(|config| Grant::read_file(config)));
    Walls::of_person(mode, DeviceChoice::Cpu, grants)
}

/// Runs the command and writes the plans to `out`.
///
/// # Errors
/// Each variant of `PlanCommandError`.
pub fn run(_proof: &Sandboxed, args: &PlanArgs, out: &mut impl io::Write) -> Result<(), PlanCommandError> {
    let model = Model::read(args)?;
    let host_available = args.host.map(bytes).or_else(available_memory).unwrap_or(Bytes(0));
    let cards = if args.vram.is_empty() { &CARDS_DEFAULT[..] } else { &args.vram };
    let contexts = if args.context.is_empty() { &[0][..] } else { &args.context };
    let mut rows = Vec::new();
    for card in cards {
        for context in contexts {
            let budget = device_budget(args.budget.map_or(Bytes(0), bytes), bytes(*card));
            let limits = CardLimits { budget, host_available };
            let asked = wishes(args, *context);
            let plan = plan_card(&model.config, &model.sizes, &asked, asked.kv_type, limits);
            rows.push(Row { card_gib: *card, budget, context_asked: *context, plan });
        }
    }
    let print = if args.json { write_json(&model, &rows, out) } else { write_table(&model, &rows, args, out) };
    print.map_err(PlanCommandError::Print)?;
    let is_none = rows.iter().all(|row| row.plan.is_err());
    match rows.into_iter().next_back().and_then(|row| row.plan.err()) {
        Some(error) if is_none => Err(PlanCommandError::NothingFits(error)),
        Some(_) | None => Ok(()),
    }
}

/// Writes the plan that the supervisor would send.
fn wishes(args: &PlanArgs, context_tokens: u32) -> LoadPlan {
    LoadPlan {
        model_dir: String::new(),
        device: DeviceChoice::Cuda(0),
        may_use_processor: false,
        context_tokens,
        sequences_max: args.sequences,
        kv_bytes: Bytes(0),
        device_budget: Bytes(0),
        kv_type: match args.kv {
            KvChoice::Bf16 => KvType::Bf16,
            KvChoice::Int8 => KvType::Int8,
        },
        faults: Faults::default(),
    }
}

/// What is planned for.
struct Model {
    name: String,
    config: Config,
    sizes: WeightSizes,
}

impl Model {
    fn read(args: &PlanArgs) -> Result<Model, PlanCommandError> {
        let (path, config, sizes) = match (args.folder.as_ref().or(args.model.as_ref()), &args.config) {
            (_, Some(file)) => {
                let config = Config::parse(&read_limited(file, CONFIG_BYTES_MAX)?, &file.display().to_string())?;
                let format = match args.format {
                    None => config.quantization,
                    Some(WeightFormat::Bf16) => None,
                    Some(WeightFormat::Nf4) => Some(Quantization::Nf4),
                    Some(WeightFormat::Mxfp4) => Some(Quantization::Mxfp4),
                };
                let sizes = sizes_of(&config, format);
                (file.as_path(), config, sizes)
            }
            (folder, None) => {
                let folder = folder.map_or(Path::new("."), PathBuf::as_path);
                let checkpoint = Checkpoint::open(folder)?;
                let config = Config::read(folder)?;
                let sizes = sizes_in(&checkpoint, &config)?;
                (folder, config, sizes)
            }
        };
        Ok(Model { name: path.display().to_string(), config, sizes })
    }
}

/// A plan and what it was made for.
struct Row {
    card_gib: f64,
    budget: Bytes,
    context_asked: u32,
    plan: Result<CardPlan, PlanError>,
}

/// A row as JSON. Units: bytes, unless a name says otherwise.
#[derive(Serialize)]
struct JsonRow {
    card_gib: f64,
    budget: u64,
    context_asked: u32,
    #[serde(flatten)]
    plan: Option<JsonPlan>,
    error: Option<String>,
}

#[derive(Serialize)]
struct JsonPlan {
    context_tokens: u32,
    sequences: u32,
    step_tokens: u32,
    kv_type: &'static str,
    kv_blocks: u32,
    host_layers: usize,
    whole_layers: usize,
    is_embedding_on_card: bool,
    weights_card: u64,
    weights_host: u64,
    kv: u64,
    kv_host: u64,
    scratch: u64,
    reserve: u64,
    total_card: u64,
    swap: u64,
    given_up: Vec<String>,
}

fn write_json(model: &Model, rows: &[Row], out: &mut impl io::Write) -> io::Result<()> {
    let plan = |plan: &CardPlan| JsonPlan {
        context_tokens: plan.context_tokens,
        sequences: plan.sequences,
        step_tokens: plan.step_tokens,
        kv_type: plan.kv_type.as_str(),
        kv_blocks: plan.full_blocks,
        host_layers: plan.host_layers.iter().filter(|is_host| **is_host).count(),
        whole_layers: plan.whole_layers,
        is_embedding_on_card: plan.is_embedding_on_card,
        weights_card: plan.weights_card.0,
        weights_host: plan.weights_host.0,
        kv: plan.kv.0,
        kv_host: plan.kv_host.0,
        scratch: plan.scratch.0,
        reserve: plan.reserve.0,
        total_card: plan.card_bytes().0,
        swap: plan.swap.0,
        given_up: plan.given_up.iter().map(ToString::to_string).collect(),
    };
    let row = |row: &Row| JsonRow {
        card_gib: row.card_gib,
        budget: row.budget.0,
        context_asked: row.context_asked,
        plan: row.plan.as_ref().ok().map(plan),
        error: row.plan.as_ref().err().map(ToString::to_string),
    };
    let rows: Vec<JsonRow> = rows.iter().map(row).collect();
    serde_json::to_writer(&mut *out, &serde_json::json!({"model": model.name, "plans": rows}))?;
    writeln!(out)
}

fn write_table(model: &Model, rows: &[Row], args: &PlanArgs, out: &mut impl io::Write) -> io::Result<()> {
    let sizes = &model.sizes;
    writeln!(
        out,
        "{}: {:.1} GiB of weights in {} layers; {} sequences; sizes in GiB",
        model.name,
        sizes.bytes().gib(),
        sizes.layers.len(),
        args.sequences,
    )?;
    writeln!(
        out,
        "{:>5} {:>6} {:>8} | {:>7} {:>5} {:>7} {:>6} | {:>5} {:>5} | given up",
        "card", "budget", "context", "weights", "KV", "buffers", "total", "host", "swap"
    )?;
    for row in rows {
        let context = row.plan.as_ref().map_or(row.context_asked, |plan| plan.context_tokens);
        write!(out, "{:>5} {:>6.1} {:>8} | ", row.card_gib, row.budget.gib(), context)?;
        match &row.plan {
            Ok(plan) => writeln!(
                out,
                "{:>7.2} {:>5.2} {:>7.2} {:>6.2} | {:>5.2} {:>5.2} | {}",
                plan.weights_card.gib(),
                plan.kv.gib(),
                Bytes(plan.scratch.0 + plan.reserve.0).gib(),
                plan.card_bytes().gib(),
                Bytes(plan.weights_host.0 + plan.kv_host.0).gib(),
                plan.swap.gib(),
                given_up(plan),
            )?,
            Err(error) => writeln!(out, "cannot be planned: {error}")?,
        }
    }
    Ok(())
}

fn given_up(plan: &CardPlan) -> String {
    let clauses: Vec<String> = plan.given_up.iter().map(ToString::to_string).collect();
    if clauses.is_empty() { "nothing".to_owned() } else { clauses.join("; ") }
}
