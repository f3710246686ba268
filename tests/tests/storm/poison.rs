//! A request that ends every worker, by a fault that is in the real worker.

use std::thread;

use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{COMPLETIONS, QUESTION, greedy, with};
use serde_json::json;

/// A token id that occurs in no other prompt and no other answer here: an ordinary token of the built-in model.
const DEADLY: u32 = 900;

#[test]
fn poison_fails_alone_and_its_neighbours_finish() {
    let deadly = DEADLY.to_string();
    let faults = ["--allow-faults", "--faults-die-on-token", &deadly, "--faults-step-delay-ms", "5"];
    let server = Server::start(&faults);
    let request = |index: u64| with(greedy(QUESTION), json!({"max_tokens": 100, "seed": index}));
    let undisturbed = server.ask(&request(0));
    thread::scope(|scope| {
        let neighbours: Vec<_> = (0..4)
            .map(|index| {
                scope.spawn({
                    let server = &server;
                    move || server.ask(&request(index))
                })
            })
            .collect();
        server.wait_for_health("/queue/running", &json!(4));
        let poison = server.post(COMPLETIONS, &json!({"prompt": [1, DEADLY, 2], "max_tokens": 5}));
        assert_eq!(poison.status, 500);
        assert_eq!(poison.json().expect("is JSON")["error"]["code"], "request_quarantined");
        for neighbour in neighbours {
            assert_eq!(neighbour.join().expect("does not panic"), undisturbed);
        }
    });
    assert_eq!(server.metric("bulkhead:quarantines_total"), Some(1.0));
    let restarts = server.metric_sum("bulkhead:worker_restarts_total");
    assert_eq!(server.ask(&request(0)), undisturbed);
    assert_eq!(server.metric_sum("bulkhead:worker_restarts_total"), restarts, "nothing restarts because of it later");
    println!("poison: {restarts} restarts until it was set aside");
}
