//! kill -9 at every token of an answer.

use bulkhead_tests::client::Events;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{QUESTION, Reply, greedy, read_stream, with};
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{delivered, is_full, strike};

/// Tokens of the answer.
const TOKENS: u32 = 60;

/// An answer with thoughts and content that nothing but the limit ends.
fn request() -> Value {
    with(
        greedy(QUESTION),
        json!({
            "max_tokens": TOKENS, "temperature": 1.5, "seed": 11, "frequency_penalty": 0.3, "stream": true,
            "stream_options": {"include_usage": true},
        }),
    )
}

fn open(server: &Server) -> Events {
    server.open_stream(&request())
}

fn read(events: Events) -> Reply {
    read_stream(events).expect("the stream ends in order")
}

/// Waits until a number of tokens was delivered. The last ones may come before anybody looks.
fn wait_until_delivered(server: &Server, tokens: f64) {
    wait::until("the token is delivered", || (delivered(server) >= tokens).then_some(()));
}

#[test]
fn a_kill_at_any_token_changes_nothing() {
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "10"]);
    let undisturbed = read(open(&server));
    assert_eq!(undisturbed.tokens("completion_tokens"), u64::from(TOKENS));
    assert!(!undisturbed.reasoning.is_empty() && !undisturbed.content.is_empty(), "{undisturbed:?}");
    let mut resumes = 0;
    for token in (1..TOKENS).step_by(if is_full() { 1 } else { 9 }) {
        let before = delivered(&server);
        let events = open(&server);
        wait_until_delivered(&server, before + f64::from(token));
        strike(&server, Signal::SIGKILL);
        assert_eq!(read(events), undisturbed, "killed behind token {token}");
        resumes += 1;
        assert_eq!(delivered(&server) - before, f64::from(TOKENS), "every token is counted once");
    }
    assert_eq!(server.metric("bulkhead:resumes_total"), Some(f64::from(resumes)));
}

#[test]
fn one_answer_survives_a_kill_at_each_of_its_tokens() {
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "10"]);
    let undisturbed = read(open(&server));
    let before = delivered(&server);
    let step = if is_full() { 1 } else { 6 };
    std::thread::scope(|scope| {
        let reply = scope.spawn(|| read(open(&server)));
        for token in (1..TOKENS - 1).step_by(step) {
            wait_until_delivered(&server, before + f64::from(token));
            strike(&server, Signal::SIGKILL);
        }
        assert_eq!(reply.join().expect("does not panic"), undisturbed);
    });
    assert_eq!(delivered(&server) - before, f64::from(TOKENS));
}
