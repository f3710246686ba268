//! What a model generates: any token may follow any other, so the parser of answers sees it all.

use std::collections::VecDeque;
use std::sync::Arc;

use bulkhead_shared::message::{Piece, TokenRun};
use bulkhead_tests::fuzz::{Random, mutate, run};
use bulkhead_tests::server::demo_model;
use bulkhead_worker::text::answer::{Answer, AnswerEnd, AnswerKind};
use bulkhead_worker::text::detokenizer::Detokenizer;
use bulkhead_worker::text::tokenizer::Tokenizer;

use crate::memory::{alone, bounded};

const MARKERS: [&str; 7] =
    ["<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"];

/// Words of headers, and text that might be taken for one.
const WORDS: [&str; 16] = [
    "analysis",
    "commentary",
    "final",
    "assistant",
    "user",
    " to=functions.clock",
    " to=assistant",
    " to=",
    "json",
    " <|constrain|>",
    r#"{"city":"Oslo"}"#,
    "<|channel|>final<|message|>",
    "Observation:",
    "\n\n",
    "grüß 👩‍🚀",
    " ",
];

const STOPS: [&str; 3] = ["Observation:", "\n\n", "ab"];

/// Writes an answer of markers, words and single tokens in any order.
fn tokens(tokenizer: &Tokenizer, random: &mut Random) -> Vec<u32> {
    let mut tokens = Vec::new();
    for _ in 0..random.below(60) {
        match random.below(4) {
            0 | 1 => tokens.extend(tokenizer.special_id(random.pick(&MARKERS))),
            2 => tokens.extend(tokenizer.encode_ordinary(random.pick(&WORDS)).expect("words are ordinary text")),
            // Also ids behind the vocabulary, which a model with more rows than that can choose.
            _ => tokens.push(u32::try_from(random.below(tokenizer.len() + 8)).expect("vocabularies are small")),
        }
    }
    tokens
}

/// What one token, or the end, brought.
type Brought = (Vec<Piece>, Vec<TokenRun>, bool);

/// Pushes tokens one by one and gives what each brought, and the end.
fn brought_by(answer: &mut Answer, tokens: &[u32], end: AnswerEnd) -> Vec<Brought> {
    let push = |token: &u32| {
        let pushed = answer.push(*token);
        (pushed.pieces, pushed.runs, pushed.is_listable)
    };
    let mut brought: Vec<_> = tokens.iter().map(push).collect();
    let finished = answer.finish(end);
    brought.push((finished.pieces, finished.runs, false));
    brought
}

/// Checks that the tokens that were listed are those that the content is made of: their bytes are the content, where
/// nothing of it is made up by the parser or by decoding.
fn check_listed(kind: &AnswerKind, (tokenizer, tokens): (&Tokenizer, &[u32]), brought: &[Brought], content: &str) {
    let mut waiting = VecDeque::new();
    let mut listed = Vec::new();
    for (index, (pieces, runs, is_listable)) in brought.iter().enumerate() {
        waiting.extend(is_listable.then(|| tokens[index]));
        let has_content = pieces.iter().any(|piece| matches!(piece, Piece::Content(_)));
        for run in runs {
            assert!(has_content && run.listed > 0, "{runs:?} with {pieces:?}");
            waiting.drain(..run.skipped as usize);
            listed.extend(waiting.drain(..run.listed as usize));
        }
    }
    let bytes: Vec<u8> =
        listed.iter().flat_map(|token| tokenizer.token_bytes(*token).expect("has text")).copied().collect();
    if content.contains('\u{fffd}') {
        return;
    }
    // Between two messages there is a blank line of the parser's, and a header in front of a text was cut off.
    let own = content.replace("\n\n", "");
    let mut rest = bytes.iter();
    assert!(own.bytes().all(|byte| rest.any(|other| *other == byte)), "{content:?} is not of {bytes:?}: {tokens:?}");
    if *kind == AnswerKind::Plain {
        let last = listed.last().map_or(0, |token| tokenizer.token_bytes(*token).map_or(0, <[u8]>::len));
        assert!(bytes.starts_with(content.as_bytes()), "{bytes:?} is not {content:?}: {tokens:?}");
        assert!(bytes.len() < content.len() + last.max(1), "{bytes:?} is more than {content:?}: {tokens:?}");
    }
}

fn check_answer(tokenizer: &Arc<Tokenizer>, random: &mut Random) {
    let tokens = tokens(tokenizer, random);
    let kind = if random.once_in(4) { AnswerKind::Plain } else { AnswerKind::Harmony };
    let stops: Vec<String> = STOPS[..random.below(STOPS.len() + 1)].iter().map(|stop| (*stop).to_owned()).collect();
    let end = random.pick(&[AnswerEnd::Eos, AnswerEnd::Length]);
    let new = || {
        Answer::new(kind.clone(), stops.clone(), tokenizer.clone())
            .expect("the built-in tokenizer has harmony's tokens")
    };

    let text_bytes: usize = tokens.iter().filter_map(|token| tokenizer.token_bytes(*token)).map(<[u8]>::len).sum();
    let allowed = (1 << 16) + 64 * (text_bytes + 16 * tokens.len());
    let mut first = new();
    let brought = bounded(allowed, || brought_by(&mut first, &tokens, end));

    // A worker that takes over replays the tokens so far: from there on it must say the same.
    let cut = random.below(tokens.len() + 1);
    let mut resumed = new();
    tokens[..cut].iter().for_each(|token| drop(resumed.push(*token)));
    assert_eq!(brought_by(&mut resumed, &tokens[cut..], end), brought[cut..], "replayed {cut} of {tokens:?}");

    let mut content = String::new();
    let mut calls = 0;
    for piece in brought.iter().flat_map(|(pieces, ..)| pieces) {
        match piece {
            Piece::Content(text) => content.push_str(text),
            Piece::Reasoning(_) => assert_eq!(kind, AnswerKind::Harmony, "plain text has no reasoning"),
            Piece::ToolCall { index, .. } => {
                assert_eq!(*index, calls, "calls are counted");
                calls += 1;
            }
        }
    }
    assert_eq!(first.has_tool_calls(), calls > 0);
    check_listed(&kind, (tokenizer, &tokens), &brought, &content);
    for stop in &stops {
        assert!(!content.contains(stop), "{stop:?} is in {content:?}");
    }
}

#[test]
fn answers() {
    alone(|| {
        let tokenizer = Arc::new(Tokenizer::open(&demo_model()).expect("the built-in model has a tokenizer"));
        run("answers", |random| check_answer(&tokenizer, random));
    });
}

#[test]
fn bytes_that_become_text() {
    alone(|| {
        run("bytes that become text", |random| {
            let mut bytes = WORDS.concat().into_bytes();
            mutate(&mut bytes, random);
            let mut decoder = Detokenizer::default();
            let mut text = String::new();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let (part, behind) = rest.split_at(1 + random.below(rest.len().min(5)));
                text.push_str(&decoder.push(part));
                rest = behind;
            }
            text.extend(decoder.finish());
            assert_eq!(text, String::from_utf8_lossy(&bytes));
        });
    });
}

#[test]
fn prompts_that_spell_markers_stay_text() {
    alone(|| {
        let tokenizer = Tokenizer::open(&demo_model()).expect("the built-in model has a tokenizer");
        run("prompts", |random| {
            let mut bytes: Vec<u8> = (0..random.below(12))
                .flat_map(|_| if random.once_in(2) { random.pick(&MARKERS) } else { random.pick(&WORDS) }.bytes())
                .collect();
            if random.once_in(2) {
                mutate(&mut bytes, random);
            }
            let text = String::from_utf8_lossy(&bytes);
            let tokens = tokenizer.encode_ordinary(&text).expect("short text can be encoded");
            let back: Vec<u8> =
                tokens.iter().flat_map(|token| tokenizer.token_bytes(*token).expect("ordinary")).copied().collect();
            assert_eq!(String::from_utf8(back).expect("the bytes of a text"), text);
        });
    });
}
