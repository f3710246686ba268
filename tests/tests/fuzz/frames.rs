//! Frames in both directions: the worker's reach the supervisor from a process that may be hostile.

use bulkhead_shared::frame::{LENGTH_BYTES, decode, decode_length, encode};
use bulkhead_shared::generate::{Chat, Generate, Message, Prompt, ReasoningEffort, Sampling, Tool, ToolCall};
use bulkhead_shared::layers::Layer;
use bulkhead_shared::limits::{DECODE_BYTES_MAX, FROM_WORKER_FRAME_BYTES_MAX, TO_WORKER_FRAME_BYTES_MAX};
use bulkhead_shared::message::{
    DeviceChoice, Facts, Failure, Faults, FinishReason, FromWorker, KvType, LoadPlan, Logprobs, MemoryKind, Piece,
    ToWorker, TokenLogprob, TokenRun, TokenText, Usage,
};
use bulkhead_shared::units::{Bytes, RequestId};
use bulkhead_tests::fuzz::{Random, mutate, run};

use crate::memory::{alone, bounded};

pub(crate) fn generate() -> Generate {
    let messages = vec![
        Message::System { text: "Be brief.".into() },
        Message::User { text: "What is the time in Oslo?".into() },
        Message::Assistant {
            reasoning: Some("I need the clock.".into()),
            content: None,
            calls: vec![ToolCall { name: "clock".into(), arguments: r#"{"city":"Oslo"}"#.into() }],
        },
        Message::Tool { name: "clock".into(), text: "12:00".into() },
    ];
    let tool = Tool { name: "clock".into(), description: None, parameters: Some(r#"{"type":"object"}"#.into()) };
    let date = "2026-01-31".into();
    Generate {
        id: RequestId(7),
        prompt: Prompt::Chat(Chat { messages, tools: vec![tool], effort: ReasoningEffort::High, date }),
        sampling: Sampling { temperature: Some(0.5), top_k: Some(40), seed: u64::MAX, ..Sampling::default() },
        stop: vec!["\n\n".into()],
        max_tokens: Some(100),
        logprobs: Some(2),
        resume: vec![1, 2, 200_002],
    }
}

fn to_worker() -> Vec<ToWorker> {
    let plan = LoadPlan {
        model_dir: "/models/demo".into(),
        device: DeviceChoice::Cuda(1),
        may_use_processor: false,
        context_tokens: 4096,
        sequences_max: 8,
        kv_bytes: Bytes(1 << 30),
        device_budget: Bytes(22 << 30),
        kv_type: KvType::Int8,
        faults: Faults { step_delay_ms: 1, die_on_token: Some(7), oom_after_steps: None, hang_after_steps: Some(2) },
    };
    let tokens = Generate { prompt: Prompt::Tokens((0..100).collect()), ..generate() };
    vec![
        ToWorker::Load(plan),
        ToWorker::Generate(Box::new(generate())),
        ToWorker::Generate(Box::new(tokens)),
        ToWorker::Cancel { id: RequestId(u64::MAX) },
        ToWorker::Ping { nonce: 1 },
    ]
}

fn told(logprob: f32) -> Logprobs {
    let token = |token| TokenLogprob { token, logprob };
    let top = vec![token(TokenText::Special("<|return|>".into())), token(TokenText::Bytes(vec![0xe2, 0x82]))];
    Logprobs { chosen: token(TokenText::Bytes(b"word".to_vec())), top }
}

pub(crate) fn from_worker() -> Vec<FromWorker> {
    let id = RequestId(3);
    let call = Piece::ToolCall { index: 0, name: "clock".into(), arguments: "{}".into() };
    let facts = Facts {
        context_tokens: 16_384,
        block_tokens: 16,
        blocks: 4096,
        vocabulary: 2048,
        memory: vec![(MemoryKind::Weights, Bytes(5 << 20)), (MemoryKind::KvCache, Bytes(1 << 30))],
        device: "cpu".into(),
        quantization: "nf4".into(),
        given_up: vec!["the embedding on the host".into()],
    };
    let length = Failure::ContextLength { prompt_tokens: 9, max_tokens: 0, context_tokens: 8 };
    let invalid = Failure::Invalid { param: "prompt".into(), detail: "has a token id that does not exist".into() };
    vec![
        FromWorker::Hello { version: 1, layers: vec![Layer::NotDumpable, Layer::NoCapabilities] },
        FromWorker::Progress { done: Bytes(1), total: Bytes(2), what: "weights".into() },
        FromWorker::Ready(facts),
        FromWorker::LoadFailed { detail: "model.safetensors is truncated".into() },
        FromWorker::Prompt { id, tokens: 100, cached: 0 },
        FromWorker::Delta {
            id,
            tokens: vec![1, 2],
            pieces: vec![Piece::Content("grüß".into()), call],
            logprobs: vec![told(-0.5), told(-9999.0)],
            runs: vec![TokenRun { skipped: 1, listed: 1 }],
        },
        FromWorker::Delta {
            id,
            tokens: vec![3],
            pieces: vec![Piece::Content("a".into())],
            logprobs: vec![told(0.0)],
            runs: vec![TokenRun { skipped: 0, listed: 1 }],
        },
        FromWorker::Done {
            id,
            pieces: vec![Piece::Content("b".into())],
            runs: vec![TokenRun { skipped: u32::MAX, listed: 1 }],
            reason: FinishReason::ToolCalls,
            usage: Usage::default(),
        },
        FromWorker::Failed { id, failure: length },
        FromWorker::Failed { id, failure: invalid },
        FromWorker::Pong { nonce: 1, progress: u64::MAX, sequences: 1, blocks_free: 2 },
    ]
}

/// Damages a frame, takes its length as a reader would, and decodes the rest. What decodes must survive the way back.
fn check<T>(corpus: &[T], bytes_max: usize, random: &mut Random)
where
    T: bincode::Encode + bincode::Decode<()> + PartialEq + std::fmt::Debug,
{
    let mut frame = match random.below(8) {
        0 => random.bytes(256),
        _ => encode(&corpus[random.below(corpus.len())], bytes_max).expect("the corpus fits"),
    };
    mutate(&mut frame, random);
    let Some((prefix, payload)) = frame.split_first_chunk::<LENGTH_BYTES>() else { return };
    // The length alone decides how much a reader waits for, so it must never pass the limit.
    if let Ok(bytes) = decode_length(*prefix, bytes_max) {
        assert!((1..=bytes_max).contains(&bytes), "{bytes}");
    }
    let claim = DECODE_BYTES_MAX + 64 * payload.len() + (1 << 16);
    let Ok(message) = bounded(claim, || decode::<T>(payload)) else { return };
    let again = encode(&message, bytes_max).expect("what was decoded is no larger than what was read");
    let again = decode::<T>(&again[LENGTH_BYTES..]).expect("what was encoded can be decoded");
    // Compared as text: a damaged number may be NaN, which equals nothing.
    assert_eq!(format!("{message:?}"), format!("{again:?}"));
}

#[test]
fn frames_to_a_worker() {
    alone(|| {
        let corpus = to_worker();
        run("frames to a worker", |random| check(&corpus, TO_WORKER_FRAME_BYTES_MAX, random));
    });
}

#[test]
fn frames_from_a_worker() {
    alone(|| {
        let corpus = from_worker();
        run("frames from a worker", |random| check(&corpus, FROM_WORKER_FRAME_BYTES_MAX, random));
    });
}
