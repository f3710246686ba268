//! From OpenAI's wire types to what a worker is asked for: the only place where a client's values are judged.
//!
//! Owns: names, types and bounds of every parameter, and what happens to those that are not supported. Refuses: status
//! codes, the prompt's text and tokens. The rules:
//! - What cannot be honoured and would change the answer is refused by name, unless its value asks for nothing.
//! - What cannot change the answer is accepted ([`params::HARMLESS`]).
//! - A parameter that nobody knows is refused, with the nearest known name: a typing error would otherwise be ignored
//!   without a word. OpenAI's own API does the same.
//! - Unknown keys *inside messages* are ignored: histories are sent back with whatever other servers put into them.
//!
//! Invariant: a [`Request`] keeps every bound of `bulkhead_shared::limits`.

mod chat;
mod fields;
mod params;
#[cfg(test)]
mod tests;

use bulkhead_shared::generate::{Generate, Prompt};
use bulkhead_shared::limits::BODY_BYTES_MAX;
use bulkhead_shared::units::RequestId;

use fields::Fields;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The body is no JSON object.
    #[error("the body is not a JSON object: {reason}")]
    NotJson {
        /// What the parser says, with the place.
        reason: String,
    },
    /// A parameter is missing.
    #[error("{param} is required")]
    Missing {
        /// Which.
        param: String,
    },
    /// A value has the wrong type or is out of bounds.
    #[error("{param} {reason}")]
    Invalid {
        /// Which parameter.
        param: String,
        /// What it must be, or what is wrong with it.
        reason: String,
    },
    /// A parameter is known and its value cannot be honoured.
    #[error("{param} is not supported: {reason}")]
    Unsupported {
        /// Which.
        param: String,
        /// What would be accepted.
        reason: String,
    },
    /// Nobody knows the parameter.
    #[error("unknown parameter {param}{}", nearest.map_or(String::new(), |name| format!(", did you mean {name}?")))]
    Unknown {
        /// Which.
        param: String,
        /// A known one with almost the same name.
        nearest: Option<&'static str>,
    },
}

/// Whether the answer comes whole or as it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// One JSON object.
    Whole,
    /// Server-sent events.
    Stream {
        /// Whether a last event tells the usage.
        has_usage: bool,
    },
}

/// What is fixed at admission because it is no function of the request.
#[derive(Clone, Debug)]
pub struct Admission {
    /// The date that the model is told, `YYYY-MM-DD`.
    pub date: String,
    /// The seed where the client gave none.
    pub seed: u64,
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The model that the client named.
    pub model: Option<String>,
    /// How the answer goes out.
    pub delivery: Delivery,
    /// What the worker is asked for; its id is set at admission.
    pub generate: Generate,
}

/// Tokens that a text completion generates when the client does not say (OpenAI's own default).
const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// Checks the body of a request to `/v1/chat/completions`.
///
/// # Errors
/// The first thing that is wrong.
pub fn chat(body: &[u8], admission: Admission) -> Result<Request, RequestError> {
    let mut fields = Fields::body(body)?;
    let seed = admission.seed;
    let conversation = chat::conversation(&mut fields, admission.date)?;
    let limits = Limits { max_tokens: params::max_tokens(&mut fields)?, logprobs: params::chat_logprobs(&mut fields)? };
    params::check_logprobs("top_logprobs", limits.logprobs, limits.max_tokens)?;
    finish(fields, Prompt::Chat(conversation), limits, seed)
}

/// Checks the body of a request to `/v1/completions`.
///
/// # Errors
/// The first thing that is wrong.
pub fn completion(body: &[u8], admission: Admission) -> Result<Request, RequestError> {
    let mut fields = Fields::body(body)?;
    let prompt = params::prompt(&mut fields)?;
    let max_tokens = params::max_tokens(&mut fields)?.or(Some(COMPLETION_TOKENS_DEFAULT));
    let limits = Limits { max_tokens, logprobs: params::completion_logprobs(&mut fields)? };
    params::check_logprobs("logprobs", limits.logprobs, limits.max_tokens)?;
    finish(fields, prompt, limits, admission.seed)
}

/// What the two kinds of request say differently: how much is generated, and how much is told of it.
struct Limits {
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
}

fn finish(mut fields: Fields<'_>, prompt: Prompt, limits: Limits, seed: u64) -> Result<Request, RequestError> {
    let Limits { max_tokens, logprobs } = limits;
    let model = fields.take::<String>("model", "must be a string")?;
    let delivery = params::delivery(&mut fields)?;
    let sampling = params::sampling(&mut fields, seed)?;
    let stop = params::stop(&mut fields)?;
    params::check_rest(fields)?;
    let generate = Generate { id: RequestId(0), prompt, sampling, stop, max_tokens, logprobs, resume: Vec::new() };
    Ok(Request { model, delivery, generate })
}

/// Says how much of the queue's bytes a request with so long a body takes.
#[must_use]
pub fn weight(body_bytes: usize) -> usize {
    /// What even the shortest request holds in lists and buffers.
    const REQUEST_BYTES_MIN: usize = 4096;
    assert!(body_bytes <= BODY_BYTES_MAX, "longer bodies were refused");
    body_bytes + REQUEST_BYTES_MIN
}
