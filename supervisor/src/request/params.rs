//! The parameters beside the conversation: sampling, limits, stop strings, and the long tail.

use bulkhead_shared::generate::{Prompt, ReasoningEffort, Sampling};
use bulkhead_shared::limits::{
    CONTEXT_TOKENS_MAX, LOGPROBS_TOP_MAX, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, logprob_tokens_max,
};
use serde_json::value::RawValue;
use serde_json::{Number, Value};

use super::fields::{Fields, invalid, items, parse, unsupported};
use super::{Delivery, RequestError};
use crate::config::edits;

/// Parameters that cannot change the answer, whatever they say.
///
/// `parallel_tool_calls` is here because a gpt-oss turn ends with its call: there is never a second one to forbid.
/// `prediction` only makes a server faster. The others name the client or the server's accounting.
pub(super) const HARMLESS: &[&str] = &[
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// Parameters that are not supported, each with the values that ask for nothing, as JSON.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("add_generation_prompt", &["true"]),
    ("allowed_token_ids", &[]),
    ("audio", &[]),
    ("bad_words", &["[]"]),
    ("best_of", &["1"]),
    ("cache_prompt", &["true"]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &["{}"]),
    ("continue_final_message", &["false"]),
    ("documents", &["[]"]),
    ("echo", &["false"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("functions", &["[]"]),
    ("grammar", &["\"\""]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("ignore_eos", &["false"]),
    ("include_reasoning", &["true"]),
    ("include_stop_str_in_output", &["false"]),
    ("json_schema", &[]),
    ("length_penalty", &["1"]),
    ("logit_bias", &["{}"]),
    ("min_tokens", &["0"]),
    ("mirostat", &["0"]),
    ("modalities", &["[\"text\"]"]),
    ("moderation", &[]),
    ("n", &["1"]),
    ("n_predict", &[]),
    ("prompt_logprobs", &["0"]),
    ("repeat_penalty", &["1"]),
    ("return_token_ids", &["false"]),
    ("separate_reasoning", &["true"]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true", "false"]),
    ("stop_token_ids", &["[]"]),
    ("structured_outputs", &[]),
    ("suffix", &["\"\""]),
    ("typical_p", &["1"]),
    ("use_beam_search", &["false"]),
    ("verbosity", &["\"medium\""]),
    ("web_search_options", &[]),
];

/// Parameters that are honoured: for suggestions.
const HONOURED: &[&str] = &[
    "frequency_penalty",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "model",
    "presence_penalty",
    "prompt",
    "reasoning_effort",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
];

/// Edits between a name and a known one, up to which the known one is suggested.
const SUGGESTION_EDITS_MAX: usize = 3;

/// Judges everything that was not taken: harmless, neutral, not supported, or unknown.
pub(super) fn check_rest(fields: Fields<'_>) -> Result<(), RequestError> {
    for (param, value) in fields.rest() {
        if HARMLESS.contains(&param.as_str()) {
            continue;
        }
        let Some((_, neutral)) = NEUTRAL.iter().find(|(name, _)| *name == param) else {
            return Err(RequestError::Unknown { nearest: nearest(&param), param });
        };
        if !neutral.iter().any(|text| is_equal(text, value)) {
            let accepted = match neutral {
                [] => "leave it out".to_owned(),
                values => format!("leave it out or send {}", values.join(" or ")),
            };
            return Err(unsupported(&param, accepted));
        }
    }
    Ok(())
}

fn nearest(param: &str) -> Option<&'static str> {
    let names = HONOURED.iter().chain(HARMLESS).chain(NEUTRAL.iter().map(|(name, _)| name));
    let distances = names.map(|name| (edits(param, name), *name));
    distances.filter(|(edits, name)| *edits <= SUGGESTION_EDITS_MAX && *edits < name.len()).min().map(|(_, name)| name)
}

fn is_equal(neutral: &str, value: &RawValue) -> bool {
    let as_value = |text| serde_json::from_str::<Value>(text).ok();
    match (as_value(neutral), as_value(value.get())) {
        (Some(Value::Number(left)), Some(Value::Number(right))) => left.as_f64() == right.as_f64(),
        (left, right) => left.is_some() && left == right,
    }
}

/// Takes `stream` and `stream_options`.
pub(super) fn delivery(fields: &mut Fields<'_>) -> Result<Delivery, RequestError> {
    let is_stream = fields.take("stream", "must be true or false")?.unwrap_or(false);
    let mut has_usage = false;
    if let Some(mut options) = fields.inner("stream_options")? {
        has_usage = options.take("include_usage", "must be true or false")?.unwrap_or(false);
        // Padding against observers of the line, which changes no text.
        options.raw("include_obfuscation");
        if let Some((param, _)) = options.rest().find(|(_, value)| value.get() != "false") {
            return Err(unsupported(&param, "stream_options takes include_usage"));
        }
    }
    Ok(if is_stream { Delivery::Stream { has_usage } } else { Delivery::Whole })
}

/// Takes `max_tokens` and `max_completion_tokens`, which mean the same.
pub(super) fn max_tokens(fields: &mut Fields<'_>) -> Result<Option<u32>, RequestError> {
    let range = format!("must be a whole number from 1 to {CONTEXT_TOKENS_MAX}");
    let mut take = |key| -> Result<Option<u32>, RequestError> {
        let Some(number) = fields.take::<Number>(key, &range)? else { return Ok(None) };
        let tokens = number.as_u64().and_then(|tokens| u32::try_from(tokens).ok());
        match tokens.filter(|tokens| (1..=CONTEXT_TOKENS_MAX).contains(tokens)) {
            Some(tokens) => Ok(Some(tokens)),
            None => Err(invalid(key, format!("{range}, not {number}"))),
        }
    };
    match (take("max_tokens")?, take("max_completion_tokens")?) {
        (Some(old), Some(new)) if old != new => {
            Err(invalid("max_tokens", format!("is {old} and max_completion_tokens is {new}: send one of them")))
        }
        (old, new) => Ok(new.or(old)),
    }
}

/// Takes `logprobs` and `top_logprobs` of a conversation: whether log-probabilities are told, and of how many tokens beside
/// the one that is generated.
pub(super) fn chat_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, RequestError> {
    let is_asked = fields.take("logprobs", "must be true or false")?.unwrap_or(false);
    match (is_asked, top_logprobs(fields, "top_logprobs")?) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(invalid("top_logprobs", "needs logprobs: true")),
    }
}

/// Takes `logprobs` of a text completion, which is a number there.
pub(super) fn completion_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, RequestError> {
    if top_logprobs(fields, "top_logprobs")?.is_some_and(|top| top > 0) {
        return Err(unsupported("top_logprobs", "a text completion takes the number as logprobs"));
    }
    match fields.raw("logprobs") {
        Some(value) if value.get() == "false" => Ok(None),
        Some(value) => parse_top("logprobs", value).map(Some),
        None => Ok(None),
    }
}

fn top_logprobs(fields: &mut Fields<'_>, key: &str) -> Result<Option<u32>, RequestError> {
    fields.raw(key).map(|value| parse_top(key, value)).transpose()
}

fn parse_top(param: &str, value: &RawValue) -> Result<u32, RequestError> {
    let must = format!("must be a whole number from 0 to {LOGPROBS_TOP_MAX}");
    match serde_json::from_str(value.get()) {
        Ok(top) if top <= LOGPROBS_TOP_MAX => Ok(top),
        Ok(_) | Err(_) => Err(invalid(param, must)),
    }
}

/// Checks that so many tokens may be told of.
pub(super) fn check_logprobs(param: &str, logprobs: Option<u32>, max_tokens: Option<u32>) -> Result<(), RequestError> {
    let (Some(top), Some(tokens)) = (logprobs, max_tokens) else { return Ok(()) };
    match logprob_tokens_max(top) {
        max if tokens > max => Err(invalid(
            param,
            format!("of {top} goes with at most {max} tokens, not {tokens}: lower it or max_tokens"),
        )),
        _ => Ok(()),
    }
}

/// Takes the sampling parameters. `seed` is used where the client gave none.
pub(super) fn sampling(fields: &mut Fields<'_>, seed: u64) -> Result<Sampling, RequestError> {
    Ok(Sampling {
        temperature: number(fields, "temperature", 0.0, 2.0)?,
        top_k: top_k(fields)?,
        // The smallest set that reaches a probability of nothing is the most likely token.
        top_p: number(fields, "top_p", 0.0, 1.0)?.map(|top_p| top_p.max(f32::MIN_POSITIVE)),
        min_p: number(fields, "min_p", 0.0, 1.0)?,
        repetition_penalty: number(fields, "repetition_penalty", f32::MIN_POSITIVE, 10.0)?,
        frequency_penalty: number(fields, "frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        presence_penalty: number(fields, "presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        seed: fields.take::<i64>("seed", "must be a whole number of 64 bits")?.map_or(seed, i64::cast_unsigned),
    })
}

/// Takes a number within bounds, inclusive.
fn number(fields: &mut Fields<'_>, key: &str, min: f32, max: f32) -> Result<Option<f32>, RequestError> {
    let Some(number) = fields.take::<f64>(key, "must be a number")? else { return Ok(None) };
    if !(f64::from(min)..=f64::from(max)).contains(&number) {
        let range =
            if min == f32::MIN_POSITIVE { format!("above 0 and up to {max}") } else { format!("from {min} to {max}") };
        return Err(invalid(key, format!("must be {range}, not {number}")));
    }
    // Rounding to f32 stays within bounds that are f32 themselves.
    Ok(Some(number as f32))
}

fn top_k(fields: &mut Fields<'_>) -> Result<Option<u32>, RequestError> {
    const MUST: &str = "must be a whole number from 0 (or -1, which both keep every token)";
    match fields.take::<i64>("top_k", MUST)? {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(top_k) => u32::try_from(top_k).map(Some).map_err(|_| invalid("top_k", format!("{MUST}, not {top_k}"))),
    }
}

/// Takes `stop`: a string or a list of strings.
pub(super) fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, RequestError> {
    const MUST: &str = "must be a string or a list of strings";
    let Some(value) = fields.raw("stop") else { return Ok(Vec::new()) };
    let strings: Vec<String> = match serde_json::from_str::<String>(value.get()) {
        Ok(string) => vec![string],
        Err(_) => parse("stop", value, MUST)?,
    };
    if strings.len() > STOP_STRINGS_MAX {
        return Err(invalid("stop", format!("has {} strings, at most {STOP_STRINGS_MAX} are allowed", strings.len())));
    }
    for (index, string) in strings.iter().enumerate() {
        match string.len() {
            0 => return Err(invalid("stop", format!("has an empty string at index {index}"))),
            bytes if bytes > STOP_STRING_BYTES_MAX => {
                let reason = format!("has a string of {bytes} bytes, at most {STOP_STRING_BYTES_MAX} are allowed");
                return Err(invalid("stop", reason));
            }
            _ => {}
        }
    }
    Ok(strings)
}

/// Takes `prompt`: a string, a list of token ids, or a list that holds one of either.
pub(super) fn prompt(fields: &mut Fields<'_>) -> Result<Prompt, RequestError> {
    const MUST: &str = "must be a string, a list of token ids, or a list that holds one of either";
    let Some(value) = fields.raw("prompt") else { return Err(RequestError::Missing { param: "prompt".into() }) };
    if let Some(prompt) = single_prompt(value) {
        return check_prompt(prompt);
    }
    match items("prompt", value).map_err(|_| invalid("prompt", MUST))?.as_slice() {
        [] => Err(invalid("prompt", "is an empty list")),
        [only] => check_prompt(single_prompt(only).ok_or_else(|| invalid("prompt", MUST))?),
        [first, ..] if single_prompt(first).is_some() => {
            Err(unsupported("prompt", "one prompt in a request; send a request for each"))
        }
        [..] => Err(invalid("prompt", MUST)),
    }
}

fn single_prompt(value: &RawValue) -> Option<Prompt> {
    let text = || serde_json::from_str(value.get()).ok().map(Prompt::Text);
    let tokens = || serde_json::from_str(value.get()).ok().map(Prompt::Tokens);
    text().or_else(tokens)
}

fn check_prompt(prompt: Prompt) -> Result<Prompt, RequestError> {
    match &prompt {
        Prompt::Text(text) if text.is_empty() => Err(invalid("prompt", "is empty")),
        Prompt::Tokens(tokens) if tokens.is_empty() => Err(invalid("prompt", "is an empty list")),
        Prompt::Text(_) | Prompt::Tokens(_) | Prompt::Chat(_) => Ok(prompt),
    }
}

/// Takes `reasoning_effort`, or `reasoning: {"effort": ...}`.
pub(super) fn effort(fields: &mut Fields<'_>) -> Result<ReasoningEffort, RequestError> {
    let mut param = "reasoning_effort".to_owned();
    let mut word = fields.take::<String>(&param, "must be a string")?;
    if let Some(mut reasoning) = fields.inner("reasoning")? {
        let inner = reasoning.take::<String>("effort", "must be a string")?;
        if word.is_none() && inner.is_some() {
            (param, word) = (reasoning.param("effort"), inner);
        }
        if let Some((param, _)) = reasoning.rest().next() {
            return Err(unsupported(&param, "reasoning takes effort"));
        }
    }
    match word.as_deref() {
        None | Some("medium") => Ok(ReasoningEffort::Medium),
        Some("low") => Ok(ReasoningEffort::Low),
        Some("high") => Ok(ReasoningEffort::High),
        Some(other) => {
            Err(invalid(&param, format!("must be low, medium or high, not {other:?}: the model knows no other")))
        }
    }
}

/// Takes `response_format`, of which only text can be promised.
pub(super) fn response_format(fields: &mut Fields<'_>) -> Result<(), RequestError> {
    let Some(mut format) = fields.inner("response_format")? else { return Ok(()) };
    match format.require::<String>("type", "must be a string")?.as_str() {
        "text" => Ok(()),
        other => Err(unsupported("response_format", format!("type {other:?} is not enforced; use \"text\""))),
    }
}
