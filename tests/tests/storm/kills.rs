//! Sixteen clients of all kinds while workers are killed, stopped, and run out of memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use bulkhead_tests::fuzz::Random;
use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{QUESTION, Reply, greedy, with};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{SetAtEnd, is_full, strike, wait_for_tokens, while_probed};

const CLIENTS: usize = 16;

/// The requests: greedy and sampled, with tools, with stop strings and penalties.
fn requests() -> Vec<Value> {
    let tool = json!({"type": "function", "function": {"name": "get_weather", "description": "Gives the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}});
    let seeded = |seed: u64| json!({"temperature": 1.2, "seed": seed, "max_tokens": 40, "presence_penalty": 0.5});
    vec![
        with(greedy(QUESTION), json!({"max_tokens": 60})),
        greedy("What is 7 plus 5?"),
        with(greedy("What is the weather in Paris?"), json!({"tools": [tool], "max_tokens": 80})),
        with(greedy(QUESTION), seeded(1)),
        with(with(greedy("Who are you?"), seeded(2)), json!({"logprobs": true, "top_logprobs": 5})),
        with(greedy("Count to ten."), json!({"stop": ["five", "6"], "max_tokens": 80})),
        with(
            greedy("Count to ten."),
            json!({"top_p": 0.9, "top_k": 20, "temperature": 0.9, "seed": 3, "max_tokens": 50}),
        ),
    ]
}

fn ask(server: &Server, request: &Value, is_stream: bool) -> Reply {
    if is_stream { server.ask_stream(request) } else { server.ask(request) }
}

/// Lets clients ask all the time while `happens` does, and checks each answer. Gives how many there were.
fn under_load(server: &Server, happens: impl FnOnce()) -> usize {
    let undisturbed: Vec<_> = requests().into_iter().map(|request| (ask(server, &request, false), request)).collect();
    let (is_over, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (undisturbed, is_over, answers) = (&undisturbed, &is_over, &answers);
            scope.spawn(move || {
                for round in client.. {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let (expected, request) = &undisturbed[round % undisturbed.len()];
                    let is_stream = (round / undisturbed.len() + client).is_multiple_of(2);
                    assert_eq!(ask(server, request, is_stream), *expected, "{request}");
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let guard = SetAtEnd(&is_over);
        happens();
        drop(guard);
    });
    answers.into_inner()
}

fn report(what: &str, server: &Server, answers: usize) {
    let resumes = server.metric("bulkhead:resumes_total").unwrap_or(0.0);
    let restarts = server.metric_sum("bulkhead:worker_restarts_total");
    println!("{what}: {answers} answers, all as undisturbed; {restarts} restarts, {resumes} resumes");
    assert_eq!(server.metric("bulkhead:quarantines_total"), Some(0.0), "{}", server.log());
    assert_eq!(server.metric_sum("bulkhead:request_failure_total"), 0.0, "{}", server.log());
    server.wait_until_idle();
    assert_eq!(process::children(server.pid()).len(), 1, "no zombie is left");
}

#[test]
fn a_storm_of_kills_changes_no_answer() {
    let server = Server::start(&[]);
    let kills: u32 = if is_full() { 100 } else { 12 };
    let (answers, times) = while_probed(&server, || {
        under_load(&server, || {
            let mut random = Random::new(1);
            for _ in 0..kills {
                // At a random moment: behind so many tokens, or in the middle of a load.
                wait_for_tokens(&server, random.below(80) as f64);
                strike(&server, Signal::SIGKILL);
            }
        })
    });
    report("kill -9", &server, answers);
    times.print("/health/live during the storm of kills");
    assert_eq!(server.health()["workers"][0]["restarts"], kills);
    assert!(!server.log().contains("BACKOFF"), "nobody had to wait for a kill from outside");
}

#[test]
fn a_storm_of_stops_changes_no_answer() {
    let server = Server::start(&["--hang-timeout", "2s"]);
    let stops = if is_full() { 10 } else { 2 };
    let (answers, times) = while_probed(&server, || {
        under_load(&server, || {
            for _ in 0..stops {
                // Enough for every suspect of the last hang to be cleared.
                wait_for_tokens(&server, 200.0);
                strike(&server, Signal::SIGSTOP);
            }
        })
    });
    assert!(server.log().contains("killed: it hung"));
    report("SIGSTOP", &server, answers);
    times.print("/health/live during the storm of stops");
}

#[test]
fn workers_that_run_out_of_memory_all_the_time_change_no_answer() {
    let server = Server::start(&["--allow-faults", "--faults-oom-after-steps", "150"]);
    let restarts = if is_full() { 50 } else { 5 };
    let mut memory = Vec::new();
    let answers = under_load(&server, || {
        for count in 1..=restarts {
            let wanted = f64::from(count);
            server.wait_for("another worker was replaced", |_| {
                (server.metric_sum("bulkhead:worker_restarts_total") >= wanted).then_some(())
            });
            memory.push(process::resident_kib(server.pid()));
        }
    });
    assert!(server.log().contains("out of host memory"));
    report("out of memory", &server, answers);
    println!("memory of the supervisor in KiB after each of them: {memory:?}");
    // Allocators keep some; what is kept of a worker or its requests would show as much more.
    let slack = 16 * 1024;
    assert!(memory[memory.len() - 1] <= memory[0] + slack, "{memory:?}");
}
