//! The two tasks that carry frames between the supervisor and one incarnation.
//!
//! Owns: reading, writing and decoding, with a bounded channel on each side. Refuses: meaning, which is `protocol`'s.
//! Invariants: no byte is reserved for a length that was not checked; neither task waits for a client. Dropping the
//! sender of `outgoing` closes the write side, which asks the worker to end.

use std::io;

use bulkhead_shared::frame::{self, FrameError, LENGTH_BYTES};
use bulkhead_shared::limits::FROM_WORKER_FRAME_BYTES_MAX;
use bulkhead_shared::message::FromWorker;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use crate::limits::LINK_FRAMES_MAX;

/// Why nothing more comes from a worker.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The bytes are no frame: a breach of protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The worker's side was closed in the middle of a frame, or the socket failed.
    #[error("the link broke: {0}")]
    Broken(#[source] io::Error),
}

/// The supervisor's end of the link to one incarnation.
#[derive(Debug)]
pub(crate) struct Link {
    /// Encoded frames for the worker. Dropping it closes the write side.
    pub(crate) outgoing: mpsc::Sender<Vec<u8>>,
    /// Messages of the worker, and at most one error, which is the last. Ends when the worker's side is closed.
    pub(crate) incoming: mpsc::Receiver<Result<FromWorker, LinkError>>,
}

/// Starts the two tasks on a connected socket.
pub(crate) fn open(stream: UnixStream) -> Link {
    let (read_half, write_half) = stream.into_split();
    let (outgoing, to_write) = mpsc::channel(LINK_FRAMES_MAX);
    let (read, incoming) = mpsc::channel(LINK_FRAMES_MAX);
    tokio::spawn(write_frames(write_half, to_write));
    tokio::spawn(read_frames(read_half, read));
    Link { outgoing, incoming }
}

async fn write_frames(mut stream: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        // A failed write means that the worker's end is gone; the reader and the wait for the process tell why.
        if stream.write_all(&frame).await.is_err() {
            return;
        }
    }
}

async fn read_frames(stream: OwnedReadHalf, messages: mpsc::Sender<Result<FromWorker, LinkError>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let message = match read_frame(&mut stream).await {
            Ok(Some(message)) => Ok(message),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let is_last = message.is_err();
        if messages.send(message).await.is_err() || is_last {
            return;
        }
    }
}

async fn read_frame(stream: &mut BufReader<OwnedReadHalf>) -> Result<Option<FromWorker>, LinkError> {
    let mut prefix = [0; LENGTH_BYTES];
    let first = stream.read(&mut prefix).await.map_err(LinkError::Broken)?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut prefix[first..]).await.map_err(LinkError::Broken)?;
    let bytes = frame::decode_length(prefix, FROM_WORKER_FRAME_BYTES_MAX)?;
    let mut payload = vec![0; bytes];
    stream.read_exact(&mut payload).await.map_err(LinkError::Broken)?;
    Ok(Some(frame::decode(&payload)?))
}
