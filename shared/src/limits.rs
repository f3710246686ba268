//! Every bound that both processes check, with the relations between them.
//!
//! Reaching one of these is a normal outcome with an error of its own, never a truncation.

use crate::units::Bytes;

/// Bytes of the body of one HTTP request, at most. The supervisor answers 413 above it.
pub const BODY_BYTES_MAX: usize = 8 * MIB;

/// Bytes of one frame from the supervisor to a worker, at most. A body becomes one frame, and its token ids and strings
/// take less room there than as JSON.
pub const TO_WORKER_FRAME_BYTES_MAX: usize = 16 * MIB;

/// Bytes of one frame from a worker to the supervisor, at most.
pub const FROM_WORKER_FRAME_BYTES_MAX: usize = MIB;

/// Memory that decoding one frame may claim: bincode counts `length * size_of` of every sequence before it reserves.
pub const DECODE_BYTES_MAX: usize = 8 * TO_WORKER_FRAME_BYTES_MAX;

/// Messages of one conversation, at most.
pub const MESSAGES_MAX: usize = 4096;

/// Tools that one request may offer, at most.
pub const TOOLS_MAX: usize = 128;

/// Bytes of the name of a tool, at most (OpenAI's own limit).
pub const TOOL_NAME_BYTES_MAX: usize = 64;

/// Bytes of the JSON schema of the parameters of one tool, at most.
pub const TOOL_SCHEMA_BYTES_MAX: usize = 256 * 1024;

/// Nesting of a tool's JSON schema, at most: renderers walk it recursively.
pub const TOOL_SCHEMA_DEPTH_MAX: usize = 32;

/// Stop strings of one request, at most (OpenAI allows 4; agents send more).
pub const STOP_STRINGS_MAX: usize = 16;

/// Bytes of one stop string, at most.
pub const STOP_STRING_BYTES_MAX: usize = 1024;

/// Token ids in one `Delta`, at most.
pub const DELTA_TOKENS_MAX: usize = 1024;

/// Bytes of text in the pieces of one `Delta`, at most. A tool call travels as one piece.
pub const DELTA_TEXT_BYTES_MAX: usize = 512 * 1024;

/// Tokens in the place of a generated one whose log-probabilities may be asked for, at most (OpenAI's own limit in
/// conversations).
pub const LOGPROBS_TOP_MAX: u32 = 20;

/// Log-probabilities that are computed for one answer, at most: those of its tokens and those in their places.
pub const LOGPROBS_MAX: u32 = 1 << 18;

/// The least log-probability that is told (OpenAI's own); what is less likely is told as this.
pub const LOGPROB_MIN: f32 = -9999.0;

/// Bytes of one token as text, at most, where log-probabilities are told.
pub const TOKEN_BYTES_MAX: usize = 256;

/// Runs of tokens in one message, at most: between two of them there is text that a stop string held back.
pub const TOKEN_RUNS_MAX: usize = 2 * STOP_STRING_BYTES_MAX;

/// Tokens that any model may have as its context, at most.
pub const CONTEXT_TOKENS_MAX: u32 = 1 << 20;

/// Requests that a worker may be handed at once, at most; the supervisor's queue holds the others.
pub const WORKER_REQUESTS_MAX: usize = 64;

/// Bytes of a message for people that crosses in a frame (a load error, a failure), at most.
pub const DETAIL_BYTES_MAX: usize = 4096;

/// Bytes that a worker holds on a card, at most, unless the configuration says otherwise.
pub const DEVICE_BUDGET_MAX: Bytes = Bytes(22 << 30);

const MIB: usize = 1024 * 1024;

/// Gives the tokens that an answer may have, at most, with the log-probabilities of so many tokens in each one's place.
#[must_use]
pub const fn logprob_tokens_max(top: u32) -> u32 {
    LOGPROBS_MAX / (1 + top)
}

const _: () = assert!(BODY_BYTES_MAX < TO_WORKER_FRAME_BYTES_MAX);
const _: () = assert!(
    DELTA_TEXT_BYTES_MAX
        + 8 * DELTA_TOKENS_MAX
        + (1 + LOGPROBS_TOP_MAX as usize) * (TOKEN_BYTES_MAX + 16)
        + 10 * TOKEN_RUNS_MAX
        < FROM_WORKER_FRAME_BYTES_MAX
);
const _: () = assert!(TOOL_SCHEMA_BYTES_MAX < BODY_BYTES_MAX);
const _: () = assert!(STOP_STRINGS_MAX * STOP_STRING_BYTES_MAX < BODY_BYTES_MAX);
const _: () = assert!(TO_WORKER_FRAME_BYTES_MAX <= u32::MAX as usize);
