//! Text on both sides of the model: a request becomes token ids, and token ids become pieces of an answer.
//!
//! Owns: the tokenizer, the harmony format in both directions, chat templates and the tool calls of Llama, incremental
//! decoding, stop strings, which tokens the content has, and the model's own sampling defaults. Refuses to do: anything with logits or batches. Invariants: text that spells a special token is
//! ordinary text, so structure enters a prompt by id only; what comes out is always valid UTF-8, never shows a marker, and
//! is a function of the tokens alone.

pub mod answer;
pub mod chat;
pub mod detokenizer;
pub mod error;
mod files;
pub mod generation_config;
pub mod harmony;
mod json;
pub mod listing;
pub mod stop;
pub mod tokenizer;
