//! Where the model computes: asks the CUDA worker which cards it can use, and decides.
//!
//! Owns: the question (`bulkhead-worker-cuda devices --json`), its limits, and the decision with its reason. Refuses: to
//! know a driver; whether a card can be used is what the worker says, or what the loader says about the worker.
//! Invariants: the question is asked once; its answer is bounded in size and time, and none is an answer too; nothing that
//! clients touch waits for it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_shared::message::DeviceChoice;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::DeviceSetting;
use crate::limits::{PROBE_BYTES_MAX, PROBE_TIMEOUT};
use crate::logging::printable;
use crate::nvml::Monitor;

/// The exit code with which a shell and the dynamic loader say that a program cannot be run.
const LOADER_EXIT: i32 = 127;

/// A card that the CUDA worker found.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Card {
    /// Its number.
    pub index: u32,
    /// What it is called.
    pub name: String,
    /// Its generation, such as 9.0.
    pub compute_capability: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// By which NVML finds the same card, whose numbers are in another order.
    #[serde(default)]
    pub uuid: Option<String>,
}

/// Why there is no card.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The program is not there.
    #[error("no CUDA worker is installed ({} does not exist)", .0.display())]
    NotInstalled(PathBuf),
    /// The program does not start.
    #[error("the CUDA worker cannot be started: {0}")]
    Start(#[source] io::Error),
    /// The dynamic loader refuses it.
    #[error("the CUDA worker cannot be loaded: {0}")]
    Loader(String),
    /// It says that there is no card to be used.
    #[error("{0}")]
    Refused(String),
    /// It ended without saying why.
    #[error("the CUDA worker did not list its devices: {0}")]
    Ended(ExitStatus),
    /// It does not answer.
    #[error("the CUDA worker did not list its devices within {} s", .0.as_secs())]
    Timeout(Duration),
    /// It answers with too much.
    #[error("the CUDA worker answered with more than {0} bytes")]
    TooLong(usize),
    /// It answers with something else.
    #[error("the CUDA worker answered with what is no list of devices: {0}")]
    Garbage(#[source] serde_json::Error),
    /// The list is empty.
    #[error("there is no CUDA device")]
    NoDevice,
}

/// The worker's executables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// Computes on the processor.
    pub cpu: PathBuf,
    /// Computes on a card too.
    pub cuda: PathBuf,
}

/// Where the model computes, by which program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The device.
    pub device: DeviceChoice,
    /// The card, where it is one.
    pub card: Option<Card>,
    /// The worker's executable.
    pub program: PathBuf,
    /// Why there, where nobody said so.
    pub reason: Option<String>,
}

/// A card that was asked for by number cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device cuda:{index} cannot be used: {reason}; --device auto falls back to the processor")]
pub struct Refused {
    /// The number.
    pub index: u32,
    /// Why not.
    pub reason: String,
}

/// What has become of the question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is still open.
    Open,
    /// This is the device.
    Decided(Arc<Decision>),
    /// The one that was asked for cannot be used.
    Refused(Refused),
    /// The supervisor ends before it was answered.
    Dropped,
}

/// The decision, or that there is none yet, and the memory of the card. Cloning gives another handle on the same.
#[derive(Clone, Debug)]
pub struct Devices {
    answer: watch::Receiver<Answer>,
    /// What the card shows, where it is one.
    pub memory: Monitor,
}

impl Devices {
    /// Asks, unless the answer is known already. Once `stop` changes, an open question stays unanswered.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn ask(setting: DeviceSetting, programs: Programs, mut stop: watch::Receiver<bool>) -> Devices {
        let first = match decide(setting, None, &programs) {
            Some(Ok(decision)) => Answer::Decided(Arc::new(decision)),
            Some(Err(refused)) => Answer::Refused(refused),
            None => Answer::Open,
        };
        let is_open = first == Answer::Open;
        let (sender, answer) = watch::channel(first);
        let devices = Devices { answer, memory: Monitor::default() };
        if is_open {
            let memory = devices.memory.clone();
            tokio::spawn(async move {
                let answer = tokio::select! {
                    probed = probe(&programs.cuda, PROBE_TIMEOUT) => match decide(setting, Some(probed), &programs) {
                        Some(Ok(decision)) => Answer::Decided(Arc::new(decision)),
                        Some(Err(refused)) => Answer::Refused(refused),
                        None => Answer::Dropped,
                    },
                    _ = stop.changed() => Answer::Dropped,
                };
                log(&answer);
                if let Answer::Decided(decision) = &answer
                    && let Some(card) = &decision.card
                {
                    memory.watch(card.index, card.uuid.clone());
                }
                sender.send_replace(answer);
            });
        }
        devices
    }

    /// Gives the answer as it is now.
    #[must_use]
    pub fn now(&self) -> Answer {
        self.answer.borrow().clone()
    }

    /// Waits until the question is answered.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn answer(&self) -> Answer {
        let mut receiver = self.answer.clone();
        match receiver.wait_for(|answer| *answer != Answer::Open).await {
            Ok(answer) => answer.clone(),
            Err(_) => Answer::Dropped,
        }
    }

    /// Waits for a refusal, and for ever where there is none.
    pub async fn refusal(&self) -> Refused {
        match self.answer().await {
            Answer::Refused(refused) => refused,
            Answer::Open | Answer::Decided(_) | Answer::Dropped => std::future::pending().await,
        }
    }

    /// Gives the reason of the choice, for people, where nobody made it.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match &*self.answer.borrow() {
            Answer::Decided(decision) => decision.reason.clone(),
            Answer::Open => Some("the CUDA worker is asked for its devices".to_owned()),
            Answer::Refused(refused) => Some(refused.to_string()),
            Answer::Dropped => None,
        }
    }
}

fn log(answer: &Answer) {
    match answer {
        Answer::Decided(decision) => match (&decision.card, &decision.reason) {
            (Some(card), _) => {
                let (index, name) = (card.index, &card.name);
                info!(
                    device = index,
                    name,
                    compute_capability = card.compute_capability,
                    "the model computes on a card"
                );
            }
            (None, Some(reason)) => info!(reason, "the model computes on the CPU"),
            (None, None) => {}
        },
        Answer::Refused(refused) => warn!(reason = refused.reason, "the device cannot be used"),
        Answer::Open | Answer::Dropped => {}
    }
}

/// Decides where to compute. `None`: only the CUDA worker's answer can tell.
fn decide(
    setting: DeviceSetting,
    probed: Option<Result<Vec<Card>, ProbeError>>,
    programs: &Programs,
) -> Option<Result<Decision, Refused>> {
    let on_processor =
        |reason| Ok(Decision { device: DeviceChoice::Cpu, card: None, program: programs.cpu.clone(), reason });
    let on_card = |card: Card| {
        let device = DeviceChoice::Cuda(card.index);
        Ok(Decision { device, card: Some(card), program: programs.cuda.clone(), reason: None })
    };
    if setting == DeviceSetting::Cpu {
        return Some(on_processor(None));
    }
    let cards = match probed {
        None if programs.cuda.is_file() => return None,
        None => Err(ProbeError::NotInstalled(programs.cuda.clone())),
        Some(probed) => probed.and_then(|cards| if cards.is_empty() { Err(ProbeError::NoDevice) } else { Ok(cards) }),
    };
    Some(match (setting, cards) {
        (DeviceSetting::Cpu, _) => on_processor(None),
        (DeviceSetting::Auto, Ok(cards)) => match cards.into_iter().next() {
            Some(card) => on_card(card),
            None => on_processor(Some(ProbeError::NoDevice.to_string())),
        },
        (DeviceSetting::Auto, Err(error)) => on_processor(Some(error.to_string())),
        (DeviceSetting::Cuda(index), Ok(cards)) => {
            let numbers: Vec<String> = cards.iter().map(|card| card.index.to_string()).collect();
            match cards.into_iter().find(|card| card.index == index) {
                Some(card) => on_card(card),
                None => Err(Refused { index, reason: format!("the devices are {}", numbers.join(", ")) }),
            }
        }
        (DeviceSetting::Cuda(index), Err(error)) => Err(Refused { index, reason: error.to_string() }),
    })
}

/// Asks the CUDA worker for its cards. Whatever it does, this ends within the time, and so does the process.
async fn probe(program: &Path, timeout: Duration) -> Result<Vec<Card>, ProbeError> {
    let asked = Command::new(program)
        .args(["devices", "--json"])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // When the time is over, or the supervisor ends, the handle is dropped and the process killed by its number.
        .kill_on_drop(true)
        .spawn();
    let mut child = match asked {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ProbeError::NotInstalled(program.to_owned()));
        }
        Err(error) => return Err(ProbeError::Start(error)),
    };
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let answer = async {
        let (output, complaint) = tokio::try_join!(read(stdout), read(stderr))?;
        let status = child.wait().await.map_err(ProbeError::Start)?;
        judge(status, &output, &complaint)
    };
    tokio::time::timeout(timeout, answer).await.unwrap_or(Err(ProbeError::Timeout(timeout)))
}

/// Reads a pipe to its end, or up to one byte beyond what an answer may have.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, ProbeError> {
    let mut bytes = Vec::new();
    let Some(pipe) = pipe else { return Ok(bytes) };
    pipe.take(PROBE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).await.map_err(ProbeError::Start)?;
    if bytes.len() > PROBE_BYTES_MAX { Err(ProbeError::TooLong(PROBE_BYTES_MAX)) } else { Ok(bytes) }
}

fn judge(status: ExitStatus, output: &[u8], complaint: &[u8]) -> Result<Vec<Card>, ProbeError> {
    #[derive(Deserialize)]
    struct List {
        devices: Vec<Card>,
    }
    if status.success() {
        let list: List = serde_json::from_slice(output).map_err(ProbeError::Garbage)?;
        return Ok(list.devices.into_iter().map(clean).collect());
    }
    let complaint = String::from_utf8_lossy(complaint);
    let line = complaint.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(printable);
    Err(match line {
        Some(line) if status.code() == Some(LOADER_EXIT) => ProbeError::Loader(line),
        Some(line) => ProbeError::Refused(line),
        None => ProbeError::Ended(status),
    })
}

/// What a worker says goes to logs and clients only after this.
fn clean(card: Card) -> Card {
    let (name, compute_capability) = (printable(&card.name), printable(&card.compute_capability));
    Card { name, compute_capability, uuid: card.uuid.as_deref().map(printable), ..card }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const TWO: &str = r#"{"devices":[{"index":0,"name":"NVIDIA H100 80GB HBM3","compute_capability":"9.0","memory_bytes":85014020096,"free_bytes":1},{"index":1,"name":"T4","compute_capability":"7.5","memory_bytes":15000000000,"free_bytes":2,"uuid":"GPU-1"}]}"#;

    /// A folder with a worker that runs this script.
    fn worker(script: &str) -> (tempfile::TempDir, Programs) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cuda = folder.path().join("bulkhead-worker-cuda");
        std::fs::write(&cuda, format!("#!/bin/sh\n{script}\n")).expect("is written");
        std::fs::set_permissions(&cuda, std::fs::Permissions::from_mode(0o755)).expect("is made executable");
        let programs = Programs { cpu: folder.path().join("bulkhead-worker"), cuda };
        (folder, programs)
    }

    /// Asks, and again while the script is still open for writing in a process that another test is just starting.
    async fn ask(programs: &Programs, timeout: Duration) -> Result<Vec<Card>, ProbeError> {
        loop {
            match probe(&programs.cuda, timeout).await {
                Err(ProbeError::Start(error)) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                answer => return answer,
            }
        }
    }

    /// The device and the reason of a decision, or the refusal.
    async fn check(setting: DeviceSetting, script: &str) -> Result<(String, Option<String>), String> {
        let (_folder, programs) = worker(script);
        let probed = ask(&programs, Duration::from_secs(10)).await;
        let decided = decide(setting, Some(probed), &programs).expect("there is an answer");
        decided.map(|decision| (decision.to_string(), decision.reason)).map_err(|refused| refused.to_string())
    }

    #[tokio::test]
    async fn the_first_card_is_taken_or_the_one_asked_for() {
        let list = format!("[ \"$*\" = 'devices --json' ] && [ -z \"$HOME\" ] && echo '{TWO}'");
        assert_eq!(check(DeviceSetting::Auto, &list).await, Ok(("cuda:0".into(), None)));
        assert_eq!(check(DeviceSetting::Cuda(1), &list).await, Ok(("cuda:1".into(), None)));
        let refused = "device cuda:7 cannot be used: the devices are 0, 1; --device auto falls back to the processor";
        assert_eq!(check(DeviceSetting::Cuda(7), &list).await, Err(refused.into()));
    }

    #[tokio::test]
    async fn without_a_card_the_processor_is_taken_and_the_reason_told() {
        for (script, reason) in [
            ("echo '  ' >&2; echo 'the CUDA driver is not installed' >&2; exit 2", "the CUDA driver is not installed"),
            (
                "echo 'error while loading shared libraries: libfoo.so.1' >&2; exit 127",
                "the CUDA worker cannot be loaded: error while loading shared libraries: libfoo.so.1",
            ),
            ("exit 3", "the CUDA worker did not list its devices: exit status: 3"),
            ("kill -9 $$", "the CUDA worker did not list its devices: signal: 9 (SIGKILL)"),
            ("echo '{\"devices\":[]}'", "there is no CUDA device"),
            ("head -c 4000000 /dev/zero", "the CUDA worker answered with more than 65536 bytes"),
            ("head -c 4000000 /dev/zero >&2", "the CUDA worker answered with more than 65536 bytes"),
        ] {
            assert_eq!(check(DeviceSetting::Auto, script).await, Ok(("cpu".into(), Some(reason.into()))), "{script}");
            let refused = check(DeviceSetting::Cuda(0), script).await.expect_err("was asked for");
            assert!(refused.contains(reason), "{refused}");
        }
        let (_, reason) = check(DeviceSetting::Auto, "echo hello").await.expect("falls back");
        let reason = reason.expect("is told");
        assert!(reason.starts_with("the CUDA worker answered with what is no list of devices:"), "{reason}");
    }

    #[tokio::test]
    async fn a_worker_that_hangs_is_given_up_and_killed() {
        let (folder, programs) = worker("echo $$ > \"${0%/*}/pid\"; exec sleep 600");
        let timeout = Duration::from_millis(300);
        let error = ask(&programs, timeout).await.expect_err("it never answers");
        assert!(matches!(error, ProbeError::Timeout(_)), "{error}");
        let pid: i32 =
            std::fs::read_to_string(folder.path().join("pid")).expect("it ran").trim().parse().expect("a pid");
        let is_gone = || nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_err();
        let waiting = async {
            while !is_gone() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("the process is killed and reaped");
    }

    #[tokio::test]
    async fn what_needs_no_question_is_answered_at_once() {
        let (folder, programs) = worker("exit 1");
        let (_stop, stopping) = watch::channel(false);
        let cpu = Devices::ask(DeviceSetting::Cpu, programs.clone(), stopping.clone());
        assert!(matches!(cpu.now(), Answer::Decided(decision) if decision.reason.is_none()));
        let absent = Programs { cuda: folder.path().join("absent"), ..programs };
        let auto = Devices::ask(DeviceSetting::Auto, absent.clone(), stopping.clone());
        assert!(auto.reason().is_some_and(|reason| reason.starts_with("no CUDA worker is installed")));
        let named = Devices::ask(DeviceSetting::Cuda(0), absent, stopping);
        assert!(
            named.refusal().await.to_string().starts_with("device cuda:0 cannot be used: no CUDA worker is installed")
        );
    }

    #[tokio::test]
    async fn an_ending_supervisor_does_not_wait_for_the_answer() {
        let (_folder, programs) = worker("exec sleep 600");
        let (stop, stopping) = watch::channel(false);
        let devices = Devices::ask(DeviceSetting::Auto, programs, stopping);
        assert_eq!(devices.now(), Answer::Open);
        stop.send_replace(true);
        assert_eq!(devices.answer().await, Answer::Dropped);
    }
}
