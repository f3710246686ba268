//! Which tokens of an answer are in its content: those are listed with their log-probabilities.
//!
//! A token is in the content when the first byte of its text has come out there. Until that is certain it waits: in a header
//! that may turn out to be text, in a tool call that may turn out to be none, in half a character, in what could become a
//! stop string. Invariants: each token that waits is listed or skipped once, in their order; both depend on the tokens alone,
//! so replaying them restores the state.

use std::collections::VecDeque;

use bulkhead_shared::message::TokenRun;

/// The tokens of one answer that may be listed.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Where in the content each token begins, oldest first; `None` for one that is not in it.
    placed: VecDeque<Option<usize>>,
    /// The tokens behind those, whose text has not become content.
    unplaced: Vec<Unplaced>,
    /// Bytes of content so far, also those that a stop string holds back.
    content_bytes: usize,
    /// Tokens that left `placed` without being listed, since the last one that was.
    skipped: u32,
    pushed: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unplaced {
    /// So many bytes, not decoded.
    Bytes(usize),
    /// Decoded: it begins at this byte of a text that may become content.
    Begins(usize),
}

impl Listing {
    /// Takes a token whose text may become content. One without text never does.
    pub fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.unplaced.push(Unplaced::Bytes(bytes.len()));
            self.pushed += 1;
        }
    }

    /// Counts the tokens that were pushed.
    #[must_use]
    pub fn pushed(&self) -> usize {
        self.pushed
    }

    /// Takes back the tokens of the last `bytes` that were pushed, none of them decoded, and gives how many of these bytes
    /// each has. Tokens before them are in no content.
    pub fn take(&mut self, mut bytes: usize) -> Vec<usize> {
        let mut parts = Vec::new();
        while let Some(Unplaced::Bytes(token)) = self.unplaced.pop_if(|_| bytes > 0) {
            // Of the first one a part may have been cut off.
            let part = token.min(bytes);
            parts.push(part);
            bytes -= part;
        }
        self.discard();
        parts.reverse();
        parts
    }

    /// Puts back the next of the tokens that were taken.
    pub fn put_back(&mut self, bytes: usize) {
        self.unplaced.push(Unplaced::Bytes(bytes));
    }

    /// The tokens so far were decoded: their text begins at byte `at` of what may become content, that of the last token
    /// `own` bytes behind this.
    pub fn decoded(&mut self, at: usize, own: usize) {
        let is_new = |token: &&mut Unplaced| matches!(token, Unplaced::Bytes(_));
        let mut own = own;
        for token in self.unplaced.iter_mut().rev().take_while(is_new) {
            *token = Unplaced::Begins(at + std::mem::take(&mut own));
        }
    }

    /// The content goes on with text of no token.
    pub fn gap(&mut self, bytes: usize) {
        self.content_bytes += bytes;
    }

    /// The content goes on with `bytes` of text, that of the tokens that were decoded.
    pub fn place(&mut self, bytes: usize) {
        let is_decoded = |token: &Unplaced| matches!(token, Unplaced::Begins(_));
        let count = self.unplaced.iter().take_while(|token| is_decoded(token)).count();
        self.placed.extend(self.unplaced.drain(..count).map(|token| match token {
            Unplaced::Begins(at) => Some(self.content_bytes + at),
            Unplaced::Bytes(_) => None,
        }));
        self.content_bytes += bytes;
    }

    /// Whatever was pushed and not placed is in no content.
    pub fn discard(&mut self) {
        self.placed.extend(self.unplaced.drain(..).map(|_| None));
    }

    /// Gives what became of the tokens that need not wait any longer, when so many bytes of content have come out in all.
    pub fn release(&mut self, content_bytes: usize) -> Vec<TokenRun> {
        let mut runs: Vec<TokenRun> = Vec::new();
        while let Some(place) = self.placed.front().copied() {
            if place.is_some_and(|start| start >= content_bytes) {
                break;
            }
            self.placed.pop_front();
            match (place, runs.last_mut()) {
                (None, _) => self.skipped += 1,
                (Some(_), Some(run)) if self.skipped == 0 => run.listed += 1,
                (Some(_), _) => runs.push(TokenRun { skipped: std::mem::take(&mut self.skipped), listed: 1 }),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(skipped: u32, listed: u32) -> TokenRun {
        TokenRun { skipped, listed }
    }

    /// The content goes on with this token.
    fn say(listing: &mut Listing, text: &str) {
        listing.push(text.as_bytes());
        listing.decoded(0, 0);
        listing.place(text.len());
    }

    #[test]
    fn a_token_is_listed_when_its_first_byte_comes_out() {
        let mut listing = Listing::default();
        ["ab", "cd", "ef"].into_iter().for_each(|text| say(&mut listing, text));
        assert_eq!(listing.release(0), []);
        assert_eq!(listing.release(3), [run(0, 2)]);
        assert_eq!(listing.release(4), []);
        assert_eq!(listing.release(6), [run(0, 1)]);
        assert_eq!(listing.pushed(), 3);
    }

    #[test]
    fn what_is_in_no_content_is_skipped_with_the_next_that_is() {
        let mut listing = Listing::default();
        listing.push(b"header");
        listing.discard();
        assert_eq!(listing.release(100), []);
        say(&mut listing, "a");
        listing.push(b"call");
        listing.push(b"");
        listing.discard();
        listing.gap(2);
        say(&mut listing, "b");
        assert_eq!(listing.release(1), [run(1, 1)]);
        assert_eq!(listing.release(3), [], "the gap is no token's");
        assert_eq!(listing.release(4), [run(1, 1)]);
    }

    #[test]
    fn text_behind_a_header_is_the_last_tokens() {
        let mut listing = Listing::default();
        ["final", " to", "=x", " he", "llo"].into_iter().for_each(|text| listing.push(text.as_bytes()));
        // Of " hello" the space was cut off.
        assert_eq!(listing.take(5), [2, 3]);
        for bytes in [2, 3] {
            listing.put_back(bytes);
            listing.decoded(0, 0);
            listing.place(bytes);
        }
        assert_eq!(listing.release(2), [run(3, 1)]);
        assert_eq!(listing.release(5), [run(0, 1)]);
        assert_eq!((listing.take(7), listing.pushed()), (Vec::new(), 5));
    }

    #[test]
    fn what_waited_as_a_whole_is_placed_as_a_whole() {
        let mut listing = Listing::default();
        say(&mut listing, "x");
        for (at, text) in [(0, "ab"), (2, "cd")] {
            listing.push(text.as_bytes());
            listing.decoded(at, 0);
        }
        listing.push(b"\xe2");
        listing.place(4);
        assert_eq!(listing.release(3), [run(0, 2)]);
        // The part of a character that was not decoded goes on in the content.
        listing.push(b"\x82\xac");
        listing.decoded(0, 0);
        listing.place(3);
        assert_eq!(listing.release(8), [run(0, 3)]);
    }

    #[test]
    fn a_token_begins_behind_what_replaces_bytes_before_it() {
        let mut listing = Listing::default();
        listing.push(b"\xe2");
        listing.push(b"x");
        // U+FFFD for the first.
        listing.decoded(0, 3);
        listing.place(4);
        assert_eq!(listing.release(3), [run(0, 1)]);
        assert_eq!(listing.release(4), [run(0, 1)]);
    }
}
