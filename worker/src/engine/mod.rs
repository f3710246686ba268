//! The engine: which sequences run, what each step computes, and what comes of it.
//!
//! A loop of steps on one thread: take in, drop what was cancelled, schedule, reserve blocks, compute one ragged batch,
//! choose tokens, emit. Refuses to tokenise or render: that is done before a sequence arrives here.

pub mod backend;
mod candidates;
pub mod faults;
pub mod intake;
pub mod kv_cache;
pub mod pager;
pub mod sampler;
pub mod schedule;
pub mod sequence;
pub mod single;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bulkhead_shared::message::{Failure, FromWorker};
use crossbeam_channel::{Receiver, Sender};

use self::backend::Backend;
use self::faults::Faults;
use self::pager::Exhausted;
use self::sampler::{NonFinite, Scratch};
use self::schedule::{Pending, share_step};
use self::sequence::{Advance, Sequence};
use crate::device::DeviceError;
use crate::model::batch::{Batch, Row};

/// Why the engine ended.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The model computes nonsense; only a new process may try again.
    #[error("a logit is not a finite number")]
    NonFinite(#[source] NonFinite),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] faults::OutOfMemory),
}

/// What engine and intake tell the thread that answers pings.
#[derive(Debug, Default)]
pub struct Status {
    /// Sequences that run or wait. Written by the engine alone, as the next.
    pub sequences: AtomicU32,
    /// Free blocks of KV cache.
    pub blocks_free: AtomicU32,
    /// Requests that are being made into sequences. Written by the intake alone, as the next.
    pub preparing: AtomicU32,
    /// Requests of which that is over.
    pub prepared: AtomicU64,
}

/// How the engine may run.
#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Sequences in one batch.
    pub sequences_max: usize,
    /// What goes wrong on purpose.
    pub faults: Faults,
}

/// The state of the loop.
#[derive(Debug)]
pub struct Engine {
    backend: Backend,
    limits: EngineLimits,
    status: Arc<Status>,
    inbox: Receiver<Sequence>,
    outbox: Sender<FromWorker>,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    scratch: Scratch,
}

impl Engine {
    /// Makes an engine that takes sequences from `inbox` and answers to `outbox`.
    #[must_use]
    pub fn new(
        mut backend: Backend,
        limits: EngineLimits,
        status: Arc<Status>,
        (inbox, outbox): (Receiver<Sequence>, Sender<FromWorker>),
    ) -> Engine {
        status.blocks_free.store(backend.pager().blocks().1, Ordering::Relaxed);
        let (waiting, running, scratch) = (VecDeque::new(), Vec::new(), Scratch::default());
        Engine { backend, limits, status, inbox, outbox, waiting, running, scratch }
    }

    /// Runs until no more sequence can come.
    ///
    /// Blocking: waits for sequences while there are none.
    ///
    /// # Errors
    /// `NonFinite` when the model's result cannot be used; `Device` when the device cannot go on.
    pub fn run(mut self) -> Result<(), EngineError> {
        loop {
            if !self.take_in() {
                return Ok(());
            }
            self.drop_cancelled();
            self.admit()?;
            self.step()?;
            self.publish();
            std::thread::sleep(self.limits.faults.step_delay());
        }
    }

    /// Takes what has arrived, waiting for it when there is nothing else to do. False: nothing more will come.
    fn take_in(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.inbox.recv() {
                Ok(sequence) => self.waiting.push_back(sequence),
                Err(_) => return false,
            }
        }
        self.waiting.extend(self.inbox.try_iter());
        self.publish();
        true
    }

    fn drop_cancelled(&mut self) {
        let running = self.running.extract_if(.., |sequence| sequence.is_cancelled());
        let (waiting, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(Sequence::is_cancelled);
        self.waiting = kept;
        let cancelled: Vec<Sequence> = running.chain(waiting).collect();
        for mut sequence in cancelled {
            self.backend.pager().release(&mut sequence.blocks);
            self.emit(FromWorker::Failed { id: sequence.id, failure: Failure::Cancelled });
        }
    }

    fn admit(&mut self) -> Result<(), DeviceError> {
        while self.running.len() < self.limits.sequences_max {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            if let Some(swapped) = sequence.swapped.take() {
                // A block for each that runs and for itself; alone it needs none beyond its own.
                let running = self.running.len();
                let spare = if running == 0 { 0 } else { running as u32 + 1 };
                match self.backend.swap_in(&swapped, spare)? {
                    Some(blocks) => sequence.blocks = blocks,
                    None => {
                        sequence.swapped = Some(swapped);
                        self.waiting.push_front(sequence);
                        break;
                    }
                }
            }
            self.running.push(sequence);
        }
        Ok(())
    }

    /// Computes one batch and hands its results to the sequences.
    fn step(&mut self) -> Result<(), EngineError> {
        let shares = self.reserve()?;
        let batch = assemble(&self.running, &shares);
        if batch.rows.is_empty() {
            return Ok(());
        }
        self.limits.faults.before_step(batch.rows.iter().map(|row| row.token))?;
        let is_last = |index: &usize| self.running[*index].computed + shares[*index] == self.running[*index].length();
        let wanted: Vec<_> =
            (0..shares.len()).filter(|i| shares[*i] > 0).filter(is_last).map(|i| self.running[i].wanted()).collect();
        let mut outcomes = self.backend.forward(&batch, &wanted)?.into_iter();
        let mut ended = Vec::new();
        for (index, rows) in shares.into_iter().enumerate() {
            let sequence = &mut self.running[index];
            sequence.computed += rows;
            self.backend.pager().release_behind(&mut sequence.blocks, sequence.computed);
            if rows == 0 || !sequence.wants_token() {
                continue;
            }
            let outcome = outcomes.next().expect("each sequence that wants a token has an output row");
            let advance = sequence.advance(outcome, &mut self.scratch).map_err(EngineError::NonFinite)?;
            let frames = match advance {
                Advance::Goes(delta) => vec![delta],
                Advance::Ends(delta, done) => {
                    ended.push(index);
                    vec![delta, done]
                }
            };
            frames.into_iter().for_each(|frame| self.emit(frame));
        }
        for index in ended.into_iter().rev() {
            let mut sequence = self.running.remove(index);
            self.backend.pager().release(&mut sequence.blocks);
        }
        Ok(())
    }

    /// Decides how many rows each running sequence gets and takes blocks for them. When blocks run out, the sequence that
    /// came last gives its own back and waits, its keys and values kept aside or to be computed anew.
    fn reserve(&mut self) -> Result<Vec<u32>, DeviceError> {
        'again: loop {
            let pending: Vec<Pending> = self.running.iter().map(Sequence::pending).collect();
            let shares = share_step(&pending, self.backend.step_tokens());
            for (sequence, rows) in self.running.iter_mut().zip(&shares) {
                let tokens = sequence.computed + rows;
                if let Err(Exhausted) = self.backend.pager().reserve(&mut sequence.blocks, tokens) {
                    self.preempt_last()?;
                    continue 'again;
                }
            }
            return Ok(shares);
        }
    }

    fn preempt_last(&mut self) -> Result<(), DeviceError> {
        assert!(self.running.len() > 1, "the cache holds at least one whole context");
        let mut sequence = self.running.pop().expect("more than one runs");
        sequence.swapped = self.backend.swap_out(&sequence.blocks)?;
        self.backend.pager().release(&mut sequence.blocks);
        if sequence.swapped.is_none() {
            sequence.computed = 0;
        }
        self.waiting.push_front(sequence);
        Ok(())
    }

    fn publish(&mut self) {
        let sequences = self.running.len() + self.waiting.len();
        self.status.sequences.store(u32::try_from(sequences).unwrap_or(u32::MAX), Ordering::Relaxed);
        self.status.blocks_free.store(self.backend.pager().blocks().1, Ordering::Relaxed);
    }

    /// Sends a frame. When the link is gone the process is about to end, and nobody is left to tell.
    fn emit(&self, frame: FromWorker) {
        let _ = self.outbox.send(frame);
    }
}

/// Puts each sequence's next rows into one batch; the last row of a sequence that is fully computed gives logits.
fn assemble<'a>(running: &'a [Sequence], shares: &[u32]) -> Batch<'a> {
    let mut batch = Batch { rows: Vec::new(), blocks: Vec::new(), outputs: Vec::new() };
    for (index, (sequence, rows)) in running.iter().zip(shares).enumerate() {
        let (positions, role) = (sequence.computed..sequence.computed + rows, sequence.pending().role);
        batch.blocks.push(&sequence.blocks);
        batch.rows.extend(positions.clone().map(|position| Row {
            sequence: index,
            position,
            token: sequence.tokens[position as usize],
            role,
        }));
        if *rows > 0 && positions.end as usize == sequence.tokens.len() {
            batch.outputs.push(batch.rows.len() - 1);
        }
    }
    batch
}
