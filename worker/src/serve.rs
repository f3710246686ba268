//! `bulkhead-worker serve`: one incarnation, from the walls to the end of the link.
//!
//! Order: sandbox, `Hello`, `Load`, the model, threads, `Ready`; then this thread reads the link until it ends. The engine
//! and the intake have threads of their own. Pings are answered here, so a busy engine does not look dead, and with the
//! engine's progress, so a dead one does not look busy.

use std::collections::HashMap;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::limits::WORKER_REQUESTS_MAX;
use bulkhead_shared::message::{DeviceChoice, FromWorker, LoadPlan, PROTOCOL_VERSION, ToWorker, detail};
use bulkhead_shared::units::{Bytes, RequestId};
use crossbeam_channel::Sender;
use tracing::{error, info, warn};

use crate::engine::backend::Backend;
use crate::engine::faults::Faults;
use crate::engine::intake::{Arrival, Intake};
use crate::engine::{Engine, EngineError, EngineLimits, Status};
use crate::ipc::{self, Inbound, LinkError};
use crate::loader::{self, LoadError, Loaded, LoadedModel};
use crate::prepare::Prepared;
use crate::sandbox::{SandboxError, Sandboxed, Sealed};
use crate::text::chat::ChatFormat;
use crate::text::tokenizer::Tokenizer;
use crate::unforeseen;

/// The least time between two reports of a load's progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Why an incarnation ended other than in order.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A message that is illegal in the state.
    #[error("the supervisor sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// More requests at once than agreed.
    #[error("the supervisor sent more than {WORKER_REQUESTS_MAX} requests at once")]
    TooManyRequests,
    /// A plan for another device than the one that was named when the worker was started.
    #[error("the plan is for {planned:?}, and the worker was started for {started_for:?}")]
    OtherDevice {
        /// By the command line, before the walls.
        started_for: DeviceChoice,
        /// By the plan.
        planned: DeviceChoice,
    },
    /// A plan for another folder than the one that was named when the worker was started.
    #[error("the plan is for the model in {planned:?}, and the worker was started for {started_for:?}")]
    OtherModel {
        /// By the command line, before the walls.
        started_for: String,
        /// By the plan.
        planned: String,
    },
    /// A layer that was asked for is not in force.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The load.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A thread that the system refused.
    #[error("a thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl ServeError {
    /// Gives the exit code by which the supervisor tells the cause.
    #[must_use]
    pub fn exit(&self) -> WorkerExit {
        match self {
            ServeError::Link(_)
            | ServeError::OutOfTurn(_)
            | ServeError::TooManyRequests
            | ServeError::OtherDevice { .. }
            | ServeError::OtherModel { .. } => WorkerExit::Protocol,
            ServeError::Sandbox(_) => WorkerExit::SandboxIncomplete,
            ServeError::Load(error) => error.exit(),
            ServeError::Thread(_) => WorkerExit::OutOfHostMemory,
            ServeError::Engine(EngineError::NonFinite(_)) => WorkerExit::NonFinite,
            ServeError::Engine(EngineError::Device(error)) => error.exit(),
            ServeError::Engine(EngineError::Fault(_)) => WorkerExit::OutOfHostMemory,
        }
    }
}

/// A model with everything that requests need.
struct Model {
    backend: Backend,
    intake: Intake,
    sequences_max: usize,
    ready: FromWorker,
}

/// What the command line named, for which the walls were built.
#[derive(Clone, Copy, Debug)]
pub struct StartedFor<'a> {
    /// The device.
    pub device: DeviceChoice,
    /// The folder.
    pub model_dir: &'a str,
}

/// Serves a model until the supervisor closes the link. What could not be prepared is told where a load that failed is.
///
/// Blocking: for the life of the worker.
///
/// # Errors
/// Each names what ended the worker; `exit` gives its code.
pub fn run(
    sealed: Sealed,
    prepared: Result<Prepared, LoadError>,
    started_for: StartedFor<'_>,
) -> Result<(), ServeError> {
    let (mut inbound, outbound) = ipc::open(&sealed)?;
    for refused in sealed.refused() {
        warn!(%refused, "a wall is missing");
    }
    say(&outbound.outbox, FromWorker::Hello { version: PROTOCOL_VERSION, layers: sealed.layers().to_vec() });
    let proof = match sealed.demand() {
        Ok(proof) => proof,
        Err(error) => {
            outbound.flush();
            return Err(error.into());
        }
    };
    let plan = match inbound.read()? {
        Some(ToWorker::Load(plan)) => plan,
        Some(_) => return Err(ServeError::OutOfTurn("a message before Load")),
        None => return Ok(()),
    };
    check_plan(&plan, started_for)?;
    let prepared = prepared.map_err(ServeError::from);
    let model = match prepared.and_then(|prepared| load(&proof, prepared, &plan, &outbound.outbox)) {
        Ok(model) => model,
        Err(error) => {
            say(&outbound.outbox, FromWorker::LoadFailed { detail: detail(&error.to_string()) });
            outbound.flush();
            return Err(error);
        }
    };
    let faults = Faults::new(plan.faults);
    let outbox = outbound.outbox;
    Running::start(model, faults, &inbound, &outbox)?.read_until_end(&mut inbound, &outbox)
}

/// Checks that a plan is for what the worker was started for: its walls were built for that.
fn check_plan(plan: &LoadPlan, started_for: StartedFor<'_>) -> Result<(), ServeError> {
    if plan.device != started_for.device {
        return Err(ServeError::OtherDevice { started_for: started_for.device, planned: plan.device });
    }
    if plan.model_dir != started_for.model_dir {
        let (started_for, planned) = (started_for.model_dir.to_owned(), plan.model_dir.clone());
        return Err(ServeError::OtherModel { started_for, planned });
    }
    Ok(())
}

fn load(
    proof: &Sandboxed,
    prepared: Prepared,
    plan: &LoadPlan,
    outbox: &Sender<FromWorker>,
) -> Result<Model, ServeError> {
    let (mut reported, mut doing) = (None, String::new());
    let mut progress = |done: u64, total: u64, what: &str| {
        // Nothing done is the beginning of something else.
        let due = reported.is_none_or(|at: Instant| at.elapsed() >= PROGRESS_INTERVAL) || done == 0 || done == total;
        if due {
            reported = Some(Instant::now());
            what.clone_into(&mut doing);
            say(outbox, FromWorker::Progress { done: Bytes(done), total: Bytes(total), what: detail(what) });
        }
    };
    let LoadedModel { backend, tokenizer, chat, defaults, loaded } =
        match unforeseen::caught(|| loader::load(proof, prepared, plan, &mut progress)) {
            Ok(loaded) => loaded?,
            Err(panic) => return Err(LoadError::Panicked { what: doing, panic }.into()),
        };
    for what in &loaded.given_up {
        warn!(what, "the plan gave something up to fit memory");
    }
    if let ChatFormat::Broken { reason } = &chat {
        warn!(reason, "conversations are refused");
    }
    let Loaded { facts, sequences, given_up: _, phases: _ } = loaded;
    let memory: Vec<String> = facts.memory.iter().map(|(kind, bytes)| format!("{} {bytes}", kind.as_str())).collect();
    info!(device = facts.device, memory = memory.join(", "), "model planned");
    let intake = Intake {
        eos: defaults.eos.clone().into(),
        tokenizer: Arc::new(tokenizer),
        chat,
        defaults,
        context_tokens: facts.context_tokens,
        vocabulary: facts.vocabulary,
    };
    Ok(Model { backend, intake, sequences_max: sequences as usize, ready: FromWorker::Ready(facts) })
}

/// A worker that takes requests.
struct Running {
    /// Layers computed so far.
    progress: Arc<AtomicU64>,
    /// Counts what it has encoded.
    tokenizer: Arc<Tokenizer>,
    status: Arc<Status>,
    arrivals: Sender<Arrival>,
    /// The flag of each request that has not ended; one that only this map holds has.
    cancels: HashMap<RequestId, Arc<AtomicBool>>,
    /// Why the engine ended, if it did.
    engine_end: Arc<Mutex<Option<EngineError>>>,
}

impl Running {
    fn start(
        model: Model,
        faults: Faults,
        inbound: &Inbound,
        outbox: &Sender<FromWorker>,
    ) -> Result<Running, ServeError> {
        let (sequence_sender, sequences) = crossbeam_channel::bounded(WORKER_REQUESTS_MAX);
        let (arrivals, arrived) = crossbeam_channel::bounded(WORKER_REQUESTS_MAX);
        let (status, tokenizer) = (Arc::new(Status::default()), Arc::clone(&model.intake.tokenizer));
        model.intake.start(&arrived, &sequence_sender, outbox, &status).map_err(ServeError::Thread)?;
        let limits = EngineLimits { sequences_max: model.sequences_max, faults };
        let channels = (sequences, outbox.clone());
        let progress = model.backend.progress();
        let engine = Engine::new(model.backend, limits, Arc::clone(&status), channels);
        let engine_end = Arc::new(Mutex::new(None));
        let (end, closer) = (Arc::clone(&engine_end), inbound.closer()?);
        let run = move || {
            if let Err(error) = engine.run() {
                *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // Wakes the thread that reads the link; should this fail, the supervisor's watchdog ends the process.
                let _ = closer.shutdown(Shutdown::Read);
            }
        };
        std::thread::Builder::new().name("engine".into()).spawn(run).map_err(ServeError::Thread)?;
        say(outbox, model.ready);
        Ok(Running { progress, tokenizer, status, arrivals, cancels: HashMap::new(), engine_end })
    }

    fn read_until_end(mut self, inbound: &mut Inbound, outbox: &Sender<FromWorker>) -> Result<(), ServeError> {
        while let Some(message) = inbound.read()? {
            match message {
                ToWorker::Load(_) => return Err(ServeError::OutOfTurn("a second Load")),
                ToWorker::Generate(request) => self.generate(*request)?,
                ToWorker::Cancel { id } => {
                    if let Some(flag) = self.cancels.get(&id) {
                        flag.store(true, Ordering::Relaxed);
                    }
                }
                ToWorker::Ping { nonce } => say(outbox, self.pong(nonce)),
            }
        }
        match self.engine_end.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => Ok(()),
            Some(end) => {
                error!(%end, "the engine ended");
                Err(end.into())
            }
        }
    }

    fn generate(&mut self, request: bulkhead_shared::generate::Generate) -> Result<(), ServeError> {
        self.cancels.retain(|_, flag| Arc::strong_count(flag) > 1);
        let cancelled = Arc::new(AtomicBool::new(false));
        self.cancels.insert(request.id, Arc::clone(&cancelled));
        self.arrivals.try_send(Arrival { request, cancelled }).map_err(|_| ServeError::TooManyRequests)
    }

    fn pong(&self, nonce: u64) -> FromWorker {
        let Status { sequences, blocks_free, preparing, prepared } = &*self.status;
        let texts = prepared.load(Ordering::Relaxed) + self.tokenizer.chunks_encoded();
        FromWorker::Pong {
            nonce,
            progress: self.progress.load(Ordering::Relaxed) + texts,
            sequences: sequences.load(Ordering::Relaxed) + preparing.load(Ordering::Relaxed),
            blocks_free: blocks_free.load(Ordering::Relaxed),
        }
    }
}

/// Says something to the supervisor. A closed outbox means that the link is gone, which the reader notices.
fn say(outbox: &Sender<FromWorker>, message: FromWorker) {
    let _ = outbox.send(message);
}
