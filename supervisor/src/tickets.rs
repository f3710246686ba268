//! The shell around the queue: admits requests, hands them to the child, and carries its reports into the journals.
//!
//! Owns: every admitted request with its journal, from the ticket to its end. Refuses: HTTP, and the policy, which is
//! `queue`'s. Invariants: each admitted request gets exactly one end; dropping its ticket gives it up; when an
//! incarnation ends, what it was handed ends and what waits stays; nothing here waits for a client.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_shared::generate::Generate;
use bulkhead_shared::message::FromWorker;
use bulkhead_shared::units::RequestId;
use tokio::sync::{Notify, mpsc, watch};
use tracing::debug;

use crate::child::{Command, Report};
use crate::journal::{End, Journal};
use crate::queue::{Bounds, Full, Queue};

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The model was never ready.
    #[error("the model is being loaded")]
    Loading,
    /// No worker will come.
    #[error("the model cannot be served: {0}")]
    Unserved(String),
    /// The supervisor is ending.
    #[error("the server is shutting down")]
    Draining,
    /// A bound of the queue is reached.
    #[error(transparent)]
    Full(#[from] Full),
}

/// Whether requests are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Door {
    Loading,
    Open,
    Unserved(String),
    Draining,
}

/// All admitted requests.
#[derive(Debug)]
pub struct Tickets {
    state: Mutex<State>,
    wake: Notify,
    /// Requests that have not ended: zero lets a drain end.
    open: watch::Sender<usize>,
    timeout: Duration,
}

#[derive(Debug)]
struct State {
    door: Door,
    queue: Queue,
    requests: HashMap<RequestId, Request>,
    cancels: VecDeque<RequestId>,
    /// The incarnation that takes requests now.
    up: Option<u32>,
    last_id: u64,
}

#[derive(Debug)]
struct Request {
    generate: Generate,
    journal: Arc<Journal>,
    is_running: bool,
}

/// The handle on an admitted request. Dropping it cancels, unless the request has ended.
#[derive(Debug)]
pub struct Ticket {
    id: RequestId,
    journal: Arc<Journal>,
    tickets: Arc<Tickets>,
}

impl Ticket {
    /// Gives what the request has produced.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.tickets.give_up(self.id);
    }
}

impl Tickets {
    /// Begins with a closed door and no requests. `timeout` is the time from admission to the end of a request.
    #[must_use]
    pub fn new(bounds: Bounds, timeout: Duration) -> Arc<Tickets> {
        let state = State {
            door: Door::Loading,
            queue: Queue::new(bounds),
            requests: HashMap::new(),
            cancels: VecDeque::new(),
            up: None,
            last_id: 0,
        };
        Arc::new(Tickets { state: Mutex::new(state), wake: Notify::new(), open: watch::Sender::new(0), timeout })
    }

    /// Says whether a request would be taken now, as far as the state of the service goes.
    ///
    /// # Errors
    /// The `Refusal` that a request would meet.
    pub fn check_door(&self) -> Result<(), Refusal> {
        self.lock().check_door()
    }

    /// Admits a request of so many bytes; its id is set here.
    ///
    /// # Errors
    /// A `Refusal`; the request has left no trace then.
    pub fn admit(self: &Arc<Self>, mut generate: Generate, bytes: usize) -> Result<Ticket, Refusal> {
        let mut state = self.lock();
        state.check_door()?;
        let id = RequestId(state.last_id + 1);
        state.queue.admit(id, bytes, Instant::now() + self.timeout)?;
        state.last_id = id.0;
        generate.id = id;
        let journal = Arc::new(Journal::default());
        state.requests.insert(id, Request { generate, journal: journal.clone(), is_running: false });
        self.settle(state);
        Ok(Ticket { id, journal, tickets: self.clone() })
    }

    /// Counts the requests that run and that wait.
    #[must_use]
    pub fn lengths(&self) -> (usize, usize) {
        self.lock().queue.lengths()
    }

    /// Refuses new requests from now on, and ends those that wait: the worker they wait for will not come.
    pub fn drain(&self) {
        let mut state = self.lock();
        state.door = Door::Draining;
        if state.up.is_none() {
            state.end_waiting(&End::ShuttingDown);
        }
        self.settle(state);
    }

    /// Ends every request that is left.
    pub fn end_all(&self) {
        let mut state = self.lock();
        let ids: Vec<_> = state.requests.keys().copied().collect();
        ids.into_iter().for_each(|id| state.end(id, End::ShuttingDown));
        self.settle(state);
    }

    /// Waits until every admitted request has ended.
    pub async fn wait_until_idle(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        drop(self.open.subscribe().wait_for(|open| *open == 0).await);
    }

    /// Serves one child until its reports end.
    pub async fn run(self: Arc<Self>, commands: mpsc::Sender<Command>, mut reports: mpsc::Receiver<Report>) {
        loop {
            let (has_work, deadline) = {
                let state = self.lock();
                (state.has_work(), state.queue.next_deadline())
            };
            tokio::select! {
                report = reports.recv() => match report {
                    Some(report) => self.take_report(report),
                    None => return,
                },
                permit = commands.reserve(), if has_work => match permit {
                    Ok(permit) => if let Some(command) = self.next_command() { permit.send(command) },
                    // The child has ended; its last report is on the way.
                    Err(_) => self.lock().up = None,
                },
                () = self.wake.notified() => {}
                () = sleep_until(deadline) => self.expire(),
            }
        }
    }

    fn next_command(&self) -> Option<Command> {
        let mut state = self.lock();
        if let Some(id) = state.cancels.pop_front() {
            return Some(Command::Cancel(id));
        }
        let incarnation = state.up?;
        let id = state.queue.start_next()?;
        let request = state.requests.get_mut(&id).expect("what is queued is known");
        request.is_running = true;
        let generate = Box::new(request.generate.clone());
        Some(Command::Generate { incarnation, generate })
    }

    fn take_report(&self, report: Report) {
        let mut state = self.lock();
        match report {
            Report::Up { incarnation } => {
                state.up = Some(incarnation);
                if state.door != Door::Draining {
                    state.door = Door::Open;
                }
            }
            Report::Message(message) => state.take_message(message),
            Report::Unsendable(id) => state.end(id, End::Unsendable),
            Report::Down { incarnation, cause } => {
                state.up = None;
                state.cancels.clear();
                let lost: Vec<_> = state.requests.iter().filter(|(_, r)| r.is_running).map(|(id, _)| *id).collect();
                debug!(incarnation, requests = lost.len(), "requests are lost with their worker");
                lost.into_iter().for_each(|id| state.end(id, End::Lost(cause)));
                if state.door == Door::Draining {
                    state.end_waiting(&End::ShuttingDown);
                }
            }
            Report::Resting { reason, .. } => {
                if state.door != Door::Draining {
                    state.door = Door::Unserved(reason);
                }
                state.end_waiting(&End::Unserved);
            }
        }
        self.settle(state);
    }

    fn expire(&self) {
        let mut state = self.lock();
        for id in state.queue.expired(Instant::now()) {
            let Some(request) = state.requests.get(&id) else { continue };
            if request.is_running {
                state.cancels.push_back(id);
            }
            state.end(id, End::TimedOut);
        }
        self.settle(state);
    }

    fn give_up(&self, id: RequestId) {
        let mut state = self.lock();
        let Some(request) = state.requests.get(&id) else { return };
        if request.is_running {
            // It keeps its place until the worker confirms, so that a worker is never handed more than it may hold.
            state.cancels.push_back(id);
        } else {
            state.end(id, End::Failed(bulkhead_shared::message::Failure::Cancelled));
        }
        self.settle(state);
    }

    /// Publishes the number of open requests, lets go of the lock and wakes the loop.
    fn settle(&self, state: MutexGuard<'_, State>) {
        let open = state.requests.len();
        drop(state);
        self.open.send_if_modified(|known| std::mem::replace(known, open) != open);
        self.wake.notify_one();
    }

    /// A panic while the lock was held ended one request; the lists are changed whole or not at all.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check_door(&self) -> Result<(), Refusal> {
        match &self.door {
            Door::Open => Ok(()),
            Door::Loading => Err(Refusal::Loading),
            Door::Unserved(reason) => Err(Refusal::Unserved(reason.clone())),
            Door::Draining => Err(Refusal::Draining),
        }
    }

    fn has_work(&self) -> bool {
        let (running, waiting) = self.queue.lengths();
        !self.cancels.is_empty() || (self.up.is_some() && waiting > 0 && running < self.queue.bounds().running_max)
    }

    fn take_message(&mut self, message: FromWorker) {
        match message {
            FromWorker::Prompt { id, .. } => self.with_journal(id, Journal::accept),
            FromWorker::Delta { id, tokens, pieces } => self.with_journal(id, |journal| journal.add(&tokens, pieces)),
            FromWorker::Done { id, pieces, reason, usage } => {
                self.with_journal(id, |journal| journal.add(&[], pieces));
                self.end(id, End::Done { reason, usage });
            }
            FromWorker::Failed { id, failure } => self.end(id, End::Failed(failure)),
            FromWorker::Hello { .. }
            | FromWorker::Progress { .. }
            | FromWorker::Ready(_)
            | FromWorker::LoadFailed { .. }
            | FromWorker::Pong { .. } => {}
        }
    }

    fn with_journal(&self, id: RequestId, write: impl FnOnce(&Journal)) {
        if let Some(request) = self.requests.get(&id) {
            write(&request.journal);
        }
    }

    fn end(&mut self, id: RequestId, end: End) {
        self.queue.remove(id);
        if let Some(request) = self.requests.remove(&id) {
            debug!(request = id.0, tokens = request.journal.tokens(), ?end, "request ended");
            request.journal.end(end);
        }
    }

    fn end_waiting(&mut self, end: &End) {
        let waiting: Vec<_> = self.requests.iter().filter(|(_, r)| !r.is_running).map(|(id, _)| *id).collect();
        waiting.into_iter().for_each(|id| self.end(id, end.clone()));
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
