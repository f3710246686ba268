//! The public API of a supervisor with the fake worker: answers, streams, errors.

use std::io::Write;
use std::thread;

use bulkhead_tests::client::{self, Answer, WholeAnswer};
use bulkhead_tests::fake::Fake;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, COMPLETIONS, read_events};
use serde_json::{Value, json};

fn message(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn streamed(text: &str) -> Value {
    json!({"messages": message(text), "stream": true})
}

fn read_whole(answer: Answer) -> WholeAnswer {
    answer.read_whole().expect("the answer is whole")
}

fn error_of(answer: &WholeAnswer) -> (u16, Value, Value) {
    let error = &answer.json()["error"];
    assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
    assert!(answer.headers.get("x-request-id").is_some_and(|id| id.starts_with("req_")));
    (answer.status, error["code"].clone(), error["param"].clone())
}

#[test]
fn whole_and_streamed_answers_are_equal() {
    let server = Server::start_fake(&[]);
    let prompt = "[think=2] so then the answer is five";
    let whole = server.chat(prompt).json();
    let message_of = &whole["choices"][0]["message"];
    assert_eq!(message_of["content"], "the answer is five");
    assert_eq!((&message_of["reasoning"], &message_of["reasoning_content"]), (&json!("so then"), &json!("so then")));
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("fake-model")));
    assert_eq!(
        whole["usage"],
        json!({"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 2}})
    );

    let body = json!({"messages": message(prompt), "stream": true, "stream_options": {"include_usage": true}});
    let stream = server.post(CHAT, &body);
    assert_eq!(stream.status, 200);
    let (events, is_done) = read_events(stream.events());
    assert!(is_done);
    let joined = |key: &str| -> String {
        events.iter().filter_map(|event| event["choices"][0]["delta"][key].as_str()).collect()
    };
    assert_eq!((joined("content"), joined("reasoning")), ("the answer is five".into(), "so then".into()));
    assert_eq!(joined("reasoning_content"), "so then");
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "stop");
    let last = &events[events.len() - 1];
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    assert!(events.iter().all(|event| event["id"] == events[0]["id"] && event["object"] == "chat.completion.chunk"));
    assert!(events[..events.len() - 1].iter().all(|event| event.get("usage") == Some(&Value::Null)));
}

#[test]
fn tool_calls_come_back_whole_and_streamed() {
    let server = Server::start_fake(&[]);
    let whole = server.chat("[think=1] hm [call]").json();
    let choice = &whole["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    let call = &choice["message"]["tool_calls"][0];
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")));
    assert_eq!(call["function"], json!({"name": "lookup", "arguments": "{\"key\":\"a\"}"}));
    let (events, _) = read_events(server.open_stream(&streamed("[call]")));
    let delta = events.iter().find_map(|event| event["choices"][0]["delta"].get("tool_calls")).expect("a call");
    assert_eq!((&delta[0]["index"], &delta[0]["type"]), (&json!(0), &json!("function")));
    assert!(events.iter().all(|event| event.get("usage").is_none()));

    let history = json!([
        {"role": "user", "content": "x"}, choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "found it"},
    ]);
    let answer = read_whole(server.post(CHAT, &json!({"messages": history}))).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "found it");
}

#[test]
fn completions_take_text_and_tokens() {
    let server = Server::start_fake(&["--aliases", "openai/other,second"]);
    let answer = read_whole(server.post(COMPLETIONS, &json!({"prompt": "one two three", "max_tokens": 2}))).json();
    assert_eq!((&answer["object"], &answer["choices"][0]["text"]), (&json!("text_completion"), &json!("one two")));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let body = json!({"prompt": [5, 6], "stream": true, "model": "openai/other"});
    let (events, is_done) = read_events(server.post(COMPLETIONS, &body).events());
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert!(is_done);
    assert_eq!(text, "2 tokens");
    assert_eq!(read_whole(server.get("/v1/models/openai/other")).json()["id"], "fake-model");
    let models = read_whole(server.get("/v1/models")).json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["object"]), (&json!("fake-model"), &json!("model")));
}

#[test]
fn every_error_has_openais_shape() {
    let server = Server::start_fake(&[]);
    let post =
        |body: &str| read_whole(client::send(server.address, "POST", CHAT, Some(body)).expect("there is an answer"));
    let with = |extra: &str| post(&format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"x\"}}], {extra}}}"));
    for (response, expected) in [
        (post("{"), (400, json!("invalid_json"), Value::Null)),
        (post("{}"), (400, json!("missing_required_parameter"), json!("messages"))),
        (with("\"temperature\": 3"), (400, json!("invalid_value"), json!("temperature"))),
        (with("\"n\": 2"), (400, json!("unsupported_parameter"), json!("n"))),
        (with("\"nn\": 2"), (400, json!("unknown_parameter"), json!("nn"))),
        (with("\"model\": \"gpt-9\""), (404, json!("model_not_found"), json!("model"))),
        (server.chat("[context]"), (400, json!("context_length_exceeded"), json!("messages"))),
        (server.chat("[invalid]"), (400, json!("invalid_value"), json!("prompt"))),
        (read_whole(server.get("/v1/models/gpt-9")), (404, json!("model_not_found"), json!("model"))),
        (read_whole(server.get("/v2")), (404, json!("unknown_url"), Value::Null)),
        (read_whole(server.get(CHAT)), (405, json!("method_not_supported"), Value::Null)),
    ] {
        assert_eq!(error_of(&response), expected);
    }
    let unknown = with("\"model\": \"gpt-9\"").json();
    assert!(unknown["error"]["message"].as_str().is_some_and(|text| text.contains("valid names: fake-model")));
    // The status is settled before the first byte: also a stream is refused with its status.
    assert_eq!(server.post(CHAT, &streamed("[context]")).status, 400);
}

#[test]
fn a_body_that_is_too_large_is_refused_and_the_answer_arrives() {
    let server = Server::start_fake(&[]);
    let limit = 8 * 1024 * 1024;
    let body = " ".repeat(limit + 1);
    let post =
        |body: &str| read_whole(client::send(server.address, "POST", CHAT, Some(body)).expect("the answer arrives"));
    assert_eq!(error_of(&post(&body)).0, 413);
    assert_eq!(post(&body[1..]).status, 400);
    // Without a length in front, in chunks.
    let mut stream = client::connect(server.address).expect("the server listens");
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("is sent");
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, &body[..1 << 20]);
    for _ in 0..9 {
        stream.write_all(chunk.as_bytes()).expect("is sent");
    }
    stream.write_all(b"0\r\n\r\n").expect("is sent");
    let answer = read_whole(client::receive(stream).expect("the answer arrives"));
    assert_eq!(answer.status, 413);
}

#[test]
fn only_local_hosts_are_served_on_loopback() {
    let server = Server::start_fake(&[]);
    for (host, status) in [
        ("host: localhost:1", 200),
        ("host: 127.0.0.1", 200),
        ("host: [::1]:80", 200),
        ("host: evil.example", 403),
        ("host: localhost.evil.example", 403),
    ] {
        let request = format!("GET /health HTTP/1.1\r\n{host}\r\nconnection: close\r\n\r\n");
        let answer = client::send_raw(server.address, request.as_bytes()).expect("there is an answer");
        assert_eq!(answer.status, status, "{host}");
    }
}

#[test]
fn dropping_the_connection_cancels_whole_and_streamed() {
    let server = Server::start_fake(&[]);
    let endless = message("[delay=5] [repeat=4000] word");
    for is_stream in [false, true] {
        let body = json!({"messages": endless, "stream": is_stream}).to_string();
        let connection = client::send_and_hold(server.address, CHAT, &body).expect("it is sent");
        server.wait_for_health("/queue/running", &json!(1));
        drop(connection);
        server.wait_for_health("/queue/running", &json!(0));
    }
    assert_eq!(server.health()["workers"][0]["incarnation"], 1);
}

/// Sends a chat request with a key and reads the answer.
fn ask_with_key(server: &Server, key: &str, text: &str) -> WholeAnswer {
    let (address, body) = (server.address, json!({"messages": message(text)}).to_string());
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    read_whole(client::send_raw(address, request.as_bytes()).expect("the server answers"))
}

#[test]
fn one_key_with_many_requests_does_not_keep_another_waiting() {
    let server = Server::start_fake(&["--sequences-max", "1"]);
    thread::scope(|scope| {
        let many: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| ask_with_key(&server, "first-key", "[delay=50] [repeat=10] word")))
            .collect();
        let waiting = |health: &Value| health["queue"]["waiting"].as_u64().expect("is a number");
        server.wait_for("the first one's requests wait", |health| (waiting(health) >= 15).then_some(()));
        assert_eq!(ask_with_key(&server, "other-key", "one two").status, 200);
        assert!(waiting(&server.health()) > 0, "it did not have to wait for all of them");
        for answer in many {
            assert_eq!(answer.join().expect("does not panic").status, 200);
        }
    });
    // Whoever has a key, it is in no line of the log.
    assert!(!server.log().contains("Bearer") && !server.log().contains("other-key"), "{}", server.log());
}

#[test]
fn a_full_queue_is_a_rate_limit_and_waiting_requests_can_be_dropped() {
    let server = Server::start_fake(&["--sequences-max", "1", "--queue-max", "2"]);
    let endless = json!({"messages": message("[delay=5] [repeat=4000] word")}).to_string();
    let ask = || client::send_and_hold(server.address, CHAT, &endless).expect("it is sent");
    // One sequence, four ahead, two waiting.
    let clients: Vec<_> = (0..7).map(|_| ask()).collect();
    server.wait_for_health("/queue/waiting", &json!(2));
    let refused = server.chat("x");
    assert_eq!(error_of(&refused).0, 429);
    assert!(refused.headers.contains_key("retry-after"));
    assert!(refused.json()["error"]["message"].as_str().is_some_and(|text| text.contains("rate limit")));
    drop(clients);
    server.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
    assert_eq!(server.chat("still here").json()["choices"][0]["message"]["content"], "still here");
}

#[test]
fn a_deadline_ends_a_request() {
    let server = Server::start_fake(&["--request-timeout", "1s"]);
    let (status, code, _) = error_of(&server.chat("[delay=20] [repeat=4000] word"));
    assert_eq!((status, code), (504, json!("request_timeout")));
    server.wait_for_health("/queue/running", &json!(0));
}

#[test]
fn a_slow_client_blocks_nobody() {
    let server = Server::start_fake(&[]);
    let mut slow: Vec<_> = (0..50).map(|_| client::connect(server.address).expect("the server listens")).collect();
    for client in &mut slow {
        client.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: lo").expect("is sent");
    }
    // One that asks for a lot and reads nothing of it.
    let body = streamed(&format!("[repeat=3000] {}", "x".repeat(2000))).to_string();
    let lazy = client::send_and_hold(server.address, CHAT, &body).expect("it is sent");
    assert_eq!(server.chat("quick").json()["choices"][0]["message"]["content"], "quick");
    server.wait_for_health("/queue/running", &json!(0));
    let (events, is_done) = read_events(client::receive(lazy).expect("there is an answer").events());
    let bytes: usize =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).map(str::len).sum();
    assert!(is_done);
    assert_eq!(bytes, 3000 * 2001 - 1);
}

#[test]
fn many_clients_stream_at_once_while_others_leave() {
    let server = Server::start_fake(&[]);
    std::thread::scope(|scope| {
        for index in 0..16 {
            let server = &server;
            scope.spawn(move || {
                let text = format!("[delay=2] [repeat=20] client {index}");
                let mut stream = server.open_stream(&streamed(&text));
                if index % 2 == 1 {
                    assert!(stream.next_data().expect("the stream runs").is_some());
                    return;
                }
                let (events, is_done) = read_events(stream);
                let content: String =
                    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
                assert!(is_done);
                assert_eq!(content, vec![format!("client {index}"); 20].join(" "));
            });
        }
    });
    server.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
}

#[test]
fn the_api_answers_before_the_model_is_ready() {
    let server = Server::spawn_fake(Fake { load: "steps 10\nstall", ..Fake::default() }, &[]);
    let health = server.wait_for_health("/workers/0/progress/done", &json!(5));
    assert_eq!((&health["status"], &health["model_loaded"]), (&json!("loading"), &json!(false)));
    assert_eq!(server.get("/health").status, 503);
    assert_eq!(server.get("/health/live").status, 200);
    assert_eq!(server.get("/health/ready").status, 503);
    let early = server.chat("x");
    assert_eq!(error_of(&early), (503, json!("model_loading"), Value::Null));
    assert!(early.headers.contains_key("retry-after"));
}

#[test]
fn health_tells_what_the_old_clients_ask_for() {
    let server = Server::start_fake(&[]);
    let answer = read_whole(server.get("/health"));
    assert_eq!(answer.status, 200);
    let health = answer.json();
    assert_eq!((&health["status"], &health["model_loaded"]), (&json!("healthy"), &json!(true)));
    assert_eq!((&health["gpu_memory_used"], &health["gpu_memory_total"]), (&json!(0.0), &json!(0.0)));
    let worker = &health["workers"][0];
    assert_eq!((&worker["state"], &worker["context_tokens"]), (&json!("RUNNING"), &json!(4096)));
    assert_eq!(worker["blocks"]["total"], 100);
}

#[test]
fn no_text_of_a_prompt_or_an_answer_reaches_the_log() {
    let server = Server::start_fake(&["--log-level", "trace"]);
    let canary = "xyzzycanaryxyzzy";
    assert_eq!(server.chat(canary).status, 200);
    let body = json!({"messages": message(canary), "stream": true, "stop": [canary], "user": canary});
    assert!(read_events(server.open_stream(&body)).1);
    assert_eq!(server.post(CHAT, &json!({"messages": canary})).status, 400);
    server.wait_for_health("/queue/running", &json!(0));
    let log = server.log();
    assert!(log.lines().count() > 3);
    assert!(log.lines().all(|line| !line.contains(canary)));
}
