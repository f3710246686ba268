//! The life of the supervisor: checks, opens its doors, runs, and ends in order.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::limits::WORKER_REQUESTS_MAX;
use bulkhead_shared::message::{DeviceChoice, LoadPlan};
use bulkhead_shared::units::Bytes;
use nix::sys::socket::{Backlog, listen};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use crate::admin::command::Desk;
use crate::admin::server::AdminSocket;
use crate::admin::{self, AdminError};
use crate::child::cgroup::{Leaf, NoLeaf};
use crate::child::lifecycle::Settings;
use crate::child::spawn::{Host, Spawner, Startup};
use crate::child::{self, Control};
use crate::config::paths::{self, PathError};
use crate::config::{Config, DeviceSetting, Loaded, WorkerCgroup};
use crate::device::{Answer, Devices, Programs, Refused};
use crate::fleet::{self, Fleet};
use crate::http::{self, Door};
use crate::keys::{Keys, KeysError};
use crate::limits::{BACKOFF_MAX, BACKOFF_MIN, DEATHS_MAX, START_KILLS_MAX, START_TIMEOUT, STOP_TIMEOUT};
use crate::logging::Recent;
use crate::metrics::Metrics;
use crate::queue::Bounds;
use crate::shutdown::{Budget, Meaning, Signals};
use crate::tickets::Tickets;
use crate::walls::{self, Begun, Walls, WallsError};

/// Requests that a worker is handed beyond those that it computes, so that it never waits for the next one.
const REQUESTS_AHEAD: usize = 4;

/// Connections that may wait to be accepted; the kernel may allow fewer.
const LISTEN_QUEUE: i32 = 1024;

/// Why the supervisor does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A path of the configuration cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The API keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The supervisor's own walls do not stand.
    #[error(transparent)]
    Walls(#[from] WallsError),
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
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] Refused),
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
    let is_in_use = error.kind() == std::io::ErrorKind::AddrInUse;
    if is_in_use { "the address is in use".into() } else { error.to_string() }
}

/// How the supervisor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// In order.
    InOrder,
    /// At once, by a second signal.
    AtOnce,
}

/// What is opened with the rights that the supervisor was started with, before it gives them up.
#[derive(Debug)]
pub struct Gate {
    listener: std::net::TcpListener,
    address: SocketAddr,
    keys: Arc<Keys>,
    walls: Arc<Walls>,
    warnings: Vec<String>,
    leaf: Result<Arc<Leaf>, NoLeaf>,
}

/// Opens the gate and puts up the supervisor's walls, for good.
///
/// # Errors
/// `StartError` when something cannot be opened, a wall does not stand, or threads are running already.
pub fn enclose(begun: Begun, config: &Config) -> Result<Gate, StartError> {
    let identity = walls::identity(config.user.as_deref())?;
    let (keys, outcome) = Keys::load(config.api_keys_file.clone())?;
    let listening = |source| StartError::Listen { address: config.listen, source };
    let listener = std::net::TcpListener::bind(config.listen).map_err(listening)?;
    listener.set_nonblocking(true).map_err(listening)?;
    // The standard library asks for a short queue, in which a flood keeps out everyone else.
    let queue = Backlog::new(LISTEN_QUEUE).unwrap_or(Backlog::MAXCONN);
    listen(&listener, queue).map_err(|error| listening(error.into()))?;
    let address = listener.local_addr().map_err(listening)?;
    paths::make_runtime_dir(&config.runtime_dir, &identity)?;
    let may_use_card = config.device != DeviceSetting::Cpu && config.worker_cuda.is_file();
    let leaf = match config.worker_cgroup {
        WorkerCgroup::Auto => Leaf::make(host_memory(config)).map(Arc::new),
        WorkerCgroup::Off => Err(NoLeaf::Off),
    };
    let control_group = leaf.as_ref().ok().and_then(|leaf| leaf.parent()).map(Path::to_owned);
    let writable = walls::writable(config.runtime_dir.clone(), control_group, may_use_card);
    let walls = walls::raise(begun, &identity, &writable)?;
    let warnings = outcome.warning.into_iter().chain(walls.warnings().iter().cloned()).collect();
    Ok(Gate { listener, address, keys: Arc::new(keys), walls: Arc::new(walls), warnings, leaf })
}

/// Runs the supervisor until a signal ends it. `recent` is what `bulkheadctl tail` shows.
///
/// # Errors
/// `StartError` when it cannot start; nothing is left behind then.
pub async fn serve(loaded: Loaded, recent: Arc<Recent>, gate: Gate) -> Result<Ended, StartError> {
    let Loaded { config, mut warnings, .. } = loaded;
    let doors = Doors::open(&config, gate).await?;
    let mut signals = Signals::new().map_err(|source| StartError::System { what: "take over signals", source })?;
    info!(address = %doors.address, model = config.model_id, folder = doors.model_dir, "bulkhead serves");
    info!(user = doors.walls.user(), walls = ?doors.walls.walls(), "the supervisor's walls stand");
    tell_leaf(&doors.leaf);
    warnings.extend(doors.warnings.iter().cloned());
    warnings.iter().for_each(|warning| warn!("{warning}"));
    if matches!(config.sandbox, SandboxMode::Off | SandboxMode::Log) {
        let sandbox = config.sandbox.as_str();
        warn!(sandbox, "workers have no walls: a hostile model or prompt can reach whatever this user can");
    }
    let shutdown_timeout = config.shutdown_timeout;
    let (devices, keys) = (doors.devices.clone(), doors.keys.clone());
    let running = Running::start(config, doors, recent);

    let name = loop {
        tokio::select! {
            meaning = signals.next() => match meaning {
                Meaning::End(name) => break name,
                // What came of it is in the log.
                Meaning::Reread => drop(keys.reload_and_log()),
            },
            refused = devices.refusal() => {
                running.end(Budget::new(Duration::ZERO)).await;
                return Err(refused.into());
            }
        }
    };
    info!(signal = name, "shutting down: running requests may end, new ones are refused");
    let ended = tokio::select! {
        () = running.end(Budget::new(shutdown_timeout)) => Ended::InOrder,
        name = signals.end() => {
            warn!(signal = name, "ending at once");
            Ended::AtOnce
        }
    };
    info!("bulkhead has ended");
    Ok(ended)
}

/// Everything that may be refused at a start, in the order in which it is opened.
struct Doors {
    model_dir: String,
    listener: TcpListener,
    address: SocketAddr,
    keys: Arc<Keys>,
    walls: Arc<Walls>,
    warnings: Vec<String>,
    leaf: Result<Arc<Leaf>, NoLeaf>,
    admin: AdminSocket,
    devices: Devices,
    spawner: Spawner,
    closing: watch::Sender<bool>,
    is_closing: watch::Receiver<bool>,
}

impl Doors {
    async fn open(config: &Config, gate: Gate) -> Result<Doors, StartError> {
        let Gate { listener, address, keys, walls, warnings, leaf } = gate;
        let model_dir = paths::check_model(&config.model)?;
        paths::check_worker(&config.worker)?;
        let (closing, is_closing) = watch::channel(false);
        let programs = Programs { cpu: config.worker.clone(), cuda: config.worker_cuda.clone() };
        let devices = Devices::ask(config.device, programs, is_closing.clone());
        if let Answer::Refused(refused) = devices.now() {
            return Err(refused.into());
        }
        let listener = TcpListener::from_std(listener);
        let listener = listener.map_err(|source| StartError::Listen { address: config.listen, source })?;
        let startup = Startup {
            model_dir: model_dir.clone(),
            threads: config.threads,
            cpu: config.cpu,
            sandbox: config.sandbox,
            landlock_abi_min: config.landlock_abi_min,
        };
        let host = Host {
            device_memory: config.device_memory,
            memory: host_memory(config),
            leaf: leaf.as_ref().ok().cloned(),
        };
        let spawner = Spawner::new(devices.clone(), host, startup);
        let spawner = spawner.map_err(|source| StartError::System { what: "start a thread", source })?;
        let admin = admin::server::open(&config.runtime_dir)?;
        Ok(Doors {
            model_dir,
            listener,
            address,
            keys,
            walls,
            warnings,
            leaf,
            admin,
            devices,
            spawner,
            closing,
            is_closing,
        })
    }
}

/// Says in the log whether a kill by the kernel will be told for certain.
fn tell_leaf(leaf: &Result<Arc<Leaf>, NoLeaf>) {
    match leaf {
        Ok(_) => {
            info!("workers have a control group of their own, which tells when the kernel kills one for want of memory")
        }
        Err(reason) => info!(%reason, "workers have no control group of their own"),
    }
}

fn host_memory(config: &Config) -> Option<Bytes> {
    Some(config.host_memory).filter(|memory| *memory > Bytes(0))
}

/// The tasks of a running supervisor and the handles that end them.
struct Running {
    tickets: Arc<Tickets>,
    controls: mpsc::Sender<Control>,
    child: JoinHandle<()>,
    closing: watch::Sender<bool>,
    http: JoinHandle<()>,
    admin_open: mpsc::Sender<()>,
    admin: JoinHandle<()>,
    leaf: Option<Arc<Leaf>>,
    /// Keeps the thread alive that spawned the worker: with the thread ends the worker.
    _spawner: Spawner,
}

impl Running {
    fn start(config: Config, doors: Doors, recent: Arc<Recent>) -> Running {
        let metrics = Arc::new(Metrics::default());
        let tickets = Tickets::new(bounds(&config), config.request_timeout, metrics.clone());
        let plan = plan(&config, doors.model_dir);
        let child = child::start(doors.spawner.clone(), plan, settings(&config));
        let seen =
            fleet::Seen { sandbox: config.sandbox, status: child.status, controls: child.controls.clone(), metrics };
        let fleet = Fleet::new(config.model_id, config.aliases, doors.devices, seen, tickets.clone());
        let fleet = Arc::new(fleet);
        let (keys, walls) = (doors.keys, doors.walls);
        let desk = Desk { fleet: fleet.clone(), recent, keys: keys.clone(), walls: walls.clone() };
        let door = Door { listen: doors.address, keys, cors_origins: config.cors_origins, walls };
        let router = http::router(fleet, door);
        let (admin_open, is_open) = mpsc::channel::<()>(1);
        Running {
            controls: child.controls,
            child: tokio::spawn(tickets.clone().run(child.commands, child.reports)),
            closing: doors.closing,
            http: tokio::spawn(http::server::serve(doors.listener, router, doors.is_closing)),
            admin_open,
            admin: tokio::spawn(doors.admin.serve(desk, is_open)),
            tickets,
            leaf: doors.leaf.ok(),
            _spawner: doors.spawner,
        }
    }

    /// Ends in order: requests, worker, connections, the private door.
    async fn end(self, budget: Budget) {
        self.tickets.drain();
        if tokio::time::timeout(budget.drain, self.tickets.wait_until_idle()).await.is_err() {
            warn!("requests are still running and are ended");
        }
        self.tickets.end_all();
        // A child that is gone needs no word; one that does not take it is left behind in time.
        let _ = self.controls.try_send(Control::End);
        // The last answers leave before their connections are closed.
        self.closing.send_replace(true);
        let both = async { tokio::join!(self.child, self.http) };
        if tokio::time::timeout(budget.rest, both).await.is_err() {
            warn!("the worker or a connection did not end in time");
        }
        for leaf in self.leaf.iter() {
            if let Err(error) = leaf.remove() {
                debug!(%error, "the worker's control group stays until the next start");
            }
        }
        drop(self.admin_open);
        // It only removes its socket; where that fails, the next start replaces a stale one.
        drop(self.admin.await);
    }
}

fn bounds(config: &Config) -> Bounds {
    let running_max = (config.sequences_max as usize + REQUESTS_AHEAD).min(WORKER_REQUESTS_MAX);
    let step_max = config.sequences_max as usize;
    Bounds { step_max, running_max, waiting_max: config.queue_max, bytes_max: config.queue_bytes_max }
}

fn plan(config: &Config, model_dir: String) -> LoadPlan {
    LoadPlan {
        model_dir,
        // Decided when a worker is started, as is what it may hold there.
        device: DeviceChoice::Cpu,
        may_use_processor: config.device == DeviceSetting::Auto,
        device_budget: config.device_memory,
        kv_type: config.kv_cache_type,
        context_tokens: config.context_tokens,
        sequences_max: config.sequences_max,
        kv_bytes: Bytes(0),
        faults: config.faults,
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
