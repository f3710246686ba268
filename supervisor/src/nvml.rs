//! The memory of the card, measured from outside by NVML, which every NVIDIA driver brings along.
//!
//! Owns: one thread that reads, since a call into a sick driver may never come back; the last reading; and the judgement
//! whether a worker's memory has been given back. Refuses: to be needed. Where NVML is not to be had, that is said once, and
//! nothing is known of the memory.
//! Invariant: nothing that waits here waits without an end.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use bulkhead_shared::units::Bytes;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::limits::{MEMORY_POLL_INTERVAL, MEMORY_SAMPLE_INTERVAL, MEMORY_WAIT_MAX};

/// Memory that a card may show in use beyond what it did before a worker, and still count as given back: other processes
/// come and go.
const SLACK: Bytes = Bytes(256 << 20);

/// What a card showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Sample {
    /// Nothing: there is no NVML, or it has not answered yet, or not this time.
    #[default]
    Unknown,
    /// It works.
    Memory(Memory),
    /// It is gone until the machine is started again.
    Lost,
}

/// The memory of a card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: Bytes,
    /// What is in use, by whomever.
    pub used: Bytes,
    /// The processes that compute on the card, and what they hold where that is told.
    pub processes: Vec<(u32, Option<Bytes>)>,
}

/// A worker on the card, and what the card showed before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Worker {
    pid: u32,
    used_before: Option<Bytes>,
    /// Whether NVML ever named it. It does not where the supervisor has process numbers of its own, as in a container.
    was_listed: bool,
}

impl Worker {
    /// Says whether the memory of the ended worker has been given back, as far as this sample tells.
    fn is_gone(&self, sample: &Sample) -> bool {
        match sample {
            // What cannot be measured cannot be waited for.
            Sample::Unknown | Sample::Lost => true,
            Sample::Memory(memory) if memory.processes.iter().any(|(pid, _)| *pid == self.pid) => false,
            Sample::Memory(_) if self.was_listed => true,
            Sample::Memory(memory) => {
                self.used_before.is_none_or(|before| memory.used.0 <= before.0.saturating_add(SLACK.0))
            }
        }
    }
}

/// The handle on the thread that reads. Cloning gives another one on the same.
#[derive(Clone, Debug)]
pub struct Monitor {
    samples: watch::Receiver<Sample>,
    worker: Arc<Mutex<Option<Worker>>>,
    /// Asks for a sample now.
    wake: SyncSender<()>,
    /// Keeps the thread from ending before a card is known.
    idle: Arc<Mutex<Option<Thread>>>,
    /// For how long the memory of an ended worker is waited for.
    patience: Duration,
}

/// The thread's ends, until there is something to read.
#[derive(Debug)]
struct Thread {
    samples: watch::Sender<Sample>,
    woken: Receiver<()>,
}

impl Default for Monitor {
    /// Makes a monitor that reads nothing yet.
    fn default() -> Monitor {
        let (sender, samples) = watch::channel(Sample::Unknown);
        let (wake, woken) = sync_channel(1);
        let idle = Arc::new(Mutex::new(Some(Thread { samples: sender, woken })));
        Monitor { samples, worker: Arc::default(), wake, idle, patience: MEMORY_WAIT_MAX }
    }
}

impl Monitor {
    /// Begins to read a card, once. Blocking: loads the library, for milliseconds, on the new thread.
    pub fn watch(&self, index: u32, uuid: Option<String>) {
        self.watch_by(move || match open(index, uuid) {
            Ok(read) => Some(Box::new(read) as Reader),
            Err(error) => {
                info!(%error, "NVML is not to be had: the memory of the card is not measured");
                None
            }
        });
    }

    /// Begins to read by a function that is made on the thread which then calls it.
    fn watch_by(&self, open: impl FnOnce() -> Option<Reader> + Send + 'static) {
        let Some(Thread { samples, woken }) = lock(&self.idle).take() else { return };
        let worker = self.worker.clone();
        let reading = move || {
            let Some(mut read) = open() else { return };
            while !samples.is_closed() {
                let sample = read();
                note(&worker, &sample);
                samples.send_replace(sample);
                if woken.recv_timeout(MEMORY_SAMPLE_INTERVAL) == Err(RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("nvml".into()).spawn(reading) {
            warn!(%error, "no thread for NVML: the memory of the card is not measured");
        }
    }

    /// Gives the last sample.
    #[must_use]
    pub fn sample(&self) -> Sample {
        self.samples.borrow().clone()
    }

    /// Notes that a worker was started on the card.
    pub(crate) fn worker_started(&self, pid: u32) {
        let used_before = match self.sample() {
            Sample::Memory(memory) => Some(memory.used),
            Sample::Unknown | Sample::Lost => None,
        };
        *lock(&self.worker) = Some(Worker { pid, used_before, was_listed: false });
    }

    /// Waits until the card shows that the last worker, which has ended, holds nothing any more; warns when it does not
    /// within a bounded time.
    pub(crate) async fn wait_until_free(&self) {
        let deadline = Instant::now() + self.patience;
        let mut samples = self.samples.clone();
        loop {
            let Some(worker) = *lock(&self.worker) else { return };
            samples.mark_unchanged();
            // Full: the thread is about to read anyway. Disconnected: there is none, and nothing changes.
            let _ = self.wake.try_send(());
            match tokio::time::timeout_at(deadline, samples.changed()).await {
                Ok(Ok(())) if worker.is_gone(&samples.borrow()) => break,
                Ok(Ok(())) if Instant::now() < deadline => tokio::time::sleep(MEMORY_POLL_INTERVAL).await,
                // The thread has ended: there was no NVML.
                Ok(Err(_)) => break,
                Ok(Ok(())) | Err(_) => {
                    self.complain(worker);
                    break;
                }
            }
        }
        *lock(&self.worker) = None;
    }

    fn complain(&self, worker: Worker) {
        let Sample::Memory(memory) = self.sample() else { return };
        let of = |(pid, bytes): &(u32, Option<Bytes>)| (*pid == worker.pid).then_some(*bytes).flatten();
        let held = memory.processes.iter().find_map(of);
        warn!(
            used = %memory.used,
            used_before = %worker.used_before.unwrap_or_default(),
            held = %held.unwrap_or_default(),
            waited_s = self.patience.as_secs(),
            "the card does not show the memory of the last worker as free"
        );
    }
}

/// Notes that a worker is among the processes that NVML names.
fn note(worker: &Mutex<Option<Worker>>, sample: &Sample) {
    if let (Some(worker), Sample::Memory(memory)) = (&mut *lock(worker), sample) {
        worker.was_listed |= memory.processes.iter().any(|(pid, _)| *pid == worker.pid);
    }
}

/// Locks. A thread that panicked left nothing half done: each critical section is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a sample.
type Reader = Box<dyn FnMut() -> Sample>;

/// Loads NVML and finds the card: by its own name where the worker told it, else by its number.
fn open(index: u32, uuid: Option<String>) -> Result<impl FnMut() -> Sample, NvmlError> {
    let nvml = Nvml::init()?;
    Ok(move || match read(&nvml, index, uuid.as_deref()) {
        Ok(memory) => Sample::Memory(memory),
        Err(NvmlError::GpuLost) => Sample::Lost,
        Err(_) => Sample::Unknown,
    })
}

fn read(nvml: &Nvml, index: u32, uuid: Option<&str>) -> Result<Memory, NvmlError> {
    let device = match uuid {
        Some(uuid) => nvml.device_by_uuid(uuid)?,
        None => nvml.device_by_index(index)?,
    };
    let memory = device.memory_info()?;
    // Some drivers refuse this for some cards; the sums are worth having alone.
    let processes = device.running_compute_processes().unwrap_or_default();
    let bytes = |used| match used {
        UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
        UsedGpuMemory::Unavailable => None,
    };
    Ok(Memory {
        total: Bytes(memory.total),
        used: Bytes(memory.used),
        processes: processes.into_iter().map(|process| (process.pid, bytes(process.used_gpu_memory))).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn memory(used: u64, pids: &[u32]) -> Sample {
        let processes = pids.iter().map(|pid| (*pid, Some(Bytes(GIB)))).collect();
        Sample::Memory(Memory { total: Bytes(80 * GIB), used: Bytes(used), processes })
    }

    #[test]
    fn a_worker_is_gone_when_the_card_says_so() {
        let worker = Worker { pid: 7, used_before: Some(Bytes(GIB)), was_listed: false };
        let named = Worker { was_listed: true, ..worker };
        for (worker, sample, is_gone) in [
            (worker, Sample::Unknown, true),
            (worker, Sample::Lost, true),
            (worker, memory(0, &[7]), false),
            (worker, memory(GIB + SLACK.0, &[8]), true),
            (worker, memory(GIB + SLACK.0 + 1, &[8]), false),
            // Once it was named, what others hold is no longer taken for its own.
            (named, memory(9 * GIB, &[8]), true),
            (named, memory(9 * GIB, &[8, 7]), false),
            (Worker { used_before: None, ..worker }, memory(9 * GIB, &[]), true),
        ] {
            assert_eq!(worker.is_gone(&sample), is_gone, "{worker:?} {sample:?}");
        }
    }

    /// A monitor that reads one sample after the other, and the last one for ever.
    fn monitor(samples: Vec<Sample>) -> Monitor {
        let monitor = Monitor::default();
        monitor.watch_by(move || {
            let mut samples = samples.into_iter();
            let mut last = Sample::Unknown;
            Some(Box::new(move || {
                last = samples.next().unwrap_or(last.clone());
                last.clone()
            }))
        });
        monitor
    }

    async fn first(monitor: &Monitor) -> Sample {
        let mut samples = monitor.samples.clone();
        let known = samples.wait_for(|sample| *sample != Sample::Unknown);
        tokio::time::timeout(Duration::from_secs(10), known).await.expect("in time").expect("the thread runs").clone()
    }

    #[tokio::test]
    async fn the_next_worker_waits_for_the_memory_of_the_last() {
        let monitor = monitor(vec![memory(GIB, &[]), memory(9 * GIB, &[7]), memory(9 * GIB, &[7]), memory(GIB, &[])]);
        first(&monitor).await;
        monitor.worker_started(7);
        let started = Instant::now();
        monitor.wait_until_free().await;
        assert_eq!(monitor.sample(), memory(GIB, &[]));
        assert!(started.elapsed() < MEMORY_WAIT_MAX, "it was free before the time was over");
        assert_eq!(*lock(&monitor.worker), None);
    }

    #[tokio::test]
    async fn the_wait_has_an_end() {
        let mut monitor = monitor(vec![memory(GIB, &[]), memory(9 * GIB, &[7])]);
        monitor.patience = Duration::from_millis(300);
        first(&monitor).await;
        monitor.worker_started(7);
        let wait = tokio::time::timeout(MEMORY_WAIT_MAX, monitor.wait_until_free());
        wait.await.expect("it gives up and warns");
    }

    #[tokio::test]
    async fn without_nvml_nothing_is_waited_for() {
        let monitor = Monitor::default();
        monitor.watch_by(|| None);
        monitor.worker_started(7);
        let wait = tokio::time::timeout(MEMORY_WAIT_MAX / 2, monitor.wait_until_free());
        wait.await.expect("there is nothing to wait for");
        assert_eq!(monitor.sample(), Sample::Unknown);
    }
}
