//! Workers die all the time, and no client notices but by waiting: the real worker with the built-in model.
//!
//! `make test` runs each storm short. `make storm` sets `BULKHEAD_STORM=full`, which runs them in full length and prints what
//! they measured. Times are printed and never asserted.

mod cost;
mod every_token;
mod flat;
mod kills;
mod pause;
mod poison;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::wait;
use nix::sys::signal::Signal;

/// Says whether the storms run in full length.
fn is_full() -> bool {
    std::env::var("BULKHEAD_STORM").is_ok_and(|value| value == "full")
}

/// Finds the worker that runs and takes requests.
fn running_worker(server: &Server) -> i32 {
    server.wait_for("a worker runs", |health| {
        let worker = &health["workers"][0];
        (worker["state"] == "RUNNING").then(|| i32::try_from(worker["pid"].as_i64()?).ok()).flatten()
    })
}

/// Strikes the worker that runs with a signal, and waits until its end was noticed.
fn strike(server: &Server, signal: Signal) {
    let worker = running_worker(server);
    process::signal(worker, signal);
    server.wait_for("its end is noticed", |health| (health["workers"][0]["pid"] != worker).then_some(()));
}

/// Counts the tokens that were delivered so far.
fn delivered(server: &Server) -> f64 {
    server.metric("bulkhead:generation_tokens_total").unwrap_or(0.0)
}

/// Waits until so many tokens more were delivered.
fn wait_for_tokens(server: &Server, more: f64) {
    let before = delivered(server);
    wait::until("tokens are delivered", || (delivered(server) >= before + more).then_some(()));
}

/// Sorted times, for printing.
#[derive(Debug, Default)]
struct Times(Vec<Duration>);

impl Times {
    fn print(mut self, what: &str) {
        self.0.sort_unstable();
        let at = |share: f64| self.0.get(((self.0.len() as f64 - 1.0) * share) as usize).copied().unwrap_or_default();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!(
            "{what}: {} times, median {:.1} ms, 90 % {:.1} ms, 99 % {:.1} ms, longest {:.1} ms",
            self.0.len(),
            ms(at(0.5)),
            ms(at(0.9)),
            ms(at(0.99)),
            ms(at(1.0))
        );
    }
}

/// Asks `/health/live` every 50 ms while something else happens; every answer has to be a 200. Gives the times.
fn while_probed<T>(server: &Server, happens: impl FnOnce() -> T) -> (T, Times) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let probe = scope.spawn(|| {
            let mut times = Times::default();
            while !is_over.load(Ordering::Relaxed) {
                let start = Instant::now();
                assert_eq!(server.get("/health/live").status, 200);
                times.0.push(start.elapsed());
                thread::sleep(Duration::from_millis(50));
            }
            times
        });
        // Ends the probe also when a panic passes: a scope waits for it.
        let guard = SetAtEnd(&is_over);
        let result = happens();
        drop(guard);
        (result, probe.join().expect("the supervisor answers at all times"))
    })
}

struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
