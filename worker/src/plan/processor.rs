//! Plans for the processor, where an architecture is computed that cards do not compute: one for each context asked for.

use std::io;

use bulkhead_shared::message::LoadPlan;
use bulkhead_shared::units::Bytes;
use serde::Serialize;

use super::Model;
use crate::memory::{self, MemoryPlan, PlanError};

/// A plan and the context that it was made for.
pub(super) struct ProcessorRow {
    context_asked: u32,
    plan: Result<MemoryPlan, PlanError>,
}

/// A row as JSON. Units: bytes, unless a name says otherwise.
#[derive(Serialize)]
struct JsonRow {
    device: &'static str,
    context_asked: u32,
    #[serde(flatten)]
    plan: Option<JsonPlan>,
    error: Option<String>,
}

#[derive(Serialize)]
struct JsonPlan {
    context_tokens: u32,
    sequences: u32,
    kv_blocks: u32,
    weights: u64,
    kv: u64,
    scratch: u64,
    total: u64,
    given_up: Vec<String>,
}

/// Plans for each of the contexts.
pub(super) fn rows(model: &Model, asked: impl Iterator<Item = LoadPlan>, available: Bytes) -> Vec<ProcessorRow> {
    let row = |asked: LoadPlan| ProcessorRow {
        context_asked: asked.context_tokens,
        plan: memory::plan(&model.config, model.sizes.bytes(), &asked, available),
    };
    asked.map(row).collect()
}

/// Gives the error of the last row, where no row has a plan.
pub(super) fn fault(rows: Vec<ProcessorRow>) -> Option<PlanError> {
    let is_none = rows.iter().all(|row| row.plan.is_err());
    rows.into_iter().next_back().and_then(|row| row.plan.err()).filter(|_| is_none)
}

fn total(plan: &MemoryPlan) -> Bytes {
    Bytes(plan.weights.0 + plan.kv.0 + plan.scratch.0)
}

pub(super) fn write_json(model: &Model, rows: &[ProcessorRow], out: &mut impl io::Write) -> io::Result<()> {
    let plan = |plan: &MemoryPlan| JsonPlan {
        context_tokens: plan.context_tokens,
        sequences: plan.sequences,
        kv_blocks: plan.full_blocks,
        weights: plan.weights.0,
        kv: plan.kv.0,
        scratch: plan.scratch.0,
        total: total(plan).0,
        given_up: plan.given_up(),
    };
    let row = |row: &ProcessorRow| JsonRow {
        device: "cpu",
        context_asked: row.context_asked,
        plan: row.plan.as_ref().ok().map(plan),
        error: row.plan.as_ref().err().map(ToString::to_string),
    };
    let rows: Vec<JsonRow> = rows.iter().map(row).collect();
    serde_json::to_writer(&mut *out, &serde_json::json!({"model": model.name, "plans": rows}))?;
    writeln!(out)
}

pub(super) fn write_table(
    model: &Model,
    rows: &[ProcessorRow],
    sequences: u32,
    out: &mut impl io::Write,
) -> io::Result<()> {
    writeln!(
        out,
        "{}: {:.1} GiB of weights in {} layers; {sequences} sequences; on the processor, since cards do not compute {}; \
         sizes in GiB",
        model.name,
        model.sizes.bytes().gib(),
        model.sizes.layers.len(),
        model.config.architecture.class(),
    )?;
    writeln!(out, "{:>8} | {:>7} {:>5} {:>7} {:>6} | given up", "context", "weights", "KV", "buffers", "total")?;
    for row in rows {
        match &row.plan {
            Ok(plan) => {
                let given_up = plan.given_up();
                writeln!(
                    out,
                    "{:>8} | {:>7.2} {:>5.2} {:>7.2} {:>6.2} | {}",
                    plan.context_tokens,
                    plan.weights.gib(),
                    plan.kv.gib(),
                    plan.scratch.gib(),
                    total(plan).gib(),
                    if given_up.is_empty() { "nothing".to_owned() } else { given_up.join("; ") },
                )?;
            }
            Err(error) => writeln!(out, "{:>8} | cannot be planned: {error}", row.context_asked)?,
        }
    }
    Ok(())
}
