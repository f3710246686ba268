//! From a request to a sequence: rendering, tokenising, and judging whether it fits.
//!
//! Runs on threads of its own, so that a long prompt never holds up a step of the others. What is prepared counts as work: a
//! text that keeps a thread for good makes a worker hang, and the supervisor sees that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_shared::generate::{Generate, Prompt};
use bulkhead_shared::limits::{LOGPROBS_TOP_MAX, TOKEN_BYTES_MAX, logprob_tokens_max};
use bulkhead_shared::message::{Failure, FromWorker, detail};
use crossbeam_channel::{Receiver, Sender};

use super::Status;
use super::sampler::Sampler;
use super::sequence::{Sequence, Start};
use crate::text::answer::{Answer, AnswerKind};
use crate::text::chat::ChatFormat;
use crate::text::error::TextError;
use crate::text::generation_config::GenerationConfig;
use crate::text::tokenizer::Tokenizer;

/// Threads that tokenise.
const THREADS: usize = 2;

/// A request on its way in.
#[derive(Debug)]
pub struct Arrival {
    /// What to generate.
    pub request: Generate,
    /// Set when nobody waits for the answer any more.
    pub cancelled: Arc<AtomicBool>,
}

/// What requests are judged by.
#[derive(Debug)]
pub struct Intake {
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// How the model's conversations are written.
    pub chat: ChatFormat,
    /// The model's defaults.
    pub defaults: GenerationConfig,
    /// The tokens that end a turn.
    pub eos: Arc<[u32]>,
    /// Tokens that a sequence may have.
    pub context_tokens: u32,
    /// Ids that the model knows.
    pub vocabulary: u32,
}

impl Intake {
    /// Starts the threads that turn arrivals into sequences, until no more can arrive.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(
        self,
        arrivals: &Receiver<Arrival>,
        sequences: &Sender<Sequence>,
        outbox: &Sender<FromWorker>,
        status: &Arc<Status>,
    ) -> std::io::Result<()> {
        let intake = Arc::new(self);
        for index in 0..THREADS {
            let (intake, arrivals) = (Arc::clone(&intake), arrivals.clone());
            let (sequences, outbox, status) = (sequences.clone(), outbox.clone(), Arc::clone(status));
            let take = move |arrival| {
                status.preparing.fetch_add(1, Ordering::Relaxed);
                intake.take(arrival, &sequences, &outbox);
                status.prepared.fetch_add(1, Ordering::Relaxed);
                status.preparing.fetch_sub(1, Ordering::Relaxed);
            };
            let run = move || arrivals.iter().for_each(take);
            std::thread::Builder::new().name(format!("intake-{index}")).spawn(run)?;
        }
        Ok(())
    }

    /// Prepares one request. A closed channel means that the process is about to end, and nobody is left to tell.
    fn take(&self, arrival: Arrival, sequences: &Sender<Sequence>, outbox: &Sender<FromWorker>) {
        let id = arrival.request.id;
        let started = match arrival.cancelled.load(Ordering::Relaxed) {
            true => Err(Failure::Cancelled),
            false => self.prepare(arrival),
        };
        let start = match started {
            Ok(start) => start,
            Err(failure) => {
                let _ = outbox.send(FromWorker::Failed { id, failure });
                return;
            }
        };
        let tokens = u32::try_from(start.prompt.len()).expect("a prompt that fits the context fits 32 bits");
        let _ = outbox.send(FromWorker::Prompt { id, tokens, cached: 0 });
        let _ = match Sequence::start(start) {
            Ok(sequence) => sequences.send(sequence).map_err(|_| ()),
            Err(done) => outbox.send(*done).map_err(|_| ()),
        };
    }

    fn prepare(&self, Arrival { request, cancelled }: Arrival) -> Result<Start, Failure> {
        let (prompt, kind) = self.tokens_of(&request.prompt)?;
        let max_tokens = self.fit(prompt.len(), request.max_tokens)?;
        let max_tokens = max_tokens.min(self.logprob_tokens(request.logprobs)?);
        self.check_ids("prompt", &prompt)?;
        self.check_ids("resume", &request.resume)?;
        let answer = Answer::new(kind, request.stop, Arc::clone(&self.tokenizer)).map_err(|error| invalid(&error))?;
        Ok(Start {
            id: request.id,
            prompt,
            resume: request.resume,
            max_tokens,
            eos: Arc::clone(&self.eos),
            answer,
            sampler: Sampler::new(&request.sampling, &self.defaults.defaults),
            logprobs: request.logprobs,
            cancelled,
        })
    }

    fn tokens_of(&self, prompt: &Prompt) -> Result<(Vec<u32>, AnswerKind), Failure> {
        let tokens = match prompt {
            Prompt::Chat(chat) => self.chat.tokens(&self.tokenizer, chat),
            Prompt::Text(text) => self.tokenizer.encode_ordinary(text).map(|ids| {
                // The special tokens that every text of the model begins with, if it has any.
                ([self.tokenizer.prefix(), &ids].concat(), AnswerKind::Plain)
            }),
            Prompt::Tokens(ids) => Ok((ids.clone(), AnswerKind::Plain)),
        };
        tokens.map_err(|error| invalid(&error))
    }

    /// Gives the tokens that may be generated behind a prompt of `prompt_tokens`.
    fn fit(&self, prompt_tokens: usize, max_tokens: Option<u32>) -> Result<u32, Failure> {
        if prompt_tokens == 0 {
            return Err(Failure::Invalid { param: "prompt".into(), detail: "the prompt has no tokens".into() });
        }
        let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let room = self.context_tokens.saturating_sub(prompt_tokens);
        let wanted = max_tokens.unwrap_or(room.max(1));
        if wanted > room {
            return Err(Failure::ContextLength {
                prompt_tokens,
                max_tokens: max_tokens.unwrap_or(0),
                context_tokens: self.context_tokens,
            });
        }
        Ok(wanted)
    }

    /// Gives the tokens that an answer may have because of the log-probabilities that are told with it.
    fn logprob_tokens(&self, logprobs: Option<u32>) -> Result<u32, Failure> {
        let refused = |detail| Failure::Invalid { param: "logprobs".into(), detail };
        let Some(top) = logprobs else { return Ok(u32::MAX) };
        if top > LOGPROBS_TOP_MAX {
            return Err(refused(format!("{top} tokens in the place of one exceed {LOGPROBS_TOP_MAX}")));
        }
        match self.tokenizer.token_bytes_max() {
            bytes if bytes > TOKEN_BYTES_MAX => Err(refused(format!(
                "this model has a token of {bytes} bytes, and log-probabilities are told of up to {TOKEN_BYTES_MAX}"
            ))),
            _ => Ok(logprob_tokens_max(top)),
        }
    }

    fn check_ids(&self, param: &str, ids: &[u32]) -> Result<(), Failure> {
        match ids.iter().find(|id| **id >= self.vocabulary) {
            None => Ok(()),
            Some(id) => Err(Failure::Invalid {
                param: param.into(),
                detail: format!("token id {id} is outside the vocabulary of {} tokens", self.vocabulary),
            }),
        }
    }
}

/// What a client is told when its text cannot be taken.
fn invalid(error: &TextError) -> Failure {
    Failure::Invalid { param: error.param().into(), detail: detail(&error.to_string()) }
}
