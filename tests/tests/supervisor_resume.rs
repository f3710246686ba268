//! A worker's death as clients see it: a pause. With the fake worker, which dies exactly where a test wants it to.

use std::thread;

use bulkhead_tests::client;
use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, COMPLETIONS, Reply, listed_text, read_events, read_stream, with};
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn request(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}]})
}

fn worker_pid(server: &Server) -> i32 {
    server.wait_for("a worker runs", |health| i32::try_from(health["workers"][0]["pid"].as_i64()?).ok())
}

/// Asks whole and streamed, and checks that both get what an undisturbed request gets.
fn check(server: &Server, disturbance: &str) {
    let script = "[think=2] [call] one two three four";
    let told = |text: &str| with(request(text), json!({"logprobs": true, "top_logprobs": 2}));
    let undisturbed = server.ask(&told(script));
    assert_eq!(listed_text(&undisturbed.logprobs), undisturbed.content);
    let disturbed = told(&format!("{disturbance} {script}"));
    let replies = [server.ask(&disturbed), server.ask_stream(&disturbed)];
    for reply in replies {
        let reply = Reply { usage: json!(null), ..reply };
        assert_eq!(reply, Reply { usage: json!(null), ..undisturbed.clone() }, "{disturbance}");
    }
}

fn metric(server: &Server, name: &str) -> u64 {
    server.metric(name).unwrap_or(0.0) as u64
}

#[test]
fn an_answer_goes_on_behind_the_last_token_of_a_dead_worker() {
    let server = Server::start_fake(&["--hang-timeout", "1500ms"]);
    let mut deaths = 0;
    // Codes that no restart helps against are left out: they are final by the table of causes.
    for code in [0, 1, 22, 23, 24, 26, 42, 101, 255] {
        check(&server, &format!("[exit=3,{code}] [once]"));
        deaths += 2;
    }
    for way in ["abort=1", "abort=4", "hang=2", "garbage=2", "close=3", "count=2"] {
        check(&server, &format!("[{way}] [once]"));
        deaths += 2;
    }
    assert_eq!(server.health()["workers"][0]["restarts"], deaths);
    assert_eq!(metric(&server, "bulkhead:resumes_total"), deaths);
    assert_eq!(server.metric_sum("bulkhead:worker_restarts_total"), deaths as f64);
    assert_eq!(metric(&server, "bulkhead:quarantines_total"), 0);
    let usage = server.ask(&request("[abort=2] [once] one two three")).usage;
    assert_eq!((&usage["completion_tokens"], &usage["prompt_tokens"]), (&json!(3), &json!(3)), "{usage}");
}

#[test]
fn the_limit_of_tokens_counts_across_the_seam() {
    let server = Server::start_fake(&[]);
    for stop_at in 1..=3 {
        let text = format!("[abort={stop_at}] [once] a b c d e");
        let reply = server.ask_stream(&with(request(&text), json!({"max_tokens": 3})));
        assert_eq!((reply.content.as_str(), reply.finish_reason.as_str()), ("a b c", "length"), "{text}");
        assert_eq!(reply.tokens("completion_tokens"), 3, "{text}");
    }
    let body = json!({"prompt": "[abort=2] [once] a b c", "max_tokens": 9});
    let answer = server.post(COMPLETIONS, &body).json().expect("is JSON");
    assert_eq!(answer["choices"][0]["text"], "a b c");
}

#[test]
fn what_a_worker_was_handed_and_had_not_begun_is_handed_to_the_next() {
    let server = Server::start_fake(&[]);
    let worker = worker_pid(&server);
    // A stopped worker takes requests into its socket and says nothing.
    process::signal(worker, Signal::SIGSTOP);
    thread::scope(|scope| {
        let asked: Vec<_> = (0..3).map(|_| scope.spawn(|| server.chat("one two"))).collect();
        server.wait_for_health("/queue/running", &json!(3));
        process::signal(worker, Signal::SIGKILL);
        for answer in asked {
            let answer = answer.join().expect("does not panic");
            assert_eq!(
                (answer.status, answer.json()["choices"][0]["message"]["content"].clone()),
                (200, json!("one two"))
            );
        }
    });
    assert_eq!(metric(&server, "bulkhead:resumes_total"), 0, "there was nothing to go on from");
}

#[test]
fn a_poisonous_request_fails_alone() {
    let server = Server::start_fake(&[]);
    thread::scope(|scope| {
        let neighbours: Vec<_> = (0..4)
            .map(|index| {
                let (server, text) = (&server, format!("[delay=5] [repeat=60] neighbour {index}"));
                scope.spawn(move || (server.ask_stream(&request(&text)), text))
            })
            .collect();
        server.wait_for_health("/queue/running", &json!(4));
        let poison = server.chat("[exit=2,101] one two three");
        assert_eq!(poison.status, 500, "{}", poison.text);
        assert_eq!(poison.json()["error"]["code"], "request_quarantined");
        assert_eq!(poison.headers.get("x-should-retry").map(String::as_str), Some("false"));
        for neighbour in neighbours {
            let (reply, text) = neighbour.join().expect("does not panic");
            assert_eq!((reply.error, reply.finish_reason.as_str()), (None, "stop"), "{text}");
            assert_eq!(reply.content.split(' ').count(), 120, "{text}");
        }
    });
    let restarts = server.health()["workers"][0]["restarts"].as_u64().expect("is a number");
    assert!((2..=3).contains(&restarts), "two deaths with the others and one alone: {restarts}");
    // Nothing restarts because of it afterwards.
    assert_eq!(server.chat("fine").status, 200);
    assert_eq!(server.health()["workers"][0]["restarts"], restarts);
    assert_eq!(metric(&server, "bulkhead:quarantines_total"), 1);
}

#[test]
fn more_poison_than_deaths_are_allowed_is_quarantined_one_by_one() {
    let server = Server::start_fake(&[]);
    thread::scope(|scope| {
        let poisons: Vec<_> = (0..6).map(|_| scope.spawn(|| server.chat("[exit=0,101] x"))).collect();
        for poison in poisons {
            assert_eq!(poison.join().expect("does not panic").json()["error"]["code"], "request_quarantined");
        }
    });
    assert_eq!(server.chat("fine").status, 200);
    assert_eq!(metric(&server, "bulkhead:quarantines_total"), 6);
}

#[test]
fn poison_in_mid_stream_is_an_error_event() {
    let server = Server::start_fake(&[]);
    let (events, is_done) = read_events(server.open_stream(&request("[abort=2] one two three")));
    let (last, before) = events.split_last().expect("there are events");
    let content: String = before.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!((content.as_str(), is_done), ("one two", false));
    assert_eq!(last["error"]["code"], "request_quarantined");
}

#[test]
fn kills_from_outside_blame_nobody() {
    let server = Server::start_fake(&[]);
    let asked = request("[delay=5000] one two");
    thread::scope(|scope| {
        let answer = scope.spawn(|| server.ask(&with(asked.clone(), json!({"max_tokens": 1}))));
        for incarnation in 1..=4 {
            server.wait_for_health("/workers/0/incarnation", &json!(incarnation));
            server.wait_for_health("/queue/running", &json!(1));
            process::signal(worker_pid(&server), Signal::SIGKILL);
        }
        assert_eq!(answer.join().expect("does not panic").content, "one");
    });
    assert_eq!(metric(&server, "bulkhead:quarantines_total"), 0);
    let log = server.log();
    assert!(log.contains("killed from outside"), "{log}");
}

#[test]
fn the_wait_for_another_worker_is_bounded_by_the_deadline() {
    let server = Server::start_fake(&["--request-timeout", "2s"]);
    let worker = worker_pid(&server);
    let mut events = server.open_stream(&request("[delay=50] [repeat=1000] word"));
    events.next_data().expect("the stream runs");
    process::signal(worker, Signal::SIGSTOP);
    let (events, is_done) = read_events(events);
    assert_eq!(events.last().expect("there are events")["error"]["code"], "request_timeout");
    assert!(!is_done);
    process::signal(worker, Signal::SIGCONT);
    server.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
}

#[test]
fn who_left_before_the_worker_died_is_not_resumed() {
    let server = Server::start_fake(&[]);
    let worker = worker_pid(&server);
    let mut events = server.open_stream(&request("[delay=20] [repeat=1000] word"));
    events.next_data().expect("the stream runs");
    process::signal(worker, Signal::SIGSTOP);
    events.hang_up();
    wait::until("the supervisor has seen it", || {
        (server.metric_sum("bulkhead:request_failure_total") == 1.0).then_some(())
    });
    process::signal(worker, Signal::SIGKILL);
    server.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
    assert_eq!(metric(&server, "bulkhead:resumes_total"), 0);
    assert_eq!(server.post(CHAT, &request("again")).status, 200);
}

#[test]
fn a_slow_reader_stops_its_own_sequence_only() {
    // More than the buffers of a connection take.
    const WORDS: usize = 4000;
    let server = Server::start_fake(&["--log-level", "debug"]);
    let word = "x".repeat(5000);
    let body = with(request(&format!("[repeat={WORDS}] {word}")), json!({"stream": true}));
    let slow = client::send_and_hold(server.address, CHAT, &body.to_string()).expect("the server listens");
    server.wait_for_log("request waits for its reader");
    // The others go on, and it stands still, once the system's buffers have taken what they take beyond that.
    let mut others = 0;
    wait::until("its sequence stands still", || {
        let tokens = metric(&server, "bulkhead:generation_tokens_total");
        assert_eq!(server.chat("one two").status, 200);
        others += 2;
        (metric(&server, "bulkhead:generation_tokens_total") == tokens + 2).then_some(())
    });
    let tokens = metric(&server, "bulkhead:generation_tokens_total");
    assert!(tokens < WORDS as u64, "{tokens}");
    // When it reads, it gets all of it, and each token once.
    let reply = read_stream(client::receive(slow).expect("the head comes").events()).expect("the stream ends in order");
    assert_eq!((reply.error, reply.finish_reason.as_str()), (None, "stop"));
    assert_eq!(reply.content, vec![word.as_str(); WORDS].join(" "));
    assert_eq!(metric(&server, "bulkhead:generation_tokens_total"), WORDS as u64 + others);
    assert!(metric(&server, "bulkhead:resumes_total") >= 1);
}

#[test]
fn running_requests_survive_a_death_during_the_drain() {
    let mut server = Server::start_fake(&["--shutdown-timeout", "20s"]);
    let mut events = server.open_stream(&request("[delay=10] [repeat=50] word"));
    events.next_data().expect("the stream runs");
    let worker = worker_pid(&server);
    server.signal(Signal::SIGTERM);
    server.wait_for_log("shutting down");
    process::signal(worker, Signal::SIGKILL);
    assert!(read_events(events).1, "the stream ended well");
    assert_eq!(server.wait().code(), Some(0));
}
