//! Starts worker processes, from one thread that lives as long as the supervisor.
//!
//! Owns: the thread, the command line, the descriptors and the environment that a worker gets, and its standard error.
//! The thread matters: a worker asks to be killed when its parent ends, and for the kernel the parent is the *thread*
//! that spawned it. Invariants: a worker inherits nothing but its end of the link (as standard input) and the pipe of
//! its standard error; its environment is empty.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::limits::{STDERR_LINE_BYTES_MAX, STDERR_LINES_PER_SECOND_MAX};
use crate::logging::printable;

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
    /// The thread that starts workers has ended, which only happens when the supervisor ends.
    #[error("the supervisor is ending")]
    Ending,
}

/// A started process and the supervisor's end of its link.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) stream: UnixStream,
}

/// The handle on the thread that starts workers.
#[derive(Clone, Debug)]
pub struct Spawner {
    orders: mpsc::Sender<oneshot::Sender<Result<Spawned, SpawnError>>>,
}

impl Spawner {
    /// Starts the thread. It ends when the last handle is dropped; keep one until the process ends.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(worker: PathBuf) -> io::Result<Spawner> {
        let (orders, mut received) = mpsc::channel::<oneshot::Sender<_>>(1);
        let runtime = tokio::runtime::Handle::current();
        thread::Builder::new().name("spawner".into()).spawn(move || {
            let _guard = runtime.enter();
            while let Some(reply) = received.blocking_recv() {
                // Whoever asked may have gone; the process then ends when its handle is dropped.
                drop(reply.send(spawn(&worker)));
            }
        })?;
        Ok(Spawner { orders })
    }

    pub(crate) async fn spawn(&self, incarnation: u32) -> Result<Spawned, SpawnError> {
        let (reply, answer) = oneshot::channel();
        self.orders.send(reply).await.map_err(|_| SpawnError::Ending)?;
        let mut spawned = answer.await.map_err(|_| SpawnError::Ending)??;
        if let Some(stderr) = spawned.child.stderr.take() {
            tokio::spawn(carry_lines(stderr, incarnation));
        }
        Ok(spawned)
    }
}

fn spawn(worker: &Path) -> Result<Spawned, SpawnError> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(SpawnError::Link)?;
    ours.set_nonblocking(true).map_err(SpawnError::Link)?;
    let stream = UnixStream::from_std(ours).map_err(SpawnError::Link)?;
    let child = Command::new(worker)
        .arg("serve")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| SpawnError::Program { worker: worker.to_owned(), source })?;
    Ok(Spawned { child, stream })
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
