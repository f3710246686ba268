//! The worker seen from outside: one child, through all its incarnations.
//!
//! Owns: the process, its link, and the shell around the state machine of [`lifecycle`]. Refuses: HTTP, JSON, and the
//! order of requests, which is the queue's. Invariants: at most one process lives at a time; every process is reaped
//! before the next one starts; a worker that breaks the protocol is killed; nothing here waits for a client.

mod budget;
pub mod cgroup;
pub mod exit;
mod held;
mod incarnation;
pub mod lifecycle;
mod link;
pub mod oom;
pub mod protocol;
mod run;
mod rungs;
pub mod spawn;

use std::time::Instant;

use bulkhead_shared::generate::Generate;
use bulkhead_shared::layers::Layer;
use bulkhead_shared::message::{Facts, FromWorker, LoadPlan};
use bulkhead_shared::units::{Bytes, RequestId};
use tokio::sync::{mpsc, watch};

use crate::limits::CHILD_MESSAGES_MAX;
use exit::Cause;
use lifecycle::{Settings, State};
use oom::Source;
use spawn::Spawner;

/// What a child is told.
#[derive(Debug)]
pub enum Command {
    /// Hand over a request.
    Generate {
        /// The incarnation that it is meant for; another one never sees it.
        incarnation: u32,
        /// The request, with the tokens that it has already.
        generate: Box<Generate>,
        /// What those tokens made.
        so_far: SoFar,
    },
    /// Give up a request.
    Cancel(RequestId),
    /// The last deaths were one request's doing, and it is gone: the next worker need not wait for them.
    Absolved,
}

/// What the tokens made that a request has from earlier workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoFar {
    /// Bytes of text.
    pub text_bytes: usize,
    /// Tokens whose log-probabilities wait for their text to be content.
    pub logprobs_waiting: usize,
}

/// What people want of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// A worker, where none is and none will come.
    Start,
    /// No worker.
    Stop,
    /// Another worker.
    Restart,
    /// No worker, and then no child.
    End,
}

/// What a child tells the queue.
#[derive(Debug)]
pub enum Report {
    /// A process was started.
    Started {
        /// Which incarnation.
        incarnation: u32,
        /// Why the one before it ended; `None` for the first.
        after: Option<Cause>,
    },
    /// The worker takes requests.
    Up {
        /// Which incarnation.
        incarnation: u32,
    },
    /// A checked message about a request: `Prompt`, `Delta`, `Done` or `Failed`.
    Message(FromWorker),
    /// The request cannot be put into a frame.
    Unsendable(RequestId),
    /// The incarnation ended: it says nothing more of the requests that it was handed.
    Down {
        /// Which one.
        incarnation: u32,
        /// Why.
        cause: Cause,
    },
    /// The child rests and will not come back by itself.
    Resting {
        /// `Stopped`, `Exited` or `Fatal`.
        state: State,
        /// Why, for people.
        reason: String,
    },
}

/// What is known about a child now.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// Which incarnation this is; 0 before the first.
    pub incarnation: u32,
    /// The process, while there is one.
    pub pid: Option<u32>,
    /// What was loaded, while it is.
    pub facts: Option<Facts>,
    /// The isolation in force.
    pub layers: Vec<Layer>,
    /// How far the load is, while there is one.
    pub progress: Option<Progress>,
    /// By what a kill of the kernel's for want of memory is told, while there is a process.
    pub oom_source: Option<Source>,
    /// How the last incarnation ended, for people.
    pub last_end: Option<String>,
    /// Blocks of KV cache that are free, by the last sign of life.
    pub blocks_free: u32,
    /// When the running worker last moved.
    pub moved: Option<Instant>,
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What has been done.
    pub done: Bytes,
    /// What there is to do.
    pub total: Bytes,
    /// What is being done, for people.
    pub what: String,
}

impl Status {
    fn new(now: Instant) -> Status {
        Status {
            state: State::Stopped,
            since: now,
            incarnation: 0,
            pid: None,
            facts: None,
            layers: Vec::new(),
            progress: None,
            oom_source: None,
            last_end: None,
            blocks_free: 0,
            moved: None,
        }
    }

    /// Counts the incarnations after the first.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.incarnation.saturating_sub(1)
    }
}

/// The queue's end of a child.
#[derive(Debug)]
pub struct Child {
    /// Commands, in order. Bounded: reserve before sending.
    pub commands: mpsc::Sender<Command>,
    /// Reports, in order. They must be taken at all times: the child waits when they are not.
    pub reports: mpsc::Receiver<Report>,
    /// What is known now.
    pub status: watch::Receiver<Status>,
    /// What people want. After `End` the child ends its worker and then itself, with a last report.
    pub controls: mpsc::Sender<Control>,
}

/// Starts a child and its first incarnation.
#[must_use]
pub fn start(spawner: Spawner, plan: LoadPlan, settings: Settings) -> Child {
    let (command_sender, commands) = mpsc::channel(CHILD_MESSAGES_MAX);
    let (reports, report_receiver) = mpsc::channel(CHILD_MESSAGES_MAX);
    let (status_sender, status) = watch::channel(Status::new(Instant::now()));
    let (control_sender, controls) = mpsc::channel(CHILD_MESSAGES_MAX);
    let ends = run::Ends { commands, reports, status: status_sender, controls };
    tokio::spawn(run::Runner::new(spawner, plan, settings, ends).run());
    Child { commands: command_sender, reports: report_receiver, status, controls: control_sender }
}
