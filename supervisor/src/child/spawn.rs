//! Starts worker processes, from one thread that lives as long as the supervisor.
//!
//! Owns: the thread, what may be held on a card, the command line, the descriptors, the control group and the environment that
//! a worker gets, and its standard error.
//! The thread matters: a worker asks to be killed when its parent ends, and for the kernel the parent is the *thread*
//! that spawned it. Invariants: a worker inherits nothing but its end of the link (as standard input) and the pipe of
//! its standard error; its environment is empty.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use bulkhead_shared::units::Bytes;
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::budget::Budget;
use super::cgroup::Leaf;
use super::exit::{Cause, KillReason};
use crate::device::{Answer, Decision, Devices, Refused};
use crate::limits::{STDERR_LINE_BYTES_MAX, STDERR_LINES_PER_SECOND_MAX};
use crate::logging::printable;
use crate::nvml::Sample;
use crate::unix;

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No socket pair could be made.
    #[error("cannot make the link for a worker: {0}")]
    Link(#[source] io::Error),
    /// The kernel refused to start the program.
    #[error("cannot start {}: {source}", worker.display())]
    Program {
        /// The worker's executable.
        worker: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The device that was asked for cannot be used.
    #[error(transparent)]
    Device(#[from] Refused),
    /// The thread that starts workers has ended, which only happens when the supervisor ends.
    #[error("the supervisor is ending")]
    Ending,
}

/// A started process and the supervisor's end of its link.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) stream: UnixStream,
    /// Where it is to compute.
    pub(crate) device: DeviceChoice,
    /// What it may hold there; 0 on the processor.
    pub(crate) device_budget: Bytes,
    /// The control group that it is in alone.
    pub(crate) leaf: Option<Arc<Leaf>>,
}

/// What workers get of this machine.
#[derive(Clone, Debug)]
pub struct Host {
    /// What one may hold on a card; 0 is a share of it.
    pub device_memory: Bytes,
    /// What one may hold of the host's memory, where there is a bound beside its plan.
    pub memory: Option<Bytes>,
    /// The control group for them, one after the other, where there is one.
    pub leaf: Option<Arc<Leaf>>,
}

/// What a worker must know before it hears anything, for its walls are built by it. The plan repeats the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Startup {
    /// The model's folder, the only one that it may read.
    pub model_dir: String,
    /// Threads that compute, all of which it starts before its last wall; 0 lets it count.
    pub threads: u32,
    /// The instructions that they compute with.
    pub cpu: CpuChoice,
    /// How much isolation it must have.
    pub sandbox: SandboxMode,
    /// The least interface of Landlock that is enough.
    pub landlock_abi_min: u32,
}

/// What the thread is asked to start.
#[derive(Debug)]
struct Order {
    decision: Arc<Decision>,
    startup: Arc<Startup>,
    reply: oneshot::Sender<Result<(Child, UnixStream), SpawnError>>,
}

/// What must be known from one worker to the next.
#[derive(Debug)]
struct History {
    budget: Budget,
    started: Instant,
}

/// The handle on the thread that starts workers.
#[derive(Clone, Debug)]
pub struct Spawner {
    orders: mpsc::Sender<Order>,
    devices: Devices,
    startup: Arc<Startup>,
    host: Host,
    history: Arc<Mutex<History>>,
}

impl Spawner {
    /// Starts the thread. It ends when the last handle is dropped; keep one until the process ends.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(devices: Devices, host: Host, startup: Startup) -> io::Result<Spawner> {
        let (orders, mut received) = mpsc::channel::<Order>(1);
        let runtime = tokio::runtime::Handle::current();
        thread::Builder::new().name("spawner".into()).spawn(move || {
            let _guard = runtime.enter();
            while let Some(Order { decision, startup, reply }) = received.blocking_recv() {
                // Whoever asked may have gone; the process then ends when its handle is dropped.
                drop(reply.send(spawn(&decision, &startup)));
            }
        })?;
        let history = History { budget: Budget::new(host.device_memory), started: Instant::now() };
        Ok(Spawner { orders, devices, startup: Arc::new(startup), host, history: Arc::new(Mutex::new(history)) })
    }

    /// Starts a worker, once it is known where it computes and the memory of the one before it has been given back.
    pub(crate) async fn spawn(&self, incarnation: u32) -> Result<Spawned, SpawnError> {
        let decision = match self.devices.answer().await {
            Answer::Decided(decision) => decision,
            Answer::Refused(refused) => return Err(refused.into()),
            Answer::Open | Answer::Dropped => return Err(SpawnError::Ending),
        };
        self.devices.memory.wait_until_free().await;
        let (reply, answer) = oneshot::channel();
        let order = Order { decision: decision.clone(), startup: self.startup.clone(), reply };
        self.orders.send(order).await.map_err(|_| SpawnError::Ending)?;
        let (mut child, stream) = answer.await.map_err(|_| SpawnError::Ending)??;
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(carry_lines(stderr, incarnation));
        }
        if let (Some(pid), Some(_)) = (child.id(), &decision.card) {
            self.devices.memory.worker_started(pid);
        }
        let leaf = child.id().and_then(|pid| self.take_in(pid));
        Ok(Spawned { child, stream, device: decision.device, device_budget: self.budget(&decision), leaf })
    }

    /// Moves a worker into the control group for workers; it has taken next to no memory yet.
    fn take_in(&self, pid: u32) -> Option<Arc<Leaf>> {
        let leaf = self.host.leaf.clone()?;
        match leaf.take_in(pid) {
            Ok(()) => Some(leaf),
            Err(error) => {
                warn!(pid, %error, "worker does not get into its control group");
                None
            }
        }
    }

    /// Gives what a worker may hold of the host's memory, where there is a bound beside its plan.
    pub(crate) fn host_memory(&self) -> Option<Bytes> {
        self.host.memory
    }

    /// Says how much isolation a worker must have.
    pub(crate) fn sandbox(&self) -> SandboxMode {
        self.startup.sandbox
    }

    /// Gives what the worker that was just started may hold on its card.
    fn budget(&self, decision: &Decision) -> Bytes {
        let Some(card) = &decision.card else { return Bytes(0) };
        let mut history = self.history();
        history.started = Instant::now();
        let budget = history.budget.of_card(Bytes(card.memory_bytes));
        if history.budget.is_reduced() {
            warn!(%budget, "the worker gets less of the card: the last one found too little memory there");
        }
        budget
    }

    /// Takes note of the end of a worker, and judges it anew where its card is found to be gone.
    pub(crate) fn ended(&self, cause: Cause) -> Cause {
        let mut history = self.history();
        let lived = history.started.elapsed();
        history.budget.ended(cause, lived);
        drop(history);
        judge(cause, &self.devices.memory.sample())
    }

    /// A thread that panicked left nothing half done: each critical section only replaces whole values.
    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a card that is gone by what NVML shows, where the worker could not say it.
fn judge(cause: Cause, sample: &Sample) -> Cause {
    let is_own = matches!(
        cause,
        Cause::Exit(WorkerExit::Orderly)
            | Cause::Killed(KillReason::Protocol | KillReason::Version | KillReason::Sandbox | KillReason::StopTimeout)
    );
    if *sample == Sample::Lost && !is_own { Cause::Exit(WorkerExit::DeviceLost) } else { cause }
}

fn spawn(decision: &Decision, startup: &Startup) -> Result<(Child, UnixStream), SpawnError> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(SpawnError::Link)?;
    // Where the kernel cannot, it closes what comes along, since the link is read with plain reads.
    let _ = unix::refuse_descriptors(&ours);
    ours.set_nonblocking(true).map_err(SpawnError::Link)?;
    let stream = UnixStream::from_std(ours).map_err(SpawnError::Link)?;
    let worker = &decision.program;
    let mut command = Command::new(worker);
    command.args(["serve", "--model", &startup.model_dir]);
    command.args(["--sandbox", startup.sandbox.as_str()]);
    command.args(["--supervisor", &std::process::id().to_string()]);
    command.args(["--threads", &startup.threads.to_string()]);
    command.args(["--cpu", startup.cpu.as_str()]);
    command.args(["--landlock-abi-min", &startup.landlock_abi_min.to_string()]);
    if decision.card.is_some() {
        command.args(["--device", &decision.to_string()]);
    }
    let child = command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| SpawnError::Program { worker: worker.clone(), source })?;
    Ok((child, stream))
}

/// Carries a worker's standard error into the log, line by line; a flood is counted instead.
async fn carry_lines(stderr: ChildStderr, incarnation: u32) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    let mut allowance = Allowance::new(Instant::now());
    loop {
        // One byte at a time out of the buffer: a line may be cut at its limit and goes on as the next one.
        match stderr.read_u8().await {
            Ok(b'\n') => {}
            Ok(byte) => {
                line.push(byte);
                if line.len() < STDERR_LINE_BYTES_MAX {
                    continue;
                }
            }
            Err(_) if line.is_empty() => return,
            Err(_) => {}
        }
        if let Some(dropped) = allowance.renew(Instant::now()) {
            warn!(incarnation, lines = dropped, "worker wrote too much: lines were left out");
        }
        if allowance.take() {
            info!(incarnation, line = %printable(&String::from_utf8_lossy(&line)), "worker says");
        }
        line.clear();
    }
}

/// How many lines may still be logged in this second.
struct Allowance {
    since: Instant,
    taken: u32,
}

impl Allowance {
    fn new(now: Instant) -> Allowance {
        Allowance { since: now, taken: 0 }
    }

    fn take(&mut self) -> bool {
        self.taken = self.taken.saturating_add(1);
        self.taken <= STDERR_LINES_PER_SECOND_MAX
    }

    /// Begins a new second when the last one is over; gives the number of lines that it left out, if any.
    fn renew(&mut self, now: Instant) -> Option<u32> {
        if now.duration_since(self.since) < Duration::from_secs(1) {
            return None;
        }
        let dropped = self.taken.saturating_sub(STDERR_LINES_PER_SECOND_MAX);
        *self = Allowance::new(now);
        (dropped > 0).then_some(dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::Memory;

    #[test]
    fn a_lost_card_is_the_cause_whatever_the_worker_died_of() {
        const LOST: Cause = Cause::Exit(WorkerExit::DeviceLost);
        for (cause, sample, expected) in [
            (Cause::Crash { code: 101 }, Sample::Lost, LOST),
            (Cause::Exit(WorkerExit::DriverPoisoned), Sample::Lost, LOST),
            (Cause::Killed(KillReason::Hang), Sample::Lost, LOST),
            (Cause::Killed(KillReason::StopTimeout), Sample::Lost, Cause::Killed(KillReason::StopTimeout)),
            (Cause::Exit(WorkerExit::Orderly), Sample::Lost, Cause::Exit(WorkerExit::Orderly)),
            (Cause::KilledFromOutside, Sample::Unknown, Cause::KilledFromOutside),
            (Cause::KilledFromOutside, Sample::Memory(Memory::default()), Cause::KilledFromOutside),
        ] {
            assert_eq!(judge(cause, &sample), expected, "{cause} {sample:?}");
        }
    }

    #[test]
    fn a_flood_of_lines_is_counted() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        let taken = (0..STDERR_LINES_PER_SECOND_MAX + 7).filter(|_| allowance.take()).count();
        assert_eq!(taken, STDERR_LINES_PER_SECOND_MAX as usize);
        assert_eq!(allowance.renew(start), None);
        assert_eq!(allowance.renew(start + Duration::from_secs(1)), Some(7));
        assert!(allowance.take());
    }
}
