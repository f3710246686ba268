//! Whole answers: what a client gets, token by token, with stop strings and every way to end.

use std::collections::VecDeque;
use std::sync::Arc;

use bulkhead_shared::message::{Piece, TokenRun};
use bulkhead_worker::text::answer::{Answer, AnswerEnd, AnswerKind, Calls};
use bulkhead_worker::text::error::TextError;
use bulkhead_worker::text::tokenizer::Tokenizer;

use crate::support::{fixture, items, model_tokenizer, text, tokenize};

/// Pushes tokens as the engine does, up to a stop string; gives the pieces, the number of reasoning tokens, and the answer.
fn grow(
    tokenizer: &Arc<Tokenizer>,
    kind: AnswerKind,
    stop: &[&str],
    ids: &[u32],
    end: AnswerEnd,
) -> (Vec<Piece>, usize, Answer) {
    let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
    let mut answer = Answer::new(kind, stop, Arc::clone(tokenizer)).expect("has harmony");
    let (mut pieces, mut reasoning_tokens, mut end) = (Vec::new(), 0, end);
    for id in ids {
        let pushed = answer.push(*id);
        pieces.extend(pushed.pieces);
        reasoning_tokens += usize::from(pushed.is_reasoning);
        if pushed.stopped {
            end = AnswerEnd::StopString;
            break;
        }
    }
    pieces.extend(answer.finish(end).pieces);
    (pieces, reasoning_tokens, answer)
}

fn harmony(stop: &[&str], text: &str, end: AnswerEnd) -> (String, String, usize) {
    let tokenizer = model_tokenizer("gptoss_basic");
    let (pieces, _, answer) = grow(&tokenizer, AnswerKind::Harmony, stop, &tokenize(&tokenizer, text), end);
    let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), 0);
    for piece in pieces {
        match piece {
            Piece::Reasoning(text) => reasoning.push_str(&text),
            Piece::Content(text) => content.push_str(&text),
            Piece::ToolCall { .. } => calls += 1,
        }
    }
    assert_eq!(answer.has_tool_calls(), calls > 0);
    (reasoning, content, calls)
}

#[test]
fn stop_strings_match_in_content_only() {
    let answer = "<|channel|>analysis<|message|>Observation: thought<|end|><|start|>assistant<|channel|>final<|message|>\
                  Say. Observation: no<|return|>";
    let expected = ("Observation: thought".to_owned(), "Say. ".to_owned(), 0);
    assert_eq!(harmony(&["Observation:"], answer, AnswerEnd::Eos), expected);
    let call = "<|channel|>commentary to=functions.f<|message|>{\"a\":\"STOP\"}<|call|>";
    assert_eq!(harmony(&["STOP"], call, AnswerEnd::Eos), (String::new(), String::new(), 1));
    // Half a match is content after all.
    let half = "<|channel|>final<|message|>an Observ<|return|>";
    assert_eq!(harmony(&["Observation:"], half, AnswerEnd::Eos).1, "an Observ");
    assert_eq!(harmony(&["Observation:"], half, AnswerEnd::Length).1, "an Observ");
    // Markers are no part of the text between two matching halves.
    let split = "<|channel|>final<|message|>ST<|end|><|start|>assistant<|channel|>final<|message|>OP";
    assert_eq!(harmony(&["STOP"], split, AnswerEnd::Length).1, "ST\n\nOP");
}

#[test]
fn the_token_limit_drops_half_a_call_and_the_end_token_completes_one() {
    let call =
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{}";
    assert_eq!(harmony(&[], call, AnswerEnd::Length), ("x".to_owned(), String::new(), 0));
    assert_eq!(harmony(&[], call, AnswerEnd::Eos), ("x".to_owned(), String::new(), 1));
    assert_eq!(harmony(&[], &format!("{call}<|call|>"), AnswerEnd::Eos), ("x".to_owned(), String::new(), 1));
    assert_eq!(harmony(&[], &format!("{call}<|call|>"), AnswerEnd::Length), ("x".to_owned(), String::new(), 1));
}

#[test]
fn reasoning_tokens_are_those_of_the_text_that_is_reasoning() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let thought = tokenizer.encode_ordinary("Why? Because.").expect("encodes").len();
    let text =
        "<|channel|>analysis<|message|>Why? Because.<|end|><|start|>assistant<|channel|>final<|message|>So.<|return|>";
    let ids = tokenize(&tokenizer, text);
    assert_eq!(grow(&tokenizer, AnswerKind::Harmony, &[], &ids, AnswerEnd::Eos).1, thought);
    assert_eq!(grow(&tokenizer, AnswerKind::Plain, &[], &ids, AnswerEnd::Eos).1, 0);
}

#[test]
fn plain_text_has_no_markers_and_ends_valid() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let content = |ids: &[u32], stop: &[&str], end| {
        let (pieces, _, answer) = grow(&tokenizer, AnswerKind::Plain, stop, ids, end);
        assert!(!answer.has_tool_calls());
        let text = |piece: &Piece| match piece {
            Piece::Content(text) => text.clone(),
            Piece::Reasoning(_) | Piece::ToolCall { .. } => panic!("{piece:?} in plain text"),
        };
        pieces.iter().map(text).collect::<String>()
    };
    let ids = tokenize(&tokenizer, "<|start|>a <|channel|>b→c<|end|>");
    assert_eq!(content(&ids, &[], AnswerEnd::Eos), "a b→c");
    assert_eq!(content(&ids, &["→"], AnswerEnd::Eos), "a b");
    let emoji = tokenizer.encode_ordinary("x👩").expect("encodes");
    assert!(emoji.len() > 2, "the last character has several tokens");
    assert_eq!(content(&emoji[..emoji.len() - 1], &[], AnswerEnd::Length), "x\u{fffd}");
    assert_eq!(content(&[u32::MAX, emoji[0], u32::MAX], &[], AnswerEnd::Length), "x", "ids without a token");
}

/// Gives the bytes of the tokens that an answer lists, put together, one list for each message.
fn listed(tokenizer: &Arc<Tokenizer>, kind: AnswerKind, stop: &[&str], ids: &[u32], end: AnswerEnd) -> Vec<String> {
    let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
    let mut answer = Answer::new(kind, stop, Arc::clone(tokenizer)).expect("has harmony");
    let (mut waiting, mut lists) = (VecDeque::new(), Vec::new());
    let mut list = |waiting: &mut VecDeque<u32>, runs: Vec<TokenRun>| {
        let mut bytes = Vec::new();
        for run in runs {
            waiting.drain(..run.skipped as usize);
            waiting.drain(..run.listed as usize).for_each(|id| {
                bytes.extend_from_slice(tokenizer.token_bytes(id).expect("only text is listed"));
            });
        }
        lists.extend((!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned()));
    };
    let mut end = end;
    for id in ids {
        let pushed = answer.push(*id);
        waiting.extend(pushed.is_listable.then_some(*id));
        list(&mut waiting, pushed.runs);
        if pushed.stopped {
            end = AnswerEnd::StopString;
            break;
        }
    }
    list(&mut waiting, answer.finish(end).runs);
    lists
}

#[test]
fn the_tokens_of_content_are_listed_when_it_comes_out() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let harmony = |text: &str, stop: &[&str], end| {
        listed(&tokenizer, AnswerKind::Harmony, stop, &tokenize(&tokenizer, text), end).concat()
    };
    let answer =
        "<|channel|>analysis<|message|>thought<|end|><|start|>assistant<|channel|>final<|message|>Say it.<|return|>";
    assert_eq!(harmony(answer, &[], AnswerEnd::Eos), "Say it.");
    // Of text that a stop string holds back nothing is lost, and of the match nothing is listed.
    let held = "<|channel|>final<|message|>an Observ<|end|><|start|>assistant<|channel|>final<|message|>more<|return|>";
    assert_eq!(harmony(held, &["Observation:", "ABC"], AnswerEnd::Eos), "an Observmore");
    assert_eq!(harmony(held, &["Observ"], AnswerEnd::Eos).trim_end(), "an");
    let call = "<|channel|>commentary to=functions.f<|message|>{}<|call|>";
    assert_eq!(harmony(call, &[], AnswerEnd::Eos), "");
    assert_eq!(harmony("Just text, without a header", &[], AnswerEnd::Eos), "Just text, without a header");
    assert_eq!(harmony("<|channel|>final said<|end|>", &[], AnswerEnd::Eos).trim_start(), "said");
    // Arguments that are too long for a call are content.
    let long = format!("{{\"a\":\"{}\"}}", "x y ".repeat(70_000));
    let call = format!("<|channel|>commentary to=functions.f<|message|>{long}");
    assert!(harmony(&call, &[], AnswerEnd::Length) == long, "each token is listed once");
}

#[test]
fn the_tokens_of_plain_text_are_listed_with_their_characters() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let ids = tokenizer.encode_ordinary("x👩 grüß").expect("encodes");
    let plain = |ids: &[u32], stop: &[&str], end| listed(&tokenizer, AnswerKind::Plain, stop, ids, end);
    let lists = plain(&ids, &[], AnswerEnd::Eos);
    assert_eq!(lists.concat(), "x👩 grüß");
    assert!(lists.iter().all(|list| !list.contains('\u{fffd}')), "a character's tokens come together: {lists:?}");
    assert_eq!(plain(&ids[..2], &[], AnswerEnd::Length).concat(), "x\u{fffd}", "half a character at the end");
    let marked = tokenize(&tokenizer, "<|start|>a <|channel|>b<|end|>");
    assert_eq!(plain(&marked, &[], AnswerEnd::Eos).concat(), "a b");
    let calls = AnswerKind::Message(Calls::Llama(vec!["add".into()]));
    for (text, expected) in [
        (r#"{"name": "add", "parameters": {}}"#, ""),
        (r#"{"name": "sub", "parameters": {}}"#, r#"{"name": "sub", "parameters": {}}"#),
    ] {
        let ids = tokenizer.encode_ordinary(text).expect("encodes");
        assert_eq!(listed(&tokenizer, calls.clone(), &[], &ids, AnswerEnd::Eos).concat(), expected);
    }
    // The space that the tokenizer put in front is in no content, and so the token that is nothing else.
    let llama = model_tokenizer("llama_tied");
    let ids = llama.encode_ordinary(" hello").expect("encodes");
    let kind = AnswerKind::Message(Calls::None);
    let content = grow(&llama, kind.clone(), &[], &ids, AnswerEnd::Eos).0;
    let [Piece::Content(content)] = &joined(content)[..] else { panic!("content only") };
    assert!(listed(&llama, kind, &[], &ids, AnswerEnd::Eos).concat().ends_with(content.as_str()));
}

/// Joins pieces of content.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let text = |piece: Piece| match piece {
        Piece::Content(text) => text,
        Piece::Reasoning(_) | Piece::ToolCall { .. } => panic!("{piece:?} in a message"),
    };
    vec![Piece::Content(pieces.into_iter().map(text).collect())]
}

#[test]
fn every_piece_has_text_and_a_replay_restores_the_state() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let cases = fixture("harmony/parse.json");
    for case in items(&cases, "cases") {
        let ids = tokenize(&tokenizer, text(case, "text"));
        for stop in [&[][..], &["final", "ll", "\"x\""]] {
            let (whole, ..) = grow(&tokenizer, AnswerKind::Harmony, stop, &ids, AnswerEnd::Eos);
            for piece in &whole {
                assert!(!matches!(piece, Piece::Content(text) | Piece::Reasoning(text) if text.is_empty()));
            }
            // A replay of the first tokens, its pieces thrown away, and then the others.
            for cut in 0..=ids.len() {
                let stop: Vec<String> = stop.iter().map(|stop| (*stop).to_owned()).collect();
                let mut answer = Answer::new(AnswerKind::Harmony, stop, Arc::clone(&tokenizer)).expect("has harmony");
                let (mut before, mut behind) = (Vec::new(), Vec::new());
                ids[..cut].iter().for_each(|id| before.extend(answer.push(*id).pieces));
                ids[cut..].iter().for_each(|id| behind.extend(answer.push(*id).pieces));
                behind.extend(answer.finish(AnswerEnd::Eos).pieces);
                assert_eq!([before, behind].concat(), whole, "{} cut at {cut}", text(case, "name"));
            }
        }
    }
}

#[test]
fn after_a_stop_string_nothing_comes_out() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let mut answer =
        Answer::new(AnswerKind::Harmony, vec!["b".to_owned()], Arc::clone(&tokenizer)).expect("has harmony");
    let ids =
        tokenize(&tokenizer, "<|channel|>final<|message|>a b<|end|><|start|>assistant<|channel|>analysis<|message|>c");
    let pieces: Vec<Piece> = ids.iter().flat_map(|id| answer.push(*id).pieces).collect();
    let is_behind = |piece: &Piece| !matches!(piece, Piece::Content(text) if "a ".contains(text.as_str()));
    assert!(!pieces.is_empty() && !pieces.iter().any(is_behind), "{pieces:?}");
    assert!(answer.push(ids[0]).stopped);
    assert!(answer.finish(AnswerEnd::StopString).pieces.is_empty());
}

#[test]
fn a_model_without_harmony_answers_in_plain_text_only() {
    let tokenizer = model_tokenizer("llama3_untied_sharded");
    let error = Answer::new(AnswerKind::Harmony, Vec::new(), Arc::clone(&tokenizer)).expect_err("has no harmony");
    assert!(matches!(error, TextError::NoHarmony { .. }));
    assert!(Answer::new(AnswerKind::Plain, Vec::new(), tokenizer).is_ok());
}
