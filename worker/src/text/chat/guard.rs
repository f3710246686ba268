//! Keeps what clients write apart from the structure that a template writes, through any template.
//!
//! A template gives one text, in which its own `<|eot_id|>` and one that a client spelled look the same. So before
//! rendering, a mark is put into every text of the request wherever it spells a structural token, or could become a part of
//! one together with what is written beside it; after rendering, structural tokens are looked for, and then marks are
//! taken out. What is left between two structural tokens is ordinary text, encoded as such.
//!
//! The mark is U+FDD0, a noncharacter that no text is exchanged with. Where a client sends it all the same, it is escaped by
//! U+FDD1, so that every text comes back as it was. Marks stand behind leading and before trailing white space, so
//! that trimming works as ever; texts that spell nothing structural are not changed at all.
//!
//! A template that cuts texts up and joins the pieces could still make structure of them. That is found by rendering a
//! second time, with the first character of every structural token replaced in the request's texts: the structure must
//! be the same.

use std::borrow::Cow;

use crate::text::tokenizer::{Structural, Tokenizer};

/// Stands inside of what must not be read as a structural token.
const MARK: char = '\u{fdd0}';

/// Stands before what a client wrote as `MARK` or `ESCAPE`.
const ESCAPE: char = '\u{fdd1}';

/// Stands for the first character of a structural token, where only the structure is wanted.
const BLANK: char = '\u{fdd2}';
const BLANK_TEXT: &str = "\u{fdd2}";

/// Behind `ESCAPE`: what it was.
const WAS_MARK: char = 'm';
const WAS_ESCAPE: char = 'e';

/// How the texts of a request are changed before they are rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Marked, to be encoded.
    Marked,
    /// Without the first characters of structural tokens, to compare the structure.
    Blanked,
}

/// A stretch of a rendered text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// A structural token.
    Token(u32),
    /// Ordinary text.
    Text(String),
}

/// Guards the texts of a request against a tokenizer's structural tokens.
#[derive(Clone, Debug)]
pub(super) struct Guard<'t> {
    tokens: &'t [Structural],
    /// The characters with which those begin.
    firsts: Vec<char>,
    mode: Mode,
}

impl<'t> Guard<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, mode: Mode) -> Guard<'t> {
        Guard::of(tokenizer.structural(), mode)
    }

    fn of(tokens: &'t [Structural], mode: Mode) -> Guard<'t> {
        let mut firsts: Vec<char> = tokens.iter().filter_map(|token| token.content.chars().next()).collect();
        firsts.sort_unstable();
        firsts.dedup();
        Guard { tokens, firsts, mode }
    }

    /// Says whether a template's own text would be taken for what a guard wrote.
    pub(super) fn is_forged_by(template: &str) -> bool {
        template.contains([MARK, ESCAPE, BLANK])
    }

    /// Changes a text of the request.
    pub(super) fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.mode {
            Mode::Marked => self.marked(text),
            Mode::Blanked if text.contains(&self.firsts[..]) => text.replace(&self.firsts[..], BLANK_TEXT).into(),
            Mode::Blanked => text.into(),
        }
    }

    fn marked<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let escaped = escape(text);
        let core = escaped.trim();
        let start = escaped.len() - escaped.trim_start().len();
        let mut cuts = Vec::new();
        for (at, first) in escaped.match_indices(&self.firsts[..]) {
            if self.tokens.iter().any(|token| escaped[at..].starts_with(token.content.as_str())) {
                // Behind the first character, so that a token that overlaps with itself is cut everywhere.
                cuts.push(at + first.len());
            }
        }
        for token in self.tokens.iter().map(|token| token.content.as_str()).filter(|_| !core.is_empty()) {
            let inner = || token.char_indices().map(|(at, _)| at).skip(1);
            if token.contains(core) || inner().any(|at| core.starts_with(&token[at..])) {
                cuts.push(start);
            }
            if inner().any(|at| core.ends_with(&token[..at])) {
                cuts.push(start + core.len());
            }
        }
        if cuts.is_empty() {
            return escaped;
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut marked = String::with_capacity(escaped.len() + cuts.len() * MARK.len_utf8());
        let mut done = 0;
        for cut in cuts {
            marked.push_str(&escaped[done..cut]);
            marked.push(MARK);
            done = cut;
        }
        marked.push_str(&escaped[done..]);
        marked.into()
    }

    /// Splits a rendered text at its structural tokens, the longest first where several begin at one place.
    pub(super) fn split(&self, rendered: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        let (mut text_start, mut at) = (0, 0);
        while let Some(next) = rendered[at..].find(&self.firsts[..]) {
            at += next;
            let rest = &rendered[at..];
            let candidates = self.tokens.iter().filter(|token| rest.starts_with(token.content.as_str()));
            let Some(token) = candidates.max_by_key(|token| token.content.len()) else {
                at += rest.chars().next().map_or(1, char::len_utf8);
                continue;
            };
            let before = &rendered[text_start..at];
            push_text(&mut parts, if token.takes_left { before.trim_end() } else { before });
            parts.push(Part::Token(token.id));
            at += token.content.len();
            if token.takes_right {
                at += rendered[at..].len() - rendered[at..].trim_start().len();
            }
            text_start = at;
        }
        push_text(&mut parts, &rendered[text_start..]);
        parts
    }
}

fn push_text(parts: &mut Vec<Part>, text: &str) {
    let text = restore(text);
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
}

fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains([MARK, ESCAPE]) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            MARK => escaped.extend([ESCAPE, WAS_MARK]),
            ESCAPE => escaped.extend([ESCAPE, WAS_ESCAPE]),
            other => escaped.push(other),
        }
    }
    escaped.into()
}

/// Takes marks out and escapes back.
pub(super) fn restore(rendered: &str) -> String {
    let mut text = String::with_capacity(rendered.len());
    let mut rest = rendered.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, rest.peek()) {
            (MARK, _) => {}
            (ESCAPE, Some(&WAS_MARK)) => {
                rest.next();
                text.push(MARK);
            }
            (ESCAPE, Some(&WAS_ESCAPE)) => {
                rest.next();
                text.push(ESCAPE);
            }
            (other, _) => text.push(other),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Vec<Structural> {
        let token = |(id, content): (usize, &&str)| Structural {
            id: id as u32,
            content: (*content).to_owned(),
            takes_left: false,
            takes_right: *content == "<end>",
        };
        ["<s>", "</s>", "<|eot|>", "<|eot|><|eot|>", "[A]", "<end>"].iter().enumerate().map(token).collect()
    }

    fn guard(tokens: &[Structural]) -> Guard<'_> {
        Guard::of(tokens, Mode::Marked)
    }

    #[test]
    fn a_text_that_spells_nothing_is_left_alone() {
        let tokens = tokens();
        for text in ["", " ", "hello", "a < b", "1 > 0 or so", "what is [A", "stop"] {
            let marked = guard(&tokens).text(text);
            assert!(matches!(marked, Cow::Borrowed(_)) || text == "what is [A", "{text:?} became {marked:?}");
            assert_eq!(restore(&marked), text);
        }
    }

    #[test]
    fn no_text_becomes_structure_whatever_stands_beside_it() {
        let tokens = tokens();
        let guard = guard(&tokens);
        let texts = [
            "<s>",
            "</s>",
            " <s> ",
            "<|eot|>",
            "<|eot|><|eot|>",
            "<|eot|",
            "|eot|>",
            "<",
            ">",
            "s",
            "/s",
            "eot",
            "[",
            "A]",
            "<<s>>",
            "<s><s>",
            "<\u{fdd0}s>",
            "\u{fdd1}m",
            "<|\u{fdd1}e",
            "\u{fdd0}",
            "\n<|eot",
            "x<|eot|>y[A]",
        ];
        let surroundings =
            [("", ""), ("<", ">"), ("<|", "|>"), ("[", "]"), ("<|eot|><", "s>"), ("x", "y"), ("</", ">")];
        for text in texts {
            let marked = guard.text(text);
            assert_eq!(restore(&marked), text);
            for (before, behind) in surroundings {
                let whole = format!("{before}{marked}{behind}");
                let found = guard.split(&whole);
                let around = [before, behind].map(|text| guard.split(text)).concat();
                let ids = |parts: &[Part]| parts.iter().filter(|part| matches!(part, Part::Token(_))).count();
                assert_eq!(ids(&found), ids(&around), "{text:?} in {before:?} {behind:?}: {found:?}");
            }
            for other in texts {
                let both = format!("{marked}{}", guard.text(other));
                assert_eq!(guard.split(&both), [Part::Text(format!("{text}{other}"))], "{text:?} and {other:?}");
            }
        }
    }

    #[test]
    fn structure_is_split_off_longest_first() {
        let tokens = tokens();
        let text = |text: &str| Part::Text(text.to_owned());
        let parts = guard(&tokens).split("<s>hi <|eot|><|eot|> x<|eot|><end>\n \ny</s");
        let expected =
            [Part::Token(0), text("hi "), Part::Token(3), text(" x"), Part::Token(2), Part::Token(5), text("y</s")];
        assert_eq!(parts, expected);
    }

    #[test]
    fn blanked_texts_begin_no_token() {
        let tokens = tokens();
        let guard = Guard::of(&tokens, Mode::Blanked);
        assert_eq!(guard.text("<s> [A] x"), "\u{fdd2}s> \u{fdd2}A] x");
        assert_eq!(guard.text("plain"), "plain");
    }
}
