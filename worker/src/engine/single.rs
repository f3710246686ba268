//! One sequence through what is served, without an engine: for `eval` and for tests.

use super::backend::Backend;
use super::pager::Blocks;
use crate::device::DeviceError;
use crate::model::batch::{Batch, Outcome, Role, Row, Wanted};

/// A sequence that has a backend for itself.
#[derive(Debug)]
pub struct Single<'a> {
    backend: &'a mut Backend,
    blocks: Blocks,
    computed: u32,
}

impl<'a> Single<'a> {
    /// Makes an empty sequence.
    #[must_use]
    pub fn new(backend: &'a mut Backend) -> Single<'a> {
        Single { backend, blocks: Blocks::default(), computed: 0 }
    }

    /// Makes the sequence an empty one again.
    pub fn restart(&mut self) {
        self.backend.pager().release(&mut self.blocks);
        self.computed = 0;
    }

    /// Computes tokens behind those that were fed before, as many in a step as are served in one, and gives the logits of
    /// each.
    ///
    /// Shapes: -> [tokens, vocabulary].
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// When the tokens exceed the room or the vocabulary.
    pub fn feed(&mut self, tokens: &[u32], role: Role) -> Result<Vec<f32>, DeviceError> {
        let mut logits = Vec::new();
        let max = self.backend.step_tokens();
        let chunk = match role {
            Role::Prompt => max.prompt,
            Role::Generated => max.generated,
        };
        for chunk in tokens.chunks(chunk as usize) {
            let end = self.computed + chunk.len() as u32;
            self.backend.pager().reserve(&mut self.blocks, end).expect("the room was made for all tokens");
            let rows = (self.computed..end).zip(chunk);
            let rows = rows.map(|(position, token)| Row { sequence: 0, position, token: *token, role }).collect();
            let batch = Batch { rows, blocks: vec![&self.blocks], outputs: (0..chunk.len()).collect() };
            for outcome in self.backend.forward(&batch, &vec![Wanted::Logits; chunk.len()])? {
                match outcome {
                    Outcome::Logits(row) => logits.extend(row),
                    Outcome::Token(_) | Outcome::Broken(_) => unreachable!("logits were asked for"),
                }
            }
            self.computed = end;
            self.backend.pager().release_behind(&mut self.blocks, end);
        }
        Ok(logits)
    }
}
