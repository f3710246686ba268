//! The place where steps are computed: the processor or a card, each with the keys and values that it holds.
//!
//! Owns: nothing but the choice between the two. What they compute for a token depends on the token's role, position and
//! sequence alone, on either.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::kv_cache::KvCache;
use super::pager::{Blocks, Pager};
use crate::device::DeviceError;
use crate::model::batch::{Batch, Outcome, Wanted};
use crate::model::config::Config;
use crate::model::decoder::Decoder;

/// How many tokens one step computes at most, by role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTokens {
    /// Generated tokens.
    pub generated: u32,
    /// Tokens of prompts.
    pub prompt: u32,
}

impl StepTokens {
    /// On the processor. Larger steps read the weights less often, smaller ones let running answers go on sooner while a
    /// long prompt is taken in.
    pub const CPU: StepTokens = StepTokens { generated: 64, prompt: 256 };

    /// Gives the tokens of a step in which both roles have all that they may.
    #[must_use]
    pub const fn sum(self) -> u32 {
        self.generated + self.prompt
    }

    /// Gives the most tokens that a step adds to one sequence.
    #[must_use]
    pub const fn of_sequence(self) -> u32 {
        if self.generated > self.prompt { self.generated } else { self.prompt }
    }
}

/// Keys and values of a sequence that gave its blocks back, kept outside the cache.
#[derive(Debug)]
pub struct Swapped {
    #[cfg(feature = "cuda")]
    pub(crate) inner: crate::cuda::swap::SwappedBlocks,
    #[cfg(not(feature = "cuda"))]
    never: std::convert::Infallible,
}

/// Where steps are computed.
#[derive(Debug)]
pub enum Backend {
    /// The processor.
    Cpu(Box<CpuBackend>),
    /// A card.
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::CardModel>),
}

/// The processor with the keys and values in host memory.
#[derive(Debug)]
pub struct CpuBackend {
    /// The model.
    pub decoder: Arc<Decoder>,
    /// Keys and values.
    pub cache: KvCache,
}

impl Backend {
    /// Makes a backend on the processor.
    #[must_use]
    pub fn cpu(decoder: Arc<Decoder>, cache: KvCache) -> Backend {
        Backend::Cpu(Box::new(CpuBackend { decoder, cache }))
    }

    /// Gives the model's configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        match self {
            Backend::Cpu(cpu) => cpu.decoder.config(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.config(),
        }
    }

    /// Gives the books of the cache.
    pub fn pager(&mut self) -> &mut Pager {
        match self {
            Backend::Cpu(cpu) => &mut cpu.cache.pager,
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.pager(),
        }
    }

    /// Gives the largest step.
    #[must_use]
    pub fn step_tokens(&self) -> StepTokens {
        match self {
            Backend::Cpu(_) => StepTokens::CPU,
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.step_tokens(),
        }
    }

    /// Gives the counter of layers computed so far: one that stands still while there is work means a hang.
    #[must_use]
    pub fn progress(&self) -> Arc<AtomicU64> {
        match self {
            Backend::Cpu(cpu) => cpu.decoder.progress(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.progress(),
        }
    }

    /// Describes where the model computes, for people.
    #[must_use]
    pub fn describe_device(&self) -> String {
        match self {
            Backend::Cpu(cpu) => cpu.decoder.describe_device(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.describe(),
        }
    }

    /// Gives the bytes of weights that steps have read so far, each as stored.
    #[must_use]
    pub fn weight_bytes_read(&self) -> u64 {
        match self {
            Backend::Cpu(cpu) => cpu.decoder.cpu().bytes_read(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.weight_bytes_read(),
        }
    }

    /// Computes a batch and gives what came of each output row, in their order.
    ///
    /// # Errors
    /// Those of the device; the processor has none.
    ///
    /// # Panics
    /// When a token is outside the vocabulary, a sequence has no block for a row, or the step is larger than allowed.
    pub fn forward(&mut self, batch: &Batch<'_>, wanted: &[Wanted]) -> Result<Vec<Outcome>, DeviceError> {
        assert_eq!(batch.outputs.len(), wanted.len(), "something is wanted of each output row");
        match self {
            Backend::Cpu(cpu) => {
                let logits = cpu.decoder.forward(batch, &mut cpu.cache);
                let vocabulary = cpu.decoder.config().vocab_size;
                if wanted.len() == 1 {
                    return Ok(vec![Outcome::Logits(logits)]);
                }
                Ok(logits.chunks_exact(vocabulary).map(|row| Outcome::Logits(row.to_vec())).collect())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.forward(batch, wanted),
        }
    }

    /// Takes the keys and values of a sequence out of the cache, where that is quicker than computing them again and there
    /// is room for them. Its blocks stay its own.
    ///
    /// # Errors
    /// Those of the device.
    pub fn swap_out(&mut self, blocks: &Blocks) -> Result<Option<Swapped>, DeviceError> {
        match self {
            Backend::Cpu(_) => {
                let _ = blocks;
                Ok(None)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => Ok(card.swap_out(blocks)?.map(|inner| Swapped { inner })),
        }
    }

    /// Brings keys and values back into blocks; gives `None`, and keeps nothing of the cache, while that would leave fewer
    /// than `spare` blocks: what comes back without room to go on would have to leave again at once.
    ///
    /// # Errors
    /// Those of the device.
    pub fn swap_in(&mut self, swapped: &Swapped, spare: u32) -> Result<Option<Blocks>, DeviceError> {
        match self {
            #[cfg(not(feature = "cuda"))]
            Backend::Cpu(_) => {
                let _ = spare;
                match swapped.never {}
            }
            #[cfg(feature = "cuda")]
            Backend::Cpu(_) => {
                let _ = swapped;
                Ok(None)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(card) => card.swap_in(&swapped.inner, spare),
        }
    }
}
