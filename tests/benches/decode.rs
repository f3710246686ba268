//! Tokens a second of the built-in model over HTTP, beside what the memory of this machine can deliver in the same minute.
//!
//! Decoding reads the weights once for each step, so bytes of weights a second against bytes of memory a second is the ratio
//! that carries over from machine to machine. It is a guide only: the built-in model is small enough for caches, and not all of
//! its experts are read in each step. No threshold: numbers are printed, not judged.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{QUESTION, greedy, read_stream, with};
use serde_json::json;

/// Tokens that each measurement asks for, at most.
const TOKENS: u64 = 512;

/// Numbers of clients that ask at the same time.
const CLIENTS: [usize; 3] = [1, 4, 8];

/// Far more than any cache holds.
const BUFFER_BYTES: usize = 512 << 20;

fn main() {
    let server = Server::start(&[]);
    let worker = server.health()["workers"][0].clone();
    let weights = worker["memory"]["weights"].as_u64().expect("a loaded model has weights");
    println!("model: {} bytes of weights on {}", weights, worker["device"]);
    let bandwidth = read_bandwidth();
    println!("memory: {:.1} GB/s read", bandwidth / 1e9);
    for clients in CLIENTS {
        let (tokens, time) = decode(&server, clients);
        let rate = tokens as f64 / time.as_secs_f64();
        // A batch reads the weights once for all its tokens.
        let read = rate / clients as f64 * weights as f64;
        println!(
            "decode, {clients} at once: {rate:.0} tokens/s; weights once a step are {:.1} GB/s, ratio to memory {:.3}",
            read / 1e9,
            read / bandwidth
        );
    }
}

/// Lets some clients stream and counts their tokens, from the first event of the first to the end of the last.
fn decode(server: &Server, clients: usize) -> (u64, Duration) {
    let start = Instant::now();
    let tokens = thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|client| scope.spawn(move || stream(server, client))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).sum()
    });
    (tokens, start.elapsed())
}

/// Streams answers until enough tokens have come: the model ends each of them when it likes.
fn stream(server: &Server, client: usize) -> u64 {
    let mut tokens = 0;
    let mut seed = 1000 * client;
    while tokens < TOKENS {
        let fields = json!({
            "max_tokens": TOKENS - tokens, "temperature": 1.5, "seed": seed, "stream_options": {"include_usage": true},
        });
        let reply = read_stream(server.open_stream(&with(greedy(QUESTION), fields))).expect("the stream is whole");
        tokens += reply.tokens("completion_tokens");
        seed += 1;
    }
    tokens
}

/// Measures how fast all cores together read memory. Units: bytes a second.
fn read_bandwidth() -> f64 {
    let buffer = vec![1u64; BUFFER_BYTES / size_of::<u64>()];
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let part = buffer.len().div_ceil(cores);
    let measure = || {
        let start = Instant::now();
        let sum: u64 = thread::scope(|scope| {
            let sum = |part: &[u64]| part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
            let threads: Vec<_> = buffer.chunks(part).map(|part| scope.spawn(move || sum(part))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a sum does not panic")).fold(0, u64::wrapping_add)
        });
        assert_eq!(black_box(sum), buffer.len() as u64, "every word was read");
        BUFFER_BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| measure()).fold(0.0, f64::max)
}
