//! The link to the supervisor: frames in, frames out.
//!
//! The link is the process's standard input, a socket. One thread reads, one writes; whoever has something to say puts it
//! into the bounded outbox. Whatever is wrong with the link or with a frame ends the worker: the supervisor starts another.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use bulkhead_shared::frame::{self, FrameError, LENGTH_BYTES};
use bulkhead_shared::limits::{FROM_WORKER_FRAME_BYTES_MAX, TO_WORKER_FRAME_BYTES_MAX};
use bulkhead_shared::message::{FromWorker, ToWorker};
use crossbeam_channel::{Receiver, Sender};

use crate::sandbox::Sealed;

/// Frames that may wait to be written. The supervisor reads without ever waiting for a client, so this fills up only when
/// the machine is very busy; the engine waits then.
const OUTBOX_FRAMES_MAX: usize = 1024;

/// Why the link cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The worker was not started by a supervisor.
    #[error("standard input is no socket: this command is started by bulkhead, not by hand ({0})")]
    NotASocket(#[source] io::Error),
    /// The socket failed.
    #[error("the link to the supervisor failed: {0}")]
    Io(#[from] io::Error),
    /// A frame is broken.
    #[error("the supervisor sent a bad frame: {0}")]
    Frame(#[from] FrameError),
}

/// The reading end.
#[derive(Debug)]
pub struct Inbound {
    stream: UnixStream,
}

/// The writing end: frames put into it are written in order by a thread of its own.
#[derive(Debug)]
pub struct Outbound {
    /// Where frames go in. Clones may be handed to any thread.
    pub outbox: Sender<FromWorker>,
    writer: JoinHandle<()>,
}

impl Outbound {
    /// Waits until everything that was said has been written. Every clone of the outbox must be gone.
    pub fn flush(self) {
        drop(self.outbox);
        // A writer that panicked has ended the process already.
        let _ = self.writer.join();
    }
}

/// Opens the link and starts the thread that writes. The proof says that no frame is read before the walls.
///
/// # Errors
/// `NotASocket` when standard input is something else; `Io` when it cannot be duplicated.
pub fn open(_proof: &Sealed) -> Result<(Inbound, Outbound), LinkError> {
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    stream.peer_addr().map_err(LinkError::NotASocket)?;
    let writing = stream.try_clone()?;
    let (outbox, frames) = crossbeam_channel::bounded(OUTBOX_FRAMES_MAX);
    let writer = std::thread::Builder::new().name("link-writer".into());
    let writer = writer.spawn(move || write_frames(writing, &frames))?;
    Ok((Inbound { stream }, Outbound { outbox, writer }))
}

impl Inbound {
    /// Reads the next message; `None` when the supervisor has closed the link.
    ///
    /// Blocking: until a whole frame has come.
    ///
    /// # Errors
    /// `Io`, also for a link that ends within a frame; `Frame` for bytes that are no message.
    pub fn read(&mut self) -> Result<Option<ToWorker>, LinkError> {
        let mut prefix = [0; LENGTH_BYTES];
        if self.stream.read(&mut prefix[..1])? == 0 {
            return Ok(None);
        }
        self.stream.read_exact(&mut prefix[1..])?;
        let mut payload = vec![0; frame::decode_length(prefix, TO_WORKER_FRAME_BYTES_MAX)?];
        self.stream.read_exact(&mut payload)?;
        Ok(Some(frame::decode(&payload)?))
    }

    /// Gives a handle that ends a `read` in progress, as if the supervisor had closed the link.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn closer(&self) -> Result<UnixStream, LinkError> {
        Ok(self.stream.try_clone()?)
    }
}

/// Writes frames until the outbox or the link is closed. A frame that cannot be encoded is a bug here, and the panic ends
/// the process.
fn write_frames(mut stream: UnixStream, frames: &Receiver<FromWorker>) {
    for message in frames {
        let frame = frame::encode(&message, FROM_WORKER_FRAME_BYTES_MAX).expect("our own frames keep to their limits");
        if stream.write_all(&frame).is_err() {
            return;
        }
    }
}
