//! Bodies of requests: what any client may send.

use bulkhead_shared::frame::encode;
use bulkhead_shared::limits::TO_WORKER_FRAME_BYTES_MAX;
use bulkhead_shared::message::ToWorker;
use bulkhead_supervisor::request::{Admission, Request, RequestError, chat, completion};
use bulkhead_tests::fuzz::{Random, mutate, mutate_json, run};
use serde_json::{Value, json};

use crate::memory::{alone, bounded};

fn chat_request() -> Value {
    json!({
        "model": "bulkhead-demo",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Use tools."}]},
            {"role": "user", "content": "What is the time in Oslo?", "name": "ada"},
            {"role": "assistant", "content": null, "reasoning": "I need the clock.", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{\"city\":\"Oslo\"}"}},
            ]},
            {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
        ],
        "tools": [{"type": "function", "function": {
            "name": "clock", "description": "Tells the time.", "strict": false,
            "parameters": {"type": "object", "properties": {"city": {"type": ["string", "null"], "enum": ["Oslo"]}}},
        }}],
        "tool_choice": "auto", "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": -1, "n": 1,
        "max_completion_tokens": 100, "stop": ["Observation:", "</code>"], "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "repetition_penalty": 1.1, "reasoning_effort": "low", "stream": true,
        "stream_options": {"include_usage": true}, "response_format": {"type": "text"}, "user": "ada",
        "logit_bias": {}, "metadata": {"a": "b"},
    })
}

fn completion_request() -> Value {
    json!({
        "model": "bulkhead-demo", "prompt": [1, 2, 3], "max_tokens": 10, "temperature": 0, "stop": "x", "echo": false,
        "suffix": null, "best_of": 1, "stream": false,
    })
}

fn admission() -> Admission {
    Admission { date: "2026-01-31".into(), seed: 7 }
}

fn check(valid: Value, parse: fn(&[u8], Admission) -> Result<Request, RequestError>, random: &mut Random) {
    let mut json = valid;
    mutate_json(&mut json, random);
    let mut body = json.to_string().into_bytes();
    if random.once_in(4) {
        mutate(&mut body, random);
    }
    let allowed = (1 << 18) + 256 * body.len();
    match bounded(allowed, || parse(&body, admission())) {
        Ok(request) => {
            let message = ToWorker::Generate(Box::new(request.generate));
            encode(&message, TO_WORKER_FRAME_BYTES_MAX).expect("whatever is accepted fits into a frame");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[test]
fn chat_requests() {
    alone(|| run("chat requests", |random| check(chat_request(), chat, random)));
}

#[test]
fn completion_requests() {
    alone(|| run("completion requests", |random| check(completion_request(), completion, random)));
}

#[test]
fn the_valid_requests_are_valid() {
    chat(chat_request().to_string().as_bytes(), admission()).expect("valid");
    completion(completion_request().to_string().as_bytes(), admission()).expect("valid");
}
