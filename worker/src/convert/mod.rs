//! `bulkhead-worker convert`: a model folder in another form, tensor by tensor.
//!
//! Owns: the command's arguments and the order of its work: hash the source, plan, make the files of weights one after
//! another, then the files beside them, config.json last of all. Refuses: to write into the source, into a folder that holds
//! anything else, and onto a disk without room.
//! Invariants: equal sources and choices give equal bytes in every file, whatever the number of threads and however often
//! the work was killed and started again. A file has its name once it is whole and on the disk; a folder without
//! config.json is an unfinished one. Memory stays below 2 GB (`produce`, `plan::TENSOR_WEIGHTS_MAX`).
//!
//! bf16, f16, f32 and MXFP4 become NF4 with double quantisation in the layouts of `checkpoint::bnb4bit`; NF4 keeps its codes,
//! and plain scales become nested ones. Or the fused experts of gpt-oss become MXFP4, and all else stays. Embedding, router, norms, biases and sinks are not quantised; the first two are
//! rounded to bf16 where they are f32.

mod error;
mod files;
mod manifest;
mod plan;
mod produce;
mod progress;
mod shards;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::message::DeviceChoice;
use clap::{Args, ValueEnum};

pub use error::ConvertError;
pub use files::MANIFEST_FILE;
pub use manifest::{KindBytes, Manifest, Order, Shard, SourceFile};
pub use plan::TENSOR_WEIGHTS_MAX;

use crate::checkpoint::{Checkpoint, INDEX_FILE};
use crate::model::config::{CONFIG_FILE, Config};
use crate::quant::cpu::cores;
use crate::sandbox::{Grant, Sandboxed, Walls, of_model};
use files::COPIED;
use plan::{Item, Work};
use progress::Progress;

/// Bytes of a shard, unless a single weight is larger: what is lost at most when the work is killed.
const SHARD_BYTES: u64 = 2_000_000_000;

/// Room that is asked for beside the weights: tokenizer, index, manifest.
const OTHER_BYTES: u64 = 64 << 20;

/// The arguments of the command.
#[derive(Args, Clone, Debug)]
pub struct ConvertArgs {
    /// The model folder to read
    #[arg(long, value_name = "DIR")]
    pub from: PathBuf,
    /// The folder to write: new, empty, or of the same conversion, which then goes on
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// The form of attention and experts, or of the dense network
    #[arg(long, value_enum)]
    pub quant: Quant,
    /// The form of the output matrix; left out: 16-bit. NF4 parts a tied one from the embedding, which stays 16-bit
    #[arg(long, value_enum)]
    pub lm_head: Option<Head>,
    /// Threads that convert; 0 is one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Bytes of one file of weights, at most; a larger tensor gets one of its own
    #[arg(long, value_name = "BYTES", default_value_t = SHARD_BYTES)]
    pub shard_bytes: u64,
}

/// The form that weights are brought into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quant {
    /// NF4 with double quantisation
    Nf4,
    /// Experts in MXFP4, as gpt-oss is published; everything else as it is
    Mxfp4,
    /// As they are: MXFP4 experts stay what they are, bit by bit
    Keep,
}

impl Quant {
    const fn name(self) -> &'static str {
        match self {
            Quant::Nf4 => "nf4",
            Quant::Mxfp4 => "mxfp4",
            Quant::Keep => "keep",
        }
    }
}

/// The form of the output matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Head {
    /// NF4 with double quantisation
    Nf4,
    /// 16-bit
    #[value(name = "bf16")]
    Wide,
}

impl Head {
    const fn name(self) -> &'static str {
        match self {
            Head::Nf4 => "nf4",
            Head::Wide => "bf16",
        }
    }
}

/// What is asked of the system before the walls are up.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    threads: usize,
    is_terminal: bool,
}

/// Makes the output's folder, and says what the command's walls leave open: the model to read and that folder.
///
/// # Errors
/// `Nested`, `Write`; `Checkpoint` when the source is no folder.
pub fn begin(args: &ConvertArgs, mode: SandboxMode) -> Result<(Walls, Begun), ConvertError> {
    let (from, to) = (resolved(&args.from), resolved(&args.to));
    if to.starts_with(&from) || from.starts_with(&to) {
        return Err(ConvertError::Nested { to: args.to.clone(), from: args.from.clone() });
    }
    if !from.is_dir() {
        Checkpoint::open(&args.from)?;
    }
    std::fs::create_dir_all(&args.to).map_err(ConvertError::write(&args.to))?;
    let mut grants = of_model(&args.from);
    grants.push(Grant::work_in_folder(&args.to));
    // Both are asked here, for the walls answer neither.
    let threads = if args.threads == 0 { cores() } else { args.threads };
    let begun = Begun { threads, is_terminal: std::io::stderr().is_terminal() };
    Ok((Walls { writes: true, ..Walls::of_person(mode, DeviceChoice::Cpu, grants) }, begun))
}

/// Follows links as far as the path exists.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    path
}

/// Runs the command, and tells on `out` what was made.
///
/// # Errors
/// Each variant of `ConvertError`.
pub fn run(_proof: &Sandboxed, begun: Begun, args: &ConvertArgs, out: &mut dyn Write) -> Result<(), ConvertError> {
    let config = Config::read(&args.from)?;
    let head = head(args)?;
    let checkpoint = Checkpoint::open(&args.from)?;
    let items = plan::plan(&checkpoint, &config, args.quant, head)?;
    let files = shards::divide(&items, args.shard_bytes)?;
    let order = Order {
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        quant: args.quant.name().to_owned(),
        lm_head: head.name().to_owned(),
        shard_bytes: args.shard_bytes,
        sources: hashes(&checkpoint, begun)?,
    };
    let found = manifest::resume(&args.to, &order)?;
    let mut manifest =
        found.unwrap_or_else(|| Manifest { order, is_complete: false, kinds: kinds(&items), shards: BTreeMap::new() });
    if !manifest.is_complete {
        let missing: Vec<_> = files.iter().filter(|file| !manifest.shards.contains_key(&file.name)).collect();
        files::check_room(&args.to, missing.iter().map(|file| file.bytes).sum::<u64>() + OTHER_BYTES)?;
        manifest.write(&args.to)?;
        let total = missing.iter().map(|file| file.source_bytes()).sum();
        let progress = Progress::start("converting", total, begun.is_terminal);
        for file in missing {
            let shard = file.make(&args.to, begun.threads, &progress)?;
            manifest.shards.insert(file.name.clone(), shard);
            manifest.write(&args.to)?;
        }
        progress.finish();
        shards::write_index(&args.to, &files)?;
        files::copy_others(&args.from, &args.to)?;
        files::write_config(&args.from, &args.to, (args.quant, head))?;
        manifest.is_complete = true;
        manifest.write(&args.to)?;
    }
    // Where nobody reads the summary any more, the work is done all the same.
    let _ = summarize(&manifest, out);
    Ok(())
}

/// Decides about the output matrix.
fn head(args: &ConvertArgs) -> Result<Head, ConvertError> {
    match args.lm_head {
        Some(choice) if args.quant == Quant::Keep => {
            Err(ConvertError::Head { choice: choice.name(), reason: "--quant keep changes no weight" })
        }
        Some(choice) if args.quant == Quant::Mxfp4 => {
            Err(ConvertError::Head { choice: choice.name(), reason: "--quant mxfp4 changes experts alone" })
        }
        choice => Ok(choice.unwrap_or(Head::Wide)),
    }
}

/// Hashes every file of the source that is read, side by side.
fn hashes(checkpoint: &Checkpoint, begun: Begun) -> Result<BTreeMap<String, SourceFile>, ConvertError> {
    let folder = checkpoint.folder();
    let others = COPIED.into_iter().chain([CONFIG_FILE, INDEX_FILE]).map(|name| folder.join(name));
    let mut paths: Vec<PathBuf> = others.filter(|path| path.is_file()).collect();
    paths.extend(checkpoint.files().map(Path::to_owned));
    let total = paths.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum();
    let progress = Progress::start("reading the source", total, begun.is_terminal);
    let hashed = produce::each(begun.threads, paths.len(), |index| manifest::hash(&paths[index], &progress))?;
    progress.finish();
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(paths.iter().map(name).zip(hashed).collect())
}

/// Counts the bytes of each kind.
fn kinds(items: &[Item]) -> BTreeMap<String, KindBytes> {
    let mut kinds = BTreeMap::<String, KindBytes>::new();
    for item in items {
        let kind = kinds.entry(item.kind.to_owned()).or_default();
        match item.work {
            Work::Copy(_) => kind.kept += item.bytes(),
            Work::Round(_) | Work::Quantize { .. } | Work::Mxfp4 { .. } | Work::Nest { .. } => {
                kind.changed_from += item.source_bytes();
                kind.changed_to += item.bytes();
            }
        }
    }
    kinds
}

fn summarize(manifest: &Manifest, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "{:<10} {:>10} {:>10} {:>10}   MB", "", "from", "to", "kept")?;
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    for (name, KindBytes { changed_from, changed_to, kept }) in &manifest.kinds {
        let [from, to, kept] = [*changed_from, *changed_to, *kept].map(megabytes);
        writeln!(out, "{name:<10} {from:>10.2} {to:>10.2} {kept:>10.2}")?;
    }
    let errors = || manifest.shards.values().flat_map(|shard| shard.relative_error.iter());
    if let Some((name, worst)) = errors().max_by(|a, b| a.1.total_cmp(b.1)) {
        writeln!(out, "largest relative error: {:.2} %, of {name}", 100.0 * worst)?;
    }
    Ok(())
}
