//! A sequence: a request inside the engine, from its tokens to its answer.
//!
//! What a sequence emits is a function of its tokens alone, so one that starts with tokens of an earlier worker
//! (`resume`) goes on exactly where that one stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_shared::message::{FinishReason, FromWorker, Logprobs, TokenLogprob, Usage};
use bulkhead_shared::units::RequestId;

use super::backend::Swapped;
use super::pager::Blocks;
use super::sampler::{History, NonFinite, Opinion, Sampler, Scratch, opinions};
use super::schedule::Pending;
use crate::model::batch::{Outcome, Role, Wanted};
use crate::text::answer::{Answer, AnswerEnd, Finished, Pushed};

/// What a sequence is made of.
#[derive(Debug)]
pub struct Start {
    /// The request.
    pub id: RequestId,
    /// The tokens of the prompt, at least one, each within the vocabulary.
    pub prompt: Vec<u32>,
    /// The tokens that an earlier worker generated.
    pub resume: Vec<u32>,
    /// Tokens to generate, at most; at least one.
    pub max_tokens: u32,
    /// The tokens that end a turn.
    pub eos: Arc<[u32]>,
    /// How tokens become text.
    pub answer: Answer,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Whether log-probabilities are told, and of how many tokens beside the one that is generated.
    pub logprobs: Option<u32>,
    /// Set when nobody waits for the answer any more.
    pub cancelled: Arc<AtomicBool>,
}

/// A request inside the engine.
#[derive(Debug)]
pub struct Sequence {
    /// The request.
    pub id: RequestId,
    /// Prompt and answer so far.
    pub tokens: Vec<u32>,
    /// How many of them have their keys and values in the cache.
    pub computed: u32,
    /// The blocks that hold those.
    pub blocks: Blocks,
    /// Its keys and values, while it waits without blocks and need not be computed anew.
    pub swapped: Option<Swapped>,
    prompt_tokens: u32,
    max_tokens: u32,
    reasoning_tokens: u32,
    eos: Arc<[u32]>,
    answer: Answer,
    sampler: Sampler,
    logprobs: Option<u32>,
    /// What the penalties count; kept only for a sampler that needs it.
    history: History,
    cancelled: Arc<AtomicBool>,
}

/// What a new token led to.
#[derive(Debug)]
pub enum Advance {
    /// The sequence goes on; the frame tells of the token.
    Goes(FromWorker),
    /// The sequence has ended; the frames tell of the token and of the end.
    Ends(FromWorker, FromWorker),
}

impl Sequence {
    /// Starts a sequence and replays what it resumes, silently.
    ///
    /// # Errors
    /// `Err` holds the frame of the end when the replayed tokens were the whole answer already.
    pub fn start(start: Start) -> Result<Sequence, Box<FromWorker>> {
        let prompt_tokens = u32::try_from(start.prompt.len()).expect("a prompt fits the context, which fits 32 bits");
        let mut history = History::default();
        if start.sampler.needs_history() {
            history.record_prompt(&start.prompt);
        }
        let mut sequence = Sequence {
            id: start.id,
            tokens: start.prompt,
            computed: 0,
            blocks: Blocks::default(),
            swapped: None,
            prompt_tokens,
            max_tokens: start.max_tokens,
            reasoning_tokens: 0,
            eos: start.eos,
            answer: start.answer,
            sampler: start.sampler,
            logprobs: start.logprobs,
            history,
            cancelled: start.cancelled,
        };
        for token in start.resume {
            let (_, ended) = sequence.take(token);
            if let Some(done) = ended {
                return Err(Box::new(done));
            }
        }
        Ok(sequence)
    }

    /// Says whether nobody waits for the answer any more.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Gives the tokens that are to be computed next: those of the prompt, then those that were generated.
    #[must_use]
    pub fn pending(&self) -> Pending {
        match self.prompt_tokens.checked_sub(self.computed).filter(|tokens| *tokens > 0) {
            Some(tokens) => Pending { role: Role::Prompt, tokens },
            None => Pending { role: Role::Generated, tokens: self.length() - self.computed },
        }
    }

    /// Says whether every token is computed, so that the next one can be chosen.
    #[must_use]
    pub fn wants_token(&self) -> bool {
        self.length() == self.computed
    }

    /// Says what is wanted of the row of the last token.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        match self.sampler.plain_choice().filter(|_| self.logprobs.is_none()) {
            None => Wanted::Logits,
            Some((temperature, seed)) => Wanted::Token { temperature, seed, position: u64::from(self.length()) },
        }
    }

    /// Goes on with what came of the row of the last token.
    ///
    /// # Errors
    /// `NonFinite` when the logits are no numbers to choose from.
    pub fn advance(&mut self, outcome: Outcome, scratch: &mut Scratch) -> Result<Advance, NonFinite> {
        let position = u64::from(self.length());
        let (token, logits) = match outcome {
            Outcome::Token(token) => (token, None),
            Outcome::Logits(mut logits) => {
                // Penalties are applied in place, and what is told is the model's own opinion.
                let is_changed = self.logprobs.is_some() && self.sampler.needs_history();
                let own = is_changed.then(|| logits.clone());
                let choice = self.sampler.sample(&mut logits, &self.history, position, scratch)?;
                (choice.token, Some(own.unwrap_or(logits)))
            }
            Outcome::Broken(token) => return Err(NonFinite { token, value: f32::NAN }),
        };
        let (pushed, ended) = self.take(token);
        let logprobs = match (self.logprobs, logits) {
            (Some(top), Some(logits)) if pushed.is_listable => {
                vec![self.logprobs_of(&opinions(&logits, token, top as usize, scratch))]
            }
            (Some(_) | None, _) => Vec::new(),
        };
        let runs = if self.logprobs.is_some() { pushed.runs } else { Vec::new() };
        let delta = FromWorker::Delta { id: self.id, tokens: vec![token], pieces: pushed.pieces, logprobs, runs };
        Ok(match ended {
            None => Advance::Goes(delta),
            Some(done) => Advance::Ends(delta, done),
        })
    }

    fn logprobs_of(&self, (chosen, top): &(Opinion, Vec<Opinion>)) -> Logprobs {
        let told =
            |opinion: &Opinion| TokenLogprob { token: self.answer.token_text(opinion.token), logprob: opinion.logprob };
        Logprobs { chosen: told(chosen), top: top.iter().map(told).collect() }
    }

    /// Appends a generated token. Gives what it brought, and the frame of the end if it was the last.
    fn take(&mut self, token: u32) -> (Pushed, Option<FromWorker>) {
        self.tokens.push(token);
        if self.sampler.needs_history() {
            self.history.record_generated(token);
        }
        let pushed = self.answer.push(token);
        self.reasoning_tokens += u32::from(pushed.is_reasoning);
        let generated = self.length() - self.prompt_tokens;
        let end = if self.eos.contains(&token) {
            Some(AnswerEnd::Eos)
        } else if pushed.stopped {
            Some(AnswerEnd::StopString)
        } else if generated >= self.max_tokens {
            Some(AnswerEnd::Length)
        } else {
            None
        };
        (pushed, end.map(|end| self.done(end)))
    }

    fn done(&mut self, end: AnswerEnd) -> FromWorker {
        let Finished { pieces, runs } = self.answer.finish(end);
        let reason = match end {
            AnswerEnd::Length => FinishReason::Length,
            AnswerEnd::Eos | AnswerEnd::StopString if self.answer.has_tool_calls() => FinishReason::ToolCalls,
            AnswerEnd::Eos | AnswerEnd::StopString => FinishReason::Stop,
        };
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: 0,
            completion_tokens: self.length() - self.prompt_tokens,
            reasoning_tokens: self.reasoning_tokens,
        };
        let runs = if self.logprobs.is_some() { runs } else { Vec::new() };
        FromWorker::Done { id: self.id, pieces, runs, reason, usage }
    }

    /// Gives the number of tokens of prompt and answer.
    #[must_use]
    pub fn length(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("a sequence is no longer than its context")
    }
}
