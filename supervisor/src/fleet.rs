//! Which model has which child, and by which names clients know it. There is one model so far.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bulkhead_shared::layers::SandboxMode;
use tokio::sync::{mpsc, watch};

use crate::child::lifecycle::State;
use crate::child::{Control, Status};
use crate::device::Devices;
use crate::limits::SLUGGISH_AFTER;
use crate::metrics::{Metrics, Now};
use crate::tickets::{Refusal, Tickets};

/// A model, its names and its child.
#[derive(Debug)]
pub struct Fleet {
    /// The name under which the model is listed.
    pub model_id: String,
    /// Its further names.
    pub aliases: Vec<String>,
    /// Where it computes.
    pub devices: Devices,
    /// When the supervisor took it on, in seconds since 1970.
    pub created: u64,
    /// The requests for it.
    pub tickets: Arc<Tickets>,
    seen: Seen,
}

/// What the fleet sees of a model's child, and how it speaks to it.
#[derive(Debug)]
pub struct Seen {
    /// How much isolation its worker must have.
    pub sandbox: SandboxMode,
    /// What is known about the child.
    pub status: watch::Receiver<Status>,
    /// What people want of it.
    pub controls: mpsc::Sender<Control>,
    /// What is counted of it and its requests.
    pub metrics: Arc<Metrics>,
}

/// A client asked for a model that is not here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model {asked:?} does not exist; valid names: {}", valid.join(", "))]
pub struct UnknownModel {
    /// The name that it used.
    pub asked: String,
    /// The names that it could use.
    pub valid: Vec<String>,
}

/// How well the service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// A model answers.
    Healthy,
    /// A model answers, and something is not as it should be.
    Degraded(String),
    /// A model is on its way.
    Loading(String),
    /// No model will answer.
    Unhealthy(String),
}

impl Fleet {
    /// Takes on a model.
    #[must_use]
    pub fn new(model_id: String, aliases: Vec<String>, devices: Devices, seen: Seen, tickets: Arc<Tickets>) -> Fleet {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Fleet { model_id, aliases, devices, created, tickets, seen }
    }

    /// Says how much isolation the worker must have.
    #[must_use]
    pub fn sandbox(&self) -> SandboxMode {
        self.seen.sandbox
    }

    /// Finds the model of a name; without a name, the default one.
    ///
    /// # Errors
    /// `UnknownModel` when no model has the name.
    pub fn find(&self, name: Option<&str>) -> Result<&str, UnknownModel> {
        match name {
            Some(name) if name != self.model_id && !self.aliases.iter().any(|alias| alias == name) => {
                let valid = std::iter::once(&self.model_id).chain(&self.aliases).cloned().collect();
                Err(UnknownModel { asked: name.to_owned(), valid })
            }
            Some(_) | None => Ok(&self.model_id),
        }
    }

    /// Gives what is known about the child now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.seen.status.borrow().clone()
    }

    /// Tells the child what people want. False when it is gone or takes nothing.
    #[must_use]
    pub fn control(&self, control: Control) -> bool {
        self.seen.controls.try_send(control).is_ok()
    }

    /// Says whether the worker ends when the requests that it has have ended.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.tickets.check_door() == Err(Refusal::Stopping)
    }

    /// Gives a handle that sees each change of the child.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.seen.status.clone()
    }

    /// Writes the metrics in Prometheus' text format.
    #[must_use]
    pub fn metrics(&self) -> String {
        let status = self.status();
        let (running, waiting) = self.tickets.lengths();
        let blocks = status.facts.as_ref().map(|facts| (facts.blocks, status.blocks_free));
        self.seen.metrics.text(&Now {
            model: self.model_id.clone(),
            running,
            waiting,
            incarnation: status.incarnation,
            is_up: status.state == State::Running,
            blocks,
            memory: status.facts.map_or_else(Vec::new, |facts| facts.memory),
        })
    }

    /// Judges the service.
    #[must_use]
    pub fn health(&self, now: Instant) -> Health {
        let status = self.seen.status.borrow();
        let last_end = || status.last_end.as_ref().map_or(String::new(), |end| format!("; the last one {end}"));
        match status.state {
            State::Running if self.is_stopping() => {
                Health::Unhealthy("the worker ends when its requests have ended".into())
            }
            State::Running => {
                let silence = status.moved.map_or_else(Default::default, |moved| now.saturating_duration_since(moved));
                if silence >= SLUGGISH_AFTER {
                    Health::Degraded(format!("the worker has not moved for {} s", silence.as_secs()))
                } else {
                    Health::Healthy
                }
            }
            State::Starting => Health::Loading(format!("a worker is starting{}", last_end())),
            State::Loading => Health::Loading(match &status.progress {
                // The beginning of something has nothing to count yet.
                Some(progress) if progress.done.0 == 0 => format!("loading {}", progress.what),
                Some(progress) => format!("{}: {} of {}", progress.what, progress.done, progress.total),
                None => "the model is being loaded".into(),
            }),
            State::Backoff => Health::Loading(format!("a worker will be started in a moment{}", last_end())),
            // Nothing was started yet.
            State::Stopped if status.incarnation == 0 => Health::Loading("a worker is starting".into()),
            State::Stopping | State::Stopped => Health::Unhealthy("the worker was stopped".into()),
            State::Exited | State::Fatal => Health::Unhealthy(status.last_end.clone().unwrap_or_default()),
        }
    }
}
