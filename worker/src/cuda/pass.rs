//! The computation of a step's tokens of one role, from ids to outcomes.
//!
//! Owns: the order of kernels, and the recorded graphs of generated tokens. A pass is one run of kernels where everything is
//! on the card, and else a run up to each layer of which the host computes a part, and up to the layers that are the host's
//! altogether. Invariant: whatever a pass reads of the
//! host was written before its first kernel, and is left alone until the card is done.

mod exchange;

use std::collections::HashMap;

use half::bf16;

use super::CardModel;
use super::driver::Graph;
use super::kernels::{AddNorm, Attention, Cache, Change, Choice, GeneratedRoute, Groups, Heads};
use super::tables::Inputs;
use super::weights::{CardLayer, CardMlp, Dense, Experts, Product};
use crate::device::DeviceError;
use crate::engine::pager::{Kind, Span};
use crate::memory::scratch::cuts_of;
use crate::model::batch::{Batch, Outcome, Role, Wanted};

/// Graphs that are kept. Each is for one number of tokens and one bound of the context.
const GRAPHS_MAX: usize = 96;

/// What the recorded runs of kernels of one kind of pass are, by tokens and cuts of the context.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    recorded: HashMap<(u32, u32), Vec<Graph>>,
}

/// The tokens of one role.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    role: Role,
    /// The tokens and their sequences' blocks, without outputs.
    pub(super) batch: Batch<'a>,
    /// What is wanted: the row within this pass, the place among the batch's outputs, and what.
    outputs: Vec<(u32, usize, Wanted)>,
}

/// What is fixed while kernels are put on the stream.
#[derive(Clone, Copy, Debug)]
struct Shape {
    role: Role,
    rows: u32,
    outputs: u32,
    /// Of generated tokens: cuts of a whole context, and whether each token is of a sequence of its own.
    cuts: u32,
    is_apart: bool,
    /// Of prompts: tiles of attention.
    tiles: u32,
}

/// Where a run of kernels ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Before what follows the attention of a layer, where the host has that, or, at the number of the card's layers, before those that are the
    /// host's altogether.
    Host(usize),
    /// Behind the last layer.
    Layers,
}

impl<'a> Pass<'a> {
    /// Picks the tokens of a role.
    pub(super) fn of(batch: &Batch<'a>, wanted: &[Wanted], role: Role) -> Pass<'a> {
        let none = Batch { rows: Vec::new(), blocks: batch.blocks.clone(), outputs: Vec::new() };
        let mut pass = Pass { role, batch: none, outputs: Vec::new() };
        let mut outputs = batch.outputs.iter().zip(wanted).enumerate().peekable();
        for (index, row) in batch.rows.iter().enumerate() {
            let output = outputs.next_if(|(_, (output, _))| **output == index);
            if row.role != role {
                continue;
            }
            if let Some((place, (_, wanted))) = output {
                pass.outputs.push((pass.batch.rows.len() as u32, place, *wanted));
            }
            pass.batch.rows.push(*row);
        }
        pass
    }
}

impl CardModel {
    /// Computes a pass and gives each output's outcome with its place.
    pub(super) fn run_pass(&mut self, pass: &Pass<'_>) -> Result<Vec<(usize, Outcome)>, DeviceError> {
        let tokens = &pass.batch.rows;
        let (rows, capacity) = (tokens.len() as u32, self.step_tokens.generated);
        let last = tokens.iter().map(|row| row.position).max().unwrap_or(0);
        let cuts = cuts_of(last + 1).next_power_of_two();
        let is_apart = tokens.windows(2).all(|pair| pair[0].sequence != pair[1].sequence);
        self.write_rows(pass);
        let tiles = self.write_tiles(pass);
        let shape = |outputs| Shape { role: pass.role, rows, outputs, cuts, is_apart, tiles };
        let mut chunks = pass.outputs.chunks(capacity as usize);
        let first = chunks.next().unwrap_or(&[]);
        self.write_outputs(pass.role, first);
        let whole = shape(first.len() as u32);
        let can_record = self.rows.is_pinned() && self.results.chosen.is_pinned();
        if pass.role == Role::Generated && whole.outputs == rows && is_apart && can_record {
            self.run_recorded(whole, &pass.batch)?;
        } else {
            self.run_layers(whole, &pass.batch)?;
            self.head(whole)?;
        }
        let mut outcomes = self.collect(first)?;
        self.count_bytes(whole);
        for chunk in chunks {
            let part = shape(chunk.len() as u32);
            self.write_outputs(pass.role, chunk);
            self.inputs(pass.role).send()?;
            self.head(part)?;
            outcomes.extend(self.collect(chunk)?);
        }
        Ok(outcomes)
    }

    fn inputs(&self, role: Role) -> &Inputs {
        match role {
            Role::Generated => &self.generated,
            Role::Prompt => &self.prompt,
        }
    }

    /// Runs the graphs of a pass, which are recorded when they are first needed.
    fn run_recorded(&mut self, shape: Shape, batch: &Batch<'_>) -> Result<(), DeviceError> {
        let key = (shape.rows, shape.cuts);
        if !self.graphs.recorded.contains_key(&key) {
            if self.graphs.recorded.len() >= GRAPHS_MAX {
                self.graphs.recorded.clear();
            }
            let recorded = match self.record(shape) {
                // Graphs are the one thing that can be given up for room.
                Err(DeviceError::OutOfMemory { .. }) if !self.graphs.recorded.is_empty() => {
                    self.graphs.recorded.clear();
                    self.record(shape)?
                }
                recorded => recorded?,
            };
            self.graphs.recorded.insert(key, recorded);
        }
        let graphs = self.graphs.recorded.remove(&key).expect("it was recorded");
        let stops: Vec<usize> = self.host.stops().collect();
        for (index, graph) in graphs.iter().enumerate() {
            graph.launch()?;
            if let Some(stop) = stops.get(index) {
                self.card.wait()?;
                self.host.run(*stop, &mut self.rows, batch);
            }
        }
        self.graphs.recorded.insert(key, graphs);
        Ok(())
    }

    fn record(&self, shape: Shape) -> Result<Vec<Graph>, DeviceError> {
        let mut graphs = Vec::new();
        let mut start = 0;
        loop {
            let mut stop = Stop::Layers;
            graphs.push(self.card.capture(|| {
                stop = self.layers(shape, start)?;
                match stop {
                    Stop::Host(_) => Ok(()),
                    Stop::Layers => self.head(shape),
                }
            })?);
            match stop {
                Stop::Host(layer) => start = layer + 1,
                Stop::Layers => return Ok(graphs),
            }
        }
    }

    /// Puts the layers of a pass on the stream, with the host's part between.
    fn run_layers(&mut self, shape: Shape, batch: &Batch<'_>) -> Result<(), DeviceError> {
        let mut start = 0;
        while let Stop::Host(stop) = self.layers(shape, start)? {
            self.card.wait()?;
            self.host.run(stop, &mut self.rows, batch);
            start = stop + 1;
        }
        Ok(())
    }

    fn at(&self, place: u64) -> u64 {
        self.scratch_memory.at(place)
    }

    /// Puts layers on the stream, from `start` on: the first with what comes before it, a later one with the change that
    /// the host computed for the layer before. Behind the host's own layers the residual stream comes back.
    fn layers(&self, shape: Shape, start: usize) -> Result<Stop, DeviceError> {
        let bytes = shape.rows as usize * self.config.hidden_size * size_of::<f32>();
        let end = self.weights.layers.len();
        if start == 0 {
            self.begin(shape)?;
        } else if start <= end {
            self.scratch_memory.copy_in(self.scratch.change, &self.rows, 0, bytes)?;
        } else {
            self.scratch_memory.copy_in(self.residual_place(shape.role, end), &self.rows, 0, bytes)?;
            return Ok(Stop::Layers);
        }
        for (index, layer) in self.weights.layers.iter().enumerate().skip(start) {
            let x = self.residual(shape.role, index);
            let normal = AddNorm { out_f32: 0, ..self.norm(x, layer.attention_norm) };
            self.kernels.add_norm(&normal, &self.change_before(index), shape.rows)?;
            self.attention(shape, index, layer)?;
            match (&layer.mlp, shape.role) {
                (Some(CardMlp::Experts(experts)), Role::Generated) => {
                    self.generated_mixture(shape, index, (layer, experts))?;
                }
                (Some(CardMlp::Experts(experts)), Role::Prompt) => {
                    self.add_attention(shape, x, layer)?;
                    self.prompt_mixture(shape, index, experts)?;
                }
                (Some(CardMlp::Dense(dense)), _) => {
                    self.add_attention(shape, x, layer)?;
                    self.dense(shape, dense)?;
                }
                (None, _) => {
                    self.add_attention(shape, x, layer)?;
                    self.scratch_memory.copy_out(self.scratch.normal_wide, &self.rows, 0, bytes)?;
                    return Ok(Stop::Host(index));
                }
            }
        }
        if self.host.counts().1 == 0 {
            return Ok(Stop::Layers);
        }
        // Norm and output are not needed: the launch adds the last change to the stream.
        let sum = AddNorm { out_f32: 0, ..self.norm(self.residual(shape.role, end), self.weights.final_norm) };
        self.kernels.add_norm(&sum, &self.change_before(end), shape.rows)?;
        self.scratch_memory.copy_out(self.residual_place(shape.role, end), &self.rows, 0, bytes)?;
        Ok(Stop::Host(end))
    }

    /// Brings the inputs to the card and makes the residual stream.
    fn begin(&self, shape: Shape) -> Result<(), DeviceError> {
        let inputs = self.inputs(shape.role);
        inputs.send()?;
        let (hidden, x) = (self.config.hidden_size as u32, self.residual(shape.role, 0));
        let (table, vocabulary) = match self.weights.embedding {
            Some(table) => (table, self.config.vocab_size as u32),
            None => {
                let bytes = shape.rows as usize * self.config.hidden_size * size_of::<bf16>();
                self.scratch_memory.copy_in(self.scratch.embedded, &self.rows, 0, bytes)?;
                (self.at(self.scratch.embedded), shape.rows)
            }
        };
        self.kernels.embed(table, inputs.at(inputs.places.tokens), vocabulary, (x, hidden), shape.rows)
    }

    /// The change that the layer before has made and not yet added.
    fn change_before(&self, layer: usize) -> Change {
        match layer.checked_sub(1).map(|before| &self.weights.layers[before]) {
            None => Change { parts: 0, count: 0, weights: 0 },
            Some(CardLayer { mlp: None | Some(CardMlp::Dense(_)), .. }) => {
                Change { parts: self.at(self.scratch.change), count: 1, weights: 0 }
            }
            Some(CardLayer { mlp: Some(CardMlp::Experts(experts)), .. }) => Change {
                parts: self.at(self.scratch.results),
                count: experts.used,
                weights: self.at(self.scratch.expert_weights),
            },
        }
    }

    /// The address of the residual stream as a layer finds it: each routing of generated tokens moves it to the other side.
    fn residual(&self, role: Role, layer: usize) -> u64 {
        self.at(self.residual_place(role, layer))
    }

    fn residual_place(&self, role: Role, layer: usize) -> u64 {
        let moves = match role {
            Role::Prompt => 0,
            Role::Generated => {
                let is_routed = |layer: &&CardLayer| matches!(layer.mlp, Some(CardMlp::Experts(_)));
                self.weights.layers[..layer].iter().filter(is_routed).count()
            }
        };
        self.scratch.x[moves % 2]
    }

    /// Adds what attention came to and normalises the sum for the experts.
    fn add_attention(&self, shape: Shape, x: u64, layer: &CardLayer) -> Result<(), DeviceError> {
        let change = Change { parts: self.at(self.scratch.change), count: 1, weights: 0 };
        self.kernels.add_norm(&self.norm(x, layer.mlp_norm), &change, shape.rows)
    }

    fn norm(&self, x: u64, weight: u64) -> AddNorm {
        AddNorm {
            x,
            rows: 0,
            weight,
            epsilon: self.config.norm_eps,
            hidden: self.config.hidden_size as u32,
            out_bf16: self.at(self.scratch.normal),
            out_f32: self.at(self.scratch.normal_wide),
        }
    }

    fn product(&self, role: Role, product: &Product, x: u64, out: u64, rows: u32) -> Result<(), DeviceError> {
        match role {
            Role::Generated => self.kernels.matvec(product, x, out, rows),
            Role::Prompt => self.kernels.matmul(product, x, out, rows),
        }
    }

    fn attention(&self, shape: Shape, index: usize, layer: &CardLayer) -> Result<(), DeviceError> {
        let inputs = self.inputs(shape.role);
        let (qkv, attended) = (self.at(self.scratch.qkv), self.at(self.scratch.attended));
        self.product(shape.role, &layer.qkv, self.at(self.scratch.normal), qkv, shape.rows)?;
        let span = self.pager.shape().spans[index];
        let kind = Kind::of(span);
        let pool = &self.pools[kind as usize];
        let (window, cuts) = match span {
            Span::Full => (0, shape.cuts),
            Span::Window(window) => (window, cuts_of(window).min(shape.cuts)),
        };
        let cache = Cache {
            pool: pool.memory.at(0),
            layers: pool.layers,
            layer: self.pager.shape().slots()[index] as u32,
            blocks: pool.tables.blocks(),
            firsts: pool.tables.firsts(),
            stride: pool.tables.stride(),
            sequences: inputs.at(inputs.places.sequences),
            positions: inputs.at(inputs.places.positions),
            window,
        };
        let number = |count: usize| u32::try_from(count).expect("dimensions are bounded");
        let attention = Attention {
            heads: Heads {
                query: number(self.config.heads),
                kv: number(self.config.kv_heads),
                dim: number(self.config.head_dim),
            },
            qkv,
            cosines: inputs.at(inputs.places.cosines),
            sines: inputs.at(inputs.places.sines),
            sinks: layer.sinks,
            out: attended,
            cache,
        };
        match shape.role {
            Role::Generated => {
                if !shape.is_apart {
                    self.kernels.rope_write(&attention, shape.rows)?;
                }
                let places = (self.at(self.scratch.partial), self.at(self.scratch.attend_counters), cuts);
                self.kernels.attend(&attention, places, !shape.is_apart, shape.rows)?;
            }
            Role::Prompt => {
                self.kernels.rope_write(&attention, shape.rows)?;
                let tiles = (inputs.at(inputs.places.tiles), shape.tiles);
                self.kernels.attend_prompt(&attention, tiles)?;
            }
        }
        self.product(shape.role, &layer.o, attended, self.at(self.scratch.change), shape.rows)
    }

    fn groups(&self, layer: usize) -> Groups {
        let scratch = &self.scratch;
        Groups {
            logits: self.at(scratch.router_logits),
            chosen: self.at(scratch.chosen_experts),
            weights: self.at(scratch.expert_weights),
            count: self.at(scratch.group_counts + layer as u64 * 4),
            experts: self.at(scratch.group_experts),
            firsts: self.at(scratch.group_firsts),
            slots: self.at(scratch.slots),
        }
    }

    /// What the experts read, work in, and write.
    fn expert_places(&self) -> (u64, u64, u64) {
        (self.at(self.scratch.normal), self.at(self.scratch.inner), self.at(self.scratch.results))
    }

    fn generated_mixture(
        &self,
        shape: Shape,
        index: usize,
        (layer, experts): (&CardLayer, &Experts),
    ) -> Result<(), DeviceError> {
        let route = GeneratedRoute {
            x: self.residual(shape.role, index),
            change: self.at(self.scratch.change),
            norm_weight: layer.mlp_norm,
            epsilon: self.config.norm_eps,
            sum: self.residual(shape.role, index + 1),
            out: self.at(self.scratch.normal),
            counters: self.at(self.scratch.route_counters),
        };
        let groups = self.groups(index);
        self.kernels.norm_route(experts, &route, &groups, shape.rows)?;
        self.kernels.experts(experts, &groups, self.expert_places(), shape.rows)
    }

    fn prompt_mixture(&self, shape: Shape, index: usize, experts: &Experts) -> Result<(), DeviceError> {
        let groups = self.groups(index);
        self.kernels.route(experts, self.at(self.scratch.normal_wide), &groups, shape.rows)?;
        self.kernels.experts_many(experts, &groups, self.expert_places(), shape.rows)
    }

    /// Shapes: from the normalised stream [rows, hidden] to the layer's change.
    fn dense(&self, shape: Shape, dense: &Dense) -> Result<(), DeviceError> {
        let (x, gate_up, inner) =
            (self.at(self.scratch.normal), self.at(self.scratch.gate_up), self.at(self.scratch.inner));
        match shape.role {
            Role::Generated => {
                self.kernels.matvec(&dense.gate_up, x, gate_up, shape.rows)?;
                self.kernels.silu_gate(gate_up, dense.gate_up.rows / 2, inner, shape.rows)?;
            }
            Role::Prompt => self.kernels.dense_gate(&dense.gate_up, (x, gate_up, inner), shape.rows)?,
        }
        self.product(shape.role, &dense.down, inner, self.at(self.scratch.change), shape.rows)
    }

    /// Puts the output matrix and the choice on the stream, and the copy of what was chosen.
    fn head(&self, shape: Shape) -> Result<(), DeviceError> {
        if shape.outputs == 0 {
            return Ok(());
        }
        let (inputs, scratch) = (self.inputs(shape.role), &self.scratch);
        let head_input = self.at(scratch.head_input);
        let norm = AddNorm {
            rows: inputs.at(inputs.places.output_rows),
            out_bf16: head_input,
            out_f32: 0,
            ..self.norm(self.residual(shape.role, self.weights.layers.len()), self.weights.final_norm)
        };
        let change = match self.host.counts().1 {
            0 => self.change_before(self.weights.layers.len()),
            _ => Change { parts: 0, count: 0, weights: 0 },
        };
        self.kernels.add_norm(&norm, &change, shape.outputs)?;
        // An output row is alone with the head whatever its role: it is the first generated token that it leads to.
        self.kernels.matvec(&self.weights.lm_head, head_input, self.at(scratch.logits), shape.outputs)?;
        let choice = Choice {
            logits: self.at(scratch.logits),
            vocabulary: self.config.vocab_size as u32,
            temperatures: inputs.at(inputs.places.temperatures),
            seeds: inputs.at(inputs.places.seeds),
            positions: inputs.at(inputs.places.choice_positions),
            partials: self.at(scratch.choice_partials),
            chosen: self.at(scratch.chosen),
        };
        self.kernels.choose(&choice, shape.outputs)?;
        let chosen = &self.results.chosen;
        self.scratch_memory.copy_out(scratch.chosen, chosen, 0, shape.outputs as usize * 8)?;
        let counts_at = self.step_tokens.generated as usize * 8;
        self.scratch_memory.copy_out(scratch.group_counts, chosen, counts_at, self.weights.layers.len() * 4)
    }

    /// Counts the bytes of weights that a pass has read, from the experts that its tokens chose.
    fn count_bytes(&mut self, shape: Shape) {
        let mut groups = vec![0u32; self.weights.layers.len()];
        self.results.chosen.read(self.step_tokens.generated as usize * 8, &mut groups);
        let of_layer = |(layer, groups): (&CardLayer, &u32)| {
            let mlp = match &layer.mlp {
                Some(CardMlp::Experts(experts)) => {
                    let each = (experts.gate_up.bytes + experts.down.bytes) / u64::from(experts.count);
                    experts.router_bytes + each * u64::from(*groups)
                }
                Some(CardMlp::Dense(dense)) => dense.gate_up.bytes + dense.down.bytes,
                None => 0,
            };
            layer.qkv.bytes + layer.o.bytes + mlp
        };
        let layers: u64 = self.weights.layers.iter().zip(&groups).map(of_layer).sum();
        self.weight_bytes_read += layers + if shape.outputs > 0 { self.weights.lm_head.bytes } else { 0 };
    }
}
