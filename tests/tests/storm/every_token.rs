//! kill -9 at every token of an answer, whose text and log-probabilities are those of an undisturbed one.

use std::thread;

use bulkhead_tests::client::Events;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, QUESTION, Reply, greedy, listed_text, read_stream, whole, with};
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{delivered, is_full, strike};

/// Tokens of the answer.
const TOKENS: u32 = 60;

/// An answer with thoughts and content that nothing but the limit ends, with the log-probabilities of its tokens. A stop
/// string holds some of its text back for several tokens, and does not match.
fn request(server: &Server) -> Value {
    let free = with(
        greedy(QUESTION),
        json!({
            "max_tokens": TOKENS, "temperature": 1.5, "seed": 11, "frequency_penalty": 0.3, "stream": true,
            "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 3,
        }),
    );
    let reply = read(server.open_stream(&free));
    let from = reply.content.len() / 4;
    let held: String = reply.content.chars().skip(from).take(reply.content.chars().count() / 2).collect();
    assert!(held.len() > 20, "{reply:?}");
    let request = with(free, json!({"stop": [format!("{held}#")]}));
    let again = read(server.open_stream(&request));
    assert_eq!(again, reply, "what was held back comes out with all that is told of it");
    assert_eq!(listed_text(&again.logprobs), again.content);
    request
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
    let request = request(&server);
    let open = || server.open_stream(&request);
    let undisturbed = read(open());
    assert_eq!(undisturbed.tokens("completion_tokens"), u64::from(TOKENS));
    assert!(!undisturbed.reasoning.is_empty() && !undisturbed.content.is_empty(), "{undisturbed:?}");
    let mut resumes = 0;
    for token in (1..TOKENS).step_by(if is_full() { 1 } else { 9 }) {
        let before = delivered(&server);
        let events = open();
        wait_until_delivered(&server, before + f64::from(token));
        strike(&server, Signal::SIGKILL);
        assert_eq!(read(events), undisturbed, "killed behind token {token}");
        resumes += 1;
        assert_eq!(delivered(&server) - before, f64::from(TOKENS), "every token is counted once");
    }
    assert_eq!(server.metric("bulkhead:resumes_total"), Some(f64::from(resumes)));
}

#[test]
fn a_kill_at_any_token_changes_no_whole_answer() {
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "10"]);
    let request = with(request(&server), json!({"stream": false, "stream_options": null}));
    let undisturbed = server.ask(&request);
    for token in (1..TOKENS).step_by(if is_full() { 1 } else { 13 }) {
        let before = delivered(&server);
        thread::scope(|scope| {
            let reply = scope.spawn(|| whole(&server.post(CHAT, &request).json().expect("answers are JSON")));
            wait_until_delivered(&server, before + f64::from(token));
            strike(&server, Signal::SIGKILL);
            assert_eq!(reply.join().expect("does not panic"), undisturbed, "killed behind token {token}");
        });
    }
}

#[test]
fn one_answer_survives_a_kill_at_each_of_its_tokens() {
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "10"]);
    let request = request(&server);
    let open = || server.open_stream(&request);
    let undisturbed = read(open());
    let before = delivered(&server);
    let step = if is_full() { 1 } else { 6 };
    thread::scope(|scope| {
        let reply = scope.spawn(|| read(open()));
        for token in (1..TOKENS - 1).step_by(step) {
            wait_until_delivered(&server, before + f64::from(token));
            strike(&server, Signal::SIGKILL);
        }
        assert_eq!(reply.join().expect("does not panic"), undisturbed);
    });
    assert_eq!(delivered(&server) - before, f64::from(TOKENS));
}
