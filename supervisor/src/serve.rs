//! The life of the supervisor: checks, opens its doors, runs, and ends in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_shared::limits::WORKER_REQUESTS_MAX;
use bulkhead_shared::message::LoadPlan;
use bulkhead_shared::units::Bytes;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::admin::{self, AdminError};
use crate::child::lifecycle::Settings;
use crate::child::spawn::Spawner;
use crate::child::{self};
use crate::config::paths::{self, PathError};
use crate::config::{Config, Loaded};
use crate::fleet::Fleet;
use crate::http;
use crate::limits::{BACKOFF_MAX, BACKOFF_MIN, DEATHS_MAX, START_KILLS_MAX, START_TIMEOUT, STOP_TIMEOUT};
use crate::queue::Bounds;
use crate::shutdown::{Budget, Signals};
use crate::tickets::Tickets;

/// Requests that a worker is handed beyond those that it computes, so that it never waits for the next one.
const REQUESTS_AHEAD: usize = 4;

/// Why the supervisor does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A path of the configuration cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {}; choose another one with --listen", describe_listen(source))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The admin socket cannot be opened.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The system refuses something that every process gets.
    #[error("cannot {what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

fn describe_listen(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "the address is in use".into(),
        _ => error.to_string(),
    }
}

/// How the supervisor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// In order.
    InOrder,
    /// At once, by a second signal.
    AtOnce,
}

/// Runs the supervisor until a signal ends it.
///
/// # Errors
/// `StartError` when it cannot start; nothing is left behind then.
pub async fn serve(loaded: Loaded) -> Result<Ended, StartError> {
    let config = loaded.config;
    let system = |what| move |source| StartError::System { what, source };
    let model_dir = paths::check_model(&config.model)?;
    paths::check_worker(&config.worker)?;
    let listen_error = |source| StartError::Listen { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    paths::make_runtime_dir(&config.runtime_dir)?;
    let admin_socket = admin::server::open(&config.runtime_dir)?;
    let mut signals = Signals::new().map_err(system("take over signals"))?;
    let spawner = Spawner::new(config.worker.clone()).map_err(system("start a thread"))?;

    info!(%address, model = config.model_id, folder = %config.model.display(), "bulkhead serves");
    loaded.warnings.iter().for_each(|warning| warn!("{warning}"));
    if let Some(reason) = config.device_reason {
        info!(reason, "the model computes on the CPU");
    }

    let tickets = Tickets::new(bounds(&config), config.request_timeout);
    let child = child::start(spawner.clone(), plan(&config, model_dir), settings(&config));
    let child_stop = child.stop.clone();
    let child_task = tokio::spawn(tickets.clone().run(child.commands, child.reports));
    let fleet = Fleet::new(config.model_id, config.aliases, config.device_reason, child.status, tickets.clone());
    let fleet = Arc::new(fleet);
    let (closing, is_closing) = watch::channel(false);
    let http_task = tokio::spawn(http::server::serve(listener, http::router(fleet.clone(), address), is_closing));
    let (admin_guard, admin_open) = mpsc::channel::<()>(1);
    let admin_task = tokio::spawn(admin_socket.serve(fleet, admin_open));

    let name = signals.next().await;
    let budget = Budget::new(config.shutdown_timeout);
    info!(signal = name, "shutting down: running requests may end, new ones are refused");
    let in_order = async {
        tickets.drain();
        if tokio::time::timeout(budget.drain, tickets.wait_until_idle()).await.is_err() {
            warn!("requests are still running and are ended");
        }
        tickets.end_all();
        child_stop.notify_one();
        // The last answers leave before their connections are closed.
        closing.send_replace(true);
        let both = async { tokio::join!(child_task, http_task) };
        if tokio::time::timeout(budget.rest.max(Duration::from_millis(50)), both).await.is_err() {
            warn!("the worker or a connection did not end in time");
        }
    };
    let ended = tokio::select! {
        () = in_order => Ended::InOrder,
        name = signals.next() => {
            warn!(signal = name, "ending at once");
            Ended::AtOnce
        }
    };
    drop(admin_guard);
    // It only removes its socket; a failure to do so leaves a stale one, which the next start replaces.
    drop(admin_task.await);
    // The thread that spawned the worker lives until here.
    drop(spawner);
    info!("bulkhead has ended");
    Ok(ended)
}

fn bounds(config: &Config) -> Bounds {
    let running_max = (config.sequences_max as usize + REQUESTS_AHEAD).min(WORKER_REQUESTS_MAX);
    Bounds { running_max, waiting_max: config.queue_max, bytes_max: config.queue_bytes_max }
}

fn plan(config: &Config, model_dir: String) -> LoadPlan {
    LoadPlan {
        model_dir,
        device: config.device,
        threads: config.threads,
        context_tokens: config.context_tokens,
        sequences_max: config.sequences_max,
        kv_bytes: Bytes(0),
        step_delay_ms: config.step_delay_ms,
    }
}

fn settings(config: &Config) -> Settings {
    Settings {
        start_timeout: START_TIMEOUT,
        load_timeout: config.load_timeout,
        hang_timeout: config.hang_timeout,
        stop_timeout: STOP_TIMEOUT,
        backoff_min: BACKOFF_MIN,
        backoff_max: BACKOFF_MAX,
        deaths_max: DEATHS_MAX,
        start_kills_max: START_KILLS_MAX,
    }
}
