//! The messages of the link, by direction.
//!
//! The order of a worker's life: `Hello`, then the supervisor's `Load`, then `Progress` any number of times, then
//! `Ready` or `LoadFailed`. From `Ready` on, for each `Generate`: one `Prompt`, any number of `Delta`, and exactly one of
//! `Done` and `Failed`. `Ping` may come at any time after `Hello` and is answered with `Pong`. The link's end asks the
//! worker to end. A message that is illegal in the state ends the incarnation.

use bincode::{Decode, Encode};

use crate::generate::Generate;
use crate::layers::Layer;
use crate::limits::{DETAIL_BYTES_MAX, DEVICE_BUDGET_MAX};
use crate::units::{Bytes, RequestId};

/// The version of everything in this crate. Both sides come from one build; a difference is refused at `Hello`.
pub const PROTOCOL_VERSION: u32 = 3;

/// What a supervisor tells its worker.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum ToWorker {
    /// Load a model as planned. Comes once, first.
    Load(LoadPlan),
    /// Generate tokens for a request.
    Generate(Box<Generate>),
    /// Give up a request: it ends with `Failed(Cancelled)` within a step. Unknown ids are ignored, since a request may
    /// have ended while this was on its way.
    Cancel {
        /// The request.
        id: RequestId,
    },
    /// Asks for a sign of life.
    Ping {
        /// Comes back in the `Pong`.
        nonce: u64,
    },
}

/// What a worker tells its supervisor.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum FromWorker {
    /// The first message: the worker stands behind its walls and may be given a model.
    Hello {
        /// The worker's `PROTOCOL_VERSION`.
        version: u32,
        /// The layers of isolation in force.
        layers: Vec<Layer>,
    },
    /// The load is moving.
    Progress {
        /// How much has been done.
        done: Bytes,
        /// How much there is to do.
        total: Bytes,
        /// What is being done, for people.
        what: String,
    },
    /// The model can take requests.
    Ready(Facts),
    /// The model cannot be loaded; the worker ends right after this with a typed exit code.
    LoadFailed {
        /// Why, naming the file and the tensor where there is one.
        detail: String,
    },
    /// The prompt of a request was rendered, tokenised and found to fit.
    Prompt {
        /// The request.
        id: RequestId,
        /// Tokens of the prompt.
        tokens: u32,
        /// Of these, how many needed no computation.
        cached: u32,
    },
    /// New tokens of a request.
    Delta {
        /// The request.
        id: RequestId,
        /// The token ids, in order, at least one. Replayed tokens of `resume` are not repeated here.
        tokens: Vec<u32>,
        /// The text that these tokens completed, by kind. May be empty: a marker, or an unfinished character.
        pieces: Vec<Piece>,
        /// The log-probabilities of those of these tokens that are in the content or may come to be; empty unless they were
        /// asked for. They wait until a run says what becomes of them.
        logprobs: Vec<Logprobs>,
        /// What becomes of log-probabilities that wait, in their order.
        runs: Vec<TokenRun>,
    },
    /// A request ended well.
    Done {
        /// The request.
        id: RequestId,
        /// Text that was held back until the end was certain.
        pieces: Vec<Piece>,
        /// The tokens of that text. Whatever waits behind them is in no content.
        runs: Vec<TokenRun>,
        /// Why it ended.
        reason: FinishReason,
        /// What it used.
        usage: Usage,
    },
    /// A request ended without a whole answer.
    Failed {
        /// The request.
        id: RequestId,
        /// Why.
        failure: Failure,
    },
    /// The answer to `Ping`.
    Pong {
        /// The `Ping`'s.
        nonce: u64,
        /// Rises with every layer computed: a worker with work whose counter stands still is hung.
        progress: u64,
        /// Sequences in the batch or waiting for it.
        sequences: u32,
        /// Blocks of KV cache that are free.
        blocks_free: u32,
    },
}

/// What to load and how much room it may take.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct LoadPlan {
    /// The model folder, an absolute path.
    pub model_dir: String,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Whether the processor will do where the card cannot take the model: nobody chose the device.
    pub may_use_processor: bool,
    /// Context to serve, in tokens; 0 takes the model's own.
    pub context_tokens: u32,
    /// Sequences that may run in one batch.
    pub sequences_max: u32,
    /// Bytes for the KV cache; 0 lets the worker take what one full context and the batch need.
    pub kv_bytes: Bytes,
    /// Bytes that the worker may hold on the device in all; 0 takes its share of the card. Of no meaning on a processor.
    pub device_budget: Bytes,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// What is made worse on purpose.
    pub faults: Faults,
}

/// Ways in which a worker is made worse on purpose, for tests; only ever set behind `--allow-faults`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Faults {
    /// Slows every step down. Units: milliseconds.
    pub step_delay_ms: u32,
    /// Crashes in the step that computes this token, of a prompt or of an answer.
    pub die_on_token: Option<u32>,
    /// Ends as for want of host memory after so many steps.
    pub oom_after_steps: Option<u32>,
    /// Stands still after so many steps.
    pub hang_after_steps: Option<u32>,
}

/// A device to compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum DeviceChoice {
    /// The processor.
    Cpu,
    /// A CUDA card by its number.
    Cuda(u32),
}

/// By which instructions a processor computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuChoice {
    /// The best that it has.
    #[default]
    Auto,
    /// Plain f32 arithmetic: exact but for the order of sums, and slow.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX2 with AVX-VNNI.
    AvxVnni,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX-512 with VNNI, and AMX in int8.
    Amx,
}

impl CpuChoice {
    /// All of them.
    pub const ALL: [CpuChoice; 6] =
        [CpuChoice::Auto, CpuChoice::Scalar, CpuChoice::Avx2, CpuChoice::AvxVnni, CpuChoice::Avx512, CpuChoice::Amx];

    /// The words for settings, in the order of `ALL`.
    pub const WORDS: [&'static str; 6] = ["auto", "scalar", "avx2", "avxvnni", "avx512", "amx"];

    /// Gives the word for settings and status lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        CpuChoice::WORDS[self as usize]
    }

    /// Finds the choice by its word.
    #[must_use]
    pub fn parse(word: &str) -> Option<CpuChoice> {
        CpuChoice::ALL.into_iter().find(|choice| choice.as_str() == word)
    }
}

/// Gives what a worker may hold on a card of this size: what was asked for, or the smaller of 22 GiB and nine tenths of
/// the card; never more than the card has.
#[must_use]
pub fn device_budget(asked: Bytes, card: Bytes) -> Bytes {
    match asked {
        // Dividing first keeps the product in range; nine bytes less are no loss.
        Bytes(0) => DEVICE_BUDGET_MAX.min(Bytes(card.0 / 10 * 9)),
        asked => asked.min(card),
    }
}

/// How keys and values of past tokens are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub enum KvType {
    /// As 16-bit floats.
    #[default]
    Bf16,
    /// As signed bytes, with a scale for each head and token: half the memory, a little less exact.
    Int8,
}

impl KvType {
    /// Gives the word for settings and status lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            KvType::Bf16 => "bf16",
            KvType::Int8 => "int8",
        }
    }
}

/// What a loaded model is.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Facts {
    /// Tokens of prompt and answer together that one sequence may have.
    pub context_tokens: u32,
    /// Tokens in a block of KV cache.
    pub block_tokens: u32,
    /// Blocks of KV cache.
    pub blocks: u32,
    /// Rows of the output matrix.
    pub vocabulary: u32,
    /// How much memory is held, by purpose.
    pub memory: Vec<(MemoryKind, Bytes)>,
    /// Where the model computes, for people: `cpu (avx2, 2 threads)`.
    pub device: String,
    /// How its weights are stored, for people: `nf4`, `mxfp4`, `bf16`.
    pub quantization: String,
    /// What the memory plan gave up to fit, for people; empty when nothing.
    pub given_up: Vec<String>,
}

/// A purpose of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum MemoryKind {
    /// Weights where the model computes, mapped or read.
    Weights,
    /// Weights that a card reads from the host's memory.
    HostWeights,
    /// Keys and values of past tokens, where the model computes.
    KvCache,
    /// Those of the layers that the host computes beside a card.
    HostKvCache,
    /// Activations of one step.
    Scratch,
    /// What the driver keeps on a card for itself: context, code, graphs.
    Reserve,
    /// Host memory for the keys and values of sequences that had to make room.
    Swap,
}

impl MemoryKind {
    /// Gives the word for status lines and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            MemoryKind::Weights => "weights",
            MemoryKind::HostWeights => "host_weights",
            MemoryKind::KvCache => "kv_cache",
            MemoryKind::HostKvCache => "host_kv_cache",
            MemoryKind::Scratch => "scratch",
            MemoryKind::Reserve => "reserve",
            MemoryKind::Swap => "swap",
        }
    }
}

/// A run of text of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Piece {
    /// What the model thinks.
    Reasoning(String),
    /// What the model says.
    Content(String),
    /// A whole call of a tool: a call that the token limit cut off never becomes a piece.
    ToolCall {
        /// Counts the calls of this answer from 0.
        index: u32,
        /// The tool's name.
        name: String,
        /// The arguments as the model wrote them, meant to be JSON.
        arguments: String,
    },
}

/// How likely the model took a generated token to be, and others in its place: natural logarithms, before temperature,
/// penalties and filters.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Logprobs {
    /// The token that was generated.
    pub chosen: TokenLogprob,
    /// The most likely tokens, the likeliest first; the generated one may be among them.
    pub top: Vec<TokenLogprob>,
}

/// A token with its log-probability.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct TokenLogprob {
    /// What the token stands for.
    pub token: TokenText,
    /// Bounds: `LOGPROB_MIN` to 0, inclusive.
    pub logprob: f32,
}

/// What a token stands for.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum TokenText {
    /// These bytes of text: perhaps a part of a character only.
    Bytes(Vec<u8>),
    /// No text: a special token, by its name.
    Special(String),
}

impl TokenText {
    /// Counts the bytes that this carries.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            TokenText::Bytes(bytes) => bytes.len(),
            TokenText::Special(name) => name.len(),
        }
    }

    /// Says whether it carries none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What becomes of the next tokens whose log-probabilities wait: first those that are in no content, then those that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TokenRun {
    /// Tokens of headers and tool calls.
    pub skipped: u32,
    /// Tokens of the content of this message, at least one.
    pub listed: u32,
}

/// Why a request ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum FinishReason {
    /// The model ended its turn, or a stop string matched.
    Stop,
    /// The token limit or the context was reached.
    Length,
    /// The model called tools and waits for their results.
    ToolCalls,
}

/// What a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Usage {
    /// Tokens of the prompt as rendered.
    pub prompt_tokens: u32,
    /// Of these, how many needed no computation.
    pub cached_tokens: u32,
    /// Tokens generated, markers and the end token included.
    pub completion_tokens: u32,
    /// Of these, how many belonged to reasoning.
    pub reasoning_tokens: u32,
}

/// Why a request ended without a whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Failure {
    /// The client's fault: prompt and answer do not fit.
    ContextLength {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens asked for, 0 where the client did not say.
        max_tokens: u32,
        /// Tokens that fit.
        context_tokens: u32,
    },
    /// The client's fault: a value that only the worker can judge.
    Invalid {
        /// The parameter by its name in the API.
        param: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The supervisor asked for it.
    Cancelled,
}

/// Cuts a text for people to what a frame may carry, at a character's boundary.
#[must_use]
pub fn detail(text: &str) -> String {
    text[..text.floor_char_boundary(DETAIL_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_a_share_of_the_card_with_a_bound() {
        const GIB: u64 = 1 << 30;
        for (asked, card, expected) in [
            (0, 10 * GIB, 9 * GIB),
            (0, 24 * GIB, 24 * GIB / 10 * 9),
            (0, 80 * GIB, 22 * GIB),
            (70 * GIB, 80 * GIB, 70 * GIB),
            (90 * GIB, 80 * GIB, 80 * GIB),
        ] {
            assert_eq!(device_budget(Bytes(asked), Bytes(card)), Bytes(expected), "{asked} of {card}");
        }
    }

    #[test]
    fn every_way_to_compute_has_its_word() {
        for (choice, word) in CpuChoice::ALL.into_iter().zip(CpuChoice::WORDS) {
            assert_eq!((choice.as_str(), CpuChoice::parse(word)), (word, Some(choice)));
        }
        assert_eq!(CpuChoice::parse("AVX2"), None);
    }

    #[test]
    fn a_long_detail_is_cut_between_characters() {
        assert_eq!(detail("short"), "short");
        let long = "é".repeat(DETAIL_BYTES_MAX);
        assert_eq!(detail(&long).len(), DETAIL_BYTES_MAX);
        assert_eq!(detail(&format!("x{long}")).len(), DETAIL_BYTES_MAX - 1);
    }
}
