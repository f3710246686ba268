//! The life of a worker as a pure state machine: `(state, event, now) -> (state, actions)`.
//!
//! Owns: the states, when to start again and when to give up, every deadline. Refuses: processes, sockets, clocks. Time
//! and randomness come in with the events. Invariants: `Spawn` is only asked for while no incarnation lives; a kill is
//! asked for once for each incarnation; a loop of restarts without progress ends in `Fatal`.

use std::fmt;
use std::time::{Duration, Instant};

use bulkhead_shared::exit::WorkerExit;

use super::exit::{Cause, KillReason};

/// The time limits and bounds of a worker's life.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// From the spawn to `Hello`.
    pub start_timeout: Duration,
    /// Between two signs that the load is moving.
    pub load_timeout: Duration,
    /// Without movement while there is work, or without an answer to a ping.
    pub hang_timeout: Duration,
    /// From the request to end to the end.
    pub stop_timeout: Duration,
    /// The first pause before a restart.
    pub backoff_min: Duration,
    /// The longest pause before a restart.
    pub backoff_max: Duration,
    /// Deaths in a row without progress, at most.
    pub deaths_max: u32,
    /// Kills from outside in a row before the worker ran, at most.
    pub start_kills_max: u32,
}

/// Where a worker stands, in supervisord's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Not started, or stopped on request.
    Stopped,
    /// The process was spawned and has not said `Hello`.
    Starting,
    /// The model is being loaded, or answers its first token.
    Loading,
    /// The model takes requests.
    Running,
    /// The worker was asked to end.
    Stopping,
    /// Waits before the next start.
    Backoff,
    /// Ended in order, by itself.
    Exited,
    /// Given up.
    Fatal,
}

impl State {
    /// Gives the word for status lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Stopped => "STOPPED",
            State::Starting => "STARTING",
            State::Loading => "LOADING",
            State::Running => "RUNNING",
            State::Stopping => "STOPPING",
            State::Backoff => "BACKOFF",
            State::Exited => "EXITED",
            State::Fatal => "FATAL",
        }
    }

    /// Says whether the worker will not come back by itself.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, State::Stopped | State::Exited | State::Fatal)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// The worker is wanted.
    Start,
    /// The worker is no longer wanted.
    Stop,
    /// Another worker is wanted.
    Restart,
    /// The last deaths had a cause that is gone.
    Absolved,
    /// The worker stands behind its walls.
    Hello,
    /// The load moved.
    Progress,
    /// The model is loaded.
    Ready,
    /// The first token was answered.
    CanaryDone,
    /// A ping was answered.
    Pong {
        /// Whether the worker moved since the last answer, or has nothing to do.
        is_moving: bool,
    },
    /// A token of a request was delivered.
    Delivered,
    /// The worker must not live on.
    Condemned(KillReason),
    /// The process has ended and was reaped.
    Ended {
        /// Why.
        cause: Cause,
        /// Spreads restarts. Bounds: from 0 to 1.
        jitter: f64,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Spawn a process as this incarnation.
    Spawn {
        /// Counts from 1.
        incarnation: u32,
    },
    /// Send the plan.
    SendLoad,
    /// Ask for one token.
    SendCanary,
    /// Close the link: asks the worker to end.
    CloseLink,
    /// Send SIGKILL.
    Kill(KillReason),
}

/// A worker's life so far.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    settings: Settings,
    state: State,
    since: Instant,
    deadline: Option<Instant>,
    incarnation: u32,
    deaths: u32,
    start_kills: u32,
    /// Whether the last worker's first token was not a number.
    was_nonsense: bool,
    has_run: bool,
    has_delivered: bool,
    is_condemned: bool,
    /// Whether another worker follows the one that was asked to end.
    is_restart: bool,
}

impl Lifecycle {
    /// Begins as `Stopped`.
    #[must_use]
    pub fn new(settings: Settings, now: Instant) -> Lifecycle {
        Lifecycle {
            settings,
            state: State::Stopped,
            since: now,
            deadline: None,
            incarnation: 0,
            deaths: 0,
            start_kills: 0,
            was_nonsense: false,
            has_run: false,
            has_delivered: false,
            is_condemned: false,
            is_restart: false,
        }
    }

    /// Gives the state and the time at which it began.
    #[must_use]
    pub fn state(&self) -> (State, Instant) {
        (self.state, self.since)
    }

    /// Counts the incarnations so far.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// Says when the next `Tick` is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes in an event. Events that mean nothing in the state change nothing.
    pub fn step(&mut self, event: Event, now: Instant) -> Option<Action> {
        match (self.state, event) {
            (_, Event::Ended { cause, jitter }) => self.ended(cause, jitter, now),
            (_, Event::Condemned(reason)) => self.condemn(reason),
            (_, Event::Tick) => self.tick(now),
            (State::Stopped | State::Exited | State::Fatal | State::Backoff, Event::Start | Event::Restart) => {
                (self.deaths, self.start_kills, self.was_nonsense) = (0, 0, false);
                self.spawn(now)
            }
            (State::Backoff | State::Exited | State::Fatal, Event::Stop) => self.rest(State::Stopped, now),
            (State::Starting | State::Loading | State::Running, Event::Stop | Event::Restart) => {
                self.is_restart = event == Event::Restart;
                self.enter(State::Stopping, now, Some(self.settings.stop_timeout));
                Some(Action::CloseLink)
            }
            (State::Stopping, Event::Start | Event::Restart | Event::Stop) => {
                self.is_restart = event != Event::Stop;
                None
            }
            (State::Backoff, Event::Absolved) => {
                self.deaths = 0;
                self.spawn(now)
            }
            (State::Starting | State::Loading | State::Running, Event::Absolved) => {
                self.deaths = 0;
                None
            }
            (State::Starting, Event::Hello) => {
                self.enter(State::Loading, now, Some(self.settings.load_timeout));
                Some(Action::SendLoad)
            }
            (State::Loading, Event::Progress) => self.extend(now, self.settings.load_timeout),
            (State::Loading, Event::Ready) => {
                self.extend(now, self.settings.hang_timeout);
                Some(Action::SendCanary)
            }
            (State::Loading, Event::CanaryDone) => {
                self.has_run = true;
                self.enter(State::Running, now, Some(self.settings.hang_timeout));
                None
            }
            (State::Running, Event::Pong { is_moving: true }) => self.extend(now, self.settings.hang_timeout),
            (State::Running, Event::Delivered) => {
                self.has_delivered = true;
                (self.deaths, self.start_kills) = (0, 0);
                None
            }
            _ => None,
        }
    }

    fn enter(&mut self, state: State, now: Instant, timeout: Option<Duration>) {
        (self.state, self.since) = (state, now);
        self.deadline = timeout.filter(|_| !self.is_condemned).map(|timeout| now + timeout);
    }

    fn extend(&mut self, now: Instant, timeout: Duration) -> Option<Action> {
        self.deadline = Some(now + timeout).filter(|_| !self.is_condemned);
        None
    }

    fn rest(&mut self, state: State, now: Instant) -> Option<Action> {
        self.enter(state, now, None);
        None
    }

    fn spawn(&mut self, now: Instant) -> Option<Action> {
        self.incarnation += 1;
        (self.has_run, self.has_delivered, self.is_condemned, self.is_restart) = (false, false, false, false);
        self.enter(State::Starting, now, Some(self.settings.start_timeout));
        Some(Action::Spawn { incarnation: self.incarnation })
    }

    fn condemn(&mut self, reason: KillReason) -> Option<Action> {
        let is_alive = matches!(self.state, State::Starting | State::Loading | State::Running | State::Stopping);
        if !is_alive || self.is_condemned {
            return None;
        }
        self.is_condemned = true;
        self.deadline = None;
        Some(Action::Kill(reason))
    }

    fn tick(&mut self, now: Instant) -> Option<Action> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return None;
        }
        self.deadline = None;
        match self.state {
            State::Backoff => self.spawn(now),
            State::Starting => self.condemn(KillReason::StartStalled),
            State::Loading => self.condemn(KillReason::LoadStalled),
            State::Running => self.condemn(KillReason::Hang),
            State::Stopping => self.condemn(KillReason::StopTimeout),
            State::Stopped | State::Exited | State::Fatal => None,
        }
    }

    fn ended(&mut self, cause: Cause, jitter: f64, now: Instant) -> Option<Action> {
        if self.state == State::Stopping {
            (self.deaths, self.start_kills) = (0, 0);
            return if self.is_restart { self.spawn(now) } else { self.rest(State::Stopped, now) };
        }
        // A card may have been at fault once; for two workers in a row it is the weights.
        let is_nonsense = cause == Cause::Exit(WorkerExit::NonFinite) && !self.has_run;
        let is_again = std::mem::replace(&mut self.was_nonsense, is_nonsense) && is_nonsense;
        if cause.is_final() || is_again {
            return self.rest(State::Fatal, now);
        }
        match cause {
            Cause::Exit(WorkerExit::Orderly) => self.rest(State::Exited, now),
            Cause::KilledFromOutside if self.has_run => self.spawn(now),
            Cause::KilledFromOutside => {
                self.start_kills += 1;
                self.pause_or_give_up(self.start_kills < self.settings.start_kills_max, self.backoff(1, jitter), now)
            }
            _ if self.has_delivered => self.spawn(now),
            Cause::NotStarted
            | Cause::Exit(_)
            | Cause::Crash { .. }
            | Cause::Signal { .. }
            | Cause::Killed(_)
            | Cause::OutOfMemory
            | Cause::SuspectedOutOfMemory => {
                self.deaths += 1;
                let pause = self.backoff(self.deaths, jitter);
                self.pause_or_give_up(self.deaths < self.settings.deaths_max, pause, now)
            }
        }
    }

    fn pause_or_give_up(&mut self, goes_on: bool, pause: Duration, now: Instant) -> Option<Action> {
        if goes_on {
            self.enter_backoff(now, pause);
            None
        } else {
            self.rest(State::Fatal, now)
        }
    }

    fn enter_backoff(&mut self, now: Instant, pause: Duration) {
        self.is_condemned = false;
        self.enter(State::Backoff, now, Some(pause));
    }

    /// The pause after so many deaths: doubled for each, up to a quarter longer by jitter, never above the maximum.
    fn backoff(&self, deaths: u32, jitter: f64) -> Duration {
        let doubled = self.settings.backoff_min.saturating_mul(1 << deaths.saturating_sub(1).min(16));
        doubled.mul_f64(1.0 + jitter.clamp(0.0, 1.0) / 4.0).min(self.settings.backoff_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings = Settings {
        start_timeout: Duration::from_secs(30),
        load_timeout: Duration::from_secs(60),
        hang_timeout: Duration::from_secs(20),
        stop_timeout: Duration::from_secs(1),
        backoff_min: Duration::from_millis(500),
        backoff_max: Duration::from_secs(3),
        deaths_max: 5,
        start_kills_max: 3,
    };

    const CRASH: Event = Event::Ended { cause: Cause::Crash { code: 101 }, jitter: 0.0 };
    const KILLED: Event = Event::Ended { cause: Cause::KilledFromOutside, jitter: 0.0 };
    const BAD_MODEL: Event = Event::Ended { cause: Cause::Exit(WorkerExit::BadModel), jitter: 0.0 };
    const ORDERLY: Event = Event::Ended { cause: Cause::Exit(WorkerExit::Orderly), jitter: 0.0 };

    /// Steps: at so many milliseconds, this event, then this action and this state.
    fn check(name: &str, steps: &[(u64, Event, Option<Action>, State)]) {
        let start = Instant::now();
        let mut life = Lifecycle::new(SETTINGS, start);
        for (index, (at_ms, event, action, state)) in steps.iter().enumerate() {
            let got = life.step(*event, start + Duration::from_millis(*at_ms));
            assert_eq!((got, life.state().0), (*action, *state), "{name}, step {index}: {event:?}");
        }
    }

    fn spawn(incarnation: u32) -> Option<Action> {
        Some(Action::Spawn { incarnation })
    }

    fn up(incarnation: u32, at: u64) -> Vec<(u64, Event, Option<Action>, State)> {
        let first = if incarnation == 1 { vec![(at, Event::Start, spawn(1), State::Starting)] } else { Vec::new() };
        let rest = [
            (at, Event::Hello, Some(Action::SendLoad), State::Loading),
            (at, Event::Ready, Some(Action::SendCanary), State::Loading),
            (at, Event::CanaryDone, None, State::Running),
        ];
        first.into_iter().chain(rest).collect()
    }

    #[test]
    fn a_worker_comes_up_and_is_stopped() {
        let mut steps = up(1, 0);
        steps.extend([
            (10, Event::Stop, Some(Action::CloseLink), State::Stopping),
            (1009, Event::Tick, None, State::Stopping),
            (1010, Event::Tick, Some(Action::Kill(KillReason::StopTimeout)), State::Stopping),
            (1011, Event::Tick, None, State::Stopping),
            (1020, CRASH, None, State::Stopped),
            (1030, Event::Start, spawn(2), State::Starting),
        ]);
        check("stop", &steps);
    }

    #[test]
    fn a_worker_that_delivered_comes_back_at_once() {
        let mut steps = up(1, 0);
        steps.push((5, Event::Delivered, None, State::Running));
        steps.push((10, CRASH, spawn(2), State::Starting));
        check("delivered", &steps);
    }

    #[test]
    fn a_worker_without_progress_backs_off_and_is_given_up() {
        let mut steps = up(1, 0);
        steps.extend([
            (0, CRASH, None, State::Backoff),
            (499, Event::Tick, None, State::Backoff),
            (500, Event::Tick, spawn(2), State::Starting),
            (500, CRASH, None, State::Backoff),
            (1499, Event::Tick, None, State::Backoff),
            (1500, Event::Tick, spawn(3), State::Starting),
            (1500, CRASH, None, State::Backoff),
            (3500, Event::Tick, spawn(4), State::Starting),
            (3500, CRASH, None, State::Backoff),
            (6499, Event::Tick, None, State::Backoff),
            (6500, Event::Tick, spawn(5), State::Starting),
            (6500, CRASH, None, State::Fatal),
            (99_000, Event::Tick, None, State::Fatal),
            (99_000, Event::Start, spawn(6), State::Starting),
        ]);
        check("gives up", &steps);
    }

    #[test]
    fn a_kill_from_outside_counts_only_before_the_worker_ran() {
        let mut steps = up(1, 0);
        steps.push((1, KILLED, spawn(2), State::Starting));
        steps.extend(up(2, 2));
        steps.push((3, KILLED, spawn(3), State::Starting));
        steps.extend([
            (4, KILLED, None, State::Backoff),
            (504, Event::Tick, spawn(4), State::Starting),
            (504, KILLED, None, State::Backoff),
            (1004, Event::Tick, spawn(5), State::Starting),
            (1004, KILLED, None, State::Fatal),
        ]);
        check("killed", &steps);
    }

    #[test]
    fn what_a_restart_cannot_help_is_fatal_at_once() {
        let mut steps = up(1, 0);
        steps.push((1, BAD_MODEL, None, State::Fatal));
        steps.push((2, Event::Stop, None, State::Stopped));
        check("bad model", &steps);
        let mut steps = up(1, 0);
        steps.push((1, ORDERLY, None, State::Exited));
        check("orderly", &steps);
    }

    #[test]
    fn a_first_token_that_is_no_number_is_tried_once_more() {
        const NONSENSE: Event = Event::Ended { cause: Cause::Exit(WorkerExit::NonFinite), jitter: 0.0 };
        let loading = |at| {
            [
                (at, Event::Hello, Some(Action::SendLoad), State::Loading),
                (at, Event::Ready, Some(Action::SendCanary), State::Loading),
            ]
        };
        let mut steps = vec![(0, Event::Start, spawn(1), State::Starting)];
        steps.extend(loading(0));
        steps.extend([(0, NONSENSE, None, State::Backoff), (500, Event::Tick, spawn(2), State::Starting)]);
        steps.extend(loading(500));
        steps.extend([(500, NONSENSE, None, State::Fatal), (600, Event::Start, spawn(3), State::Starting)]);
        steps.extend(loading(600));
        // Whoever sets it right starts from the beginning.
        steps.push((600, NONSENSE, None, State::Backoff));
        check("nonsense", &steps);
        // A worker that has run met a request or a fault that the next one need not meet.
        let mut steps = up(1, 0);
        steps.extend([(0, NONSENSE, None, State::Backoff), (500, Event::Tick, spawn(2), State::Starting)]);
        steps.extend(up(2, 500));
        steps.push((500, NONSENSE, None, State::Backoff));
        check("nonsense later", &steps);
    }

    #[test]
    fn each_phase_has_its_watchdog() {
        check(
            "start",
            &[
                (0, Event::Start, spawn(1), State::Starting),
                (29_999, Event::Tick, None, State::Starting),
                (30_000, Event::Tick, Some(Action::Kill(KillReason::StartStalled)), State::Starting),
            ],
        );
        check(
            "load",
            &[
                (0, Event::Start, spawn(1), State::Starting),
                (0, Event::Hello, Some(Action::SendLoad), State::Loading),
                (59_000, Event::Progress, None, State::Loading),
                (60_000, Event::Tick, None, State::Loading),
                (119_000, Event::Tick, Some(Action::Kill(KillReason::LoadStalled)), State::Loading),
            ],
        );
        let mut steps = up(1, 0);
        steps.extend([
            (19_000, Event::Pong { is_moving: true }, None, State::Running),
            (30_000, Event::Pong { is_moving: false }, None, State::Running),
            (38_999, Event::Tick, None, State::Running),
            (39_000, Event::Tick, Some(Action::Kill(KillReason::Hang)), State::Running),
            (39_000, Event::Condemned(KillReason::Protocol), None, State::Running),
            (39_001, Event::Pong { is_moving: true }, None, State::Running),
            (90_000, Event::Tick, None, State::Running),
        ]);
        check("hang", &steps);
    }

    #[test]
    fn a_stop_in_the_pause_needs_no_worker() {
        check(
            "stop in backoff",
            &[
                (0, Event::Start, spawn(1), State::Starting),
                (0, CRASH, None, State::Backoff),
                (10, Event::Stop, None, State::Stopped),
                (9000, Event::Tick, None, State::Stopped),
            ],
        );
    }

    #[test]
    fn a_restart_on_request_is_no_death() {
        let mut steps = up(1, 0);
        steps.extend([
            (1, Event::Restart, Some(Action::CloseLink), State::Stopping),
            (2, ORDERLY, spawn(2), State::Starting),
            (3, Event::Restart, Some(Action::CloseLink), State::Stopping),
            (4, Event::Stop, None, State::Stopping),
            (5, CRASH, None, State::Stopped),
            (6, Event::Restart, spawn(3), State::Starting),
            (6, CRASH, None, State::Backoff),
            (7, Event::Start, spawn(4), State::Starting),
            (8, Event::Stop, Some(Action::CloseLink), State::Stopping),
            (9, Event::Start, None, State::Stopping),
            (10, ORDERLY, spawn(5), State::Starting),
            (11, Event::Start, None, State::Starting),
        ]);
        check("restart", &steps);
    }

    #[test]
    fn deaths_with_a_cause_that_is_gone_do_not_count() {
        let mut steps = up(1, 0);
        for incarnation in 2..=9 {
            steps.extend([
                (1, CRASH, None, State::Backoff),
                (1, Event::Absolved, spawn(incarnation), State::Starting),
                (1, Event::Absolved, None, State::Starting),
            ]);
        }
        check("absolved", &steps);
    }

    #[test]
    fn jitter_lengthens_the_pause_within_its_bounds() {
        let life = Lifecycle::new(SETTINGS, Instant::now());
        assert_eq!(life.backoff(1, 0.0), Duration::from_millis(500));
        assert_eq!(life.backoff(1, 1.0), Duration::from_millis(625));
        assert_eq!(life.backoff(40, 1.0), SETTINGS.backoff_max);
    }
}
