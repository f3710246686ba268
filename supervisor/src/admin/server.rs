//! The supervisor's side of the admin socket.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::command::{self, Desk, Order};
use super::{AdminError, LOCK, SOCKET};
use crate::limits::{ADMIN_CONNECTIONS_MAX, ADMIN_LINE_BYTES_MAX, ADMIN_TIMEOUT};
use crate::logging::Recent;
use crate::unix;

/// The open socket, with the lock that makes it ours.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    _lock: File,
}

/// Opens the socket in a folder that is ours alone. A socket that a dead supervisor left is replaced.
///
/// # Errors
/// `InUse` when another supervisor lives there; `Unusable` when the files cannot be made.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn open(folder: &Path) -> Result<AdminSocket, AdminError> {
    let path = folder.join(SOCKET);
    let unusable = |source| AdminError::Unusable { path: path.clone(), source };
    let lock_path = folder.join(LOCK);
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(lock_path);
    let lock = lock.map_err(unusable)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(AdminError::InUse(folder.to_owned())),
        Err(TryLockError::Error(source)) => return Err(unusable(source)),
    }
    // Whoever holds the lock is alone here, so a socket that exists is stale.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(unusable(error)),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&path).map_err(unusable)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(unusable)?;
    // Accepted connections inherit it.
    if !unix::refuse_descriptors(&listener) {
        debug!("this kernel cannot refuse descriptors on a socket: those that come are closed unread");
    }
    Ok(AdminSocket { listener, path, _lock: lock })
}

impl AdminSocket {
    /// Serves until the other end of `open` is dropped, then ends its connections and removes the socket.
    pub(crate) async fn serve(self, desk: Desk, mut open: mpsc::Receiver<()>) {
        let places = Arc::new(Semaphore::new(ADMIN_CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                _ = open.recv() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept an admin connection");
                    tokio::time::sleep(ADMIN_TIMEOUT / 50).await;
                    continue;
                }
            };
            // Beyond the bound the connection is closed at once.
            let Ok(place) = places.clone().try_acquire_owned() else { continue };
            let desk = desk.clone();
            connections.spawn(async move {
                if let Err(error) = answer(stream, &desk).await {
                    debug!(%error, "admin connection ended early");
                }
                drop(place);
            });
        }
        if let Err(error) = fs::remove_file(&self.path) {
            debug!(%error, "cannot remove the admin socket");
        }
    }
}

async fn answer(mut stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != nix::unistd::geteuid().as_raw() {
        warn!(peer, "another user tried the admin socket");
        return Ok(());
    }
    let (read_half, mut write_half) = stream.split();
    let mut line = Vec::new();
    let limit = ADMIN_LINE_BYTES_MAX as u64;
    let mut reader = BufReader::new(read_half).take(limit);
    in_time(reader.read_until(b'\n', &mut line)).await?;
    match command::read(&line) {
        Ok(Order::Follow { lines }) => follow(&mut write_half, &desk.recent, lines).await,
        Ok(order) => {
            let result = desk.carry_out(order).await;
            write(&mut write_half, &result).await
        }
        Err(error) => write(&mut write_half, &Err(error)).await,
    }
}

/// Sends the last lines of the log, and then what is added, until the other side is gone.
async fn follow(stream: &mut (impl AsyncWrite + Unpin), recent: &Recent, lines: u64) -> io::Result<()> {
    let mut next = recent.last(lines);
    loop {
        let (lines, after) = recent.since(next);
        write(stream, &Ok(json!({"lines": lines}))).await?;
        next = after;
        recent.wait_for(next).await;
    }
}

async fn write(stream: &mut (impl AsyncWrite + Unpin), result: &Result<Value, String>) -> io::Result<()> {
    let reply = match result {
        Ok(result) => json!({"ok": true, "result": result}),
        Err(error) => json!({"ok": false, "error": error}),
    };
    in_time(stream.write_all(format!("{reply}\n").as_bytes())).await
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(ADMIN_TIMEOUT, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
