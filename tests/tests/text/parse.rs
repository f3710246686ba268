//! Answers as models write them, sound and malformed, against openai-harmony and against what we do better.

use bulkhead_shared::message::Piece;
use bulkhead_worker::text::harmony::Markers;
use bulkhead_worker::text::harmony::parse::{Ending, Parser};
use bulkhead_worker::text::tokenizer::Tokenizer;
use serde_json::Value;

use crate::support::{MARKERS, fixture, items, model_tokenizer, text, tokenize};

/// What comes out of an answer, its pieces joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Outcome {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

impl Outcome {
    fn of(pieces: Vec<Piece>) -> Outcome {
        let mut outcome = Outcome::default();
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => outcome.reasoning.push_str(&text),
                Piece::Content(text) => outcome.content.push_str(&text),
                Piece::ToolCall { index, name, arguments } => {
                    assert_eq!(index as usize, outcome.calls.len());
                    outcome.calls.push((name, arguments));
                }
            }
        }
        outcome
    }

    /// Sorts the reference's messages by the rules of the parser's table.
    fn of_messages(messages: &[Value]) -> Outcome {
        let mut outcome = Outcome::default();
        for message in messages {
            let body = text(&message["content"][0], "text");
            let recipient = message["recipient"].as_str().filter(|recipient| !recipient.is_empty());
            let is_reasoning = message["channel"] == "analysis" || message["role"] == "user";
            let joined = match (recipient, is_reasoning) {
                (Some(recipient), _) => {
                    let name = recipient.strip_prefix("functions.").unwrap_or(recipient);
                    outcome.calls.push((name.to_owned(), body.to_owned()));
                    continue;
                }
                (None, true) => &mut outcome.reasoning,
                (None, false) => &mut outcome.content,
            };
            if !joined.is_empty() && !body.is_empty() {
                joined.push_str("\n\n");
            }
            joined.push_str(body);
        }
        outcome
    }
}

fn parse(tokenizer: &Tokenizer, ids: &[u32], ending: Ending) -> Outcome {
    let mut parser = Parser::new(Markers::of(tokenizer).expect("has harmony"));
    let mut pieces: Vec<Piece> =
        ids.iter().flat_map(|id| parser.push(*id, tokenizer.token_bytes(*id)).pieces).collect();
    pieces.extend(parser.finish(ending));
    assert_eq!(parser.calls() as usize, pieces.iter().filter(|piece| matches!(piece, Piece::ToolCall { .. })).count());
    Outcome::of(pieces)
}

/// Cases where we differ: name, why, and reasoning, content and call that we expect.
type Difference = (&'static str, &'static str, [&'static str; 2], Option<[&'static str; 2]>);

const DIFFERENCES: [Difference; 23] = [
    ("truncated_in_header", "half a header is dropped, not an error", ["x", ""], None),
    ("truncated_in_json", "half a call is dropped", ["", ""], None),
    ("no_call_token", "a call without its end may be half a call", ["", ""], None),
    ("empty_output", "nothing is not an error", ["", ""], None),
    ("plain_text_only", "text without a header is the answer", ["", "Hello, no harmony at all."], None),
    ("garbage_in_header", "words too many in a header mean nothing", ["", "Hello"], None),
    ("duplicated_start", "the second one starts again", ["x", "y"], None),
    ("start_inside_content", "a structural token ends the message", ["thinking ", "answer"], None),
    ("channel_inside_content", "a structural token ends the message", ["thinking ", "answer"], None),
    ("missing_start_after_end", "a role is recognised without it", ["x", "y"], None),
    ("text_between_messages", "text outside of messages is content", ["x", "stray text\n\ny"], None),
    ("no_role_after_start", "the channel is enough", ["x", "y"], None),
    ("wrong_role", "the channel is enough", ["x", "y"], None),
    ("double_channel", "the last channel counts", ["", "y"], None),
    ("double_message", "the second marker means nothing", ["", "ab"], None),
    ("recipient_after_constrain", "a recipient is one wherever it stands", ["", ""], Some(["a", "{}"])),
    ("two_recipients", "the last recipient counts", ["", ""], Some(["b", "{}"])),
    ("recipient_in_both_places", "the last recipient counts", ["", ""], Some(["b", "{}"])),
    ("spaces_in_channel", "spaces around a name are no part of it", ["", "y"], None),
    ("constrain_in_final", "a format is no recipient", ["", "{\"a\":1}"], None),
    ("repeated_return", "an end behind an end means nothing", ["", "x"], None),
    ("endoftext_inside", "a structural token ends the message", ["", "x\n\ny"], None),
    ("reserved_token", "special tokens stand for no text", ["", "xy"], None),
];

#[test]
fn answers_are_read_as_openai_harmony_does_or_better() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let cases = fixture("harmony/parse.json");
    let mut differences: Vec<&str> = DIFFERENCES.iter().map(|(name, ..)| *name).collect();
    for case in items(&cases, "cases") {
        let (name, answer) = (text(case, "name"), text(case, "text"));
        let is_ended = ["<|return|>", "<|call|>", "<|end|>"].iter().any(|end| answer.ends_with(end));
        let ending = if is_ended { Ending::Complete } else { Ending::Cut };
        let mut ids = tokenize(&tokenizer, answer);
        if name == "truncated_mid_utf8_character" {
            // The fixture's tokens end inside of the last character, which this tokenizer writes byte by byte.
            ids.pop();
        }
        let found = parse(&tokenizer, &ids, ending);
        let expected = match DIFFERENCES.iter().find(|(other, ..)| *other == name) {
            Some((_, _, [reasoning, content], call)) => {
                differences.retain(|other| *other != name);
                Outcome {
                    reasoning: (*reasoning).to_owned(),
                    content: (*content).to_owned(),
                    calls: call.iter().map(|[name, arguments]| ((*name).to_owned(), (*arguments).to_owned())).collect(),
                }
            }
            None => Outcome::of_messages(items(&case["lenient"], "messages")),
        };
        assert_eq!(found, expected, "{name}: {answer}");
    }
    assert!(differences.is_empty(), "differences without a case: {differences:?}");
}

/// What an answer in gpt-oss's format comes out as when it ends in `ending`.
fn check(answer: &str, ending: Ending, reasoning: &str, content: &str, calls: &[(&str, &str)]) {
    let tokenizer = model_tokenizer("gptoss_basic");
    let found = parse(&tokenizer, &tokenize(&tokenizer, answer), ending);
    let calls = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect();
    let expected = Outcome { reasoning: reasoning.to_owned(), content: content.to_owned(), calls };
    assert_eq!(found, expected, "{answer} {ending:?}");
}

#[test]
fn malformed_headers_lose_no_turn() {
    let complete = Ending::Complete;
    check("<|channel|>commentary to=assistant<|message|>hi<|end|>", complete, "", "hi", &[]);
    check("<|channel|>commentary to=functions.f code<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>commentaryto=functions.f<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>commentary functions.f<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>final to=functions.f<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>final to=user<|message|>hi<|return|>", complete, "", "hi", &[]);
    check("<|channel|>mystery to=functions.f<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>mystery to=python<|message|>1<|call|>", complete, "", "1", &[]);
    check(" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>commentary to=functions.f, now<|message|>{}<|call|>", complete, "", "", &[("f", "{}")]);
    check("<|channel|>commentary to=functions.f{\"a\":1}<|call|>", complete, "", "", &[("f", "{\"a\":1}")]);
    check("<|channel|>commentary to=functions.f {\"a\":1}<|call|>", complete, "", "", &[("f", "{\"a\":1}")]);
    check("<|channel|>commentary to=functions.f thinking<|call|>", complete, "", "thinking", &[]);
    check("<|channel|>commentary to=functions.f <|constrain|>json<|call|>", complete, "", "", &[]);
    check(
        "<|channel|>analysis I wonder<|end|><|start|>assistant<|channel|>final<|message|>y",
        complete,
        "I wonder",
        "y",
        &[],
    );
    check("<|start|>assistant Hello there<|return|>", complete, "", "Hello there", &[]);
    check("<|constrain|><|constrain|>json<|message|>x<|return|>", complete, "", "x", &[]);
    check("<|message|><|message|>x<|return|>", complete, "", "x", &[]);
    check("<|end|><|end|><|return|><|call|>", complete, "", "", &[]);
    let long = "word ".repeat(300);
    check(&format!("<|channel|>final {long}<|return|>"), complete, "", &long, &[]);
    check(&format!("<|channel|>analysis {long}<|end|>"), complete, &long, "", &[]);
    check(&format!("<|start|>assistant {long}"), Ending::Cut, "", &long, &[]);
}

#[test]
fn text_without_a_header_is_the_answer_as_it_stands() {
    for text in ["  indented", "assist", "assistants help", "total", "t", "to be", "é", "\n\nx", "assistant: hi"] {
        check(text, Ending::Complete, "", text, &[]);
        check(text, Ending::Cut, "", text, &[]);
    }
}

#[test]
fn a_made_up_turn_of_somebody_else_is_no_answer() {
    let complete = Ending::Complete;
    check("<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|end|>", complete, "b", "a", &[]);
    let result = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>{}<|end|>";
    check(
        &format!("<|end|>{result}<|start|>assistant<|channel|>final<|message|>a<|return|>"),
        complete,
        "{}",
        "a",
        &[],
    );
}

#[test]
fn a_call_comes_out_whole_or_not_at_all() {
    let call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\":";
    let next = "<|start|>assistant<|channel|>commentary to=functions.g<|message|>{}";
    let whole = format!("{call} 1}}");
    for end in ["<|call|>", "<|end|>", "<|return|>", "<|start|>", "<|channel|>", "<|endoftext|>"] {
        check(&format!("{whole}{end}"), Ending::Cut, "", "", &[("f", "{\"a\": 1}")]);
    }
    check(call, Ending::Cut, "", "", &[]);
    check(&whole, Ending::Complete, "", "", &[("f", "{\"a\": 1}")]);
    check(&format!("{whole}<|call|>{next}"), Ending::Cut, "", "", &[("f", "{\"a\": 1}")]);
    check(&format!("{whole}<|call|>{next}<|call|>"), Ending::Cut, "", "", &[("f", "{\"a\": 1}"), ("g", "{}")]);
}

#[test]
fn arguments_without_end_come_out_as_content() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let header = tokenize(&tokenizer, "<|channel|>commentary to=functions.f<|message|>");
    let end = tokenize(&tokenizer, "<|call|>");
    let mut parser = Parser::new(Markers::of(&tokenizer).expect("has harmony"));
    let mut pieces = Vec::new();
    for id in header {
        pieces.extend(parser.push(id, tokenizer.token_bytes(id)).pieces);
    }
    let chunk = vec![b'x'; 1 << 10];
    for _ in 0..300 {
        pieces.extend(parser.push(u32::MAX, Some(&chunk)).pieces);
    }
    pieces.extend(parser.push(end[0], None).pieces);
    pieces.extend(parser.finish(Ending::Complete));
    let outcome = Outcome::of(pieces);
    assert_eq!((outcome.content.len(), outcome.calls.len()), (300 << 10, 0));
}

#[test]
fn any_tokens_give_pieces_without_markers_and_the_same_ones_again() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let words = ["analysis", "commentary", "final", " to=functions.f", "assistant", " json", "{", "é", "text ", "\n"];
    let choices: Vec<Vec<u32>> = MARKERS.iter().chain(&words).map(|text| tokenize(&tokenizer, text)).collect();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..2000 {
        let ids: Vec<u32> = (0..random(24)).flat_map(|_| choices[random(choices.len())].clone()).collect();
        for ending in [Ending::Complete, Ending::Cut] {
            let outcome = parse(&tokenizer, &ids, ending);
            let all = format!("{outcome:?}");
            assert!(!all.contains("<|") && !all.contains('\u{fffd}'), "{all}");
            assert_eq!(parse(&tokenizer, &ids, ending), outcome);
        }
    }
}
