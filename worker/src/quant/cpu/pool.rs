//! The threads that compute: a parallel loop whose start costs less than a product.
//!
//! Owns: the threads, and a scratch buffer for each. A loop's tasks are taken in order by whoever is free, the caller's
//! thread among them; a thread that is late is not waited for unless it has begun a task. Between loops a thread spins for
//! a moment, since the next product of a step is near, and then sleeps.
//!
//! Invariant: no thread touches a loop's closure unless it entered the gate while it was open, and the caller leaves only
//! when the gate is shut and all have left. A loop inside a loop, or from a second thread at the same time, runs on the
//! thread that asks for it: what a task computes must not depend on who runs it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};
use std::{hint, io, thread};

use super::lines::Line;

/// How long a thread without work spins before it sleeps.
const SPIN: Duration = Duration::from_micros(60);

/// Looks at the gate between two looks at the clock.
const LOOKS: u32 = 32;

/// In the gate: whether it is open; below it the threads inside, above it the number of the loop.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const LOOP: u64 = 1 << 32;

/// What a task may use for itself: room for two tiles of weights. It finds there what the task before left.
pub(super) type Scratch = [Decoded; 2];

/// Rows of a weight that were decoded.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    /// Their integers.
    pub(super) lines: Vec<Line>,
    /// Their scales, or their floats.
    pub(super) floats: Vec<f32>,
}

type Task<'a> = dyn Fn(usize, &mut Scratch) + Sync + 'a;

/// Threads that wait for loops.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    /// The scratch of the thread that asks; who holds it may open the gate.
    caller: Mutex<Scratch>,
    helpers: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    gate: AtomicU64,
    /// Where the caller keeps the reference to the closure of the loop behind the open gate.
    task: AtomicPtr<()>,
    next: AtomicUsize,
    count: AtomicUsize,
    panicked: AtomicBool,
    stopping: AtomicBool,
    asleep: Vec<AtomicBool>,
}

impl Pool {
    /// Starts threads until there are `threads` with the caller's.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(super) fn start(threads: usize) -> io::Result<Pool> {
        let helpers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            task: AtomicPtr::default(),
            next: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool =
            Pool { shared, caller: Mutex::new(Scratch::default()), helpers: Vec::new(), handles: Vec::new() };
        for index in 0..helpers {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new().name(format!("compute-{index}")).spawn(move || shared.help(index))?;
            pool.helpers.push(handle.thread().clone());
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Gives the number of threads that compute, the caller's with them.
    pub(super) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `task` with each number below `count`, on all threads.
    ///
    /// Blocking: until all calls have returned.
    ///
    /// # Panics
    /// When a call panics.
    pub(super) fn for_each(&self, count: usize, task: &Task<'_>) {
        let mut scratch = match self.caller.try_lock() {
            Ok(scratch) => scratch,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let mut own = Scratch::default();
                (0..count).for_each(|index| task(index, &mut own));
                return;
            }
        };
        if count <= 1 || self.helpers.is_empty() {
            (0..count).for_each(|index| task(index, &mut scratch));
            return;
        }
        let shared = &self.shared;
        shared.open(count, &task);
        for (helper, asleep) in self.helpers.iter().zip(&shared.asleep).take(count - 1) {
            if asleep.swap(false, Ordering::SeqCst) {
                helper.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(task, &mut scratch)));
        shared.shut();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a task panicked on another thread");
    }

    /// Calls `task` for each chunk of `chunk_len` elements of `data`, the last one shorter, on all threads.
    pub(super) fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "a chunk has elements");
        let (start, len) = (Shareable(data.as_mut_ptr()), data.len());
        self.for_each(len.div_ceil(chunk_len), &|index, _| {
            let from = index * chunk_len;
            // SAFETY: `data` is borrowed for the whole loop and `from` lies inside it, for `index` is below the number of
            // chunks.
            let first = unsafe { start.get().add(from) };
            // SAFETY: chunks of different indices do not overlap and each index is given to one call, so that this is the
            // only reference to these elements; `T: Send` lets another thread have it.
            let chunk = unsafe { std::slice::from_raw_parts_mut(first, chunk_len.min(len - from)) };
            task(index, chunk);
        });
    }
}

/// Lets many threads write into numbers: as atomic bits, which cost no more than plain ones.
pub(super) fn cells(numbers: &mut [f32]) -> &[AtomicU32] {
    let (start, len) = (numbers.as_mut_ptr().cast(), numbers.len());
    // SAFETY: `f32` and `AtomicU32` are alike in size and alignment and any bits make either; the borrow is exclusive and
    // lasts as long as the cells, so that nobody reads or writes the numbers in another way.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// The start of a slice that a loop's calls share out among themselves.
struct Shareable<T>(*mut T);

impl<T> Shareable<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: `for_each_chunk` alone makes one, and takes from it parts that do not overlap, of elements that may be sent.
unsafe impl<T: Send> Sync for Shareable<T> {}

impl Shared {
    /// Publishes a loop. Only one thread at a time does so, and after the last loop was shut.
    fn open(&self, count: usize, task: &&Task<'_>) {
        self.task.store(std::ptr::from_ref(task).cast_mut().cast(), Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        self.count.store(count, Ordering::Relaxed);
        let shut = self.gate.load(Ordering::Relaxed);
        // In one order with the flags of sleepers: either the helper sees the open gate, or the caller that it sleeps.
        self.gate.store((shut & !(OPEN | INSIDE)).wrapping_add(LOOP) | OPEN, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Takes the loop back once nobody is inside.
    fn shut(&self) {
        self.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.gate.load(Ordering::Acquire) & INSIDE != 0 {
            looks += 1;
            // Whoever is inside may have lost its core to another process.
            if looks.is_multiple_of(4096) { thread::yield_now() } else { hint::spin_loop() }
        }
    }

    fn take_tasks(&self, task: &Task<'_>, scratch: &mut Scratch) {
        let count = self.count.load(Ordering::Relaxed);
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            task(index, scratch);
        }
    }

    /// The life of a thread.
    fn help(&self, index: usize) {
        let mut scratch = Scratch::default();
        let mut last = 0;
        while let Some(gate) = self.wait(index, last) {
            let entered = self.gate.compare_exchange(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed);
            if entered.is_err() {
                continue;
            }
            last = gate / LOOP;
            let task = self.task.load(Ordering::Relaxed).cast::<&Task<'_>>();
            // SAFETY: the address of such a reference was stored before the gate was opened, which entering it made visible;
            // reference and closure outlive the loop, which `shut` ends only after this thread has left.
            let task = unsafe { *task };
            if catch_unwind(AssertUnwindSafe(|| self.take_tasks(task, &mut scratch))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until the gate is open to a loop other than the last one, and gives it; `None` when the pool ends.
    fn wait(&self, index: usize, last: u64) -> Option<u64> {
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let gate = self.gate.load(Ordering::Relaxed);
                if gate & OPEN != 0 && gate / LOOP != last {
                    return Some(gate);
                }
                hint::spin_loop();
            }
            if self.stopping.load(Ordering::Relaxed) {
                return None;
            }
            if since.elapsed() < SPIN {
                continue;
            }
            self.asleep[index].store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let gate = self.gate.load(Ordering::SeqCst);
            let is_needed = gate & OPEN != 0 && gate / LOOP != last || self.stopping.load(Ordering::SeqCst);
            if !is_needed {
                thread::park();
            }
            self.asleep[index].store(false, Ordering::SeqCst);
            since = Instant::now();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.helpers.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            // A helper catches what its tasks throw, and has nothing else to say.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_run_once_whoever_takes_it() {
        for threads in [1, 2, 5] {
            let pool = Pool::start(threads).expect("threads start");
            assert_eq!(pool.threads(), threads);
            for count in (0..40).chain([1000]) {
                let calls: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(count, &|index, _| {
                    calls[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1), "{threads} {count}");
            }
        }
    }

    #[test]
    fn loops_follow_each_other_closely_and_after_sleep() {
        let pool = Pool::start(3).expect("threads start");
        let sum = AtomicUsize::new(0);
        for round in 0..20_000 {
            if round % 5000 == 0 {
                // Longer than a thread spins: the next loop must wake it, or do without.
                thread::sleep(2 * SPIN);
            }
            pool.for_each(4, &|index, _| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 20_000 * 6);
    }

    #[test]
    fn chunks_cover_the_data() {
        let pool = Pool::start(2).expect("threads start");
        for (len, chunk_len) in [(0, 3), (1, 3), (3, 3), (10, 3), (1000, 7)] {
            let mut data = vec![0usize; len];
            pool.for_each_chunk(&mut data, chunk_len, |index, chunk| {
                chunk.iter_mut().enumerate().for_each(|(offset, value)| *value += index * chunk_len + offset);
            });
            assert!(data.iter().enumerate().all(|(index, value)| index == *value), "{len} {chunk_len}");
        }
    }

    #[test]
    fn a_loop_inside_a_loop_and_from_another_thread_runs_all_the_same() {
        let pool = Pool::start(2).expect("threads start");
        let sum = AtomicUsize::new(0);
        let inner = |_: usize, _: &mut Scratch| {
            pool.for_each(3, &|index, _| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| pool.for_each(10, &inner));
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3 * 10 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::start(2).expect("threads start");
        for faulty in [0, 5] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(8, &|index, _| assert!(index != faulty, "on purpose"));
            }));
            assert!(result.is_err());
        }
        let calls = AtomicUsize::new(0);
        pool.for_each(8, &|_, _| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 8);
    }
}
