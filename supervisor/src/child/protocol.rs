//! What a worker may say, and when: the check of every message that arrives.
//!
//! Pure. A worker is not trusted: whatever is illegal in the state, about an unknown request, or beyond a limit is a
//! [`Violation`], and ends the incarnation. Invariant: a message that passed the check refers to a request that was sent
//! and has not ended, and keeps every bound that `bulkhead_shared::limits` states.

use std::collections::HashMap;

use bulkhead_shared::generate::{Generate, Prompt};
use bulkhead_shared::layers::{Layer, SandboxMode};
use bulkhead_shared::limits::{
    CONTEXT_TOKENS_MAX, DELTA_TEXT_BYTES_MAX, DELTA_TOKENS_MAX, DETAIL_BYTES_MAX, LOGPROB_MIN, TOKEN_BYTES_MAX,
    TOKEN_RUNS_MAX, logprob_tokens_max,
};
use bulkhead_shared::message::{Facts, Failure, FromWorker, Logprobs, PROTOCOL_VERSION, Piece, TokenRun, Usage};
use bulkhead_shared::units::RequestId;

use super::SoFar;
use crate::limits::ANSWER_BYTES_MAX;

/// How a worker broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It speaks another version.
    #[error("the worker speaks version {worker} of the protocol, the supervisor {supervisor}")]
    Version { worker: u32, supervisor: u32 },
    /// It stands behind fewer walls than it must.
    #[error(
        "this system does not give a worker the sandbox layers {}; --sandbox best-effort does without them, \
         at the price that a hostile model or prompt may reach what they would have held back",
        names(.missing)
    )]
    Walls { missing: Vec<Layer> },
    #[error("{message} is illegal in phase {phase:?}")]
    Order { message: &'static str, phase: Phase },
    #[error("{message} names request {id}, which is not running")]
    UnknownRequest { message: &'static str, id: RequestId },
    #[error("{message} of request {id} came before its prompt or twice")]
    PromptOrder { message: &'static str, id: RequestId },
    #[error("{what} of {value} exceeds {max}")]
    TooMuch { what: &'static str, value: u64, max: u64 },
    #[error("delta of request {id} has no tokens")]
    EmptyDelta { id: RequestId },
    #[error("pong carries nonce {nonce}, which was not asked")]
    Nonce { nonce: u64 },
    #[error("the facts of the model are contradictory: {what}")]
    Facts { what: &'static str },
    #[error("request {id} used {told} tokens by its end and {seen} by its deltas")]
    TokenCount { id: RequestId, told: u32, seen: u64 },
    #[error("request {id} did not ask for a conversation and got a tool call")]
    ToolCall { id: RequestId },
    #[error("the log-probabilities of request {id} are contradictory: {what}")]
    Logprobs { id: RequestId, what: &'static str },
}

fn names(layers: &[Layer]) -> String {
    layers.iter().map(|layer| layer.as_str()).collect::<Vec<_>>().join(", ")
}

/// How far the conversation with a worker has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was said.
    #[default]
    Silent,
    /// `Hello` came.
    Greeted,
    /// `Load` was sent.
    Loading,
    /// `Ready` came.
    Serving,
    /// `LoadFailed` came: nothing may follow.
    Failed,
}

/// The state of one conversation.
#[derive(Debug, Default)]
pub struct Protocol {
    sandbox: SandboxMode,
    phase: Phase,
    requests: HashMap<RequestId, Outstanding>,
    nonces: (u64, u64),
}

#[derive(Debug)]
struct Outstanding {
    is_chat: bool,
    has_prompt: bool,
    tokens: u64,
    tokens_max: u64,
    text_bytes: usize,
    /// Tokens in the place of a generated one whose log-probabilities were asked for, where any were.
    logprobs: Option<u32>,
    /// Log-probabilities of generated tokens of which is not known yet whether they are in the content.
    logprobs_waiting: usize,
}

impl Protocol {
    /// Begins with a worker that has said nothing and must be so isolated.
    pub fn new(sandbox: SandboxMode) -> Protocol {
        Protocol { sandbox, ..Protocol::default() }
    }

    /// Notes that `Load` was sent.
    pub fn load_sent(&mut self) {
        assert_eq!(self.phase, Phase::Greeted, "a plan follows the greeting");
        self.phase = Phase::Loading;
    }

    /// Notes that a request was sent, and what the tokens made that it has already.
    pub fn generate_sent(&mut self, generate: &Generate, so_far: SoFar) {
        let told_max = generate.logprobs.map_or(CONTEXT_TOKENS_MAX, logprob_tokens_max);
        let outstanding = Outstanding {
            is_chat: matches!(generate.prompt, Prompt::Chat(_)),
            has_prompt: false,
            tokens: generate.resume.len() as u64,
            tokens_max: generate.max_tokens.unwrap_or(CONTEXT_TOKENS_MAX).min(told_max).into(),
            text_bytes: so_far.text_bytes,
            logprobs: generate.logprobs,
            logprobs_waiting: so_far.logprobs_waiting,
        };
        self.requests.insert(generate.id, outstanding);
    }

    /// Notes that a request could not be sent after all.
    pub fn forget(&mut self, id: RequestId) {
        self.requests.remove(&id);
    }

    /// Gives the nonce of a new ping.
    pub fn next_nonce(&mut self) -> u64 {
        self.nonces.1 += 1;
        self.nonces.1
    }

    /// Counts the requests that were sent and have not ended.
    pub fn outstanding(&self) -> usize {
        self.requests.len()
    }

    /// Checks a message and notes what it changes.
    ///
    /// # Errors
    /// A `Violation` when the worker may not say this now.
    pub fn check(&mut self, message: &FromWorker) -> Result<(), Violation> {
        match message {
            FromWorker::Hello { version, layers } => {
                self.advance("hello", Phase::Silent, Phase::Greeted)?;
                if *version != PROTOCOL_VERSION {
                    return Err(Violation::Version { worker: *version, supervisor: PROTOCOL_VERSION });
                }
                at_most("layers", layers.len(), Layer::ALL.len())?;
                let missing = Layer::missing(layers);
                let is_enough = self.sandbox != SandboxMode::Full || missing.is_empty();
                if is_enough { Ok(()) } else { Err(Violation::Walls { missing }) }
            }
            FromWorker::Progress { what, .. } => {
                self.advance("progress", Phase::Loading, Phase::Loading)?;
                at_most("progress text", what.len(), DETAIL_BYTES_MAX)
            }
            FromWorker::Ready(facts) => {
                self.advance("ready", Phase::Loading, Phase::Serving)?;
                check_facts(facts)
            }
            FromWorker::LoadFailed { detail } => {
                self.advance("load-failed", Phase::Loading, Phase::Failed)?;
                at_most("load error", detail.len(), DETAIL_BYTES_MAX)
            }
            FromWorker::Prompt { id, tokens, cached } => {
                let request = self.request("prompt", *id)?;
                if std::mem::replace(&mut request.has_prompt, true) {
                    return Err(Violation::PromptOrder { message: "prompt", id: *id });
                }
                at_most("prompt tokens", *tokens as usize, CONTEXT_TOKENS_MAX as usize)?;
                at_most("cached tokens", *cached as usize, *tokens as usize)
            }
            FromWorker::Delta { id, tokens, pieces, logprobs, runs } => {
                self.check_delta(*id, tokens, logprobs)?;
                self.request("delta", *id)?.take_in(*id, pieces, runs)
            }
            FromWorker::Done { id, pieces, runs, usage, .. } => self.check_done(*id, (pieces, runs), *usage),
            FromWorker::Failed { id, failure } => {
                self.request("failed", *id)?;
                if let Failure::Invalid { param, detail } = failure {
                    at_most("failure text", param.len() + detail.len(), DETAIL_BYTES_MAX)?;
                }
                self.requests.remove(id);
                Ok(())
            }
            FromWorker::Pong { nonce, .. } => {
                if self.phase == Phase::Silent || *nonce <= self.nonces.0 || *nonce > self.nonces.1 {
                    return Err(Violation::Nonce { nonce: *nonce });
                }
                self.nonces.0 = *nonce;
                Ok(())
            }
        }
    }

    fn check_delta(&mut self, id: RequestId, tokens: &[u32], logprobs: &[Logprobs]) -> Result<(), Violation> {
        let request = self.request("delta", id)?;
        if !request.has_prompt {
            return Err(Violation::PromptOrder { message: "delta", id });
        }
        if tokens.is_empty() {
            return Err(Violation::EmptyDelta { id });
        }
        at_most("delta tokens", tokens.len(), DELTA_TOKENS_MAX)?;
        request.tokens += tokens.len() as u64;
        if request.tokens > request.tokens_max {
            return Err(Violation::TooMuch { what: "answer tokens", value: request.tokens, max: request.tokens_max });
        }
        at_most("log-probabilities", logprobs.len(), tokens.len())?;
        request.take_in_logprobs(id, logprobs)
    }

    fn check_done(
        &mut self,
        id: RequestId,
        (pieces, runs): (&[Piece], &[TokenRun]),
        usage: Usage,
    ) -> Result<(), Violation> {
        let request = self.request("done", id)?;
        if !request.has_prompt {
            return Err(Violation::PromptOrder { message: "done", id });
        }
        request.take_in(id, pieces, runs)?;
        let (told, seen) = (usage.completion_tokens, request.tokens);
        if u64::from(told) != seen {
            return Err(Violation::TokenCount { id, told, seen });
        }
        at_most("reasoning tokens", usage.reasoning_tokens as usize, usage.completion_tokens as usize)?;
        at_most("prompt tokens", usage.prompt_tokens as usize, CONTEXT_TOKENS_MAX as usize)?;
        at_most("cached tokens", usage.cached_tokens as usize, usage.prompt_tokens as usize)?;
        self.requests.remove(&id);
        Ok(())
    }

    fn advance(&mut self, message: &'static str, from: Phase, to: Phase) -> Result<(), Violation> {
        if self.phase != from {
            return Err(Violation::Order { message, phase: self.phase });
        }
        self.phase = to;
        Ok(())
    }

    fn request(&mut self, message: &'static str, id: RequestId) -> Result<&mut Outstanding, Violation> {
        if self.phase != Phase::Serving {
            return Err(Violation::Order { message, phase: self.phase });
        }
        self.requests.get_mut(&id).ok_or(Violation::UnknownRequest { message, id })
    }
}

impl Outstanding {
    fn take_in(&mut self, id: RequestId, pieces: &[Piece], runs: &[TokenRun]) -> Result<(), Violation> {
        let (mut bytes, mut content_bytes) = (0, 0);
        for piece in pieces {
            bytes += match piece {
                Piece::Reasoning(text) => text.len(),
                Piece::Content(text) => {
                    content_bytes += text.len();
                    text.len()
                }
                Piece::ToolCall { .. } if !self.is_chat => return Err(Violation::ToolCall { id }),
                Piece::ToolCall { name, arguments, .. } => name.len() + arguments.len(),
            };
        }
        at_most("text of one message", bytes, DELTA_TEXT_BYTES_MAX)?;
        self.text_bytes += bytes;
        at_most("text of an answer", self.text_bytes, ANSWER_BYTES_MAX)?;
        at_most("runs of tokens", runs.len(), TOKEN_RUNS_MAX)?;
        if content_bytes == 0 && !runs.is_empty() {
            return Err(Violation::Logprobs { id, what: "tokens of content without content" });
        }
        runs.iter().try_for_each(|run| self.take_in_run(id, *run))
    }

    /// Checks what becomes of log-probabilities that wait.
    fn take_in_run(&mut self, id: RequestId, run: TokenRun) -> Result<(), Violation> {
        let taken = run.skipped as usize + run.listed as usize;
        if run.listed == 0 {
            return Err(Violation::Logprobs { id, what: "a run without tokens of content" });
        }
        match self.logprobs_waiting.checked_sub(taken) {
            None => Err(Violation::Logprobs { id, what: "a run of more tokens than wait" }),
            Some(waiting) => {
                self.logprobs_waiting = waiting;
                Ok(())
            }
        }
    }

    fn take_in_logprobs(&mut self, id: RequestId, logprobs: &[Logprobs]) -> Result<(), Violation> {
        if logprobs.is_empty() {
            return Ok(());
        }
        let Some(top) = self.logprobs else {
            return Err(Violation::Logprobs { id, what: "none were asked for" });
        };
        for Logprobs { chosen, top: beside } in logprobs {
            at_most("tokens beside one", beside.len(), top as usize)?;
            for told in std::iter::once(chosen).chain(beside) {
                at_most("text of a token", told.token.len(), TOKEN_BYTES_MAX)?;
                // What is no number is in no range.
                if !(LOGPROB_MIN..=0.0).contains(&told.logprob) {
                    return Err(Violation::Logprobs { id, what: "a number that is none of a probability" });
                }
            }
        }
        self.logprobs_waiting += logprobs.len();
        Ok(())
    }
}

fn at_most(what: &'static str, value: usize, max: usize) -> Result<(), Violation> {
    if value <= max { Ok(()) } else { Err(Violation::TooMuch { what, value: value as u64, max: max as u64 }) }
}

fn check_facts(facts: &Facts) -> Result<(), Violation> {
    at_most("context", facts.context_tokens as usize, CONTEXT_TOKENS_MAX as usize)?;
    at_most("device text", facts.device.len(), DETAIL_BYTES_MAX)?;
    at_most("quantization text", facts.quantization.len(), DETAIL_BYTES_MAX)?;
    at_most("kinds of memory", facts.memory.len(), 16)?;
    at_most("things given up", facts.given_up.len(), 16)?;
    at_most("given up text", facts.given_up.iter().map(String::len).sum(), DETAIL_BYTES_MAX)?;
    for (is_wrong, what) in [
        (facts.context_tokens == 0, "no context"),
        (facts.block_tokens == 0, "no tokens in a block"),
        (facts.blocks == 0, "no blocks"),
        (facts.vocabulary == 0, "no vocabulary"),
    ] {
        if is_wrong {
            return Err(Violation::Facts { what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_shared::generate::Sampling;
    use bulkhead_shared::message::{FinishReason, TokenLogprob, TokenText};

    const ID: RequestId = RequestId(7);

    fn facts() -> Facts {
        Facts {
            context_tokens: 128,
            block_tokens: 16,
            blocks: 8,
            vocabulary: 300,
            memory: Vec::new(),
            device: "cpu".into(),
            quantization: "nf4".into(),
            given_up: Vec::new(),
        }
    }

    fn hello() -> FromWorker {
        FromWorker::Hello { version: PROTOCOL_VERSION, layers: Layer::ALL.to_vec() }
    }

    fn prompt() -> FromWorker {
        FromWorker::Prompt { id: ID, tokens: 5, cached: 2 }
    }

    fn delta(tokens: usize, text: &str) -> FromWorker {
        let pieces = vec![Piece::Content(text.into())];
        FromWorker::Delta { id: ID, tokens: vec![1; tokens], pieces, logprobs: Vec::new(), runs: Vec::new() }
    }

    /// One token with its log-probability and that of one beside it, and what becomes of those that wait.
    fn told(logprob: f32, text: &str, runs: &[(u32, u32)]) -> FromWorker {
        let token = |bytes: usize| TokenLogprob { token: TokenText::Bytes(vec![b'x'; bytes]), logprob };
        let logprobs = vec![Logprobs { chosen: token(TOKEN_BYTES_MAX), top: vec![token(1)] }];
        let pieces = vec![Piece::Content(text.into())];
        let runs = runs.iter().map(|(skipped, listed)| TokenRun { skipped: *skipped, listed: *listed }).collect();
        FromWorker::Delta { id: ID, tokens: vec![1], pieces, logprobs, runs }
    }

    fn done(completion_tokens: u32) -> FromWorker {
        let usage = Usage { prompt_tokens: 5, cached_tokens: 2, completion_tokens, reasoning_tokens: 0 };
        FromWorker::Done { id: ID, pieces: Vec::new(), runs: Vec::new(), reason: FinishReason::Stop, usage }
    }

    fn serving(logprobs: Option<u32>) -> Protocol {
        let mut protocol = Protocol::new(SandboxMode::Full);
        protocol.check(&hello()).expect("greets");
        protocol.load_sent();
        protocol.check(&FromWorker::Ready(facts())).expect("is ready");
        let generate = Generate {
            id: ID,
            prompt: Prompt::Text("x".into()),
            sampling: Sampling::default(),
            stop: Vec::new(),
            max_tokens: Some(10),
            logprobs,
            resume: vec![1; 2],
        };
        protocol.generate_sent(&generate, SoFar { text_bytes: 100, logprobs_waiting: 1 });
        protocol
    }

    /// Says the messages to a serving worker's protocol; only the last may be refused, with an error of this beginning.
    fn check(messages: &[FromWorker], refused: Option<&str>) {
        check_with(None, messages, refused);
    }

    fn check_with(logprobs: Option<u32>, messages: &[FromWorker], refused: Option<&str>) {
        let mut protocol = serving(logprobs);
        let (last, before) = messages.split_last().expect("at least one");
        for message in before {
            protocol.check(message).expect("legal so far");
        }
        let text = protocol.check(last).err().map(|violation| violation.to_string());
        match refused {
            None => assert_eq!(text, None),
            Some(start) => assert!(text.as_deref().is_some_and(|text| text.starts_with(start)), "{text:?}"),
        }
    }

    #[test]
    fn a_request_runs_in_order() {
        check(&[prompt(), delta(4, "a"), delta(4, "b"), done(10)], None);
        check(&[prompt(), done(2)], None);
        check(&[FromWorker::Failed { id: ID, failure: Failure::Cancelled }], None);
    }

    #[test]
    fn what_is_out_of_order_is_refused() {
        check(&[hello()], Some("hello is illegal"));
        check(&[FromWorker::Ready(facts())], Some("ready is illegal"));
        check(&[delta(1, "a")], Some("delta of request 7 came before"));
        check(&[done(0)], Some("done of request 7 came before"));
        check(&[prompt(), prompt()], Some("prompt of request 7 came before its prompt or twice"));
        check(&[prompt(), done(2), done(2)], Some("done names request 7"));
        check(&[FromWorker::Failed { id: RequestId(8), failure: Failure::Cancelled }], Some("failed names request 8"));
        let pong = FromWorker::Pong { nonce: 1, progress: 0, sequences: 0, blocks_free: 0 };
        check(&[pong], Some("pong carries nonce 1"));
    }

    #[test]
    fn what_is_beyond_a_limit_is_refused() {
        check(&[prompt(), delta(8, "a")], None);
        check(&[prompt(), delta(9, "a")], Some("answer tokens of 11"));
        check(&[prompt(), delta(0, "a")], Some("delta of request 7 has no tokens"));
        check(&[prompt(), delta(1, &"x".repeat(DELTA_TEXT_BYTES_MAX))], None);
        check(&[prompt(), delta(1, &"x".repeat(DELTA_TEXT_BYTES_MAX + 1))], Some("text of one message"));
        check(&[prompt(), delta(1, "a"), done(2)], Some("request 7 used 2 tokens by its end and 3 by its deltas"));
        check(&[prompt(), delta(1, "a"), done(4)], Some("request 7 used 4 tokens by its end and 3 by its deltas"));
        check(&[FromWorker::Prompt { id: ID, tokens: 1, cached: 2 }], Some("cached tokens of 2"));
        let call = Piece::ToolCall { index: 0, name: "f".into(), arguments: "{}".into() };
        let (logprobs, runs) = (Vec::new(), Vec::new());
        check(
            &[prompt(), FromWorker::Delta { id: ID, tokens: vec![1], pieces: vec![call], logprobs, runs }],
            Some("request 7 did not ask"),
        );
    }

    #[test]
    fn log_probabilities_are_those_that_were_asked_for() {
        let check = |messages: &[FromWorker], refused| check_with(Some(1), messages, refused);
        let refuse = |message: FromWorker, what: &str| {
            let words = format!("the log-probabilities of request 7 are contradictory: {what}");
            check_with(Some(1), &[prompt(), message], Some(&words));
        };
        // One waits from the worker before.
        check(&[prompt(), told(-0.5, "ab", &[(0, 2)])], None);
        check(&[prompt(), told(0.0, "", &[]), told(LOGPROB_MIN, "b", &[(1, 1), (0, 1)]), done(4)], None);
        check(&[prompt(), told(-0.5, "a", &[(0, 1)]), done(3)], None);
        for number in [0.1, LOGPROB_MIN - 1.0, f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
            refuse(told(number, "a", &[]), "a number that is none of a probability");
        }
        refuse(told(-0.5, "a", &[(0, 3)]), "a run of more tokens than wait");
        refuse(told(-0.5, "a", &[(u32::MAX, u32::MAX)]), "a run of more tokens than wait");
        refuse(told(-0.5, "a", &[(1, 0)]), "a run without tokens");
        refuse(told(-0.5, "", &[(0, 1)]), "tokens of content without content");
        check(&[prompt(), told(-0.5, "a", &[(0, 1); TOKEN_RUNS_MAX + 1])], Some("runs of tokens of"));
        check_with(Some(0), &[prompt(), told(-0.5, "a", &[])], Some("tokens beside one of 1 exceeds 0"));
        let words = "the log-probabilities of request 7 are contradictory: none were asked for";
        check_with(None, &[prompt(), told(-0.5, "a", &[])], Some(words));
        let mut long = told(-0.5, "a", &[]);
        let FromWorker::Delta { logprobs, .. } = &mut long else { panic!("a delta") };
        logprobs[0].chosen.token = TokenText::Special("x".repeat(TOKEN_BYTES_MAX + 1));
        check(&[prompt(), long.clone()], Some("text of a token of 257"));
        let FromWorker::Delta { logprobs, .. } = &mut long else { panic!("a delta") };
        logprobs.push(logprobs[0].clone());
        check(&[prompt(), long], Some("log-probabilities of 2 exceeds 1"));
        let mut late = done(2);
        let FromWorker::Done { runs, .. } = &mut late else { panic!("an end") };
        runs.push(TokenRun { skipped: 0, listed: 1 });
        refuse(late.clone(), "tokens of content without content");
        let FromWorker::Done { pieces, .. } = &mut late else { panic!("an end") };
        pieces.push(Piece::Content("held".into()));
        check(&[prompt(), late], None);
    }

    #[test]
    fn a_start_is_checked() {
        let mut other = Protocol::new(SandboxMode::Full);
        let version = PROTOCOL_VERSION + 1;
        let violation = other.check(&FromWorker::Hello { version, layers: Vec::new() });
        assert_eq!(violation, Err(Violation::Version { worker: version, supervisor: PROTOCOL_VERSION }));
        let layers: Vec<_> = Layer::ALL.into_iter().filter(|layer| *layer != Layer::Files).collect();
        let bare = FromWorker::Hello { version: PROTOCOL_VERSION, layers };
        let refused = Protocol::new(SandboxMode::Full).check(&bare).expect_err("a wall is missing").to_string();
        assert!(refused.contains("landlock-files") && refused.contains("--sandbox best-effort"), "{refused}");
        for mode in [SandboxMode::BestEffort, SandboxMode::Log, SandboxMode::Off] {
            Protocol::new(mode).check(&bare).expect("less was asked for");
        }
        let many = FromWorker::Hello { version: PROTOCOL_VERSION, layers: [Layer::ALL, Layer::ALL].concat() };
        let refused = Protocol::new(SandboxMode::Full).check(&many).expect_err("too many");
        assert!(matches!(refused, Violation::TooMuch { what: "layers", .. }), "{refused}");
        let mut eager = Protocol::new(SandboxMode::Full);
        assert!(matches!(eager.check(&FromWorker::Ready(facts())), Err(Violation::Order { .. })));
        let mut empty = Protocol::new(SandboxMode::Full);
        empty.check(&hello()).expect("greets");
        empty.load_sent();
        let facts = Facts { blocks: 0, ..facts() };
        assert_eq!(empty.check(&FromWorker::Ready(facts)), Err(Violation::Facts { what: "no blocks" }));
    }
}
