//! The engine with a small model: preemption, cancellation and resume change nothing of what a request gets.

#![expect(clippy::wildcard_enum_match_arm, reason = "a test fails on every frame that it does not name")]

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_shared::generate::Sampling;
use bulkhead_shared::message::{Failure, FinishReason, FromWorker, Logprobs, Piece, TokenRun, Usage};
use bulkhead_shared::units::RequestId;
use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::engine::backend::{Backend, StepTokens};
use bulkhead_worker::engine::faults::Faults;
use bulkhead_worker::engine::kv_cache::KvCache;
use bulkhead_worker::engine::pager::KvShape;
use bulkhead_worker::engine::sampler::Sampler;
use bulkhead_worker::engine::sequence::{Sequence, Start};
use bulkhead_worker::engine::{Engine, EngineLimits, Status};
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::decoder::Decoder;
use bulkhead_worker::model::weights::{self, Quantize};
use bulkhead_worker::quant::cpu::Cpu;
use bulkhead_worker::text::answer::{Answer, AnswerKind};
use bulkhead_worker::text::generation_config::Defaults;
use bulkhead_worker::text::tokenizer::Tokenizer;

struct Model {
    decoder: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
}

fn model() -> Model {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle/models/gptoss_basic");
    let checkpoint = Checkpoint::open(&dir).expect("the fixture is a checkpoint");
    let config = Config::read(&dir).expect("the fixture has a configuration");
    let weights = weights::load(&checkpoint, &config, Quantize::Nf4, &mut |_, _, _| {}).expect("the fixture is whole");
    let decoder = Arc::new(Decoder::new(config, weights, Cpu::start(2).expect("threads start")));
    Model { decoder, tokenizer: Arc::new(Tokenizer::open(&dir).expect("the fixture has a tokenizer")) }
}

impl Model {
    /// A request for `max_tokens` sampled tokens that nothing but the limit ends.
    fn start(&self, id: u64, max_tokens: u32, resume: &[u32]) -> Start {
        let sampling =
            Sampling { temperature: Some(0.8), frequency_penalty: 0.2, seed: 1000 + id, ..Sampling::default() };
        let prompt = (0..10 + 3 * id as u32).map(|i| (i * 7 + id as u32) % 200).collect();
        Start {
            id: RequestId(id),
            prompt,
            resume: resume.to_vec(),
            max_tokens,
            eos: Arc::from([]),
            answer: Answer::new(AnswerKind::Plain, Vec::new(), Arc::clone(&self.tokenizer)).expect("plain text"),
            sampler: Sampler::new(&sampling, &Defaults::default()),
            logprobs: Some(3),
            cancelled: Arc::new(AtomicBool::new(false)),
        }
    }
}

/// What one request got.
#[derive(Debug, Default, PartialEq)]
struct Got {
    tokens: Vec<u32>,
    text: String,
    /// All log-probabilities, those of tokens that wait, and those of tokens of the content.
    told: Vec<Logprobs>,
    waiting: VecDeque<Logprobs>,
    listed: Vec<Logprobs>,
    end: Option<(FinishReason, Usage)>,
    failure: Option<Failure>,
}

impl Got {
    fn add(&mut self, pieces: Vec<Piece>, runs: Vec<TokenRun>) {
        for run in runs {
            // What a worker before was told of is not here.
            let waiting = self.waiting.len();
            self.waiting.drain(..waiting.min(run.skipped as usize));
            let waiting = self.waiting.len();
            self.listed.extend(self.waiting.drain(..waiting.min(run.listed as usize)));
        }
        for piece in pieces {
            match piece {
                Piece::Content(text) => self.text.push_str(&text),
                Piece::Reasoning(_) | Piece::ToolCall { .. } => panic!("plain text has neither"),
            }
        }
    }
}

/// Runs requests side by side until all have ended; `watch` sees every frame.
fn run(model: &Model, blocks: u32, starts: Vec<Start>, mut watch: impl FnMut(&FromWorker)) -> Vec<Got> {
    let count = starts.len();
    let cache = KvCache::new(KvShape::of(model.decoder.config()), blocks, count as u32, StepTokens::CPU.sum());
    let status = Arc::new(Status::default());
    let (sequence_sender, sequences) = crossbeam_channel::bounded(64);
    // No frame waits unread, so that what `watch` does comes before the next step but one.
    let (outbox, frames) = crossbeam_channel::bounded(0);
    let limits = EngineLimits { sequences_max: count, faults: Faults::default() };
    let engine =
        Engine::new(Backend::cpu(Arc::clone(&model.decoder), cache), limits, Arc::clone(&status), (sequences, outbox));
    for start in starts {
        sequence_sender.send(Sequence::start(start).expect("not at its end yet")).expect("the engine is there");
    }
    drop(sequence_sender);
    let thread = std::thread::spawn(move || engine.run());
    let mut got: Vec<Got> = (0..count).map(|_| Got::default()).collect();
    for frame in frames {
        watch(&frame);
        match frame {
            FromWorker::Delta { id, tokens, pieces, logprobs, runs } => {
                assert!(logprobs.iter().all(|told| told.top.len() == 3 && told.chosen.logprob <= told.top[0].logprob));
                got[id.0 as usize].tokens.extend(tokens);
                got[id.0 as usize].told.extend(logprobs.clone());
                got[id.0 as usize].waiting.extend(logprobs);
                got[id.0 as usize].add(pieces, runs);
            }
            FromWorker::Done { id, pieces, runs, reason, usage } => {
                got[id.0 as usize].add(pieces, runs);
                got[id.0 as usize].end = Some((reason, usage));
            }
            FromWorker::Failed { id, failure } => got[id.0 as usize].failure = Some(failure),
            other => panic!("an engine does not say {other:?}"),
        }
    }
    thread.join().expect("the engine does not panic").expect("the logits are finite");
    assert_eq!(status.blocks_free.load(Ordering::Relaxed), blocks, "every block came back");
    assert_eq!(status.sequences.load(Ordering::Relaxed), 0);
    got
}

#[test]
fn a_cache_that_is_too_small_for_all_delays_but_changes_nothing() {
    let model = model();
    let starts = || (0..6).map(|id| model.start(id, 60, &[])).collect();
    let roomy = run(&model, 64, starts(), |_| {});
    // Three blocks hold one of these sequences (85 tokens at most), not two.
    let tight = run(&model, 3, starts(), |_| {});
    assert_eq!(roomy, tight);
    for got in &roomy {
        assert_eq!(got.tokens.len(), 60);
        let (reason, usage) = got.end.expect("each request ends");
        assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 60));
    }
}

#[test]
fn a_cancelled_request_ends_and_its_neighbours_do_not_notice() {
    let model = model();
    let whole = run(&model, 64, (0..4).map(|id| model.start(id, 40, &[])).collect(), |_| {});
    let starts: Vec<Start> = (0..4).map(|id| model.start(id, 40, &[])).collect();
    let flags: Vec<Arc<AtomicBool>> = starts.iter().map(|start| Arc::clone(&start.cancelled)).collect();
    let mut seen = 0;
    let got = run(&model, 64, starts, |frame| {
        if let FromWorker::Delta { id: RequestId(1), .. } = frame {
            seen += 1;
            flags[1].store(seen == 5, Ordering::Relaxed);
        }
    });
    assert_eq!(got[1].failure, Some(Failure::Cancelled));
    assert!(got[1].tokens.len() < 40 && whole[1].tokens.starts_with(&got[1].tokens));
    for neighbour in [0, 2, 3] {
        assert_eq!(got[neighbour], whole[neighbour]);
    }
}

#[test]
fn a_request_resumed_after_any_token_goes_on_as_if_nothing_had_happened() {
    let model = model();
    let whole = run(&model, 64, vec![model.start(0, 30, &[])], |_| {}).remove(0);
    for done in 0..30 {
        let resumed = run(&model, 64, vec![model.start(0, 30, &whole.tokens[..done])], |_| {}).remove(0);
        assert_eq!(resumed.tokens, whole.tokens[done..], "resumed behind token {done}");
        assert_eq!(resumed.end, whole.end, "usage counts every token once");
        assert!(whole.text.ends_with(&resumed.text));
        // Tokens whose ids have no text are not told of.
        let bytes_of = |ids: &[u32]| ids.iter().filter(|id| model.tokenizer.token_bytes(**id).is_some()).count();
        assert_eq!(resumed.told.len(), bytes_of(&resumed.tokens));
        assert!(whole.told.ends_with(&resumed.told), "bit by bit, resumed behind token {done}");
    }
}

#[test]
fn a_request_resumed_at_its_end_ends_at_once() {
    let model = model();
    let whole = run(&model, 64, vec![model.start(0, 5, &[])], |_| {}).remove(0);
    match Sequence::start(model.start(0, 5, &whole.tokens)) {
        Err(done) => match *done {
            FromWorker::Done { reason, usage, .. } => assert_eq!(Some((reason, usage)), whole.end),
            other => panic!("not an end: {other:?}"),
        },
        Ok(_) => panic!("a sequence that has all its tokens does not start"),
    }
}
