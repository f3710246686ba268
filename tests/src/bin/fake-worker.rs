//! A worker without a model, for tests of the supervisor: it speaks the real protocol and answers from a script.
//!
//! The script is the prompt: words in square brackets in front are directives, the rest is echoed, a word a token.
//! `[delay=MS]` waits before each token, `[repeat=N]` says the words N times, `[think=N]` makes the first N tokens
//! reasoning, `[call]` calls the tool `lookup` at the end. The others misbehave, `=N` after N tokens: `[exit=N,CODE]`,
//! `[abort=N]`, `[hang=N]`, `[garbage=N]`, `[long-frame=N]`, `[unknown-id=N]`, `[no-prompt]`, `[flood]`, `[close=N]`,
//! `[mute=N]` (stops reading, and so answering pings), `[hello=N]` and `[progress=N]` (say what is over), `[oom=N]` (takes memory
//! until it is killed), `[count=N]` (tells a wrong number of tokens at the end), `[logprob=N,VALUE]` (tells that of a token); with `[once]` it behaves when the request
//! is resumed behind tokens of an earlier worker. `[context]` and `[invalid]` fail the request; `[say=TEXT]` writes to
//! standard error. The load is scripted by the lines of `fake.txt` in the model folder: `exit CODE`, `fail TEXT`,
//! `steps N`, `stall`, `abort`. On the command line: `mute`, `wrong-version`, `no-walls` and `exit CODE` before or in the greeting.
//!
//! Invariants: however it misbehaves, it ends with its supervisor, as the real one does; what it says behind a token is a
//! function of the request and the tokens up to that one.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bulkhead_shared::frame;
use bulkhead_shared::generate::{Generate, Message, Prompt};
use bulkhead_shared::layers::Layer;
use bulkhead_shared::limits::{FROM_WORKER_FRAME_BYTES_MAX, TO_WORKER_FRAME_BYTES_MAX};
use bulkhead_shared::message::{
    DeviceChoice, Facts, Failure, FinishReason, FromWorker, LoadPlan, Logprobs, PROTOCOL_VERSION, Piece, ToWorker,
    TokenLogprob, TokenRun, TokenText, Usage,
};
use bulkhead_shared::units::{Bytes, RequestId};
use nix::sys::prctl;
use nix::sys::signal::Signal;

const CONTEXT_TOKENS: u32 = 4096;

fn main() -> anyhow::Result<()> {
    // What hangs by its script does not see the end of its link.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let version = match words.as_slice() {
        ["mute", ..] => sleep_forever(),
        ["exit", code, ..] => process::exit(code.parse()?),
        ["wrong-version", ..] => PROTOCOL_VERSION + 1,
        _ => PROTOCOL_VERSION,
    };
    let link: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned()?;
    let worker = Arc::new(Worker {
        link: UnixStream::from(link),
        writing: Mutex::new(()),
        cancelled: Mutex::default(),
        progress: AtomicU64::new(0),
        sequences: AtomicU32::new(0),
    });
    let layers = match words.as_slice() {
        ["no-walls", ..] => vec![Layer::ParentDeathSignal],
        _ => Layer::ALL.to_vec(),
    };
    worker.send(&FromWorker::Hello { version, layers })?;
    while let Some(message) = worker.receive()? {
        match message {
            ToWorker::Load(plan) => worker.load(&plan)?,
            ToWorker::Generate(generate) => {
                worker.sequences.fetch_add(1, Ordering::SeqCst);
                let worker = worker.clone();
                thread::spawn(move || {
                    // The link's end is the main thread's to see.
                    drop(worker.generate(&generate));
                    worker.sequences.fetch_sub(1, Ordering::SeqCst);
                });
            }
            ToWorker::Cancel { id } => {
                worker.cancelled.lock().expect("no panics").insert(id);
            }
            ToWorker::Ping { nonce } => worker.send(&FromWorker::Pong {
                nonce,
                progress: worker.progress.load(Ordering::SeqCst),
                sequences: worker.sequences.load(Ordering::SeqCst),
                blocks_free: 100,
            })?,
        }
    }
    Ok(())
}

fn facts(plan: &LoadPlan) -> Facts {
    Facts {
        context_tokens: CONTEXT_TOKENS,
        block_tokens: 16,
        blocks: 100,
        vocabulary: 1000,
        memory: Vec::new(),
        device: match plan.device {
            DeviceChoice::Cpu => "cpu (fake)".into(),
            DeviceChoice::Cuda(index) => {
                format!("cuda:{index} (fake, {} of {})", plan.device_budget, plan.kv_type.as_str())
            }
        },
        quantization: "none".into(),
        given_up: Vec::new(),
    }
}

/// Takes memory until the kernel puts an end to it, as it does where the control group has a limit; without one it stops
/// before the machine suffers, and hangs.
fn take_memory() -> ! {
    const PART_BYTES: usize = 1 << 20;
    const PARTS_MAX: usize = 1024;
    let taken: Vec<_> = (0..PARTS_MAX).map(|_| std::hint::black_box(vec![1_u8; PART_BYTES])).collect();
    std::hint::black_box(&taken);
    sleep_forever()
}

/// What is told of a token by its place in the answer: each of the `top` others is half as likely as the one before.
fn logprobs(place: usize, text: &str, top: u32) -> (Vec<Logprobs>, Vec<TokenRun>) {
    let token = |text: String, logprob| TokenLogprob { token: TokenText::Bytes(text.into_bytes()), logprob };
    let chosen = token(text.to_owned(), -(place as f32) / 8.0);
    let top = (0..top).map(|rank| token(format!(" {place}-{rank}"), -std::f32::consts::LN_2 * (rank + 1) as f32));
    (vec![Logprobs { chosen, top: top.collect() }], vec![TokenRun { skipped: 0, listed: 1 }])
}

fn sleep_forever() -> ! {
    loop {
        thread::park();
    }
}

struct Worker {
    link: UnixStream,
    writing: Mutex<()>,
    cancelled: Mutex<HashSet<RequestId>>,
    progress: AtomicU64,
    sequences: AtomicU32,
}

/// What one prompt asks for.
#[derive(Default)]
struct Script {
    directives: Vec<(String, String)>,
    words: Vec<String>,
}

impl Script {
    fn read(prompt: &Prompt) -> Script {
        let text = match prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(tokens) => format!("{} tokens", tokens.len()),
            Prompt::Chat(chat) => match chat.messages.last() {
                Some(Message::User { text } | Message::Tool { text, .. }) => text.clone(),
                Some(Message::System { .. } | Message::Developer { .. } | Message::Assistant { .. }) | None => {
                    "nothing to say".into()
                }
            },
        };
        let mut script = Script::default();
        for word in text.split_whitespace() {
            match word.strip_prefix('[').and_then(|word| word.strip_suffix(']')) {
                Some(directive) => {
                    let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
                    script.directives.push((name.to_owned(), value.to_owned()));
                }
                None => script.words.push(word.to_owned()),
            }
        }
        let repeat = script.number("repeat").unwrap_or(1);
        script.words = script.words.iter().cycle().take(script.words.len() * repeat).cloned().collect();
        script
    }

    fn has(&self, name: &str) -> bool {
        self.directives.iter().any(|(directive, _)| directive == name)
    }

    fn number(&self, name: &str) -> Option<usize> {
        let (_, value) = self.directives.iter().find(|(directive, _)| directive == name)?;
        value.split(',').next()?.parse().ok()
    }
}

impl Worker {
    fn send(&self, message: &FromWorker) -> anyhow::Result<()> {
        self.send_bytes(&frame::encode(message, FROM_WORKER_FRAME_BYTES_MAX)?)
    }

    fn send_bytes(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let _turn = self.writing.lock().expect("no panics");
        Ok((&self.link).write_all(bytes)?)
    }

    fn receive(&self) -> anyhow::Result<Option<ToWorker>> {
        let mut prefix = [0; frame::LENGTH_BYTES];
        if (&self.link).read_exact(&mut prefix).is_err() {
            return Ok(None);
        }
        let mut payload = vec![0; frame::decode_length(prefix, TO_WORKER_FRAME_BYTES_MAX)?];
        (&self.link).read_exact(&mut payload)?;
        Ok(Some(frame::decode(&payload)?))
    }

    fn load(&self, plan: &LoadPlan) -> anyhow::Result<()> {
        let script = std::fs::read_to_string(format!("{}/fake.txt", plan.model_dir)).unwrap_or_default();
        for line in script.lines() {
            match line.split_once(' ').unwrap_or((line, "")) {
                ("exit", code) => process::exit(code.parse()?),
                ("fail", detail) => self.send(&FromWorker::LoadFailed { detail: detail.to_owned() })?,
                ("steps", count) => {
                    let total: u64 = count.parse()?;
                    for done in 0..total {
                        let what = "the weights".to_owned();
                        self.send(&FromWorker::Progress { done: Bytes(done), total: Bytes(total), what })?;
                        thread::sleep(Duration::from_millis(20));
                    }
                }
                ("stall", _) => sleep_forever(),
                ("abort", _) => process::abort(),
                (other, _) => anyhow::bail!("unknown line {other:?} in fake.txt"),
            }
        }
        self.send(&FromWorker::Ready(facts(plan)))
    }

    fn generate(&self, generate: &Generate) -> anyhow::Result<()> {
        let id = generate.id;
        let script = Script::read(&generate.prompt);
        for (_, text) in script.directives.iter().filter(|(name, _)| name == "say") {
            eprintln!("{text}");
        }
        if script.has("context") {
            let max_tokens = generate.max_tokens.unwrap_or(0);
            let failure = Failure::ContextLength { prompt_tokens: 5000, max_tokens, context_tokens: CONTEXT_TOKENS };
            return self.send(&FromWorker::Failed { id, failure });
        }
        if script.has("invalid") {
            let failure = Failure::Invalid { param: "prompt".into(), detail: "token 9999 is unknown".into() };
            return self.send(&FromWorker::Failed { id, failure });
        }
        let prompt_tokens = u32::try_from(script.words.len())?;
        if !script.has("no-prompt") {
            self.send(&FromWorker::Prompt { id, tokens: prompt_tokens, cached: 0 })?;
        }
        let limit = generate.max_tokens.unwrap_or(CONTEXT_TOKENS) as usize;
        let reasoning = script.number("think").unwrap_or(0);
        let mut emitted = generate.resume.len();
        let (is_call, pause) = (script.has("call"), Duration::from_millis(script.number("delay").unwrap_or(0) as u64));
        let behaves = script.has("once") && emitted > 0;
        let script = if behaves { Script { directives: Vec::new(), ..script } } else { script };
        for word in script.words.iter().take(limit).skip(emitted) {
            self.misbehave(&script, emitted, id)?;
            thread::sleep(pause);
            if self.cancelled.lock().expect("no panics").remove(&id) {
                return self.send(&FromWorker::Failed { id, failure: Failure::Cancelled });
            }
            let text = if emitted == 0 || emitted == reasoning { word.clone() } else { format!(" {word}") };
            let top = generate.logprobs.filter(|_| emitted >= reasoning);
            let (logprobs, runs) = top.map(|top| logprobs(emitted, &text, top)).unwrap_or_default();
            let piece = if emitted < reasoning { Piece::Reasoning(text) } else { Piece::Content(text) };
            emitted += 1;
            self.progress.fetch_add(1, Ordering::SeqCst);
            let (tokens, pieces) = (vec![emitted as u32], vec![piece]);
            self.send(&FromWorker::Delta { id, tokens, pieces, logprobs, runs })?;
        }
        self.misbehave(&script, emitted, id)?;
        let is_cut = script.words.len() > limit;
        let is_call = is_call && !is_cut;
        let call = Piece::ToolCall { index: 0, name: "lookup".into(), arguments: "{\"key\":\"a\"}".into() };
        let reason = match (is_call, is_cut) {
            (true, _) => FinishReason::ToolCalls,
            (false, true) => FinishReason::Length,
            (false, false) => FinishReason::Stop,
        };
        let completion_tokens = u32::try_from(emitted + usize::from(script.has("count")))?;
        let reasoning_tokens = u32::try_from(reasoning.min(emitted))?;
        let usage = Usage { prompt_tokens, cached_tokens: 0, completion_tokens, reasoning_tokens };
        let pieces = if is_call { vec![call] } else { Vec::new() };
        self.send(&FromWorker::Done { id, pieces, runs: Vec::new(), reason, usage })
    }

    /// Does what the script asks for after so many tokens.
    fn misbehave(&self, script: &Script, emitted: usize, id: RequestId) -> anyhow::Result<()> {
        for (name, value) in &script.directives {
            let mut values = value.split(',');
            if values.next().and_then(|at| at.parse().ok()).unwrap_or(0) != emitted {
                continue;
            }
            match name.as_str() {
                "exit" => process::exit(values.next().unwrap_or("1").parse()?),
                "abort" => process::abort(),
                "hang" => sleep_forever(),
                "garbage" => self.send_bytes(&[9, 0, 0, 0, 255, 254, 253, 252, 251, 250, 249, 248, 247])?,
                "hello" => self.send(&FromWorker::Hello { version: PROTOCOL_VERSION, layers: Vec::new() })?,
                "progress" => {
                    self.send(&FromWorker::Progress { done: Bytes(0), total: Bytes(0), what: String::new() })?
                }
                "oom" => take_memory(),
                "long-frame" => self.send_bytes(&u32::MAX.to_le_bytes())?,
                "unknown-id" => {
                    self.send(&FromWorker::Failed { id: RequestId(id.0 + 1000), failure: Failure::Cancelled })?;
                }
                "flood" => loop {
                    let pieces = vec![Piece::Content("x".repeat(1000))];
                    let (logprobs, runs) = (Vec::new(), Vec::new());
                    self.send(&FromWorker::Delta { id, tokens: vec![7], pieces, logprobs, runs })?;
                },
                "logprob" => {
                    let (mut logprobs, runs) = logprobs(emitted, "x", 0);
                    logprobs[0].chosen.logprob = values.next().unwrap_or("nan").parse()?;
                    let pieces = vec![Piece::Content("x".into())];
                    self.send(&FromWorker::Delta { id, tokens: vec![7], pieces, logprobs, runs })?;
                }
                "close" => {
                    // Holds the main thread up at its next answer, where it would see the end and go.
                    let _turn = self.writing.lock().expect("no panics");
                    self.link.shutdown(std::net::Shutdown::Write)?;
                    sleep_forever();
                }
                "mute" => {
                    let _turn = self.writing.lock().expect("no panics");
                    sleep_forever();
                }
                _ => {}
            }
        }
        Ok(())
    }
}
