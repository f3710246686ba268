//! Every admitted request and what becomes of it: where the policies of the queue and of blame meet the journals.
//!
//! No I/O and no waiting: reports come in, commands go out. Invariants: a request that stands here has its place in the
//! queue; a worker is handed nothing while a suspect runs alone; what a dead worker was handed waits again, unless nobody
//! waits for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bulkhead_shared::generate::Generate;
use bulkhead_shared::message::{Failure, FromWorker};
use bulkhead_shared::units::RequestId;
use tracing::{debug, info, warn};

use super::{Listed, Refusal};
use crate::blame::Blame;
use crate::child::exit::Cause;
use crate::child::{Command, Report};
use crate::journal::{End, Journal, Made};
use crate::limits::UNREAD_BYTES_MAX;
use crate::metrics::Metrics;
use crate::queue::{Bounds, Place, Queue};

/// Whether requests are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Door {
    Loading,
    Open,
    Unserved(String),
    /// Closed until the worker has been stopped, or is wanted again and this is so again.
    Stopping(Box<Door>),
    Draining,
}

#[derive(Debug)]
pub(super) struct Book {
    door: Door,
    queue: Queue,
    blame: Blame,
    requests: HashMap<RequestId, Entry>,
    /// What the child is to be told, beside new requests.
    orders: VecDeque<Command>,
    /// The incarnation that takes requests now.
    up: Option<u32>,
    /// The last one that did.
    last_up: u32,
    last_id: u64,
    last_turn: u64,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Entry {
    generate: Generate,
    journal: Arc<Journal>,
    standing: Standing,
    admitted: Instant,
    was_handed: bool,
    /// When the worker that has it accepted its prompt, as a number that rises.
    turn: Option<u64>,
    /// When the last token came.
    token: Option<Instant>,
}

/// What becomes of a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It waits for a worker.
    Waiting,
    /// A worker has it.
    Running,
    /// It has its end. It keeps its place until the worker confirms, so that a worker is never handed more than it may
    /// hold, and so that it is known as a suspect when it kills the worker on its way out.
    Leaving,
    /// The worker was asked to let go of it, so that another one can run alone.
    Parking,
    /// The worker was asked to let go of it, because its reader is far behind.
    Holding,
    /// It waits for its reader.
    Held,
}

impl Standing {
    const fn as_str(self) -> &'static str {
        match self {
            Standing::Waiting => "waiting",
            Standing::Running => "running",
            Standing::Leaving => "leaving",
            Standing::Parking => "parking",
            Standing::Holding => "holding",
            Standing::Held => "held",
        }
    }

    /// Says whether a worker knows of the request.
    const fn is_handed(self) -> bool {
        match self {
            Standing::Running | Standing::Leaving | Standing::Parking | Standing::Holding => true,
            Standing::Waiting | Standing::Held => false,
        }
    }
}

impl Book {
    pub(super) fn new(bounds: Bounds, metrics: Arc<Metrics>) -> Book {
        Book {
            door: Door::Loading,
            queue: Queue::new(bounds),
            blame: Blame::default(),
            requests: HashMap::new(),
            orders: VecDeque::new(),
            up: None,
            last_up: 0,
            last_id: 0,
            last_turn: 0,
            metrics,
        }
    }

    pub(super) fn check_door(&self) -> Result<(), Refusal> {
        match &self.door {
            Door::Open => Ok(()),
            Door::Loading => Err(Refusal::Loading),
            Door::Unserved(reason) => Err(Refusal::Unserved(reason.clone())),
            Door::Stopping(_) => Err(Refusal::Stopping),
            Door::Draining => Err(Refusal::Draining),
        }
    }

    pub(super) fn admit(
        &mut self,
        mut generate: Generate,
        place: Place,
        now: Instant,
    ) -> Result<(RequestId, Arc<Journal>), Refusal> {
        self.check_door()?;
        let id = RequestId(self.last_id + 1);
        if let Err(full) = self.queue.admit(id, place) {
            return Err(Refusal::Full { full, retry_after: self.queue.retry_after(now) });
        }
        self.last_id = id.0;
        generate.id = id;
        let journal = Arc::new(Journal::default());
        let entry = Entry {
            generate,
            journal: journal.clone(),
            standing: Standing::Waiting,
            admitted: now,
            was_handed: false,
            turn: None,
            token: None,
        };
        self.requests.insert(id, entry);
        Ok((id, journal))
    }

    pub(super) fn last_up(&self) -> u32 {
        self.last_up
    }

    pub(super) fn open(&self) -> usize {
        self.requests.len()
    }

    pub(super) fn lengths(&self) -> (usize, usize) {
        self.queue.lengths()
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.queue.next_deadline()
    }

    pub(super) fn list(&self, now: Instant) -> Vec<Listed> {
        let listed = |(id, entry): (&RequestId, &Entry)| Listed {
            id: *id,
            standing: entry.standing.as_str(),
            tokens: entry.journal.tokens(),
            age: now.saturating_duration_since(entry.admitted),
        };
        let mut list: Vec<_> = self.requests.iter().map(listed).collect();
        list.sort_unstable_by_key(|listed| listed.id);
        list
    }

    pub(super) fn drain(&mut self) {
        self.door = Door::Draining;
    }

    /// Takes no more requests until the worker has been stopped. False where the supervisor is ending.
    pub(super) fn stop(&mut self) -> bool {
        match &self.door {
            Door::Draining => return false,
            Door::Stopping(_) => {}
            before @ (Door::Loading | Door::Open | Door::Unserved(_)) => {
                self.door = Door::Stopping(Box::new(before.clone()));
            }
        }
        true
    }

    /// Takes requests again, if they were refused because the worker was to be stopped: true for that.
    pub(super) fn stop_not(&mut self) -> bool {
        let Door::Stopping(before) = &self.door else { return false };
        self.door = Door::clone(before);
        true
    }

    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.door, Door::Stopping(_))
    }

    pub(super) fn end_all(&mut self) {
        let ids: Vec<_> = self.requests.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id, End::ShuttingDown));
    }

    pub(super) fn no_child(&mut self) {
        self.up = None;
        self.orders.clear();
    }

    pub(super) fn has_work(&self) -> bool {
        !self.orders.is_empty() || self.can_start()
    }

    fn can_start(&self) -> bool {
        let (running, waiting) = self.queue.lengths();
        let has_room = match self.blame.next_alone() {
            Some(alone) => running == 0 && self.stands(alone, Standing::Waiting),
            None => running < self.queue.bounds().running_max,
        };
        self.up.is_some() && waiting > 0 && has_room
    }

    pub(super) fn next_command(&mut self, now: Instant) -> Option<Command> {
        if let Some(order) = self.orders.pop_front() {
            return Some(order);
        }
        let incarnation = self.up.filter(|_| self.can_start())?;
        let id = match self.blame.next_alone() {
            Some(alone) => self.queue.start(alone)?,
            None => self.queue.start_next()?,
        };
        let entry = self.requests.get_mut(&id).expect("what is queued is known");
        entry.standing = Standing::Running;
        entry.turn = None;
        if !std::mem::replace(&mut entry.was_handed, true) {
            self.metrics.counts().queued.add(now.saturating_duration_since(entry.admitted), 1);
        }
        let (resume, so_far) = entry.journal.so_far();
        if !resume.is_empty() {
            self.metrics.counts().resumes += 1;
            debug!(incarnation, request = id.0, tokens = resume.len(), "request is resumed");
        }
        let generate = Box::new(Generate { resume, ..entry.generate.clone() });
        Some(Command::Generate { incarnation, generate, so_far })
    }

    pub(super) fn take_report(&mut self, report: Report) {
        match report {
            Report::Started { after: None, .. } => {}
            Report::Started { after: Some(cause), .. } => self.metrics.counts().restart(cause.label()),
            Report::Up { incarnation } => {
                (self.up, self.last_up) = (Some(incarnation), incarnation);
                match &mut self.door {
                    Door::Draining => {}
                    Door::Stopping(before) => **before = Door::Open,
                    door @ (Door::Loading | Door::Open | Door::Unserved(_)) => *door = Door::Open,
                }
            }
            Report::Message(message) => self.take_message(message),
            Report::Unsendable(id) => self.end(id, End::Unsendable),
            Report::Down { incarnation, cause } => self.take_death(incarnation, cause),
            Report::Resting { reason, .. } => {
                let end = if self.door == Door::Draining { End::ShuttingDown } else { End::Unserved };
                if self.door != Door::Draining {
                    self.door = Door::Unserved(reason);
                }
                let ids: Vec<_> = self.requests.keys().copied().collect();
                ids.into_iter().for_each(|id| self.end(id, end.clone()));
            }
        }
    }

    /// Takes back what a dead worker had been handed, and judges whether it was one of those.
    fn take_death(&mut self, incarnation: u32, cause: Cause) {
        self.no_child();
        let handed = self.with_standing(Standing::is_handed);
        if cause.blames()
            && let Some(culprit) = self.blame.death(&self.suspects(&handed))
        {
            warn!(incarnation, request = culprit.0, %cause, "request ends its workers and is set aside");
            self.metrics.counts().quarantines += 1;
            self.leave(culprit, End::Quarantined(cause));
            // The cause of the deaths is gone: nobody else has to wait for them.
            self.orders.push_back(Command::Absolved);
        }
        let mut waiting_again = 0;
        for id in handed {
            let Some(entry) = self.requests.get_mut(&id) else { continue };
            if entry.standing == Standing::Leaving {
                self.remove(id);
            } else {
                entry.standing = Standing::Waiting;
                self.queue.give_back(id);
                waiting_again += 1;
            }
        }
        info!(incarnation, requests = waiting_again, "requests wait for the next worker");
    }

    /// Gives those that the worker was at work on: whose prompt it had not accepted yet, and the first of the others, as
    /// many as it computes at once.
    fn suspects(&self, handed: &[RequestId]) -> Vec<RequestId> {
        let turn = |id: &RequestId| self.requests.get(id).and_then(|entry| entry.turn);
        let mut accepted: Vec<_> = handed.iter().filter_map(|id| Some((turn(id)?, *id))).collect();
        accepted.sort_unstable();
        let computed = accepted.into_iter().take(self.queue.bounds().step_max).map(|(_, id)| id);
        computed.chain(handed.iter().filter(|id| turn(id).is_none()).copied()).collect()
    }

    fn with_standing(&self, is_meant: impl Fn(Standing) -> bool) -> Vec<RequestId> {
        self.requests.iter().filter(|(_, entry)| is_meant(entry.standing)).map(|(id, _)| *id).collect()
    }

    fn take_message(&mut self, message: FromWorker) {
        match message {
            FromWorker::Prompt { id, tokens, cached } => {
                let Some(entry) = self.requests.get_mut(&id) else { return };
                self.last_turn += 1;
                entry.turn = Some(self.last_turn);
                if entry.journal.accept(cached) {
                    self.metrics.counts().prompt_tokens += u64::from(tokens);
                }
            }
            FromWorker::Delta { id, tokens, pieces, logprobs, runs } => {
                if let Some(entry) = self.requests.get_mut(&id) {
                    let count = tokens.len();
                    entry.journal.add(Made { tokens, pieces, logprobs, runs });
                    entry.count_tokens(&self.metrics, count, Instant::now());
                    if entry.standing == Standing::Running && entry.journal.unread_bytes() > UNREAD_BYTES_MAX {
                        entry.standing = Standing::Holding;
                        self.orders.push_back(Command::Cancel(id));
                    }
                    self.gained(id);
                }
            }
            FromWorker::Done { id, pieces, runs, reason, usage } => {
                if let Some(entry) = self.requests.get(&id) {
                    entry.journal.add(Made { pieces, runs, ..Made::default() });
                }
                self.end(id, End::Done { reason, usage });
            }
            FromWorker::Failed { id, failure: Failure::Cancelled } => self.let_go(id),
            FromWorker::Failed { id, failure } => self.end(id, End::Failed(failure)),
            FromWorker::Hello { .. }
            | FromWorker::Progress { .. }
            | FromWorker::Ready(_)
            | FromWorker::LoadFailed { .. }
            | FromWorker::Pong { .. } => {}
        }
    }

    /// Notes that a request gained a token. Where another one has to run alone, this one makes room.
    fn gained(&mut self, id: RequestId) {
        self.blame.gained(id);
        if self.blame.next_alone().is_some() {
            for id in self.with_standing(|standing| standing == Standing::Running) {
                self.orders.push_back(Command::Cancel(id));
                self.stand(id, Standing::Parking);
            }
        }
    }

    /// The worker has let go of a request.
    fn let_go(&mut self, id: RequestId) {
        match self.requests.get(&id).map(|entry| entry.standing) {
            Some(Standing::Parking) => {
                self.stand(id, Standing::Waiting);
                self.queue.give_back(id);
            }
            Some(Standing::Holding) => self.hold(id),
            Some(Standing::Running | Standing::Leaving | Standing::Waiting | Standing::Held) => {
                self.end(id, End::Failed(Failure::Cancelled));
            }
            None => {}
        }
    }

    /// Lets a request wait for its reader, unless that has caught up meanwhile. The reader looks at the mark behind each
    /// look at the text, and here it is the other way round, so one of the two sees the other.
    fn hold(&mut self, id: RequestId) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        entry.journal.set_held(true);
        entry.standing = Standing::Held;
        self.queue.hold(id);
        debug!(incarnation = self.up, request = id.0, "request waits for its reader");
        if entry.journal.unread_bytes() <= UNREAD_BYTES_MAX / 2 {
            self.release(id);
        }
    }

    /// The reader of a request has caught up.
    pub(super) fn release(&mut self, id: RequestId) {
        let Some(entry) = self.requests.get_mut(&id) else { return };
        entry.journal.set_held(false);
        if entry.standing == Standing::Held {
            entry.standing = Standing::Waiting;
            self.queue.give_back(id);
        }
    }

    fn stands(&self, id: RequestId, standing: Standing) -> bool {
        self.requests.get(&id).is_some_and(|entry| entry.standing == standing)
    }

    fn stand(&mut self, id: RequestId, standing: Standing) {
        if let Some(entry) = self.requests.get_mut(&id) {
            entry.standing = standing;
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        for id in self.queue.expired(now) {
            self.leave(id, End::TimedOut);
        }
    }

    /// Ends a request by the supervisor's own decision. One that a worker has leaves when that confirms. False where there
    /// is none to end.
    pub(super) fn leave(&mut self, id: RequestId, end: End) -> bool {
        match self.requests.get(&id).map(|entry| entry.standing) {
            Some(Standing::Waiting | Standing::Held) => self.end(id, end),
            Some(standing @ (Standing::Running | Standing::Parking | Standing::Holding)) => {
                if standing == Standing::Running {
                    self.orders.push_back(Command::Cancel(id));
                }
                self.finish(id, end);
                self.stand(id, Standing::Leaving);
                self.queue.lift_deadline(id);
            }
            Some(Standing::Leaving) | None => return false,
        }
        true
    }

    /// Gives a request its end and forgets it.
    fn end(&mut self, id: RequestId, end: End) {
        if self.requests.get(&id).is_some_and(|entry| entry.standing != Standing::Leaving) {
            self.finish(id, end);
        }
        self.remove(id);
    }

    fn remove(&mut self, id: RequestId) {
        self.queue.remove(id, Instant::now());
        self.blame.forget(id);
        self.requests.remove(&id);
    }

    fn finish(&mut self, id: RequestId, end: End) {
        let Some(entry) = self.requests.get(&id) else { return };
        debug!(incarnation = self.up, request = id.0, tokens = entry.journal.tokens(), ?end, "request ended");
        let mut counts = self.metrics.counts();
        counts.whole.add(entry.admitted.elapsed(), 1);
        if let End::Done { reason, .. } = &end {
            counts.success(*reason);
        } else {
            counts.failure(end.label());
        }
        drop(counts);
        entry.journal.end(end);
    }
}

impl Entry {
    fn count_tokens(&mut self, metrics: &Metrics, tokens: usize, now: Instant) {
        if self.standing == Standing::Leaving {
            return;
        }
        let mut counts = metrics.counts();
        let tokens = tokens as u64;
        counts.generation_tokens += tokens;
        match self.token.replace(now) {
            None => counts.first_token.add(now.saturating_duration_since(self.admitted), 1),
            Some(last) => {
                let each = now.saturating_duration_since(last) / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
                counts.inter_token.add(each, tokens);
            }
        }
    }
}
