//! Thousands of requests with cancels and kills: nothing grows, and the metrics add up with what the clients saw.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use bulkhead_tests::client;
use bulkhead_tests::fuzz::Random;
use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, greedy, with};
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::json;

use super::{is_full, running_worker, strike};

const CLIENTS: usize = 4;

/// What the clients saw.
#[derive(Debug, Default)]
struct Seen {
    answers: AtomicUsize,
    tokens: AtomicUsize,
    left: AtomicUsize,
}

fn ask(server: &Server, random: &mut Random, seen: &Seen) {
    let request = with(greedy("Hello"), json!({"max_tokens": 1 + random.below(6), "seed": 1}));
    if random.below(5) == 0 {
        let body = with(request, json!({"stream": true, "max_tokens": 200, "temperature": 2})).to_string();
        client::send_and_leave(server.address, CHAT, &body).expect("the server listens");
        seen.left.fetch_add(1, Ordering::Relaxed);
    } else {
        let reply = server.ask(&request);
        seen.answers.fetch_add(1, Ordering::Relaxed);
        seen.tokens.fetch_add(usize::try_from(reply.tokens("completion_tokens")).expect("small"), Ordering::Relaxed);
    }
}

fn round(server: &Server, requests: usize, seed: usize, seen: &Seen) {
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut random = Random::new((seed * CLIENTS + client) as u64);
                (0..requests / CLIENTS).for_each(|_| ask(server, &mut random, seen));
            });
        }
    });
    server.wait_until_idle();
}

#[test]
fn many_requests_leave_nothing_behind() {
    let server = Server::start(&[]);
    let rounds = if is_full() { 20 } else { 4 };
    let requests = if is_full() { 500 } else { 40 };
    let seen = Seen::default();
    let descriptors = || process::descriptors(server.pid()).expect("it is ours");
    let mut memory = Vec::new();
    round(&server, requests, 0, &seen);
    let before = descriptors();
    for number in 1..=rounds {
        thread::scope(|scope| {
            let struck = scope.spawn(|| strike(&server, Signal::SIGKILL));
            round(&server, requests, number, &seen);
            struck.join().expect("does not panic");
        });
        server.wait_until_loaded();
        memory.push((process::resident_kib(server.pid()), process::resident_kib(running_worker(&server))));
    }
    wait::until("descriptors have come back", || (descriptors() <= before + 1).then_some(()));

    let answers = seen.answers.into_inner();
    assert_eq!(server.metric_sum("bulkhead:request_success_total"), answers as f64, "{}", server.log());
    let failures = server.metric_sum("bulkhead:request_failure_total");
    assert!(failures <= seen.left.into_inner() as f64, "only those that left have failed: {failures}");
    let tokens = server.metric("bulkhead:generation_tokens_total").expect("is counted");
    assert!(tokens >= seen.tokens.into_inner() as f64, "those that left got some too");
    let (first, last) = (memory[0], memory[memory.len() - 1]);
    println!("memory of supervisor and worker in KiB after each kill: {memory:?}; {answers} answers");
    // Allocators keep some; a leak of one request in each would show as much more.
    let slack = 16 * 1024;
    assert!(last.0 <= first.0 + slack && last.1 <= first.1 + slack, "{memory:?}");
}
