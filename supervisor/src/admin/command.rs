//! The commands of the private door: what may be asked, and how it is carried out.

use std::sync::Arc;

use bulkhead_shared::units::RequestId;
use serde_json::{Value, json};
use tracing::debug;

use crate::child::Control;
use crate::child::lifecycle::State;
use crate::fleet::Fleet;
use crate::http;
use crate::keys::Keys;
use crate::limits::{ADMIN_ACTION_TIMEOUT, LOG_LINES_MAX};
use crate::logging::Recent;
use crate::walls::Walls;

/// One request on the admin socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// How everything is.
    Status,
    /// What people want of the worker, at once.
    Control(Control),
    /// No worker, when the requests that there are have ended.
    Drain,
    /// The requests that wait or run.
    Queue,
    /// Give up a request.
    Cancel {
        /// Which.
        id: RequestId,
    },
    /// The end of the log.
    Tail {
        /// So many lines of it.
        lines: u64,
    },
    /// The end of the log, and what is added to it.
    Follow {
        /// So many lines to begin with.
        lines: u64,
    },
    /// Read anew what can be read anew: the API keys.
    Reread,
    /// The version of this program.
    Version,
}

/// Reads a line of JSON.
///
/// # Errors
/// A sentence for whoever wrote it.
pub fn read(line: &[u8]) -> Result<Order, String> {
    let request: Value =
        serde_json::from_slice(line).map_err(|error| format!("the request is no line of JSON: {error}"))?;
    let number = |name: &str| request[name].as_u64().ok_or_else(|| format!("{name} must be a whole number"));
    match request["command"].as_str() {
        Some("status") => Ok(Order::Status),
        Some("start") => Ok(Order::Control(Control::Start)),
        Some("stop") => match &request["now"] {
            Value::Bool(true) => Ok(Order::Control(Control::Stop)),
            Value::Bool(false) | Value::Null => Ok(Order::Drain),
            Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
                Err("now must be true or false".into())
            }
        },
        Some("restart") => Ok(Order::Control(Control::Restart)),
        Some("queue") => Ok(Order::Queue),
        Some("cancel") => Ok(Order::Cancel { id: RequestId(number("id")?) }),
        Some("tail") => {
            let lines = number("lines")?.min(LOG_LINES_MAX as u64);
            let is_followed = request["follow"].as_bool().unwrap_or(false);
            Ok(if is_followed { Order::Follow { lines } } else { Order::Tail { lines } })
        }
        Some("reread") => Ok(Order::Reread),
        Some("version") => Ok(Order::Version),
        Some(other) => Err(format!("unknown command {other:?}")),
        None => Err("the request has no command".into()),
    }
}

/// What the commands work with.
#[derive(Clone, Debug)]
pub(crate) struct Desk {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) recent: Arc<Recent>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) walls: Arc<Walls>,
}

impl Desk {
    /// Carries out what needs one answer.
    pub(super) async fn carry_out(&self, order: Order) -> Result<Value, String> {
        match order {
            Order::Status => Ok(self.status()),
            Order::Control(control) => self.control(control).await,
            Order::Drain => self.drain().await,
            Order::Queue => Ok(self.queue()),
            Order::Cancel { id } => match self.fleet.tickets.cancel(id) {
                true => Ok(json!({"id": id.0})),
                false => Err(format!("no request {id} waits or runs")),
            },
            Order::Tail { lines } | Order::Follow { lines } => {
                Ok(json!({"lines": self.recent.since(self.recent.last(lines)).0}))
            }
            Order::Reread => match self.keys.reload_and_log() {
                Ok(outcome) => Ok(json!({"keys": outcome.keys, "warning": outcome.warning})),
                Err(error) => Err(error.to_string()),
            },
            Order::Version => Ok(json!({"version": env!("CARGO_PKG_VERSION")})),
        }
    }

    fn status(&self) -> Value {
        let (running, waiting) = self.fleet.tickets.lengths();
        let queue = json!({"running": running, "waiting": waiting});
        let workers = [http::worker(&self.fleet)];
        json!({
            "workers": workers, "queue": queue, "pid": std::process::id(), "supervisor": self.walls.describe(),
        })
    }

    fn queue(&self) -> Value {
        let describe = |listed: crate::tickets::Listed| {
            let (id, age_s) = (listed.id.0, listed.age.as_secs_f64());
            json!({"id": id, "state": listed.standing, "tokens": listed.tokens, "age_s": age_s})
        };
        json!({"requests": self.fleet.tickets.list().into_iter().map(describe).collect::<Vec<_>>()})
    }

    /// Tells the child, and waits until it has done so, has failed, or has been at it for long enough.
    async fn control(&self, control: Control) -> Result<Value, String> {
        let mut status = self.fleet.watch();
        let before = status.borrow_and_update().clone();
        let is_there = !before.state.is_final() && before.state != State::Stopping;
        let is_wanted_again = matches!(control, Control::Start | Control::Restart) && self.fleet.tickets.stop_not();
        if is_wanted_again && is_there && control == Control::Start {
            return Ok(self.outcome(&before, Need::Something));
        }
        let needs_nothing = match control {
            Control::Start => is_there,
            Control::Stop | Control::End => before.state == State::Stopped,
            Control::Restart => false,
        };
        if !needs_nothing {
            if !self.fleet.control(control) {
                return Err("the server is shutting down".into());
            }
            let is_done = |now: &crate::child::Status| match control {
                Control::Stop | Control::End => now.state == State::Stopped,
                Control::Start | Control::Restart => {
                    now.incarnation > before.incarnation && (now.state == State::Running || now.state.is_final())
                }
            };
            let done = async {
                let now = status.wait_for(is_done).await.map(|now| (now.state, now.incarnation));
                if let Ok((State::Running, incarnation)) = now {
                    self.fleet.tickets.wait_until_up(incarnation).await;
                }
            };
            // Whoever takes longer is told where it stands.
            drop(tokio::time::timeout(ADMIN_ACTION_TIMEOUT, done).await);
        }
        Ok(self.outcome(&before, if needs_nothing { Need::Nothing } else { Need::Something }))
    }

    /// Lets the worker take no more requests and end behind the last one, and waits for that as `control` does. It goes on
    /// when nobody waits any more.
    async fn drain(&self) -> Result<Value, String> {
        let mut status = self.fleet.watch();
        let before = status.borrow_and_update().clone();
        if before.state == State::Stopped {
            return Ok(self.outcome(&before, Need::Nothing));
        }
        if !self.fleet.tickets.stop() {
            return Err("the server is shutting down".into());
        }
        let fleet = self.fleet.clone();
        tokio::spawn(async move {
            let stop = || {
                if !fleet.control(Control::Stop) {
                    debug!("nobody is there to stop the worker: the supervisor is ending");
                }
            };
            fleet.tickets.when_stopped(stop).await;
        });
        let is_done = |now: &crate::child::Status| now.state == State::Stopped;
        drop(tokio::time::timeout(ADMIN_ACTION_TIMEOUT, status.wait_for(is_done)).await);
        Ok(self.outcome(&before, Need::Something))
    }

    /// Tells where a worker stands now, and where it stood.
    fn outcome(&self, before: &crate::child::Status, need: Need) -> Value {
        let (running, waiting) = self.fleet.tickets.lengths();
        json!({
            "was": before.state.as_str(),
            "needed_nothing": need == Need::Nothing,
            "requests": running + waiting,
            "worker": http::worker(&self.fleet),
        })
    }
}

/// Whether something had to be done for what was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Nothing,
    Something,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_or_says_what_is_wrong() {
        for (line, expected) in [
            (r#"{"command": "status"}"#, Ok(Order::Status)),
            (r#"{"command": "restart", "more": 1}"#, Ok(Order::Control(Control::Restart))),
            (r#"{"command": "reread"}"#, Ok(Order::Reread)),
            (r#"{"command": "stop"}"#, Ok(Order::Drain)),
            (r#"{"command": "stop", "now": false}"#, Ok(Order::Drain)),
            (r#"{"command": "stop", "now": true}"#, Ok(Order::Control(Control::Stop))),
            (r#"{"command": "stop", "now": "yes"}"#, Err("now must be true or false")),
            (r#"{"command": "cancel", "id": 7}"#, Ok(Order::Cancel { id: RequestId(7) })),
            (r#"{"command": "cancel", "id": -7}"#, Err("id must be a whole number")),
            (r#"{"command": "cancel"}"#, Err("id must be a whole number")),
            (r#"{"command": "tail", "lines": 5}"#, Ok(Order::Tail { lines: 5 })),
            (r#"{"command": "tail", "lines": 1e9}"#, Err("lines must be a whole number")),
            (
                r#"{"command": "tail", "lines": 18446744073709551615, "follow": true}"#,
                Ok(Order::Follow { lines: 1000 }),
            ),
            (r#"{"command": "End"}"#, Err("unknown command \"End\"")),
            (r#"{"command": 3}"#, Err("the request has no command")),
            ("[]", Err("the request has no command")),
        ] {
            assert_eq!(read(line.as_bytes()), expected.map_err(str::to_owned), "{line}");
        }
        for line in [&b""[..], b"\xff\xfe", b"{", b"{\"command\": \"status\"} x"] {
            assert!(read(line).is_err_and(|error| error.starts_with("the request is no line of JSON")), "{line:?}");
        }
    }
}
