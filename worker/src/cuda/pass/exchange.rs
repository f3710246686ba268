//! What a pass tells the card, and what it reads back.

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::{CardModel, Pass};
use crate::cuda::kernels::tile_rows;
use crate::device::DeviceError;
use crate::model::batch::{Outcome, Role, Row, Wanted};
use crate::quant::{FloatType, Matrix};

/// Positions whose angles are computed together.
const ANGLES_AT_ONCE: usize = 256;

impl CardModel {
    /// Writes what concerns the tokens: places, angles, and rows of the embedding that the host gathers.
    pub(super) fn write_rows(&mut self, pass: &Pass<'_>) {
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        self.know_angles(pass.batch.rows.iter().map(|row| row.position as usize + 1).max().unwrap_or(0));
        let half = self.config.head_dim / 2;
        for row in &pass.batch.rows {
            let (own_cosines, own_sines) = self.angles[row.position as usize * 2 * half..][..2 * half].split_at(half);
            cosines.extend_from_slice(own_cosines);
            sines.extend_from_slice(own_sines);
        }
        let numbers = |of: fn(&Row) -> u32| pass.batch.rows.iter().map(of).collect::<Vec<u32>>();
        let tokens = match &self.embedding {
            // The host sends the rows themselves: the token of a row is its place among them.
            Some(embedding) => {
                let row_bytes = self.config.hidden_size * size_of::<bf16>();
                for (place, row) in pass.batch.rows.iter().enumerate() {
                    self.rows.write(place * row_bytes, &embedding_row(embedding, row.token as usize));
                }
                (0..pass.batch.rows.len() as u32).collect()
            }
            None => numbers(|row| row.token),
        };
        let inputs = match pass.role {
            Role::Generated => &mut self.generated,
            Role::Prompt => &mut self.prompt,
        };
        let places = inputs.places;
        inputs.write(places.tokens, &tokens);
        inputs.write(places.sequences, &numbers(|row| row.sequence as u32));
        inputs.write(places.positions, &numbers(|row| row.position));
        inputs.write(places.cosines, &cosines);
        inputs.write(places.sines, &sines);
    }

    /// Computes the angles of all positions up to one, where they are not known yet.
    fn know_angles(&mut self, positions: usize) {
        let width = self.config.head_dim;
        let known = self.angles.len() / width;
        if positions <= known {
            return;
        }
        self.angles.resize(positions.next_multiple_of(ANGLES_AT_ONCE) * width, 0.0);
        let rope = &self.rope;
        self.host.cpu().for_each_chunk(&mut self.angles[known * width..], width, |index, angles| {
            let (cosines, sines) = angles.split_at_mut(width / 2);
            rope.write(known + index, cosines, sines);
        });
    }

    /// Cuts a prompt's rows into tiles of attention: neighbours of one sequence. Gives their number.
    pub(super) fn write_tiles(&mut self, pass: &Pass<'_>) -> u32 {
        if pass.role == Role::Generated {
            return 0;
        }
        let most = tile_rows(self.config.heads, self.config.kv_heads);
        let mut tiles: Vec<[u32; 2]> = Vec::new();
        for (index, row) in (0..).zip(&pass.batch.rows) {
            match tiles.last_mut() {
                Some([first, rows]) if *rows < most && pass.batch.rows[*first as usize].sequence == row.sequence => {
                    *rows += 1
                }
                Some(_) | None => tiles.push([index, 1]),
            }
        }
        self.prompt.write(self.prompt.places.tiles, tiles.as_flattened());
        tiles.len() as u32
    }

    /// Writes what is wanted. Logits are a choice at temperature 0 whose token nobody reads.
    pub(super) fn write_outputs(&mut self, role: Role, outputs: &[(u32, usize, Wanted)]) {
        let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (row, _, wanted) in outputs {
            let (temperature, seed, position) = match *wanted {
                Wanted::Logits => (0.0, 0, 0),
                Wanted::Token { temperature, seed, position } => (temperature, seed, position),
            };
            columns.0.push(*row);
            columns.1.push(temperature);
            columns.2.push(seed);
            columns.3.push(position);
        }
        let inputs = match role {
            Role::Generated => &mut self.generated,
            Role::Prompt => &mut self.prompt,
        };
        let places = inputs.places;
        inputs.write::<u32>(places.output_rows, &columns.0);
        inputs.write::<f32>(places.temperatures, &columns.1);
        inputs.write::<u64>(places.seeds, &columns.2);
        inputs.write::<u64>(places.choice_positions, &columns.3);
    }

    /// Waits for the card, the step's one wait where no expert is on the host, and reads what came of the outputs.
    pub(super) fn collect(&self, outputs: &[(u32, usize, Wanted)]) -> Result<Vec<(usize, Outcome)>, DeviceError> {
        let row_bytes = self.config.vocab_size * size_of::<f32>();
        let are_logits = outputs.iter().map(|(_, _, wanted)| *wanted == Wanted::Logits);
        for (index, _) in are_logits.enumerate().filter(|(_, is_wanted)| *is_wanted) {
            let at = index * row_bytes;
            self.scratch_memory.copy_out(self.scratch.logits + at as u64, &self.results.logits, at, row_bytes)?;
        }
        self.card.wait()?;
        let read = |(index, (_, place, wanted)): (usize, &(u32, usize, Wanted))| {
            let mut chosen = [0u32; 2];
            self.results.chosen.read(index * 8, &mut chosen);
            let outcome = match (wanted, chosen) {
                (Wanted::Logits, _) => {
                    let mut logits = vec![0.0; self.config.vocab_size];
                    self.results.logits.read(index * row_bytes, &mut logits);
                    Outcome::Logits(logits)
                }
                (Wanted::Token { .. }, [token, u32::MAX]) => Outcome::Token(token),
                (Wanted::Token { .. }, [_, broken]) => Outcome::Broken(broken),
            };
            (*place, outcome)
        };
        Ok(outputs.iter().enumerate().map(read).collect())
    }
}

/// Gives a row of the embedding as 16-bit floats.
fn embedding_row(embedding: &Matrix, token: usize) -> Vec<u8> {
    if let Matrix::Dense(dense) = embedding
        && dense.float_type() == FloatType::Bf16
        && dense.col_stride() == 1
    {
        let bytes = dense.cols() * size_of::<bf16>();
        return dense.region().bytes()[token * bytes..(token + 1) * bytes].to_vec();
    }
    let mut wide = vec![0.0; embedding.cols()];
    embedding.decode_row(token, &mut wide);
    let mut narrow = vec![bf16::ZERO; wide.len()];
    narrow.convert_from_f32_slice(&wide);
    narrow.iter().flat_map(|value| value.to_le_bytes()).collect()
}
