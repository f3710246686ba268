//! The shell around the state machine: waits, asks it, and does what it says.
//!
//! Invariants: the process of an incarnation is reaped and its link is read to the end before its end is reported, so
//! that no token it sent is lost; after a kill nothing more is believed; commands are taken only while the link has room.

use std::io;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::generate::{Generate, Prompt, Sampling};
use bulkhead_shared::layers::Layer;
use bulkhead_shared::message::{DeviceChoice, FromWorker, LoadPlan, ToWorker};
use bulkhead_shared::units::RequestId;
use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior};
use tracing::{debug, error, info, warn};

use super::exit::{Cause, KillReason};
use super::held;
use super::incarnation::{self, Incarnation};
use super::lifecycle::{Action, Event, Lifecycle, Settings, State};
use super::link::LinkError;
use super::oom::Kills;
use super::protocol::Violation;
use super::rungs::Rung;
use super::spawn::Spawner;
use super::{Command, Control, Progress, Report, SoFar, Status};
use crate::limits::{PING_INTERVAL, STOP_TIMEOUT};
use crate::logging::printable;
use crate::random;

/// The request that a freshly loaded model has to answer with one token. The queue counts its ids from 1.
const CANARY: RequestId = RequestId(0);

/// The child's ends of the channels of [`super::Child`].
pub(super) struct Ends {
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) status: watch::Sender<Status>,
    pub(super) controls: mpsc::Receiver<Control>,
}

/// One child.
pub(super) struct Runner {
    spawner: Spawner,
    /// What was configured.
    plan: LoadPlan,
    /// What the next worker gets of it.
    rung: Rung,
    life: Lifecycle,
    ends: Ends,
    pings: Interval,
    current: Option<Incarnation>,
    /// What the present or last incarnation said about its end, or what was found wrong with it.
    detail: Option<String>,
    /// Why the last incarnation ended.
    last_cause: Option<Cause>,
    /// Whether the child ends when its worker has.
    is_ending: bool,
}

enum Input {
    Command(Option<Command>),
    Message(Option<Result<FromWorker, LinkError>>),
    Exited(io::Result<ExitStatus>),
    Sent,
    Control(Control),
    Ping,
    Tick,
}

impl Runner {
    pub(super) fn new(spawner: Spawner, plan: LoadPlan, settings: Settings, ends: Ends) -> Runner {
        let mut pings = tokio::time::interval(PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let life = Lifecycle::new(settings, Instant::now());
        Runner {
            spawner,
            plan,
            rung: Rung::default(),
            life,
            ends,
            pings,
            current: None,
            detail: None,
            last_cause: None,
            is_ending: false,
        }
    }

    /// Runs until the child was told to end and its process is gone.
    pub(super) async fn run(mut self) {
        self.step(Event::Start).await;
        loop {
            match self.wait().await {
                // The queue is gone, so the supervisor is ending: the worker has no one to work for.
                Input::Command(None) => return,
                Input::Command(Some(command)) => self.take_command(command).await,
                Input::Message(message) => self.take_message(message).await,
                Input::Exited(status) => {
                    if let Some(current) = &mut self.current {
                        current.note_exit(status);
                    }
                }
                Input::Sent => {}
                Input::Control(control) => self.take_control(control).await,
                Input::Ping => {
                    self.ping();
                    self.measure().await;
                }
                Input::Tick => self.step(Event::Tick).await,
            }
            self.settle().await;
            if self.is_ending && self.life.state().0 == State::Stopped {
                return;
            }
        }
    }

    async fn wait(&mut self) -> Input {
        let is_measured = matches!(self.life.state().0, State::Loading | State::Running);
        let mut deadline = self.life.deadline();
        let Some(current) = &mut self.current else {
            return tokio::select! {
                command = self.ends.commands.recv() => Input::Command(command),
                Some(control) = self.ends.controls.recv() => Input::Control(control),
                () = sleep_until(deadline) => Input::Tick,
            };
        };
        deadline = [deadline, current.rest_deadline].into_iter().flatten().min();
        let is_blocked = current.unsent.is_some();
        tokio::select! {
            message = current.incoming.recv(), if !current.is_link_over => Input::Message(message),
            status = current.process.wait(), if current.exit.is_none() => Input::Exited(status),
            () = incarnation::send(&current.outgoing, &mut current.unsent), if is_blocked => Input::Sent,
            command = self.ends.commands.recv(), if !is_blocked => Input::Command(command),
            Some(control) = self.ends.controls.recv() => Input::Control(control),
            _ = self.pings.tick(), if is_measured => Input::Ping,
            () = sleep_until(deadline) => Input::Tick,
        }
    }

    async fn take_control(&mut self, control: Control) {
        info!(incarnation = self.life.incarnation(), ?control, "worker is controlled");
        match control {
            Control::Start => self.step(Event::Start).await,
            Control::Stop => self.step(Event::Stop).await,
            Control::Restart => self.step(Event::Restart).await,
            Control::End => {
                self.is_ending = true;
                self.step(Event::Stop).await;
            }
        }
    }

    async fn take_command(&mut self, command: Command) {
        if let Command::Absolved = command {
            return self.step(Event::Absolved).await;
        }
        let is_running = self.life.state().0 == State::Running;
        let Some(current) = self.current.as_mut().filter(|current| is_running && current.killed.is_none()) else {
            return;
        };
        match command {
            Command::Generate { incarnation, generate, so_far } if incarnation == current.number => {
                let id = generate.id;
                current.protocol.generate_sent(&generate, so_far);
                if let Err(error) = current.send(&ToWorker::Generate(generate)) {
                    debug!(request = id.0, %error, "request does not fit a frame");
                    current.protocol.forget(id);
                    self.report(Report::Unsendable(id)).await;
                }
            }
            // It was meant for an incarnation whose end has been reported: the request is queued again.
            Command::Generate { .. } | Command::Absolved => {}
            Command::Cancel(id) => {
                current.send(&ToWorker::Cancel { id }).expect("a cancellation fits a frame");
            }
        }
    }

    async fn take_message(&mut self, message: Option<Result<FromWorker, LinkError>>) {
        let Some(current) = &mut self.current else { return };
        match message {
            None => {
                current.is_link_over = true;
                current.rest_deadline = Some(Instant::now() + STOP_TIMEOUT);
            }
            Some(_) if current.killed.is_some() => {}
            Some(Err(LinkError::Frame(error))) => self.condemn(KillReason::Protocol, error.to_string()).await,
            // A worker that dies in the middle of a frame; how it died is told by its wait status.
            Some(Err(error @ LinkError::Broken(_))) => self.detail = Some(error.to_string()),
            Some(Ok(message)) => match current.protocol.check(&message) {
                Ok(()) => self.believe(message).await,
                Err(violation @ Violation::Version { .. }) => {
                    self.condemn(KillReason::Version, violation.to_string()).await;
                }
                Err(violation @ Violation::Walls { .. }) => {
                    self.condemn(KillReason::Sandbox, violation.to_string()).await;
                }
                Err(violation) => self.condemn(KillReason::Protocol, violation.to_string()).await,
            },
        }
    }

    /// Acts on a message that passed the check.
    async fn believe(&mut self, message: FromWorker) {
        match message {
            FromWorker::Hello { layers, .. } => {
                let names: Vec<_> = layers.iter().map(|layer| layer.as_str()).collect();
                let (incarnation, layers_missing) = (self.life.incarnation(), Layer::missing(&layers).len());
                let sandbox = self.spawner.sandbox().as_str();
                if layers_missing == 0 {
                    info!(incarnation, layers = names.join(" "), sandbox, "worker is behind its walls");
                } else {
                    warn!(incarnation, layers = names.join(" "), sandbox, layers_missing, "worker lacks walls");
                }
                self.ends.status.send_modify(|status| status.layers = layers);
                self.step(Event::Hello).await;
            }
            FromWorker::Progress { done, total, what } => {
                let progress = Some(Progress { done, total, what: printable(&what) });
                let has_moved = self.ends.status.borrow().progress != progress;
                self.ends.status.send_modify(|status| status.progress = progress);
                if has_moved {
                    self.step(Event::Progress).await;
                }
            }
            FromWorker::Ready(mut facts) => {
                facts.device = printable(&facts.device);
                facts.given_up.extend(self.rung.given_up(&self.plan));
                facts.quantization = printable(&facts.quantization);
                facts.given_up.iter_mut().for_each(|clause| *clause = printable(clause));
                info!(incarnation = self.life.incarnation(), device = facts.device, "model is loaded");
                self.ends.status.send_modify(|status| {
                    status.blocks_free = facts.blocks;
                    status.facts = Some(facts);
                    status.progress = None;
                });
                self.step(Event::Ready).await;
            }
            FromWorker::LoadFailed { detail } => self.detail = Some(printable(&detail)),
            FromWorker::Pong { progress, sequences, blocks_free, .. } => {
                self.take_pong(progress, sequences, blocks_free).await;
            }
            FromWorker::Done { id: CANARY, .. } => self.step(Event::CanaryDone).await,
            FromWorker::Failed { id: CANARY, failure } => {
                self.condemn(KillReason::Canary, format!("it answered {failure:?}")).await;
            }
            FromWorker::Prompt { id: CANARY, .. } | FromWorker::Delta { id: CANARY, .. } => {}
            FromWorker::Delta { .. } => {
                self.report(Report::Message(message)).await;
                self.step(Event::Delivered).await;
            }
            FromWorker::Prompt { .. } | FromWorker::Done { .. } | FromWorker::Failed { .. } => {
                self.report(Report::Message(message)).await;
            }
        }
    }

    async fn take_pong(&mut self, progress: u64, sequences: u32, blocks_free: u32) {
        let Some(current) = &mut self.current else { return };
        let is_moving = sequences == 0 || progress > current.progress;
        current.progress = progress;
        self.ends.status.send_modify(|status| {
            status.blocks_free = blocks_free;
            if is_moving {
                status.moved = Some(Instant::now());
            }
        });
        self.step(Event::Pong { is_moving }).await;
    }

    fn ping(&mut self) {
        let is_running = self.life.state().0 == State::Running;
        let Some(current) = self.current.as_mut().filter(|_| is_running) else { return };
        // Behind a frame that does not go out a ping is not needed: the missing answer tells as much.
        if current.unsent.is_none() {
            let nonce = current.protocol.next_nonce();
            current.send(&ToWorker::Ping { nonce }).expect("a ping fits a frame");
        }
    }

    /// Measures what the worker holds, and ends one that passes its plan, or what a load may hold.
    async fn measure(&mut self) {
        let Some(current) = self.current.as_ref().filter(|current| current.killed.is_none()) else { return };
        let Some(held) = current.process.id().and_then(held::held_by) else { return };
        let is_on_card = self.plan.device != DeviceChoice::Cpu;
        let plan = self.ends.status.borrow().facts.as_ref().map(|facts| facts.memory.clone());
        let limit = held::limit(plan.as_deref(), is_on_card, current.available)
            .map(|limit| limit.within(self.spawner.host_memory()));
        let Some(limit) = limit.filter(|limit| held > limit.bytes) else { return };
        let detail = format!("it holds {held} of the host's memory where {} {}", limit.what, limit.bytes);
        self.condemn(limit.reason, detail + &self.doing()).await;
    }

    /// Ends the incarnation when its process and its link are over, or when one of them has waited long enough.
    async fn settle(&mut self) {
        let Some(current) = &mut self.current else { return };
        let is_late = current.rest_deadline.is_some_and(|deadline| Instant::now() >= deadline);
        match current.exit {
            Some(status) if current.is_link_over || is_late => {
                let sign = Kills::read(current.leaf.as_deref()).since(current.kills_before);
                let cause = Cause::tell(status, current.killed, sign);
                self.finish(cause).await;
            }
            None if is_late => {
                current.rest_deadline = None;
                self.condemn(KillReason::LinkClosed, "its link was closed".into()).await;
            }
            Some(_) | None => {}
        }
    }

    async fn finish(&mut self, cause: Cause) {
        let cause = self.spawner.ended(cause);
        let incarnation = self.life.incarnation();
        let requests = self.current.take().map_or(0, |current| current.protocol.outstanding());
        // Whoever leaves requests behind has not ended in order, whatever it says.
        let is_deserter = cause == Cause::Exit(WorkerExit::Orderly) && requests > 0;
        let is_stopping = self.life.state().0 == State::Stopping;
        let cause = if is_deserter && !is_stopping { Cause::Crash { code: 0 } } else { cause };
        self.last_cause = Some(cause);
        self.choose_rung(cause);
        let text = match self.detail.take() {
            Some(detail) => format!("{cause}: {detail}"),
            None => format!("{cause}{}", self.doing()),
        };
        if is_stopping {
            info!(incarnation, cause = %text, "worker ended");
        } else {
            warn!(incarnation, cause = %text, requests, "worker ended");
        }
        self.ends.status.send_modify(|status| {
            *status = Status { incarnation, last_end: Some(text), ..Status::new(Instant::now()) };
        });
        self.report(Report::Down { incarnation, cause }).await;
        self.step(Event::Ended { cause, jitter: random::fraction() }).await;
    }

    /// Says what a worker that is loading was about, for one that has no words of its own left.
    fn doing(&self) -> String {
        let status = self.ends.status.borrow();
        let progress = status.progress.as_ref().filter(|_| self.life.state().0 == State::Loading);
        progress.map_or_else(String::new, |progress| format!(", while it loaded {}", progress.what))
    }

    /// Chooses how much of the plan the next worker gets.
    fn choose_rung(&mut self, cause: Cause) {
        let (state, since) = self.life.state();
        let ready_for = if state == State::Running { since.elapsed() } else { Duration::ZERO };
        let next = self.rung.after(&self.plan, cause, ready_for);
        if std::mem::replace(&mut self.rung, next) != next {
            let given_up = self.rung.given_up(&self.plan).unwrap_or_else(|| "nothing".into());
            warn!(incarnation = self.life.incarnation(), given_up, "the plan of the next worker changes");
        }
    }

    async fn condemn(&mut self, reason: KillReason, detail: String) {
        self.detail = Some(printable(&detail));
        self.step(Event::Condemned(reason)).await;
    }

    /// Asks the state machine and does what it says, until it has nothing more to say.
    async fn step(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let before = self.life.state().0;
            let action = self.life.step(event, Instant::now());
            self.publish(before).await;
            next = match action {
                None => None,
                Some(Action::Spawn { incarnation }) => self.spawn(incarnation).await,
                Some(Action::SendLoad) => self.send_load(),
                Some(Action::SendCanary) => self.send_canary(),
                Some(Action::CloseLink) => {
                    self.current.iter_mut().for_each(|current| current.outgoing = None);
                    None
                }
                Some(Action::Kill(reason)) => self.kill(reason),
            };
        }
    }

    async fn spawn(&mut self, incarnation: u32) -> Option<Event> {
        match self.spawner.spawn(incarnation).await {
            Ok(spawned) => {
                let pid = spawned.child.id();
                info!(incarnation, pid, "worker started");
                (self.plan.device, self.plan.device_budget) = (spawned.device, spawned.device_budget);
                let current = self.current.insert(Incarnation::new(incarnation, spawned, self.spawner.sandbox()));
                let source = current.kills_before.source();
                debug!(incarnation, source = source.as_str(), "kills for want of memory are told");
                self.report(Report::Started { incarnation, after: self.last_cause }).await;
                self.ends.status.send_modify(|status| {
                    status.pid = pid;
                    status.incarnation = incarnation;
                    status.oom_source = Some(source);
                });
                None
            }
            Err(error) => {
                warn!(incarnation, %error, "worker did not start");
                self.last_cause = Some(Cause::NotStarted);
                self.ends.status.send_modify(|status| status.last_end = Some(error.to_string()));
                Some(Event::Ended { cause: Cause::NotStarted, jitter: random::fraction() })
            }
        }
    }

    fn send_load(&mut self) -> Option<Event> {
        let current = self.current.as_mut()?;
        current.protocol.load_sent();
        match current.send(&ToWorker::Load(self.rung.plan(&self.plan))) {
            Ok(()) => None,
            Err(error) => {
                error!(%error, "plan does not fit a frame");
                Some(Event::Condemned(KillReason::StartStalled))
            }
        }
    }

    fn send_canary(&mut self) -> Option<Event> {
        let current = self.current.as_mut()?;
        let generate = Generate {
            id: CANARY,
            prompt: Prompt::Text("Hello".into()),
            sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
            stop: Vec::new(),
            max_tokens: Some(1),
            logprobs: None,
            resume: Vec::new(),
        };
        current.protocol.generate_sent(&generate, SoFar::default());
        current.send(&ToWorker::Generate(Box::new(generate))).expect("the canary fits a frame");
        None
    }

    fn kill(&mut self, reason: KillReason) -> Option<Event> {
        let current = self.current.as_mut()?;
        warn!(incarnation = current.number, reason = reason.describe(), "worker is killed");
        current.kill(reason);
        None
    }

    /// Tells the world about a change of state.
    async fn publish(&mut self, before: State) {
        let (state, since) = self.life.state();
        let incarnation = self.life.incarnation();
        if state == before && self.ends.status.borrow().incarnation == incarnation {
            return;
        }
        self.ends.status.send_modify(|status| {
            status.state = state;
            status.since = since;
            status.incarnation = incarnation;
            status.moved = (state == State::Running).then_some(since);
        });
        match state {
            State::Running => {
                info!(incarnation, "worker is ready");
                self.pings.reset();
                self.report(Report::Up { incarnation }).await;
            }
            State::Stopped | State::Exited | State::Fatal => {
                let reason = self.ends.status.borrow().last_end.clone().unwrap_or_else(|| "not started".into());
                if state == State::Fatal {
                    error!(incarnation, %reason, "worker is given up: set the cause right and say `bulkheadctl start`");
                }
                self.report(Report::Resting { state, reason }).await;
            }
            State::Starting | State::Loading | State::Stopping | State::Backoff => {
                debug!(incarnation, %state, "worker changed state");
            }
        }
    }

    async fn report(&self, report: Report) {
        // Without a queue there is nobody to tell; the loop ends by itself when the commands do.
        drop(self.ends.reports.send(report).await);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
