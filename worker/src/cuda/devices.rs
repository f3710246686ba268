//! `bulkhead-worker-cuda devices`: the cards that this worker can use, for the supervisor's choice and for people.

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;

use super::driver::{CardFacts, list_cards};
use super::images;
use crate::device::DeviceError;

/// The arguments of the command.
#[derive(Args, Clone, Debug)]
pub struct DevicesArgs {
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// The driver.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The driver knows no card.
    #[error("the CUDA driver is there and knows no device")]
    NoCard,
    /// None of the cards can be used.
    #[error("no CUDA device can be used: {0}")]
    NoneUsable(String),
    /// The list cannot be printed.
    #[error("the list cannot be printed: {0}")]
    Print(#[from] io::Error),
}

#[derive(Serialize)]
struct Listed<'a> {
    index: u32,
    name: &'a str,
    uuid: &'a str,
    compute_capability: String,
    memory_bytes: u64,
}

/// Runs the command and writes the list to `out`.
///
/// # Errors
/// Each variant of `DevicesError`.
pub fn run(args: &DevicesArgs, out: &mut impl Write) -> Result<(), DevicesError> {
    let cards = list_cards()?;
    if cards.is_empty() {
        return Err(DevicesError::NoCard);
    }
    let judged: Vec<(&CardFacts, Option<String>)> = cards.iter().map(|card| (card, why_not(card))).collect();
    let usable: Vec<Listed<'_>> =
        judged.iter().filter(|(_, why_not)| why_not.is_none()).map(|(card, _)| listed(card)).collect();
    if usable.is_empty() {
        let reasons: Vec<String> = judged.into_iter().filter_map(|(_, why_not)| why_not).collect();
        return Err(DevicesError::NoneUsable(reasons.join("; ")));
    }
    if args.json {
        return Ok(writeln!(out, "{}", serde_json::json!({ "devices": usable }))?);
    }
    for (card, why_not) in judged {
        let Listed { index, name, uuid: _, compute_capability, memory_bytes } = listed(card);
        let rest = why_not.map_or_else(String::new, |why| format!(", cannot be used: {why}"));
        let memory = bulkhead_shared::units::Bytes(memory_bytes);
        writeln!(out, "cuda:{index}: {name}, compute capability {compute_capability}, {memory}{rest}")?;
    }
    Ok(())
}

fn listed(card: &CardFacts) -> Listed<'_> {
    let (major, minor) = card.capability;
    let compute_capability = format!("{major}.{minor}");
    Listed { index: card.index, name: &card.name, uuid: &card.uuid, compute_capability, memory_bytes: card.memory.0 }
}

/// Says why a card cannot be used.
fn why_not(card: &CardFacts) -> Option<String> {
    images::module(card.capability, "matvec").err().map(|error| format!("{}: {error}", card.name))
}
