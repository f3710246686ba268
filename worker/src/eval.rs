//! `bulkhead-worker eval`: the logits of a prompt, or the perplexity of a text, for tests and for checking a model by hand.
//!
//! Owns: the command's arguments, its input and its output. Refuses: token ids outside the vocabulary, and inputs that
//! have none. The input is `{"input_ids": [...]}`; the output is a safetensors file with `logits` f32 `[tokens, vocab]`
//! and, if asked for, `greedy` i64 `[N]`: the N most likely tokens, each after the ones before.

pub mod perplexity;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::message::{CpuChoice, DeviceChoice, Faults, KvType, LoadPlan};
use bulkhead_shared::units::Bytes;
use clap::{Args, ValueEnum};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};
use serde::Deserialize;

use crate::checkpoint::{Checkpoint, CheckpointError, read_limited};
use crate::device::{parse_cpu, parse_device};
use crate::engine::backend::Backend;
use crate::engine::single::Single;
use crate::loader::{LoadError, place};
use crate::model::batch::Role;
use crate::model::config::{Config, ConfigError};
use crate::model::reference::{Precision, Reference};
use crate::model::weights::{Quantize, Weights, load};
use crate::prepare::Prepared;
use crate::sandbox::{Grant, Sandboxed, Walls, of_model};
use perplexity::Surprise;

/// Bytes of the input file, at most.
const INPUT_BYTES_MAX: u64 = 64 << 20;

/// Tokens of the prompt and of the continuation together, at most.
const TOKENS_MAX: usize = bulkhead_shared::limits::CONTEXT_TOKENS_MAX as usize;

/// The arguments of the command.
#[derive(Args, Clone, Debug)]
pub struct EvalArgs {
    /// The model folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    #[command(flatten)]
    pub task: Task,
    /// Tokens of the text that are seen together
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..=TOKENS_MAX as i64))]
    pub window: u32,
    /// Which weights to compute from
    #[arg(long, value_enum, default_value_t = WeightChoice::File)]
    pub quant: WeightChoice,
    /// How values between operations are kept
    #[arg(long, value_enum, default_value_t = ValueType::F32)]
    pub dtype: ValueType,
    /// Who computes
    #[arg(long = "path", value_enum, default_value_t = DecoderPath::Reference)]
    pub decoder_path: DecoderPath,
    /// Where what is served computes: cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    pub device: DeviceChoice,
    /// Instructions to compute with on the processor: auto, scalar, avx2, avxvnni, avx512 or amx
    #[arg(long, value_name = "PATH", default_value = "auto", value_parser = parse_cpu)]
    pub cpu: CpuChoice,
    /// Also continue the prompt by the N most likely tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub greedy: usize,
}

/// What to compute.
#[derive(Args, Clone, Debug, Default)]
#[group(required = true, multiple = true)]
pub struct Task {
    /// A JSON file: {"input_ids": [...]}
    #[arg(long, value_name = "IN.json", requires = "output", conflicts_with = "perplexity")]
    pub input: Option<PathBuf>,
    /// The safetensors file to write the logits to
    #[arg(long, value_name = "OUT.safetensors", requires = "input", conflicts_with = "perplexity")]
    pub output: Option<PathBuf>,
    /// Tell how well this text is foreseen: a text, or a JSON file {"input_ids": [...]}
    #[arg(long, value_name = "FILE")]
    pub perplexity: Option<PathBuf>,
}

/// Which weights to compute from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightChoice {
    /// Unquantised weights; a 4-bit file is decoded
    None,
    /// As stored
    File,
    /// Attention and experts quantised to NF4 on the way
    Nf4,
}

/// How values between operations are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ValueType {
    /// Single precision
    F32,
    /// Rounded to bf16 after each operation
    Bf16,
}

impl ValueType {
    fn precision(self) -> Precision {
        match self {
            ValueType::F32 => Precision::F32,
            ValueType::Bf16 => Precision::Bf16,
        }
    }
}

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DecoderPath {
    /// Plain arithmetic with keys and values in f32
    Reference,
    /// What is served
    Fast,
}

/// Why there is no output.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The config describes no model that can be served.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights do not make the model of the config, or the input cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The input is not the JSON that it must be.
    #[error("{}: expected {{\"input_ids\": [...]}} with token ids from 0 to {}: {source}", .file.display(), u32::MAX)]
    Input {
        /// The file.
        file: PathBuf,
        /// What the JSON reader found.
        source: serde_json::Error,
    },
    /// There is no token to start from.
    #[error("{}: input_ids is empty, expected at least one token id", .file.display())]
    NoTokens {
        /// The file.
        file: PathBuf,
    },
    /// There is no token that another one stands before.
    #[error("{}: {tokens} tokens, expected at least two to tell how the next is foreseen", .file.display())]
    TooFewTokens {
        /// The file.
        file: PathBuf,
        /// What it holds.
        tokens: usize,
    },
    /// A text is none.
    #[error("{}: not text in UTF-8; token ids are read from a file whose name ends in .json", .file.display())]
    NotText {
        /// The file.
        file: PathBuf,
    },
    /// A continuation of a text whose perplexity is asked for.
    #[error("--greedy continues a prompt: use it with --input and --output")]
    GreedyWithoutPrompt,
    /// More tokens than the limit.
    #[error("{tokens} tokens of prompt and continuation exceed the limit of {max}")]
    TooManyTokens {
        /// Tokens asked for.
        tokens: usize,
        /// The limit.
        max: usize,
    },
    /// A token id that the model does not have.
    #[error("{}: token id {token} at index {index} is not below the vocabulary size of {vocab_size}", .file.display())]
    NotInVocabulary {
        /// The file.
        file: PathBuf,
        /// The id.
        token: u32,
        /// Where it stands.
        index: usize,
        /// The first id that does not exist.
        vocab_size: usize,
    },
    /// The served decoder has one precision.
    #[error("--path fast computes in f32 and has no --dtype bf16: leave --dtype out, or use --path reference")]
    FastInBf16,
    /// The plain decoder computes on the processor alone.
    #[error("--device cuda computes what is served: add --path fast")]
    ReferenceOnCard,
    /// The memory or the device.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The tensor library refused an operation.
    #[error("computing the logits failed: {0}")]
    Compute(#[source] candle_core::Error),
    /// The model made a logit that is not a number.
    #[error("logit {token} at position {position} is {value}: the weights are damaged")]
    NotFinite {
        /// Where in the sequence.
        position: usize,
        /// Which logit.
        token: usize,
        /// What it is.
        value: f32,
    },
    /// The output cannot be written.
    #[error("{}: cannot be written: {source}", .file.display())]
    Output {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither a prompt nor a text is there to compute.
    #[error("give --input and --output, or --perplexity")]
    NoTask,
    /// What was measured cannot be told.
    #[error("standard output cannot be written: {0}")]
    Told(#[source] io::Error),
    /// The output cannot be put together.
    #[error("{}: cannot be encoded: {source}", .file.display())]
    Encode {
        /// The file.
        file: PathBuf,
        /// What the encoder said.
        source: SafeTensorError,
    },
}

#[derive(Deserialize)]
struct InputFile {
    input_ids: Vec<u32>,
}

/// What a decoder computes from a prompt.
#[derive(Debug)]
struct Computed {
    /// `[tokens, vocab]`, row-major.
    logits: Vec<f32>,
    /// The continuation.
    greedy: Vec<i64>,
}

/// Says what the command's walls leave open: the model, the input, and the output's folder.
#[must_use]
pub fn walls(args: &EvalArgs, mode: SandboxMode) -> Walls {
    let mut grants = of_model(&args.model);
    let Task { input, output, perplexity } = &args.task;
    grants.extend(input.iter().chain(perplexity).map(|file| Grant::read_file(file)));
    if let Some(output) = output {
        let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
        grants.push(Grant::write_folder(folder.unwrap_or(Path::new("."))));
    }
    Walls { writes: output.is_some(), ..Walls::of_person(mode, args.device, grants) }
}

/// Runs the command; what it measures is told on `out`.
///
/// # Errors
/// Each variant of `EvalError`; the output is written only when everything before went well.
pub fn run(_proof: &Sandboxed, prepared: Prepared, args: &EvalArgs, out: &mut dyn io::Write) -> Result<(), EvalError> {
    match &args.task {
        Task { perplexity: Some(text), .. } => {
            let surprise = foresee(prepared, args, text)?;
            perplexity::report(&surprise, args, out).map_err(EvalError::Told)
        }
        Task { input: Some(input), output: Some(output), .. } => prompt(prepared, args, input, output),
        Task { .. } => Err(EvalError::NoTask),
    }
}

/// Measures how a text is foreseen.
///
/// # Errors
/// Each variant of `EvalError` but those of the output.
pub fn foresee(prepared: Prepared, args: &EvalArgs, text: &Path) -> Result<Surprise, EvalError> {
    if args.greedy != 0 {
        return Err(EvalError::GreedyWithoutPrompt);
    }
    let config = Config::read(&args.model)?;
    let text = perplexity::Text::read(text, &args.model, &config)?;
    let weights = weights(args, &config)?;
    let sizes = (args.window as usize, config.vocab_size);
    match args.decoder_path {
        DecoderPath::Reference => {
            let begun = || Reference::new(&config, &weights, args.dtype.precision());
            perplexity::measure(&text, sizes, &mut begun(), |reference| *reference = begun(), plain_logits)
        }
        DecoderPath::Fast => {
            let mut backend = backend(args, prepared, (config, weights), args.window)?;
            let feed = |single: &mut Single<'_>, tokens: &[u32]| {
                Ok(single.feed(tokens, Role::Prompt).map_err(LoadError::Device)?)
            };
            perplexity::measure(&text, sizes, &mut Single::new(&mut backend), Single::restart, feed)
        }
    }
}

/// Computes the logits of a prompt.
fn prompt(prepared: Prepared, args: &EvalArgs, input: &Path, output: &Path) -> Result<(), EvalError> {
    check_output(output)?;
    let config = Config::read(&args.model)?;
    let tokens = read_tokens(input, &config)?;
    let length = tokens.len().saturating_add(args.greedy);
    if length > TOKENS_MAX {
        return Err(EvalError::TooManyTokens { tokens: length, max: TOKENS_MAX });
    }
    let weights = weights(args, &config)?;
    let vocab_size = config.vocab_size;
    let computed = match args.decoder_path {
        DecoderPath::Reference => {
            let mut reference = Reference::new(&config, &weights, args.dtype.precision());
            compute(args.greedy, vocab_size, &tokens, |tokens| plain_logits(&mut reference, tokens))?
        }
        DecoderPath::Fast => {
            let length = u32::try_from(length).expect("the limit on tokens is below u32");
            let mut backend = backend(args, prepared, (config, weights), length)?;
            let (mut sequence, mut role) = (Single::new(&mut backend), Role::Prompt);
            compute(args.greedy, vocab_size, &tokens, |tokens| {
                let logits = sequence.feed(tokens, role).map_err(LoadError::Device)?;
                role = Role::Generated;
                Ok(logits)
            })?
        }
    };
    write_output(output, &computed, tokens.len(), vocab_size)
}

/// Loads what is computed from, once it is clear that it can be.
fn weights(args: &EvalArgs, config: &Config) -> Result<Weights, EvalError> {
    match args.decoder_path {
        DecoderPath::Reference if args.device != DeviceChoice::Cpu => return Err(EvalError::ReferenceOnCard),
        DecoderPath::Fast if args.dtype == ValueType::Bf16 => return Err(EvalError::FastInBf16),
        DecoderPath::Reference | DecoderPath::Fast => {}
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let quantize = match args.quant {
        WeightChoice::None => Quantize::None,
        WeightChoice::File => Quantize::File,
        WeightChoice::Nf4 => Quantize::Nf4,
    };
    Ok(load(&checkpoint, config, quantize, &mut |_, _, _| {})?)
}

/// Reads and checks the prompt.
fn read_tokens(file: &Path, config: &Config) -> Result<Vec<u32>, EvalError> {
    let bytes = read_limited(file, INPUT_BYTES_MAX)?;
    let input: InputFile =
        serde_json::from_slice(&bytes).map_err(|source| EvalError::Input { file: file.to_owned(), source })?;
    let tokens = input.input_ids;
    if tokens.is_empty() {
        return Err(EvalError::NoTokens { file: file.to_owned() });
    }
    check_vocabulary(file, &tokens, config.vocab_size)?;
    Ok(tokens)
}

fn check_vocabulary(file: &Path, tokens: &[u32], vocab_size: usize) -> Result<(), EvalError> {
    match tokens.iter().position(|token| *token as usize >= vocab_size) {
        None => Ok(()),
        Some(index) => {
            Err(EvalError::NotInVocabulary { file: file.to_owned(), token: tokens[index], index, vocab_size })
        }
    }
}

/// Computes with the plain decoder.
fn plain_logits(reference: &mut Reference<'_>, tokens: &[u32]) -> Result<Vec<f32>, EvalError> {
    let logits = reference.logits(tokens).and_then(|logits| logits.flatten_all()?.to_vec1::<f32>());
    logits.map_err(EvalError::Compute)
}

/// Prepares the decoder that is served, which keeps keys and values in bf16 and everything else in f32.
fn backend(
    args: &EvalArgs,
    prepared: Prepared,
    (config, weights): (Config, Weights),
    tokens: u32,
) -> Result<Backend, EvalError> {
    let plan = LoadPlan {
        model_dir: String::new(),
        device: args.device,
        may_use_processor: false,
        context_tokens: tokens,
        sequences_max: 1,
        kv_bytes: Bytes(0),
        device_budget: Bytes(0),
        kv_type: KvType::Bf16,
        faults: Faults::default(),
    };
    Ok(place(config, weights, prepared, &plan, &mut |_, _, _| {})?.0)
}

/// Feeds the prompt to a decoder, then its own choices, one at a time.
fn compute(
    greedy_count: usize,
    vocab_size: usize,
    tokens: &[u32],
    mut step: impl FnMut(&[u32]) -> Result<Vec<f32>, EvalError>,
) -> Result<Computed, EvalError> {
    let logits = step(tokens)?;
    check_finite(&logits, vocab_size, 0)?;
    let mut last = logits[logits.len() - vocab_size..].to_vec();
    let mut greedy = Vec::new();
    while greedy.len() < greedy_count {
        let token = most_likely(&last);
        greedy.push(i64::from(token));
        if greedy.len() < greedy_count {
            last = step(&[token])?;
            check_finite(&last, vocab_size, tokens.len() + greedy.len() - 1)?;
        }
    }
    Ok(Computed { logits, greedy })
}

/// Finds the token with the largest logit, the lowest id on a tie.
pub(crate) fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    u32::try_from(best).expect("a vocabulary is far smaller than u32")
}

fn check_finite(logits: &[f32], vocab_size: usize, first_position: usize) -> Result<(), EvalError> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(index) => Err(EvalError::NotFinite {
            position: first_position + index / vocab_size,
            token: index % vocab_size,
            value: logits[index],
        }),
    }
}

/// Refuses an output path that cannot work before hours are spent on computing.
fn check_output(file: &Path) -> Result<(), EvalError> {
    let refused = |kind: io::ErrorKind| EvalError::Output { file: file.to_owned(), source: kind.into() };
    if file.is_dir() {
        return Err(refused(io::ErrorKind::IsADirectory));
    }
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => Err(refused(io::ErrorKind::NotFound)),
        _ => Ok(()),
    }
}

fn write_output(file: &Path, computed: &Computed, tokens: usize, vocab_size: usize) -> Result<(), EvalError> {
    let encode_error = |source| EvalError::Encode { file: file.to_owned(), source };
    let logits: Vec<u8> = computed.logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let greedy: Vec<u8> = computed.greedy.iter().flat_map(|token| token.to_le_bytes()).collect();
    let mut tensors = BTreeMap::new();
    let view = TensorView::new(Dtype::F32, vec![tokens, vocab_size], &logits).map_err(encode_error)?;
    tensors.insert("logits", view);
    if !greedy.is_empty() {
        let view = TensorView::new(Dtype::I64, vec![computed.greedy.len()], &greedy).map_err(encode_error)?;
        tensors.insert("greedy", view);
    }
    // Not by way of a file beside it that is renamed: the walls let files be made, and none be removed.
    let bytes = safetensors::serialize(tensors, None).map_err(encode_error)?;
    std::fs::write(file, bytes).map_err(|source| EvalError::Output { file: file.to_owned(), source })
}
