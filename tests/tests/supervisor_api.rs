//! The public API of a supervisor with the fake worker: answers, streams, errors.

use std::io::Write;

use bulkhead_tests::http::{self, Response, Stream};
use bulkhead_tests::service::{Service, Setup, wait_for};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn message(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn error_of(response: &Response) -> (u16, Value, Value) {
    let error = &response.json()["error"];
    assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
    assert!(response.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    (response.status, error["code"].clone(), error["param"].clone())
}

#[test]
fn whole_and_streamed_answers_are_equal() {
    let service = Service::ready(&[]);
    let prompt = "[think=2] so then the answer is five";
    let whole = service.chat(prompt).json();
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
    let mut stream = Stream::post(service.port, CHAT, &body);
    assert_eq!(stream.status, 200);
    let (events, is_done) = stream.events();
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
    let service = Service::ready(&[]);
    let whole = service.chat("[think=1] hm [call]").json();
    let choice = &whole["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    let call = &choice["message"]["tool_calls"][0];
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")));
    assert_eq!(call["function"], json!({"name": "lookup", "arguments": "{\"key\":\"a\"}"}));
    let body = json!({"messages": message("[call]"), "stream": true});
    let (events, _) = Stream::post(service.port, CHAT, &body).events();
    let delta = events.iter().find_map(|event| event["choices"][0]["delta"].get("tool_calls")).expect("a call");
    assert_eq!((&delta[0]["index"], &delta[0]["type"]), (&json!(0), &json!("function")));
    assert!(events.iter().all(|event| event.get("usage").is_none()));

    let history = json!([
        {"role": "user", "content": "x"}, choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "found it"},
    ]);
    let answer = service.post(CHAT, &json!({"messages": history})).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "found it");
}

#[test]
fn completions_take_text_and_tokens() {
    let service = Service::ready(&["--aliases", "openai/other,second"]);
    let whole = service.post("/v1/completions", &json!({"prompt": "one two three", "max_tokens": 2})).json();
    assert_eq!((&whole["object"], &whole["choices"][0]["text"]), (&json!("text_completion"), &json!("one two")));
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let body = json!({"prompt": [5, 6], "stream": true, "model": "openai/other"});
    let (events, is_done) = Stream::post(service.port, "/v1/completions", &body).events();
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert!(is_done);
    assert_eq!(text, "2 tokens");
    assert_eq!(service.get("/v1/models/openai/other").json()["id"], "fake-model");
    let models = service.get("/v1/models").json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["object"]), (&json!("fake-model"), &json!("model")));
}

#[test]
fn every_error_has_openais_shape() {
    let service = Service::ready(&[]);
    let post = |body: &str| http::request(service.port, "POST", CHAT, &[], body.as_bytes());
    let with = |extra: &str| post(&format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"x\"}}], {extra}}}"));
    for (response, expected) in [
        (post("{"), (400, json!("invalid_json"), Value::Null)),
        (post("{}"), (400, json!("missing_required_parameter"), json!("messages"))),
        (with("\"temperature\": 3"), (400, json!("invalid_value"), json!("temperature"))),
        (with("\"n\": 2"), (400, json!("unsupported_parameter"), json!("n"))),
        (with("\"nn\": 2"), (400, json!("unknown_parameter"), json!("nn"))),
        (with("\"model\": \"gpt-9\""), (404, json!("model_not_found"), json!("model"))),
        (service.chat("[context]"), (400, json!("context_length_exceeded"), json!("messages"))),
        (service.chat("[invalid]"), (400, json!("invalid_value"), json!("prompt"))),
        (service.get("/v1/models/gpt-9"), (404, json!("model_not_found"), json!("model"))),
        (service.get("/v2"), (404, json!("unknown_url"), Value::Null)),
        (service.get(CHAT), (405, json!("method_not_supported"), Value::Null)),
    ] {
        assert_eq!(error_of(&response), expected);
    }
    let unknown = with("\"model\": \"gpt-9\"").json();
    assert!(unknown["error"]["message"].as_str().is_some_and(|text| text.contains("valid names: fake-model")));
    // The status is settled before the first byte: also a stream is refused with its status.
    let stream = Stream::post(service.port, CHAT, &json!({"messages": message("[context]"), "stream": true}));
    assert_eq!(stream.status, 400);
}

#[test]
fn a_body_that_is_too_large_is_refused_and_the_answer_arrives() {
    let service = Service::ready(&[]);
    let limit = 8 * 1024 * 1024;
    let body = vec![b' '; limit + 1];
    assert_eq!(error_of(&http::request(service.port, "POST", CHAT, &[], &body)).0, 413);
    assert_eq!(http::request(service.port, "POST", CHAT, &[], &body[1..]).status, 400);
    // Without a length in front, in chunks.
    let mut stream = http::connect(service.port);
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("is sent");
    let chunk = [format!("{:x}\r\n", 1 << 20).as_bytes(), &body[..1 << 20], b"\r\n"].concat();
    for _ in 0..9 {
        stream.write_all(&chunk).expect("is sent");
    }
    stream.write_all(b"0\r\n\r\n").expect("is sent");
    assert_eq!(http::read(stream).status, 413);
}

#[test]
fn only_local_hosts_are_served_on_loopback() {
    let service = Service::ready(&[]);
    for (host, status) in [
        ("host: localhost:1", 200),
        ("host: 127.0.0.1", 200),
        ("host: [::1]:80", 200),
        ("host: evil.example", 403),
        ("host: localhost.evil.example", 403),
    ] {
        assert_eq!(http::request(service.port, "GET", "/health", &[host], b"").status, status, "{host}");
    }
}

#[test]
fn dropping_the_connection_cancels_whole_and_streamed() {
    let service = Service::ready(&[]);
    let endless = message("[delay=5] [repeat=4000] word");
    for is_stream in [false, true] {
        let mut client = http::connect(service.port);
        let body = json!({"messages": endless, "stream": is_stream});
        http::send(&mut client, "POST", CHAT, &[], body.to_string().as_bytes());
        service.wait_for_health("/queue/running", &json!(1));
        drop(client);
        service.wait_for_health("/queue/running", &json!(0));
    }
    assert_eq!(service.get("/health").json()["workers"][0]["incarnation"], 1);
}

#[test]
fn a_full_queue_is_a_rate_limit_and_waiting_requests_can_be_dropped() {
    let service = Service::ready(&["--sequences-max", "1", "--queue-max", "2"]);
    let endless = json!({"messages": message("[delay=5] [repeat=4000] word")}).to_string();
    let ask = || {
        let mut client = http::connect(service.port);
        http::send(&mut client, "POST", CHAT, &[], endless.as_bytes());
        client
    };
    // One sequence, four ahead, two waiting.
    let clients: Vec<_> = (0..7).map(|_| ask()).collect();
    service.wait_for_health("/queue/waiting", &json!(2));
    let refused = service.chat("x");
    assert_eq!(error_of(&refused).0, 429);
    assert!(refused.header("retry-after").is_some());
    assert!(refused.json()["error"]["message"].as_str().is_some_and(|text| text.contains("rate limit")));
    drop(clients);
    service.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
    assert_eq!(service.chat("still here").json()["choices"][0]["message"]["content"], "still here");
}

#[test]
fn a_deadline_ends_a_request() {
    let service = Service::ready(&["--request-timeout", "1s"]);
    let (status, code, _) = error_of(&service.chat("[delay=20] [repeat=4000] word"));
    assert_eq!((status, code), (504, json!("request_timeout")));
    service.wait_for_health("/queue/running", &json!(0));
}

#[test]
fn a_slow_client_blocks_nobody() {
    let service = Service::ready(&[]);
    let mut slow: Vec<_> = (0..50).map(|_| http::connect(service.port)).collect();
    for client in &mut slow {
        client.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: lo").expect("is sent");
    }
    // One that asks for a lot and reads nothing of it.
    let mut lazy = http::connect(service.port);
    let body = json!({"messages": message(&format!("[repeat=3000] {}", "x".repeat(2000))), "stream": true});
    http::send(&mut lazy, "POST", CHAT, &[], body.to_string().as_bytes());
    assert_eq!(service.chat("quick").json()["choices"][0]["message"]["content"], "quick");
    service.wait_for_health("/queue/running", &json!(0));
    let (events, is_done) = Stream::new(lazy).events();
    let bytes: usize =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).map(str::len).sum();
    assert!(is_done);
    assert_eq!(bytes, 3000 * 2001 - 1);
}

#[test]
fn many_clients_stream_at_once_while_others_leave() {
    let service = Service::ready(&[]);
    std::thread::scope(|scope| {
        for index in 0..16 {
            let service = &service;
            scope.spawn(move || {
                let text = format!("[delay=2] [repeat=20] client {index}");
                let mut stream = Stream::post(service.port, CHAT, &json!({"messages": message(&text), "stream": true}));
                assert_eq!(stream.status, 200);
                if index % 2 == 1 {
                    assert!(stream.event().is_some());
                    return;
                }
                let (events, is_done) = stream.events();
                let content: String =
                    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
                assert!(is_done);
                assert_eq!(content, vec![format!("client {index}"); 20].join(" "));
            });
        }
    });
    service.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
}

#[test]
fn the_api_answers_before_the_model_is_ready() {
    let service = Service::start(&Setup { load: "steps 10\nstall", ..Setup::default() });
    let health = service.wait_for_health("/workers/0/progress/done", &json!(5));
    assert_eq!((&health["status"], &health["model_loaded"]), (&json!("loading"), &json!(false)));
    assert_eq!(service.get("/health").status, 503);
    assert_eq!(service.get("/health/live").status, 200);
    assert_eq!(service.get("/health/ready").status, 503);
    let early = service.chat("x");
    assert_eq!(error_of(&early), (503, json!("model_loading"), Value::Null));
    assert!(early.header("retry-after").is_some());
}

#[test]
fn health_tells_what_the_old_clients_ask_for() {
    let service = Service::ready(&[]);
    let health = wait_for("health", || Some(service.get("/health")).filter(|health| health.status == 200)).json();
    assert_eq!((&health["status"], &health["model_loaded"]), (&json!("healthy"), &json!(true)));
    assert_eq!((&health["gpu_memory_used"], &health["gpu_memory_total"]), (&json!(0.0), &json!(0.0)));
    let worker = &health["workers"][0];
    assert_eq!((&worker["state"], &worker["context_tokens"]), (&json!("RUNNING"), &json!(4096)));
    assert_eq!(worker["blocks"]["total"], 100);
}

#[test]
fn no_text_of_a_prompt_or_an_answer_reaches_the_log() {
    let service = Service::ready(&["--log-level", "trace"]);
    let canary = "xyzzycanaryxyzzy";
    assert_eq!(service.chat(canary).status, 200);
    let body = json!({"messages": message(canary), "stream": true, "stop": [canary], "user": canary});
    assert!(Stream::post(service.port, CHAT, &body).events().1);
    assert_eq!(service.post(CHAT, &json!({"messages": canary})).status, 400);
    service.wait_for_health("/queue/running", &json!(0));
    let lines = service.log_lines();
    assert!(lines.len() > 3);
    assert!(lines.iter().all(|line| !line.contains(canary)));
}
