//! The configuration: flags over environment over file over defaults, from one table.
//!
//! Owns: every setting, its name in each layer, its bounds, and where its value came from; all reads of the environment.
//! Refuses: to guess. A value that cannot be used is a fault, in whichever layer it stands, and all faults are reported
//! at once. Invariant: a [`Config`] holds no value that still has to be checked, except against the outside world.

pub(crate) mod access;
mod layers;
pub mod paths;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::limits::{CONTEXT_TOKENS_MAX, WORKER_REQUESTS_MAX};
use bulkhead_shared::message::{CpuChoice, Faults, KvType};
use bulkhead_shared::units::Bytes;

use layers::Settings;
pub(crate) use layers::edits;
pub use layers::{Environment, FLAG_CONFIG, flags};
use value::{Kind, Value};

/// Where the configuration file is looked for when none is named.
pub const SYSTEM_FILE: &str = "/etc/bulkhead/bulkhead.toml";

/// A setting: its name in the file, from which flag (`--log-level`) and variable (`BULKHEAD_LOG_LEVEL`) follow.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) default: &'static str,
    pub(crate) help: &'static str,
}

const fn key(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Key {
    Key { name, kind, default, help }
}

/// Every setting. An empty default of a text or path means what the help says.
pub(crate) const KEYS: &[Key] = &[
    key("listen", Kind::Text, "127.0.0.1:8000", "address and port to serve HTTP on"),
    key("allow_unauthenticated", Kind::Flag, "false", "serve on an address other than loopback without API keys"),
    key(
        "api_keys_file",
        Kind::Path,
        "",
        "API keys, a `name:key` or a key in each line [the systemd credential api-keys]",
    ),
    key("cors_origins", Kind::List, "", "web pages' origins that may call the API from a browser, or *"),
    key("user", Kind::Text, "", "ordinary user to become, where bulkhead is started as root"),
    key("model", Kind::Path, "", "folder of the model to serve [the built-in demonstration model]"),
    key("model_id", Kind::Text, "", "name of the model in the API [the folder's name]"),
    key("aliases", Kind::List, "", "further names of the model in the API"),
    key("device", Kind::Text, "auto", "where to compute: auto, cpu or cuda:N"),
    key("device_memory", Kind::Text, "0", "most that is held on a card, such as 16GiB; 0: 22 GiB or 90 % of the card"),
    key("host_memory", Kind::Text, "0", "most that a worker holds of the host's memory, such as 16GiB; 0: as planned"),
    key(
        "worker_cgroup",
        CGROUP,
        "auto",
        "whether a worker gets a control group of its own: auto (if possible), or off",
    ),
    key(
        "kv_cache_type",
        KV_CACHE,
        "bf16",
        "how keys and values are kept: bf16, or int8 (on a card) for half the memory",
    ),
    key("threads", Kind::Number { min: 0, max: 1024 }, "0", "threads that compute; 0: one for each core"),
    key("cpu", Kind::Choice(&CpuChoice::WORDS), "auto", "instructions to compute with on the processor"),
    key("context_tokens", CONTEXT, "0", "tokens of prompt and answer together; 0: the model's own limit"),
    key("sequences_max", SEQUENCES, "8", "requests that are computed at the same time"),
    key("queue_max", Kind::Number { min: 0, max: 65_536 }, "256", "requests that may wait"),
    key("queue_bytes_max", QUEUE_BYTES, "268435456", "bytes of all requests that wait or run"),
    key("request_timeout", Kind::Duration { min: SECOND, max: DAY }, "1h", "time for a request, waiting included"),
    key("shutdown_timeout", Kind::Duration { min: ZERO, max: DAY }, "5s", "time for running requests to end at a stop"),
    key("load_timeout", Kind::Duration { min: TENTH, max: DAY }, "60s", "time for which a load may stand still"),
    key("hang_timeout", Kind::Duration { min: TENTH, max: DAY }, "30s", "time for which a worker may stand still"),
    key("worker", Kind::Path, "", "the worker's executable [bulkhead-worker beside this one]"),
    key("worker_cuda", Kind::Path, "", "the executable for cards [bulkhead-worker-cuda beside this one]"),
    key("sandbox", Kind::Choice(&SandboxMode::WORDS), "full", "walls around a worker: full, best-effort, off, or log"),
    key("landlock_abi_min", LANDLOCK, "1", "least interface of Landlock that is enough: 3 is Linux 6.2, 6 is 6.12"),
    key("runtime_dir", Kind::Path, "", "folder of the admin socket [$XDG_RUNTIME_DIR/bulkhead or like it]"),
    key("log.format", Kind::Choice(&["human", "json"]), "human", "form of the log"),
    key("log.level", Kind::Choice(&["error", "warn", "info", "debug", "trace"]), "info", "least level of the log"),
    key("allow_faults", Kind::Flag, "false", "accept the settings under [faults], which make the service worse"),
    key("faults.step_delay_ms", Kind::Number { min: 0, max: 60_000 }, "0", "for tests: slows every step of the model"),
    key("faults.die_on_token", Kind::Maybe, "", "for tests: token id in whose step the worker crashes [none]"),
    key("faults.oom_after_steps", Kind::Maybe, "", "for tests: steps after which a worker is out of memory [never]"),
    key("faults.hang_after_steps", Kind::Maybe, "", "for tests: steps after which a worker stands still [never]"),
];

const CGROUP: Kind = Kind::Choice(&["auto", "off"]);
const LANDLOCK: Kind = Kind::Number { min: 1, max: 6 };
const CONTEXT: Kind = Kind::Number { min: 0, max: CONTEXT_TOKENS_MAX as u64 };
const KV_CACHE: Kind = Kind::Choice(&[KvType::Bf16.as_str(), KvType::Int8.as_str()]);
const SEQUENCES: Kind = Kind::Number { min: 1, max: WORKER_REQUESTS_MAX as u64 };
const MEMORY_MIN: Bytes = Bytes(256 << 20);
const MEMORY_MAX: Bytes = Bytes(1 << 42);
const QUEUE_BYTES: Kind = Kind::Number { min: 1 << 20, max: 1 << 40 };
const ZERO: Duration = Duration::ZERO;
const TENTH: Duration = Duration::from_millis(100);
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to serve HTTP.
    pub listen: SocketAddr,
    /// The API keys; without them anyone is served.
    pub api_keys_file: Option<PathBuf>,
    /// The origins of the web pages that may call the API, in the form that browsers send.
    pub cors_origins: Vec<String>,
    /// The ordinary user to become.
    pub user: Option<String>,
    /// The model's folder.
    pub model: PathBuf,
    /// The model's name in the API.
    pub model_id: String,
    /// Its further names.
    pub aliases: Vec<String>,
    /// Where to compute.
    pub device: DeviceSetting,
    /// What may be held on a card; 0 is a share of it.
    pub device_memory: Bytes,
    /// What a worker may hold of the host's memory; 0 is what its plan says.
    pub host_memory: Bytes,
    /// Whether a worker gets a control group of its own, where one can be made.
    pub worker_cgroup: WorkerCgroup,
    /// How keys and values are kept.
    pub kv_cache_type: KvType,
    /// Threads that compute; 0 lets the worker count.
    pub threads: u32,
    /// By which instructions the processor computes.
    pub cpu: CpuChoice,
    /// Context to serve; 0 takes the model's own.
    pub context_tokens: u32,
    /// Requests in one batch.
    pub sequences_max: u32,
    /// Requests that may wait.
    pub queue_max: usize,
    /// Bytes of all admitted requests.
    pub queue_bytes_max: usize,
    /// From the admission of a request to its end.
    pub request_timeout: Duration,
    /// From the signal to the end.
    pub shutdown_timeout: Duration,
    /// For which a load may stand still.
    pub load_timeout: Duration,
    /// For which a running worker may stand still.
    pub hang_timeout: Duration,
    /// The worker's executable.
    pub worker: PathBuf,
    /// The executable of the worker for cards, which need not be there.
    pub worker_cuda: PathBuf,
    /// How much isolation a worker must have.
    pub sandbox: SandboxMode,
    /// The least interface of Landlock that is enough.
    pub landlock_abi_min: u32,
    /// The folder of the admin socket.
    pub runtime_dir: PathBuf,
    /// The form of the log.
    pub log_format: LogFormat,
    /// The least level of the log.
    pub log_level: LogLevel,
    /// For tests: what is made worse on purpose.
    pub faults: Faults,
}

/// Where to compute, as people say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSetting {
    /// On the first card that can be used, else on the processor.
    Auto,
    /// On the processor.
    Cpu,
    /// On the CUDA card of this number.
    Cuda(u32),
}

/// Whether a worker gets a control group of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerCgroup {
    /// Where one can be made.
    Auto,
    /// It stays in the supervisor's.
    Off,
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// A line of text.
    Human,
    /// A JSON object in a line.
    Json,
}

/// The least level of the log, by its word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLevel(String);

impl LogLevel {
    /// Gives the word.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The table.
    Default,
    /// A line of a file, counted from 1.
    File(PathBuf, usize),
    /// A variable of the environment.
    Variable(String),
    /// A flag on the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path, line) => write!(f, "{}:{line}", path.display()),
            Origin::Variable(name) | Origin::Flag(name) => f.write_str(name),
        }
    }
}

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The file cannot be read.
    #[error("{}: cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// The file is not TOML.
    #[error("{origin}: {reason}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What the parser says.
        reason: String,
    },
    /// There is no such setting.
    #[error("{origin}: unknown setting {name:?}{}", suggestion(.nearest))]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// The name that is unknown.
        name: String,
        /// A known name that is much like it.
        nearest: Option<&'static str>,
    },
    /// The value cannot be used.
    #[error("{origin}: {name}: {reason}")]
    Value {
        /// Where.
        origin: Origin,
        /// The setting.
        name: &'static str,
        /// What is wrong, with the value.
        reason: String,
    },
}

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map_or(String::new(), |name| format!(", did you mean {name:?}?"))
}

/// Everything that is wrong with the configuration, in the order of the layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(pub Vec<Fault>);

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(Fault::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// A configuration and how it came about.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The result.
    pub config: Config,
    /// What should be said in the log about how it came about.
    pub warnings: Vec<String>,
    listing: String,
}

impl Loaded {
    /// Prints every setting with its value and its origin, as lines of TOML with a comment.
    #[must_use]
    pub fn listing(&self) -> &str {
        &self.listing
    }
}

/// Reads all layers.
///
/// `matches` are those of a command made with [`flags`].
///
/// # Errors
/// Every fault of every layer.
pub fn load(matches: &clap::ArgMatches, environment: &Environment) -> Result<Loaded, ConfigError> {
    let file = layers::file(matches, environment);
    let (settings, mut faults) = layers::gather(matches, environment, file.as_deref());
    let config = settings.build(environment, &mut faults);
    if !faults.is_empty() {
        return Err(ConfigError(faults));
    }
    let listing = settings.listing(&config);
    let warnings = environment.unknown().into_iter().chain(access::warning(&config)).collect();
    Ok(Loaded { config, warnings, listing })
}

impl Settings {
    fn build(&self, environment: &Environment, faults: &mut Vec<Fault>) -> Config {
        let listen = self.check("listen", faults, || parse_listen(self.text("listen")), fallback_address());
        let api_keys_file = self.path("api_keys_file").or_else(|| access::credential(environment));
        if let Err(reason) = access::check_listen(listen, api_keys_file.is_some(), self.flag("allow_unauthenticated")) {
            faults.push(self.fault("listen", reason));
        }
        let cors_origins =
            self.check("cors_origins", faults, || access::origins(self.list("cors_origins")), Vec::new());
        let device = self.check("device", faults, || parse_device(self.text("device")), DeviceSetting::Auto);
        let memory = self.check("device_memory", faults, || parse_memory(self.text("device_memory")), Bytes(0));
        let host_memory = self.check("host_memory", faults, || parse_memory(self.text("host_memory")), Bytes(0));
        let kv_cache_type = if self.text("kv_cache_type") == "int8" { KvType::Int8 } else { KvType::Bf16 };
        if device == DeviceSetting::Cpu && kv_cache_type == KvType::Int8 {
            let reason = "int8 is for a CUDA card and device is cpu: set it to bf16".to_owned();
            faults.push(self.fault("kv_cache_type", reason));
        }
        let asked_faults = self.faults(faults);
        let is_built_in = self.text("model").is_empty();
        let model = self.path("model").unwrap_or_else(paths::demo_model);
        let model_id = match (self.text("model_id"), is_built_in) {
            ("", true) => paths::DEMO_MODEL_ID.to_owned(),
            ("", false) => folder_name(&model),
            (name, _) => name.to_owned(),
        };
        Config {
            listen,
            api_keys_file,
            cors_origins,
            user: Some(self.text("user").to_owned()).filter(|name| !name.is_empty()),
            model,
            model_id,
            aliases: self.list("aliases"),
            device,
            device_memory: memory,
            host_memory,
            worker_cgroup: if self.text("worker_cgroup") == "off" { WorkerCgroup::Off } else { WorkerCgroup::Auto },
            kv_cache_type,
            threads: self.small("threads"),
            // One of the words, or a fault that is reported.
            cpu: CpuChoice::parse(self.text("cpu")).unwrap_or_default(),
            context_tokens: self.small("context_tokens"),
            sequences_max: self.small("sequences_max"),
            queue_max: self.size("queue_max"),
            queue_bytes_max: self.size("queue_bytes_max"),
            request_timeout: self.duration("request_timeout"),
            shutdown_timeout: self.duration("shutdown_timeout"),
            load_timeout: self.duration("load_timeout"),
            hang_timeout: self.duration("hang_timeout"),
            worker: self.path("worker").unwrap_or_else(paths::worker),
            worker_cuda: self.path("worker_cuda").unwrap_or_else(paths::worker_cuda),
            sandbox: SandboxMode::from_word(self.text("sandbox")).expect("the table lists the words"),
            landlock_abi_min: self.small("landlock_abi_min"),
            runtime_dir: self.path("runtime_dir").unwrap_or_else(|| paths::runtime_dir(environment)),
            log_format: if self.text("log.format") == "json" { LogFormat::Json } else { LogFormat::Human },
            log_level: LogLevel(self.text("log.level").to_owned()),
            faults: asked_faults,
        }
    }

    /// Reads what a test wants to go wrong; it has to say that it means it.
    fn faults(&self, faults: &mut Vec<Fault>) -> Faults {
        let asked = Faults {
            step_delay_ms: self.small("faults.step_delay_ms"),
            die_on_token: self.maybe("faults.die_on_token"),
            oom_after_steps: self.maybe("faults.oom_after_steps"),
            hang_after_steps: self.maybe("faults.hang_after_steps"),
        };
        for (is_asked, name) in [
            (asked.step_delay_ms > 0, "faults.step_delay_ms"),
            (asked.die_on_token.is_some(), "faults.die_on_token"),
            (asked.oom_after_steps.is_some(), "faults.oom_after_steps"),
            (asked.hang_after_steps.is_some(), "faults.hang_after_steps"),
        ] {
            if is_asked && !self.flag("allow_faults") {
                faults.push(self.fault(name, "is for tests and is refused without --allow-faults".to_owned()));
            }
        }
        asked
    }

    fn check<T>(
        &self,
        name: &'static str,
        faults: &mut Vec<Fault>,
        parse: impl FnOnce() -> Result<T, String>,
        fallback: T,
    ) -> T {
        parse().unwrap_or_else(|reason| {
            faults.push(self.fault(name, reason));
            fallback
        })
    }

    fn listing(&self, config: &Config) -> String {
        let keys_file = config.api_keys_file.as_deref().unwrap_or(Path::new(""));
        let derived: BTreeMap<_, _> = [
            ("api_keys_file", keys_file.display().to_string()),
            ("model", config.model.display().to_string()),
            ("model_id", config.model_id.clone()),
            ("worker", config.worker.display().to_string()),
            ("worker_cuda", config.worker_cuda.display().to_string()),
            ("runtime_dir", config.runtime_dir.display().to_string()),
        ]
        .into();
        let line = |key: &Key| {
            let (value, origin) = self.get(key.name);
            let text = match (value, derived.get(key.name)) {
                (Value::Text(_) | Value::Path(_), Some(derived)) => Value::Text(derived.clone()).toml(),
                (value, _) => value.toml(),
            };
            format!("{} = {text}  # {origin}\n", key.name)
        };
        KEYS.iter().map(line).collect()
    }
}

/// Stands in for an address that is a fault, so that the other settings can be checked too.
fn fallback_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let numeric = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    numeric.parse().map_err(|_| format!("{text:?} is not an address with a port, such as 127.0.0.1:8000 or [::1]:8000"))
}

fn parse_device(text: &str) -> Result<DeviceSetting, String> {
    let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    match (text, number) {
        ("auto", _) => Ok(DeviceSetting::Auto),
        ("cpu", _) => Ok(DeviceSetting::Cpu),
        (_, Some(number)) => Ok(DeviceSetting::Cuda(number)),
        (_, None) => Err(format!("{text:?} is not a device: use auto, cpu or cuda:N, such as cuda:0")),
    }
}

/// Reads an amount of memory: a number of MiB or GiB, whole or with decimals, or 0.
fn parse_memory(text: &str) -> Result<Bytes, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "GiB" => Some(1u64 << 30),
        "MiB" => Some(1 << 20),
        "" if text == "0" => Some(0),
        _ => None,
    };
    let bytes = |unit: u64| text[..digits].parse::<f64>().ok().map(|number| (number * unit as f64) as u64);
    match unit.and_then(bytes) {
        Some(bytes) if bytes == 0 && text == "0" => Ok(Bytes(0)),
        Some(bytes) if (MEMORY_MIN..=MEMORY_MAX).contains(&Bytes(bytes)) => Ok(Bytes(bytes)),
        Some(bytes) => Err(format!("{} is not from {MEMORY_MIN} to {MEMORY_MAX}", Bytes(bytes))),
        None => Err(format!("{text:?} is not an amount of memory: use a number with GiB or MiB, such as 16GiB, or 0")),
    }
}

fn folder_name(folder: &Path) -> String {
    folder.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
