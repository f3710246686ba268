//! The supervisor's side of the admin socket.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tracing::{debug, warn};

use super::{AdminError, LOCK, SOCKET};
use crate::fleet::Fleet;
use crate::http;
use crate::limits::{ADMIN_CONNECTIONS_MAX, ADMIN_LINE_BYTES_MAX, ADMIN_TIMEOUT};

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
    Ok(AdminSocket { listener, path, _lock: lock })
}

impl AdminSocket {
    /// Serves until the other end of `open` is dropped, then removes the socket.
    pub async fn serve(self, fleet: Arc<Fleet>, mut open: mpsc::Receiver<()>) {
        let places = Arc::new(Semaphore::new(ADMIN_CONNECTIONS_MAX));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
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
            let fleet = fleet.clone();
            tokio::spawn(async move {
                let answered = tokio::time::timeout(ADMIN_TIMEOUT, answer(stream, &fleet)).await;
                debug!(in_time = answered.is_ok(), "admin connection ended");
                drop(place);
            });
        }
        if let Err(error) = fs::remove_file(&self.path) {
            debug!(%error, "cannot remove the admin socket");
        }
    }
}

async fn answer(mut stream: UnixStream, fleet: &Fleet) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != nix::unistd::geteuid().as_raw() {
        warn!(peer, "another user tried the admin socket");
        return Ok(());
    }
    let (read_half, mut write_half) = stream.split();
    let mut line = Vec::new();
    let limit = ADMIN_LINE_BYTES_MAX as u64;
    BufReader::new(read_half).take(limit).read_until(b'\n', &mut line).await?;
    let mut reply = reply(&line, fleet).to_string().into_bytes();
    reply.push(b'\n');
    write_half.write_all(&reply).await
}

fn reply(line: &[u8], fleet: &Fleet) -> Value {
    let request: Value = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return json!({"ok": false, "error": format!("the request is no line of JSON: {error}")}),
    };
    match request["command"].as_str() {
        Some("status") => {
            let (running, waiting) = fleet.tickets.lengths();
            let queue = json!({"running": running, "waiting": waiting});
            let result = json!({"workers": [http::worker(fleet)], "queue": queue, "pid": std::process::id()});
            json!({"ok": true, "result": result})
        }
        Some(other) => json!({"ok": false, "error": format!("unknown command {other:?}")}),
        None => json!({"ok": false, "error": "the request has no command"}),
    }
}
