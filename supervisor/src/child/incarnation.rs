//! One run of a worker as its child holds it: the process, its link, and what is on its way to it.

use std::io;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_shared::frame;
use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::limits::TO_WORKER_FRAME_BYTES_MAX;
use bulkhead_shared::message::{FromWorker, ToWorker};
use bulkhead_shared::units::Bytes;
use tokio::sync::mpsc;
use tracing::{debug, error};

use super::cgroup::Leaf;
use super::exit::KillReason;
use super::held;
use super::link::{self, LinkError};
use super::oom::Kills;
use super::protocol::Protocol;
use super::spawn::Spawned;
use crate::limits::STOP_TIMEOUT;

pub(super) struct Incarnation {
    pub(super) number: u32,
    pub(super) process: tokio::process::Child,
    pub(super) outgoing: Option<mpsc::Sender<Vec<u8>>>,
    pub(super) incoming: mpsc::Receiver<Result<FromWorker, LinkError>>,
    pub(super) protocol: Protocol,
    /// A frame that waits for room in `outgoing`.
    pub(super) unsent: Option<Vec<u8>>,
    pub(super) killed: Option<KillReason>,
    pub(super) exit: Option<ExitStatus>,
    pub(super) is_link_over: bool,
    /// When one of process and link is over, the other has until then.
    pub(super) rest_deadline: Option<Instant>,
    /// The worker's own counter, at the last answer.
    pub(super) progress: u64,
    /// The process's own control group, where it has one.
    pub(super) leaf: Option<Arc<Leaf>>,
    /// The kernel's counters when the process was started.
    pub(super) kills_before: Kills,
    /// What the machine could give then.
    pub(super) available: Bytes,
}

impl Incarnation {
    pub(super) fn new(number: u32, spawned: Spawned, sandbox: SandboxMode) -> Incarnation {
        let link = link::open(spawned.stream);
        Incarnation {
            number,
            process: spawned.child,
            outgoing: Some(link.outgoing),
            incoming: link.incoming,
            protocol: Protocol::new(sandbox),
            unsent: None,
            killed: None,
            exit: None,
            is_link_over: false,
            rest_deadline: None,
            progress: 0,
            kills_before: Kills::read(spawned.leaf.as_deref()),
            leaf: spawned.leaf,
            available: held::available(),
        }
    }

    /// Encodes a message and puts it on its way; at most one waits here, so nothing is sent while one does.
    pub(super) fn send(&mut self, message: &ToWorker) -> Result<(), frame::FrameError> {
        assert!(self.unsent.is_none(), "commands are taken only while nothing waits");
        let frame = frame::encode(message, TO_WORKER_FRAME_BYTES_MAX)?;
        let Some(outgoing) = &self.outgoing else { return Ok(()) };
        match outgoing.try_send(frame) {
            Err(mpsc::error::TrySendError::Full(frame)) => self.unsent = Some(frame),
            // The writer has ended because the worker's side is gone, which the reader reports.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
        Ok(())
    }

    pub(super) fn note_exit(&mut self, status: io::Result<ExitStatus>) {
        // Waiting for an own child cannot fail but by a bug; the incarnation is over in any case.
        let status = status.unwrap_or_else(|error| {
            error!(%error, "cannot wait for the worker");
            ExitStatus::default()
        });
        self.exit = Some(status);
        self.outgoing = None;
        self.rest_deadline = Some(Instant::now() + STOP_TIMEOUT);
    }

    pub(super) fn kill(&mut self, reason: KillReason) {
        self.killed = Some(reason);
        self.unsent = None;
        if let Err(error) = self.process.start_kill() {
            // It has ended in the meantime: its wait status is on the way.
            debug!(%error, "nothing to kill");
        }
    }
}

/// Waits until the link has room for the frame that waits. Cancel safety: the frame stays where it is until then.
pub(super) async fn send(outgoing: &Option<mpsc::Sender<Vec<u8>>>, unsent: &mut Option<Vec<u8>>) {
    let permit = match outgoing {
        Some(outgoing) => outgoing.reserve().await.ok(),
        None => None,
    };
    let frame = unsent.take();
    if let (Some(permit), Some(frame)) = (permit, frame) {
        permit.send(frame);
    }
}
