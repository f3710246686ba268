//! Many clients at once: each gets its own answer, those who leave give back what they held.

use std::thread;

use bulkhead_tests::client::{send_and_hold, send_and_leave};
use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, QUESTION, Reply, greedy, with};
use serde_json::json;

/// Questions of different length, so that a batch of them is ragged.
const QUESTIONS: [&str; 8] = [
    QUESTION,
    "What is 7 plus 5?",
    "Who are you?",
    "Hi",
    "How many words are in: one two three four?",
    "Repeat after me: the sea is calm",
    "How do I change the port?",
    "What is 20 minus 3? Then tell me how to see the queue, please, as I have forgotten it.",
];

/// Memory that a server may gain over rounds of equal load, by caches and fragmentation. Units: KiB.
const GROWTH_KIB_MAX: u64 = 64 * 1024;

fn ask_all(server: &Server) -> Vec<Reply> {
    thread::scope(|scope| {
        let threads: Vec<_> =
            QUESTIONS.iter().map(|question| scope.spawn(|| server.ask_stream(&greedy(question)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).collect()
    })
}

#[test]
fn neighbours_and_threads_change_no_answer() {
    let answers = ["1", "2"].map(|threads| {
        let server = Server::start(&["--threads", threads]);
        let alone: Vec<_> = QUESTIONS.iter().map(|question| server.ask_stream(&greedy(question))).collect();
        let together = ask_all(&server);
        for (question, (alone, together)) in QUESTIONS.iter().zip(alone.iter().zip(&together)) {
            let texts = |reply: &Reply| (reply.reasoning.clone(), reply.content.clone(), reply.finish_reason.clone());
            assert_eq!(texts(alone), texts(together), "{question} with {threads} threads");
        }
        alone
    });
    let [one, two] = answers;
    for ((question, one), two) in QUESTIONS.iter().zip(one).zip(two) {
        assert_eq!((one.reasoning, one.content), (two.reasoning, two.content), "{question}");
    }
}

#[test]
fn eight_stream_while_others_leave() {
    // Steps that take a while leave room to leave in the middle of an answer.
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "2"]);
    let quiet = ask_all(&server);
    server.wait_until_idle();
    let worker = server.worker().expect("a worker runs").pid;
    let memory = |pid| process::resident_kib(pid);
    let before = (memory(server.pid()), memory(worker), process::descriptors(server.pid()).expect("it is ours"));
    for round in 0..3 {
        let busy = thread::scope(|scope| {
            for leaver in 0..6 {
                let server = &server;
                scope.spawn(move || leave_early(server, leaver + round));
            }
            ask_all(&server)
        });
        for (quiet, busy) in quiet.iter().zip(&busy) {
            assert_eq!((&quiet.content, &quiet.finish_reason), (&busy.content, &busy.finish_reason));
        }
        server.wait_until_idle();
    }
    let after = (memory(server.pid()), memory(worker));
    assert!(after.0 < before.0 + GROWTH_KIB_MAX, "supervisor: {before:?} {after:?}");
    assert!(after.1 < before.1 + GROWTH_KIB_MAX, "worker: {before:?} {after:?}");
    server.wait_for("connections are closed", |_| {
        let now = process::descriptors(server.pid()).expect("it is ours");
        (now <= before.2 + 1).then_some(())
    });
    assert_eq!(server.worker().map(|stat| stat.pid), Some(worker), "the same worker did it all");
}

/// Asks for more than it waits for: leaves at once, after the first events, or while a whole answer is made.
fn leave_early(server: &Server, how: usize) {
    let request = with(greedy(QUESTION), json!({"max_tokens": 4000, "temperature": 2, "seed": how}));
    match how % 3 {
        0 => drop(server.open_stream(&request)),
        1 => {
            let mut events = server.open_stream(&request);
            for _ in 0..3 {
                events.next_data().expect("the stream has begun");
            }
            events.hang_up();
        }
        _ => send_and_leave(server.address, CHAT, &request.to_string()).expect("it is sent"),
    }
}

#[test]
fn more_than_the_queue_holds_is_told_to_come_back() {
    let server =
        Server::start(&["--sequences-max", "1", "--queue-max", "1", "--allow-faults", "--faults-step-delay-ms", "50"]);
    let long = with(greedy("Count from 1 to 60."), json!({"max_tokens": 4000}));
    // Those that wait get no answer yet, so none is waited for here.
    let stream = with(long.clone(), json!({"stream": true})).to_string();
    let mut held = Vec::new();
    while server.health()["queue"]["waiting"] != 1 {
        held.push(send_and_hold(server.address, CHAT, &stream).expect("it is sent"));
        server.wait_for("it is admitted", |health| {
            let queue = &health["queue"];
            let admitted = queue["running"].as_u64()? + queue["waiting"].as_u64()?;
            (usize::try_from(admitted) == Ok(held.len())).then_some(())
        });
    }
    let refused = server.post(CHAT, &long);
    assert_eq!(refused.status, 429);
    assert!(refused.headers.contains_key("retry-after"), "{:?}", refused.headers);
    let body = refused.json().expect("refusals are JSON");
    assert!(body["error"]["message"].as_str().expect("a text").contains("rate limit"), "{body}");
    drop(held);
    server.wait_until_idle();
}
