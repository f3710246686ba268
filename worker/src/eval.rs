//! `bulkhead-worker eval`: the logits of a prompt, for tests and for checking a model by hand.
//!
//! Owns: the command's arguments, its input and its output. Refuses: token ids outside the vocabulary, and inputs that
//! have none. The input is `{"input_ids": [...]}`; the output is a safetensors file with `logits` f32 `[tokens, vocab]`
//! and, if asked for, `greedy` i64 `[N]`: the N most likely tokens, each after the ones before.

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
use crate::engine::single::Single;
use crate::loader::{LoadError, place};
use crate::model::batch::Role;
use crate::model::config::{Config, ConfigError};
use crate::model::reference::{Precision, Reference};
use crate::model::weights::{Quantize, Weights, load};
use crate::prepare::Prepared;
use crate::sandbox::{Grant, Sandboxed, Walls, of_model};

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
    /// A JSON file: {"input_ids": [...]}
    #[arg(long, value_name = "IN.json")]
    pub input: PathBuf,
    /// The safetensors file to write
    #[arg(long, value_name = "OUT.safetensors")]
    pub output: PathBuf,
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
    grants.push(Grant::read_file(&args.input));
    let folder = args.output.parent().filter(|folder| !folder.as_os_str().is_empty());
    grants.push(Grant::write_folder(folder.unwrap_or(Path::new("."))));
    Walls { writes: true, ..Walls::of_person(mode, args.device, grants) }
}

/// Runs the command.
///
/// # Errors
/// Each variant of `EvalError`; the output is written only when everything before went well.
pub fn run(_proof: &Sandboxed, prepared: Prepared, args: &EvalArgs) -> Result<(), EvalError> {
    check_output(&args.output)?;
    let config = Config::read(&args.model)?;
    let tokens = read_tokens(&args.input, &config)?;
    let length = tokens.len().saturating_add(args.greedy);
    if length > TOKENS_MAX {
        return Err(EvalError::TooManyTokens { tokens: length, max: TOKENS_MAX });
    }
    if args.device != DeviceChoice::Cpu && args.decoder_path == DecoderPath::Reference {
        return Err(EvalError::ReferenceOnCard);
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let quantize = match args.quant {
        WeightChoice::None => Quantize::None,
        WeightChoice::File => Quantize::File,
        WeightChoice::Nf4 => Quantize::Nf4,
    };
    let weights = load(&checkpoint, &config, quantize, &mut |_, _, _| {})?;
    let vocab_size = config.vocab_size;
    let computed = match args.decoder_path {
        DecoderPath::Reference => reference_path(args, &config, &weights, &tokens)?,
        DecoderPath::Fast => fast_path(args, prepared, (config, weights), &tokens)?,
    };
    write_output(&args.output, &computed, tokens.len(), vocab_size)
}

/// Reads and checks the prompt.
fn read_tokens(file: &Path, config: &Config) -> Result<Vec<u32>, EvalError> {
    let bytes = read_limited(file, INPUT_BYTES_MAX)?;
    let file = || file.to_owned();
    let input: InputFile =
        serde_json::from_slice(&bytes).map_err(|source| EvalError::Input { file: file(), source })?;
    let tokens = input.input_ids;
    if tokens.is_empty() {
        return Err(EvalError::NoTokens { file: file() });
    }
    let vocab_size = config.vocab_size;
    match tokens.iter().position(|token| *token as usize >= vocab_size) {
        None => Ok(tokens),
        Some(index) => Err(EvalError::NotInVocabulary { file: file(), token: tokens[index], index, vocab_size }),
    }
}

/// Computes with the plain decoder.
fn reference_path(args: &EvalArgs, config: &Config, weights: &Weights, tokens: &[u32]) -> Result<Computed, EvalError> {
    let precision = match args.dtype {
        ValueType::F32 => Precision::F32,
        ValueType::Bf16 => Precision::Bf16,
    };
    let mut reference = Reference::new(config, weights, precision);
    compute(args.greedy, config.vocab_size, tokens, |tokens| {
        let logits = reference.logits(tokens).and_then(|logits| logits.flatten_all()?.to_vec1::<f32>());
        logits.map_err(EvalError::Compute)
    })
}

/// Computes with the decoder that is served, which keeps keys and values in bf16 and everything else in f32.
fn fast_path(
    args: &EvalArgs,
    prepared: Prepared,
    (config, weights): (Config, Weights),
    tokens: &[u32],
) -> Result<Computed, EvalError> {
    if args.dtype == ValueType::Bf16 {
        return Err(EvalError::FastInBf16);
    }
    let (greedy, vocab_size) = (args.greedy, config.vocab_size);
    let length = u32::try_from(tokens.len() + greedy).expect("the limit on tokens is below u32");
    let plan = LoadPlan {
        model_dir: String::new(),
        device: args.device,
        may_use_processor: false,
        threads: 0,
        cpu: args.cpu,
        context_tokens: length,
        sequences_max: 1,
        kv_bytes: Bytes(0),
        device_budget: Bytes(0),
        kv_type: KvType::Bf16,
        faults: Faults::default(),
    };
    let (mut backend, _) = place(config, weights, prepared, &plan, &mut |_, _, _| {})?;
    let mut sequence = Single::new(&mut backend);
    let mut role = Role::Prompt;
    compute(greedy, vocab_size, tokens, |tokens| {
        let logits = sequence.feed(tokens, role).map_err(LoadError::Device)?;
        role = Role::Generated;
        Ok(logits)
    })
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
