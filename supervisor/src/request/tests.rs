//! Tests of the judgement of requests, by tables.

use bulkhead_shared::generate::{Chat, Message, ReasoningEffort};
use bulkhead_shared::limits::{
    CONTEXT_TOKENS_MAX, MESSAGES_MAX, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, TOOLS_MAX, logprob_tokens_max,
};
use serde_json::{Value, json};

use super::*;

fn admission() -> Admission {
    Admission { date: "2025-02-03".into(), seed: 42 }
}

/// A chat request with these further parameters.
fn ask(extra: &Value) -> Result<Request, RequestError> {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let fields = body.as_object_mut().expect("is an object");
    fields.extend(extra.as_object().expect("is an object").clone());
    chat(body.to_string().as_bytes(), admission())
}

fn accepted(extra: &Value) -> Generate {
    ask(extra).unwrap_or_else(|error| panic!("{extra}: {error}")).generate
}

fn conversation(extra: &Value) -> Chat {
    let Prompt::Chat(chat) = accepted(extra).prompt else { panic!("no conversation") };
    chat
}

/// Gives the parameter that an error names.
fn named(error: &RequestError) -> Option<&str> {
    match error {
        RequestError::NotJson { .. } => None,
        RequestError::Missing { param }
        | RequestError::Invalid { param, .. }
        | RequestError::Unsupported { param, .. }
        | RequestError::Unknown { param, .. } => Some(param),
    }
}

#[test]
fn a_value_out_of_bounds_is_refused_by_name() {
    let long_stop = "x".repeat(STOP_STRING_BYTES_MAX + 1);
    let many_stops = vec!["x"; STOP_STRINGS_MAX + 1];
    for (param, extra) in [
        ("temperature", json!({"temperature": -0.1})),
        ("temperature", json!({"temperature": 2.1})),
        ("temperature", json!({"temperature": "1"})),
        ("temperature", json!({"temperature": true})),
        ("top_p", json!({"top_p": -0.1})),
        ("top_p", json!({"top_p": 1.1})),
        ("min_p", json!({"min_p": 1.5})),
        ("top_k", json!({"top_k": -2})),
        ("top_k", json!({"top_k": 1.5})),
        ("repetition_penalty", json!({"repetition_penalty": 0})),
        ("frequency_penalty", json!({"frequency_penalty": 2.5})),
        ("presence_penalty", json!({"presence_penalty": -2.5})),
        ("seed", json!({"seed": 0.5})),
        ("n", json!({"n": 2})),
        ("n", json!({"n": 0})),
        ("max_tokens", json!({"max_tokens": 0})),
        ("max_tokens", json!({"max_tokens": -1})),
        ("max_tokens", json!({"max_tokens": 1.5})),
        ("max_tokens", json!({"max_tokens": CONTEXT_TOKENS_MAX + 1})),
        ("max_tokens", json!({"max_tokens": 1, "max_completion_tokens": 2})),
        ("max_completion_tokens", json!({"max_completion_tokens": 0})),
        ("logprobs", json!({"logprobs": 5})),
        ("logprobs", json!({"logprobs": "true"})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 21})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": -1})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 1.5})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": "5"})),
        ("top_logprobs", json!({"top_logprobs": 1})),
        ("top_logprobs", json!({"logprobs": false, "top_logprobs": 1})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 20, "max_tokens": logprob_tokens_max(20) + 1})),
        ("stop", json!({"stop": ""})),
        ("stop", json!({"stop": ["a", ""]})),
        ("stop", json!({"stop": 5})),
        ("stop", json!({"stop": long_stop})),
        ("stop", json!({"stop": many_stops})),
        ("stream", json!({"stream": "yes"})),
        ("stream_options.include_usage", json!({"stream_options": {"include_usage": 1}})),
        ("stream_options.continuous_usage_stats", json!({"stream_options": {"continuous_usage_stats": true}})),
        ("model", json!({"model": 5})),
        ("reasoning_effort", json!({"reasoning_effort": "minimal"})),
        ("reasoning_effort", json!({"reasoning_effort": "none"})),
        ("reasoning.effort", json!({"reasoning": {"effort": "xhigh"}})),
        ("tool_choice", json!({"tool_choice": "required"})),
        ("tool_choice", json!({"tool_choice": {"type": "function", "function": {"name": "f"}}})),
        ("response_format", json!({"response_format": {"type": "json_object"}})),
        ("response_format", json!({"response_format": {"type": "json_schema", "json_schema": {}}})),
        ("response_format.type", json!({"response_format": {}})),
        ("logit_bias", json!({"logit_bias": {"5": 1}})),
        ("functions", json!({"functions": [{"name": "f"}]})),
        ("modalities", json!({"modalities": ["text", "audio"]})),
        ("verbosity", json!({"verbosity": "low"})),
        ("temprature", json!({"temprature": 1})),
    ] {
        let error = ask(&extra).expect_err(param);
        assert_eq!(named(&error), Some(param), "{extra}: {error}");
    }
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    for extra in [
        json!({"n": 1, "logprobs": false, "top_logprobs": 0, "logit_bias": {}, "best_of": 1.0}),
        json!({"user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "seed": null}),
        json!({"parallel_tool_calls": false, "modalities": ["text"], "response_format": {"type": "text"}}),
        json!({"stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}}),
        json!({"functions": null, "audio": null, "unheard_of": null}),
    ] {
        accepted(&extra);
    }
}

#[test]
fn bounds_are_inclusive() {
    for extra in [
        json!({"temperature": 0, "top_p": 0, "min_p": 0, "top_k": 0, "frequency_penalty": -2}),
        json!({"temperature": 2, "top_p": 1, "min_p": 1, "top_k": -1, "presence_penalty": 2}),
        json!({"max_tokens": 1, "max_completion_tokens": 1}),
        json!({"max_tokens": CONTEXT_TOKENS_MAX}),
        json!({"stop": vec!["x".repeat(STOP_STRING_BYTES_MAX); STOP_STRINGS_MAX]}),
        json!({"seed": i64::MIN}),
    ] {
        accepted(&extra);
    }
}

#[test]
fn log_probabilities_are_asked_for_in_two_ways() {
    for (extra, expected) in [
        (json!({}), None),
        (json!({"logprobs": false}), None),
        (json!({"logprobs": null, "top_logprobs": 0}), None),
        (json!({"logprobs": true}), Some(0)),
        (json!({"logprobs": true, "top_logprobs": 20, "max_tokens": logprob_tokens_max(20)}), Some(20)),
    ] {
        assert_eq!(accepted(&extra).logprobs, expected, "{extra}");
    }
    let ask = |logprobs: Value| {
        let body = json!({"prompt": "x", "logprobs": logprobs}).to_string();
        completion(body.as_bytes(), admission()).expect("is good").generate.logprobs
    };
    for (logprobs, expected) in [(json!(null), None), (json!(false), None), (json!(0), Some(0)), (json!(20), Some(20))]
    {
        assert_eq!(ask(logprobs), expected);
    }
}

#[test]
fn values_arrive_as_they_were_sent() {
    let generate = accepted(&json!({
        "temperature": 0.5, "top_k": -1, "top_p": 0, "seed": -1, "max_completion_tokens": 9, "stop": "END",
        "repetition_penalty": 1.5, "frequency_penalty": 0.25,
    }));
    assert_eq!(generate.sampling.temperature, Some(0.5));
    assert_eq!(generate.sampling.top_k, Some(0));
    assert_eq!(generate.sampling.top_p, Some(f32::MIN_POSITIVE));
    assert_eq!(generate.sampling.repetition_penalty, Some(1.5));
    assert_eq!(generate.sampling.frequency_penalty, 0.25);
    assert_eq!(generate.sampling.seed, u64::MAX);
    assert_eq!((generate.max_tokens, generate.stop), (Some(9), vec!["END".to_owned()]));
    let plain = accepted(&json!({}));
    assert_eq!((plain.sampling.seed, plain.sampling.temperature, plain.max_tokens), (42, None, None));
    let chat = conversation(&json!({"reasoning_effort": "high"}));
    assert_eq!((chat.effort, chat.date.as_str()), (ReasoningEffort::High, "2025-02-03"));
    assert_eq!(conversation(&json!({"reasoning": {"effort": "low"}})).effort, ReasoningEffort::Low);
}

#[test]
fn an_unknown_name_comes_with_the_nearest_known_one() {
    for (extra, nearest) in [
        (json!({"temprature": 1}), Some("temperature")),
        (json!({"max_token": 1}), Some("max_tokens")),
        (json!({"nothing_like_it": 1}), None),
    ] {
        assert!(matches!(ask(&extra), Err(RequestError::Unknown { nearest: got, .. }) if got == nearest), "{extra}");
    }
}

#[test]
fn what_is_no_json_object_is_refused() {
    let deep = "[".repeat(100_000);
    for body in ["", "{", "[]", "5", "{\"messages\": \"\u{0}\"}", deep.as_str(), "{} {}"] {
        assert!(matches!(chat(body.as_bytes(), admission()), Err(RequestError::NotJson { .. })), "{body:.20}");
    }
    assert!(matches!(chat(b"{\"model\": \"\xff\"}", admission()), Err(RequestError::NotJson { .. })));
    let nested = format!("{{\"messages\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    assert!(chat(nested.as_bytes(), admission()).is_err());
}

#[test]
fn every_role_becomes_its_turn() {
    let call = json!({"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}});
    let chat = conversation(&json!({"messages": [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
        {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "assistant", "content": "done", "annotations": []},
    ]}));
    let look = bulkhead_shared::generate::ToolCall { name: "look".into(), arguments: "{}".into() };
    assert_eq!(
        chat.messages,
        [
            Message::System { text: "s".into() },
            Message::Developer { text: "d".into() },
            Message::User { text: "a\nb".into() },
            Message::Assistant { reasoning: Some("hm".into()), content: None, calls: vec![look] },
            Message::Tool { name: "look".into(), text: "5".into() },
            Message::Assistant { reasoning: None, content: Some("done".into()), calls: Vec::new() },
        ]
    );
}

#[test]
fn a_bad_message_is_refused_by_its_place() {
    let user = json!({"role": "user", "content": "x"});
    for (param, messages) in [
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages", json!(vec![user.clone(); MESSAGES_MAX + 1])),
        ("messages[0]", json!(["hi"])),
        ("messages[0].role", json!([{"content": "x"}])),
        ("messages[0].role", json!([{"role": "king", "content": "x"}])),
        ("messages[0].role", json!([{"role": "function", "name": "f", "content": "x"}])),
        ("messages[1].content", json!([user, {"role": "user"}])),
        ("messages[0].content", json!([{"role": "user", "content": 5}])),
        ("messages[0].content", json!([{"role": "user", "content": []}])),
        ("messages[0].content", json!([{"role": "assistant"}])),
        ("messages[0].content[0].type", json!([{"role": "user", "content": [{"type": "image_url"}]}])),
        ("messages[0].content[0].text", json!([{"role": "user", "content": [{"type": "text"}]}])),
        ("messages[0].tool_call_id", json!([{"role": "tool", "content": "x"}])),
        ("messages[0].tool_call_id", json!([{"role": "tool", "content": "x", "tool_call_id": "c"}])),
        ("messages[0].function_call", json!([{"role": "assistant", "content": "", "function_call": {}}])),
        (
            "messages[0].tool_calls[0].function.name",
            json!([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "a b", "arguments": ""}}]}]),
        ),
    ] {
        let error = ask(&json!({"messages": messages})).expect_err(param);
        assert_eq!(named(&error), Some(param), "{error}");
    }
    assert!(matches!(chat(b"{}", admission()), Err(RequestError::Missing { param }) if param == "messages"));
}

#[test]
fn tools_are_checked_and_can_be_forbidden() {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"a": [1]}}});
    let chat = conversation(&json!({"tools": [tool("f"), tool("g.h-i_j")], "tool_choice": "auto"}));
    assert_eq!(chat.tools.len(), 2);
    assert_eq!(chat.tools[0].parameters.as_deref(), Some("{\"a\":[1]}"));
    assert!(conversation(&json!({"tools": [tool("f")], "tool_choice": "none"})).tools.is_empty());
    let deep = (0..40).fold(json!({}), |inner, _| json!({"a": inner}));
    let many: Vec<Value> = (0..=TOOLS_MAX).map(|index| tool(&format!("f{index}"))).collect();
    for (param, tools) in [
        ("tools", json!({})),
        ("tools", json!(many)),
        ("tools[0].type", json!([{"type": "web_search"}])),
        ("tools[0].function", json!([{"type": "function"}])),
        ("tools[0].function.name", json!([tool("")])),
        ("tools[0].function.name", json!([tool("a<|end|>")])),
        ("tools[0].function.name", json!([tool(&"x".repeat(65))])),
        ("tools[1].function.name", json!([tool("f"), tool("f")])),
        ("tools[0].function.strict", json!([{"function": {"name": "f", "strict": true}}])),
        ("tools[0].function.parameters", json!([{"function": {"name": "f", "parameters": "x"}}])),
        ("tools[0].function.parameters", json!([{"function": {"name": "f", "parameters": deep}}])),
    ] {
        let error = ask(&json!({"tools": tools})).expect_err(param);
        assert_eq!(named(&error), Some(param), "{error}");
    }
}

#[test]
fn a_completion_takes_one_prompt_in_four_forms() {
    let ask = |body: Value| completion(body.to_string().as_bytes(), admission());
    for (prompt, expected) in [
        (json!("text"), Prompt::Text("text".into())),
        (json!(["text"]), Prompt::Text("text".into())),
        (json!([1, 2]), Prompt::Tokens(vec![1, 2])),
        (json!([[1, 2]]), Prompt::Tokens(vec![1, 2])),
    ] {
        let generate = ask(json!({"prompt": prompt})).expect("is good").generate;
        assert_eq!((generate.prompt, generate.max_tokens), (expected, Some(COMPLETION_TOKENS_DEFAULT)));
    }
    for (param, body) in [
        ("prompt", json!({})),
        ("prompt", json!({"prompt": ""})),
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": [[]]})),
        ("prompt", json!({"prompt": ["a", "b"]})),
        ("prompt", json!({"prompt": [[1], [2]]})),
        ("prompt", json!({"prompt": [-1]})),
        ("prompt", json!({"prompt": {"a": 1}})),
        ("echo", json!({"prompt": "x", "echo": true})),
        ("suffix", json!({"prompt": "x", "suffix": "y"})),
        ("best_of", json!({"prompt": "x", "best_of": 2})),
        ("logprobs", json!({"prompt": "x", "logprobs": true})),
        ("logprobs", json!({"prompt": "x", "logprobs": 21})),
        ("logprobs", json!({"prompt": "x", "logprobs": -1})),
        ("logprobs", json!({"prompt": "x", "logprobs": 20, "max_tokens": logprob_tokens_max(20) + 1})),
        ("top_logprobs", json!({"prompt": "x", "logprobs": 1, "top_logprobs": 1})),
    ] {
        let error = ask(body.clone()).expect_err(param);
        assert_eq!(named(&error), Some(param), "{body}: {error}");
    }
}
