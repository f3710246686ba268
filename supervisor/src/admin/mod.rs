//! The private door: a socket in the runtime folder, one line of JSON each way.
//!
//! A request is `{"command": NAME}`, its answer `{"ok": true, "result": ...}` or `{"ok": false, "error": TEXT}`. The
//! commands: `status`, `start`, `stop` and perhaps `now`, `restart`, `queue`, `cancel` with an `id`, `tail` with a number of
//! `lines` and perhaps `follow`, `reread` and `version`. What follows the log gets an answer each time that there is more of
//! it. Invariants: only the supervisor's own user and root are answered; one supervisor to a runtime folder.

pub mod client;
pub mod command;
pub mod server;

use std::io;
use std::path::PathBuf;

/// The name of the socket in the runtime folder.
pub const SOCKET: &str = "admin.sock";

/// The name of the file that a supervisor holds locked while it uses the folder.
const LOCK: &str = "admin.lock";

/// Why the private door does not open.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Another supervisor lives there.
    #[error(
        "another bulkhead uses {}: end it, or give this one its own folder with --runtime-dir", .0.display()
    )]
    InUse(PathBuf),
    /// The socket or its lock cannot be made.
    #[error("cannot open the admin socket {}: {source}; choose another folder with --runtime-dir", path.display())]
    Unusable {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}
