//! The bounds that only the supervisor checks; what both processes check stands in `bulkhead_shared::limits`.

use std::time::Duration;

use bulkhead_shared::limits::{BODY_BYTES_MAX, DELTA_TEXT_BYTES_MAX};

/// Open HTTP connections, at most; for further ones those have to go that keep the server waiting. Below the usual 1024
/// descriptors.
pub(crate) const CONNECTIONS_MAX: usize = 512;

/// Bytes of the head of a request, at most: its line and its headers.
pub(crate) const HEAD_BYTES_MAX: usize = 32 * 1024;

/// Headers of a request, at most.
pub(crate) const HEADERS_MAX: usize = 100;

/// Time for a client to send the head of a request, and so also for which an idle connection stays open.
pub(crate) const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a client to send the body of a request.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Time in which a body has to grow by so many bytes, unless it ends.
pub(crate) const BODY_WINDOW: Duration = Duration::from_secs(10);
pub(crate) const BODY_WINDOW_BYTES: usize = 4 * 1024;

/// Time for which a client may take nothing of what was sent to it: it is gone, or stands still.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(600);

/// Bytes of one API key.
pub(crate) const KEY_BYTES_MIN: usize = 16;
pub(crate) const KEY_BYTES_MAX: usize = 256;

/// Bytes of the name of an API key, at most.
pub(crate) const KEY_NAME_BYTES_MAX: usize = 64;

/// API keys, at most; each is compared with each that a client shows.
pub(crate) const KEYS_MAX: usize = 1024;

/// Bytes of the file with API keys, at most.
pub(crate) const KEYS_FILE_BYTES_MAX: usize = 512 * 1024;

/// Bytes of all bodies that are being read and checked, at most: bounds the memory of requests not yet admitted.
pub(crate) const BODIES_BYTES_MAX: usize = 32 * BODY_BYTES_MAX;

/// Bytes of the body of a client without a valid key which are read and thrown away, so that it gets to see the answer.
pub(crate) const STRANGER_BYTES_MAX: usize = 64 * 1024;

/// Bytes of a body that is too large which are read and thrown away, so that the client gets to see the answer.
pub(crate) const DRAIN_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;

/// Time between the comments that keep a silent stream open.
pub(crate) const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Frames that may wait in either direction of a link, at most.
pub(crate) const LINK_FRAMES_MAX: usize = 64;

/// Commands and events between the queue and a child that may wait, at most.
pub(crate) const CHILD_MESSAGES_MAX: usize = 64;

/// Bytes of text in the answer to one request, at most: a worker that sends more is lying.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Bytes of text of one answer that wait for its reader, at most: beyond, its sequence stops until the reader has caught up.
/// The last step before that may add one message.
pub(crate) const UNREAD_BYTES_MAX: usize = 256 * 1024;

/// Bytes of one line of a worker's standard error; what is longer is logged in parts.
pub(crate) const STDERR_LINE_BYTES_MAX: usize = 4096;

/// Lines of a worker's standard error that are logged in one second, at most; the number of the others is logged.
pub(crate) const STDERR_LINES_PER_SECOND_MAX: u32 = 200;

/// Time between signs of life that are asked of a running worker.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(1);

/// Silence after which a running worker is called degraded.
pub(crate) const SLUGGISH_AFTER: Duration = Duration::from_secs(5);

/// Time from the spawn of a worker to its `Hello`.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(30);

/// What a worker for the processor may hold of its own while it loads, before there is a plan that says more: weights are
/// mapped, and tables of text are what is left. Units: bytes.
pub(crate) const LOAD_BYTES_MAX: u64 = 4 << 30;

/// Time for a worker to end after it was asked to, or after it closed its link.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The pause before the first restart that has to wait; it doubles with each further death.
pub(crate) const BACKOFF_MIN: Duration = Duration::from_millis(500);

/// The longest pause before a restart.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Deaths in a row without a delivered token after which a worker is given up.
pub(crate) const DEATHS_MAX: u32 = 5;

/// Time for which a worker has to have been ready before its plan is taken back up by a rung.
pub(crate) const HEALTHY_SPELL: Duration = Duration::from_secs(600);

/// Kills from outside in a row, before the worker was running, after which it is given up.
pub(crate) const START_KILLS_MAX: u32 = 20;

/// Time for the CUDA worker to list its devices: a driver that wakes a card takes seconds.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of that list, and of what is said in its place, at most.
pub(crate) const PROBE_BYTES_MAX: usize = 64 * 1024;

/// Time between two readings of a card's memory.
pub(crate) const MEMORY_SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two readings while the memory of an ended worker is waited for.
pub(crate) const MEMORY_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Time for the driver to take back the memory of an ended worker.
pub(crate) const MEMORY_WAIT_MAX: Duration = Duration::from_secs(5);

/// Lines of the log that are kept in memory, at most.
pub(crate) const LOG_LINES_MAX: usize = 1000;

/// Bytes of one line of the log that are kept in memory, at most.
pub(crate) const LOG_LINE_BYTES_MAX: usize = 8 * 1024;

/// Time for a worker to do what people want of it, before they are told how far it is.
pub(crate) const ADMIN_ACTION_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of one line on the admin socket, at most.
pub(crate) const ADMIN_LINE_BYTES_MAX: usize = 64 * 1024;

/// Time for an admin client to send its line and take its answer.
pub(crate) const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections on the admin socket, at most.
pub(crate) const ADMIN_CONNECTIONS_MAX: usize = 16;

const _: () = assert!(PROBE_TIMEOUT.as_millis() + MEMORY_WAIT_MAX.as_millis() < START_TIMEOUT.as_millis());
const _: () = assert!(DRAIN_BYTES_MAX > BODY_BYTES_MAX);
const _: () = assert!(KEYS_FILE_BYTES_MAX > KEYS_MAX * (KEY_NAME_BYTES_MAX + KEY_BYTES_MAX + 2));
const _: () = assert!(BODY_WINDOW.as_millis() < BODY_TIMEOUT.as_millis());
const _: () = assert!(ANSWER_BYTES_MAX > DELTA_TEXT_BYTES_MAX);
const _: () = assert!(BACKOFF_MIN.as_millis() < BACKOFF_MAX.as_millis());
const _: () = assert!(STDERR_LINE_BYTES_MAX < LOG_LINE_BYTES_MAX);
const _: () = assert!(ADMIN_CONNECTIONS_MAX + CONNECTIONS_MAX < 1024);
