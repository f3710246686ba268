//! Log-probabilities of an answer's tokens: their numbers beside those that follow from the logits of `eval`, the plain
//! decoder's among them, and their place beside the text.

use bulkhead_shared::message::{CpuChoice, TokenText};
use bulkhead_tests::oracle::{Ask, evaluate};
use bulkhead_tests::server::{Server, demo_model};
use bulkhead_tests::talk::{COMPLETIONS, QUESTION, Reply, greedy, listed_text, with};
use bulkhead_worker::eval::{DecoderPath, WeightChoice};
use bulkhead_worker::text::tokenizer::Tokenizer;
use serde_json::{Value, json};

const PROMPT: [i64; 6] = [20, 21, 22, 300, 301, 302];
const TOKENS: usize = 16;
const TOP: usize = 5;

/// Gives the natural logarithms of the probabilities that a row of logits stands for, by the definition.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - most) - total.ln()).collect()
}

fn name(tokenizer: &Tokenizer, id: usize) -> String {
    match tokenizer.token_text(u32::try_from(id).expect("ids are small")) {
        TokenText::Bytes(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        TokenText::Special(name) => name,
    }
}

fn complete(server: &Server, request: Value) -> Value {
    let answer = server.post(COMPLETIONS, &request).json().expect("answers are JSON");
    assert!(answer["choices"][0]["logprobs"].is_object(), "{answer}");
    answer["choices"][0].clone()
}

/// Checks what a completion tells of its tokens against logits, a row for each token generated.
fn compare(choice: &Value, greedy: &[i64], logits: &[Vec<f32>], tolerance: f64) {
    let tokenizer = Tokenizer::open(&demo_model()).expect("the built-in model has a tokenizer");
    let told = &choice["logprobs"];
    let listed = told["tokens"].as_array().expect("a list");
    assert!(listed.len() >= 8, "{choice}");
    // The less likely a token is, the more its logit is off.
    let slack = |expected: f64| tolerance * (1.0 + expected.abs());
    let near =
        |found: &Value, expected: f64| found.as_f64().is_some_and(|found| (found - expected).abs() < slack(expected));
    // Markers have no text, and so no place in the list.
    let generated =
        greedy.iter().zip(logits).map(|(id, logits)| (usize::try_from(*id).expect("ids are small"), logits));
    let with_text = generated.filter(|(id, _)| tokenizer.token_bytes(*id as u32).is_some());
    for (place, (id, logits)) in with_text.take(listed.len()).enumerate() {
        let expected = log_softmax(logits);
        assert_eq!(listed[place], name(&tokenizer, id), "{choice}");
        let found = &told["token_logprobs"][place];
        assert!(near(found, expected[id]), "token {place}: {found} instead of {}", expected[id]);
        let mut ranked: Vec<usize> = (0..expected.len()).collect();
        ranked.sort_by(|left, right| expected[*right].total_cmp(&expected[*left]));
        let top = told["top_logprobs"][place].as_object().expect("tokens with their numbers");
        assert!((TOP..=TOP + 1).contains(&top.len()), "{top:?}");
        for id in &ranked[..TOP] {
            // One that is about as likely as the next may have lost its place to that.
            let is_tie = expected[*id] - expected[ranked[TOP]] < 2.0 * slack(expected[*id]);
            let found = top.get(&name(&tokenizer, *id));
            assert!(found.map_or(is_tie, |found| near(found, expected[*id])), "{id} in {top:?}");
        }
    }
}

#[test]
fn numbers_follow_from_the_logits() {
    let ask = |decoder_path| Ask { decoder_path, cpu: CpuChoice::Scalar, ..Ask::reference(WeightChoice::File) };
    let run = |tokens: &[i64], ask| evaluate(&demo_model(), tokens, ask).expect("the prompt can be evaluated");
    let greedy = run(&PROMPT, Ask { greedy: TOKENS, ..ask(DecoderPath::Reference) }).greedy;
    let server = Server::start(&["--cpu", "scalar"]);
    let request = json!({"prompt": PROMPT, "max_tokens": TOKENS, "logprobs": TOP, "temperature": 0});
    let choice = complete(&server, request);
    // The plain decoder keeps keys and values in 32 bits, and what is served in 16.
    for (decoder_path, tolerance) in [(DecoderPath::Reference, 0.1), (DecoderPath::Fast, 1e-4)] {
        let logits = run(&[&PROMPT, &greedy[..]].concat(), ask(decoder_path)).logits;
        compare(&choice, &greedy, &logits[PROMPT.len() - 1..], tolerance);
    }
}

#[test]
fn penalties_and_temperature_do_not_change_what_the_model_says() {
    let server = Server::start(&[]);
    // A single token: whatever is drawn, the model's opinion on the likeliest ones is the same.
    let top = |fields: Value| {
        let request = json!({"prompt": PROMPT, "max_tokens": 1, "logprobs": TOP, "seed": 3});
        let choice = complete(&server, with(request, fields));
        let told = &choice["logprobs"];
        let chosen = (told["tokens"][0].clone(), told["token_logprobs"][0].clone());
        assert_eq!(told["top_logprobs"][0][chosen.0.as_str().expect("a name")], chosen.1, "{choice}");
        (chosen, told["top_logprobs"][0].clone())
    };
    let (plain, expected) = top(json!({"temperature": 0}));
    let (hot, found) = top(json!({"temperature": 2, "repetition_penalty": 5, "frequency_penalty": 2, "top_p": 0.999}));
    assert_ne!(plain.0, hot.0, "another token was drawn");
    for (name, number) in expected.as_object().expect("an object") {
        assert_eq!(&found[name], number, "{name}");
    }
}

/// Checks a conversation's list against its content.
fn check(reply: &Reply, top: usize) {
    assert!(!reply.reasoning.is_empty() && !reply.content.is_empty(), "{reply:?}");
    assert_eq!(listed_text(&reply.logprobs), reply.content, "thoughts and markers are not listed");
    for told in &reply.logprobs {
        let list = told["top_logprobs"].as_array().expect("a list");
        assert_eq!(list.len(), top, "{told}");
        let numbers: Vec<f64> = list.iter().map(|told| told["logprob"].as_f64().expect("a number")).collect();
        assert!(numbers.is_sorted_by(|left, right| left >= right), "{told}");
        let own = told["logprob"].as_f64().expect("a number");
        assert!((-9999.0..=0.0).contains(&own) && numbers.iter().all(|number| (-9999.0..=0.0).contains(number)));
        assert!(list.iter().all(|other| other["token"] != told["token"] || other["logprob"] == told["logprob"]));
    }
}

#[test]
fn tokens_of_a_conversation_are_those_of_its_content() {
    let server = Server::start(&[]);
    for (fields, top) in [(json!({"logprobs": true}), 0), (json!({"logprobs": true, "top_logprobs": 20}), 20)] {
        let request = with(greedy(QUESTION), fields);
        let (whole, streamed) = (server.ask(&request), server.ask_stream(&request));
        assert_eq!(whole, streamed);
        check(&whole, top);
    }
    // What a stop string cuts off is not listed, and what it held back is.
    let whole = server.ask(&greedy(QUESTION));
    let stop: String = whole.content.chars().skip(6).take(3).collect();
    for stop in [stop.clone(), format!("{}#", &whole.content[..whole.content.len() / 2])] {
        let request = with(greedy(QUESTION), json!({"logprobs": true, "stop": [stop]}));
        let (reply, streamed) = (server.ask(&request), server.ask_stream(&request));
        assert_eq!(reply, streamed);
        let text = listed_text(&reply.logprobs);
        let last = reply.logprobs.last().expect("tokens")["token"].as_str().expect("text").len();
        assert!(text.starts_with(&reply.content) && text.len() < reply.content.len() + last, "{text:?}: {reply:?}");
    }
    // A call is no content.
    let tool = json!({"type": "function", "function": {"name": "get_weather", "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}});
    let call = server.ask(&with(
        greedy("What is the weather in Paris?"),
        json!({"tools": [tool], "logprobs": true, "top_logprobs": 1}),
    ));
    assert_eq!((call.calls.len(), call.logprobs.as_slice()), (1, &[][..]), "{call:?}");
}

#[test]
fn tokens_of_a_text_have_their_places_in_it() {
    let server = Server::start(&[]);
    let request = json!({"prompt": "Bulkhead is", "max_tokens": 24, "temperature": 1, "seed": 5, "logprobs": 2});
    let choice = complete(&server, request.clone());
    let (text, told) = (choice["text"].as_str().expect("a text"), &choice["logprobs"]);
    let list = |key: &str| told[key].as_array().unwrap_or_else(|| panic!("no {key}: {choice}")).clone();
    let (tokens, offsets) = (list("tokens"), list("text_offset"));
    assert_eq!((tokens.len(), tokens.len()), (list("token_logprobs").len(), list("top_logprobs").len()));
    let characters: Vec<char> = text.chars().collect();
    for (token, offset) in tokens.iter().zip(&offsets) {
        let (token, offset) = (token.as_str().expect("a name"), offset.as_u64().expect("a place") as usize);
        let here: String = characters[offset..].iter().take(token.chars().count()).collect();
        assert!(token.starts_with("bytes:") || here == token, "{token:?} at {offset} of {text:?}");
    }
    assert_eq!(tokens.iter().map(|token| token.as_str().expect("a name")).collect::<String>(), text);

    let mut events = server.post(COMPLETIONS, &with(request.clone(), json!({"stream": true}))).events();
    let mut streamed = json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
    while let Some(data) = events.next_data().expect("the stream is whole").filter(|data| data != "[DONE]") {
        let chunk: Value = serde_json::from_str(&data).expect("chunks are JSON");
        for (key, list) in chunk["choices"][0]["logprobs"].as_object().into_iter().flatten() {
            let more = list.as_array().expect("a list").clone();
            streamed[key].as_array_mut().expect("one of the four").extend(more);
        }
    }
    assert_eq!(streamed, *told);

    let none = complete(&server, with(request, json!({"logprobs": 0})));
    let told = &none["logprobs"];
    assert_eq!(told["tokens"], choice["logprobs"]["tokens"], "asking changes no token");
    assert_eq!(
        told["top_logprobs"][0],
        json!({told["tokens"][0].as_str().expect("a name"): told["token_logprobs"][0]})
    );
}
