//! What one running request has produced so far.
//!
//! Owns: the token ids and the text of the answer, the log-probabilities of the tokens of content where they were asked for,
//! and how it ended. The link writes, one reader (the HTTP answer) follows
//! by a cursor and is woken; neither waits for the other. How much is unread is known, so that the sequence of a client
//! that reads slowly can be stopped, and nobody else's. Invariants: nothing is written behind an end; there is exactly one end; what was read once is
//! not read again; tokens, their text and their log-probabilities are written together, so that a later worker, which is
//! given the token ids to continue from, says neither too much nor too little.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_shared::message::{Failure, FinishReason, Logprobs, Piece, TokenRun, Usage};
use tokio::sync::Notify;

use crate::child::SoFar;
use crate::child::exit::Cause;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With a whole answer.
    Done {
        /// Why it is whole.
        reason: FinishReason,
        /// What it used.
        usage: Usage,
    },
    /// The worker refused or gave up.
    Failed(Failure),
    /// It ended the workers that ran it, for this reason at last.
    Quarantined(Cause),
    /// Its deadline passed.
    TimedOut,
    /// No worker will come to run it.
    Unserved,
    /// The supervisor is ending and could not wait any longer.
    ShuttingDown,
    /// It does not fit a frame, which the limits on bodies rule out.
    Unsendable,
}

impl End {
    /// Gives the word for metrics.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            End::Done { .. } => "done",
            End::Failed(Failure::ContextLength { .. }) => "context_length",
            End::Failed(Failure::Invalid { .. }) => "invalid",
            End::Failed(Failure::Cancelled) => "cancelled",
            End::Quarantined(_) => "quarantined",
            End::TimedOut => "timed_out",
            End::Unserved => "unserved",
            End::ShuttingDown => "shutting_down",
            End::Unsendable => "unsendable",
        }
    }
}

/// What a worker has made of a request, as one message brings it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Made {
    pub(crate) tokens: Vec<u32>,
    pub(crate) pieces: Vec<Piece>,
    /// Of those tokens that may be in the content.
    pub(crate) logprobs: Vec<Logprobs>,
    /// What becomes of log-probabilities that wait. There are some only where there is content.
    pub(crate) runs: Vec<TokenRun>,
}

/// What a reader gets: everything since it last asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct News {
    /// Whether the worker has accepted the prompt.
    pub is_accepted: bool,
    /// New text, runs of one kind joined.
    pub parts: Vec<Part>,
    /// The end, when everything before it was read.
    pub end: Option<End>,
}

/// A piece of the answer, with what is told of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The piece.
    pub piece: Piece,
    /// The tokens whose text begins in it, where they are told and it is content.
    pub logprobs: Vec<Logprobs>,
}

/// How far a reader has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    has_acceptance: bool,
    /// Pieces before this one were read whole.
    piece: usize,
    /// Bytes of this one's text that were read.
    bytes: usize,
    /// Listed tokens before this one were read.
    listed: usize,
}

/// The journal of one request.
#[derive(Debug, Default)]
pub struct Journal {
    state: Mutex<Written>,
    changed: Notify,
    /// Whether no worker goes on until the reader has caught up.
    is_held: AtomicBool,
}

#[derive(Debug, Default)]
struct Written {
    /// What the first worker said of the prompt: how many of its tokens needed no computation.
    accepted: Option<u32>,
    tokens: Vec<u32>,
    pieces: Vec<Piece>,
    text_bytes: usize,
    /// Of tokens of which is not known yet whether they are in the content.
    waiting: VecDeque<Logprobs>,
    /// Of tokens of content, each with the index of its piece.
    listed: Vec<(usize, Logprobs)>,
    listed_bytes: usize,
    /// How many bytes of text and of listed tokens the reader has taken.
    read_bytes: usize,
    end: Option<End>,
}

impl Written {
    fn add(&mut self, made: Made) {
        self.tokens.extend(made.tokens);
        self.text_bytes += made.pieces.iter().map(text_bytes).sum::<usize>();
        made.pieces.into_iter().for_each(|piece| append(&mut self.pieces, piece));
        self.waiting.extend(made.logprobs);
        // A message that lists tokens brought content, of which the last piece has them.
        let piece = self.pieces.iter().rposition(|piece| matches!(piece, Piece::Content(_))).unwrap_or(0);
        for run in made.runs {
            let mut taken = self.waiting.drain(..run.skipped as usize + run.listed as usize);
            let listed = taken.by_ref().skip(run.skipped as usize).map(|logprobs| (piece, logprobs));
            self.listed.extend(listed.inspect(|(_, logprobs)| self.listed_bytes += logprob_bytes(logprobs)));
        }
    }

    /// Counts the bytes that a reader takes.
    fn bytes(&self) -> usize {
        self.text_bytes + self.listed_bytes
    }
}

impl Journal {
    /// Notes that a worker has accepted the prompt, and how many of its tokens it knew. Only the first one counts: true for
    /// that.
    pub(crate) fn accept(&self, cached_tokens: u32) -> bool {
        let mut is_first = false;
        self.write(|written| {
            is_first = written.accepted.is_none();
            written.accepted.get_or_insert(cached_tokens);
        });
        is_first
    }

    /// Adds what a worker has produced.
    pub(crate) fn add(&self, made: Made) {
        self.write(|written| written.add(made));
    }

    /// Counts the bytes that the reader has not taken: of text, and of what is told of its tokens.
    pub(crate) fn unread_bytes(&self) -> usize {
        let written = self.lock();
        written.bytes() - written.read_bytes
    }

    /// Says whether no worker goes on until the reader has caught up.
    pub(crate) fn is_held(&self) -> bool {
        self.is_held.load(Ordering::SeqCst)
    }

    pub(crate) fn set_held(&self, is_held: bool) {
        self.is_held.store(is_held, Ordering::SeqCst);
    }

    /// Ends the journal. Only the first end counts. What the first worker said of the prompt stays true to the end.
    pub(crate) fn end(&self, mut end: End) {
        self.write(|written| {
            if let (End::Done { usage, .. }, Some(cached_tokens)) = (&mut end, written.accepted) {
                usage.cached_tokens = cached_tokens;
            }
            written.end = Some(end);
        });
    }

    /// Counts the tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.lock().tokens.len()
    }

    /// Gives what another worker needs to go on: the tokens so far, and what they made.
    pub(crate) fn so_far(&self) -> (Vec<u32>, SoFar) {
        let written = self.lock();
        let so_far = SoFar { text_bytes: written.text_bytes, logprobs_waiting: written.waiting.len() };
        (written.tokens.clone(), so_far)
    }

    /// Waits for news and takes it. For one reader at a time.
    ///
    /// Cancel safety: nothing is lost, the cursor moves only with the result.
    pub async fn read(&self, cursor: &mut Cursor) -> News {
        loop {
            if let Some(news) = self.take(cursor) {
                return news;
            }
            // A notification that comes between the look and the wait is kept, so none is missed.
            self.changed.notified().await;
        }
    }

    fn take(&self, cursor: &mut Cursor) -> Option<News> {
        let mut written = self.lock();
        let is_accepted = written.accepted.is_some();
        let is_newly_accepted = is_accepted && !cursor.has_acceptance;
        let parts = take_parts(&written, cursor);
        if parts.is_empty() && written.end.is_none() && !is_newly_accepted {
            return None;
        }
        cursor.has_acceptance = is_accepted;
        written.read_bytes = written.bytes();
        Some(News { is_accepted, parts, end: written.end.clone() })
    }

    fn write(&self, change: impl FnOnce(&mut Written)) {
        let mut written = self.lock();
        if written.end.is_none() {
            change(&mut written);
        }
        drop(written);
        self.changed.notify_one();
    }

    /// A panic while the lock was held ended one request; what was written before is whole.
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the bytes that a piece carries.
fn text_bytes(piece: &Piece) -> usize {
    match piece {
        Piece::Reasoning(text) | Piece::Content(text) => text.len(),
        Piece::ToolCall { name, arguments, .. } => name.len() + arguments.len(),
    }
}

/// Counts the bytes that the log-probabilities of a token carry.
fn logprob_bytes(logprobs: &Logprobs) -> usize {
    let told = std::iter::once(&logprobs.chosen).chain(&logprobs.top);
    told.map(|told| told.token.len() + size_of_val(&told.logprob)).sum()
}

/// Adds a piece, joined to the last one where both are text of one kind.
fn append(pieces: &mut Vec<Piece>, piece: Piece) {
    match (pieces.last_mut(), piece) {
        (Some(Piece::Reasoning(text)), Piece::Reasoning(more)) | (Some(Piece::Content(text)), Piece::Content(more)) => {
            text.push_str(&more);
        }
        (_, Piece::Reasoning(text) | Piece::Content(text)) if text.is_empty() => {}
        (_, piece) => pieces.push(piece),
    }
}

/// Copies what lies behind the cursor and moves it to the end.
fn take_parts(written: &Written, cursor: &mut Cursor) -> Vec<Part> {
    let mut news = Vec::new();
    while let Some(piece) = written.pieces.get(cursor.piece) {
        let (rest, bytes) = match piece {
            Piece::Reasoning(text) => (Piece::Reasoning(text[cursor.bytes..].to_owned()), text.len()),
            Piece::Content(text) => (Piece::Content(text[cursor.bytes..].to_owned()), text.len()),
            Piece::ToolCall { .. } => (piece.clone(), 1),
        };
        if cursor.bytes < bytes {
            let of_piece = written.listed[cursor.listed..].iter().take_while(|(piece, _)| *piece == cursor.piece);
            let logprobs: Vec<_> = of_piece.map(|(_, logprobs)| logprobs.clone()).collect();
            cursor.listed += logprobs.len();
            news.push(Part { piece: rest, logprobs });
        }
        // The last piece may grow, so the cursor stays in it.
        if cursor.piece + 1 == written.pieces.len() {
            cursor.bytes = bytes;
            break;
        }
        (cursor.piece, cursor.bytes) = (cursor.piece + 1, 0);
    }
    news
}

#[cfg(test)]
mod tests {
    use bulkhead_shared::message::{TokenLogprob, TokenText};

    use super::*;

    fn content(text: &str) -> Piece {
        Piece::Content(text.into())
    }

    fn part(piece: Piece) -> Part {
        Part { piece, logprobs: Vec::new() }
    }

    fn parts<const N: usize>(pieces: [Piece; N]) -> Vec<Part> {
        pieces.map(part).to_vec()
    }

    fn made(tokens: &[u32], pieces: Vec<Piece>) -> Made {
        Made { tokens: tokens.to_vec(), pieces, ..Made::default() }
    }

    /// What is told of a token that has this byte.
    fn told(byte: u8) -> Logprobs {
        let token = TokenLogprob { token: TokenText::Bytes(vec![byte]), logprob: -f32::from(byte) };
        Logprobs { chosen: token.clone(), top: vec![token] }
    }

    fn call(index: u32) -> Piece {
        Piece::ToolCall { index, name: "f".into(), arguments: "{}".into() }
    }

    #[test]
    fn a_reader_gets_everything_once_and_joined() {
        let journal = Journal::default();
        let mut cursor = Cursor::default();
        assert_eq!(journal.take(&mut cursor), None);
        assert!(journal.accept(7));
        assert!(!journal.accept(9));
        assert_eq!(journal.take(&mut cursor), Some(News { is_accepted: true, ..News::default() }));
        assert_eq!(journal.take(&mut cursor), None);
        journal.add(made(&[1], vec![Piece::Reasoning("a".into()), content("b")]));
        journal.add(made(&[2, 3], vec![content("c"), content("")]));
        let news = journal.take(&mut cursor).expect("there is news");
        assert_eq!(news.parts, parts([Piece::Reasoning("a".into()), content("bc")]));
        assert_eq!(journal.take(&mut cursor), None);
        journal.add(made(&[4], vec![content("d"), call(0), call(1), content("e")]));
        let news = journal.take(&mut cursor).expect("there is news");
        assert_eq!(news.parts, parts([content("d"), call(0), call(1), content("e")]));
        assert_eq!(journal.take(&mut cursor), None);
        assert_eq!((journal.tokens(), journal.unread_bytes()), (4, 0));
        journal.add(made(&[5], vec![content("fgh")]));
        assert_eq!(journal.unread_bytes(), 3);
    }

    #[test]
    fn a_call_at_the_end_is_read_once() {
        let journal = Journal::default();
        let mut cursor = Cursor::default();
        journal.add(made(&[1], vec![call(0)]));
        assert_eq!(journal.take(&mut cursor).expect("there is news").parts, parts([call(0)]));
        assert_eq!(journal.take(&mut cursor), None);
        journal.add(made(&[2], vec![call(1)]));
        assert_eq!(journal.take(&mut cursor).expect("there is news").parts, parts([call(1)]));
    }

    #[test]
    fn what_another_worker_needs_is_kept_whole() {
        let journal = Journal::default();
        journal.accept(3);
        journal.add(made(&[5, 6], vec![content("ab"), call(0)]));
        journal.add(made(&[7], Vec::new()));
        journal.accept(0);
        let so_far = SoFar { text_bytes: 2 + "f{}".len(), logprobs_waiting: 0 };
        assert_eq!(journal.so_far(), (vec![5, 6, 7], so_far));
        let usage =
            |cached_tokens| Usage { prompt_tokens: 9, cached_tokens, completion_tokens: 3, reasoning_tokens: 0 };
        journal.end(End::Done { reason: FinishReason::Stop, usage: usage(0) });
        let end = journal.take(&mut Cursor::default()).expect("there is news").end;
        assert_eq!(end, Some(End::Done { reason: FinishReason::Stop, usage: usage(3) }));
    }

    #[test]
    fn tokens_are_listed_with_the_content_that_they_are_in_and_read_once() {
        let journal = Journal::default();
        let mut cursor = Cursor::default();
        let waits = |token, byte| Made { tokens: vec![token], logprobs: vec![told(byte)], ..Made::default() };
        let run = |skipped, listed| vec![TokenRun { skipped, listed }];
        // Two of a header, one that waits, and the one that brings the content of both.
        (1..=3).for_each(|token| journal.add(waits(token, token as u8)));
        assert_eq!(journal.take(&mut cursor), None);
        assert_eq!(journal.so_far().1, SoFar { text_bytes: 0, logprobs_waiting: 3 });
        journal.add(Made { pieces: vec![content("ab")], runs: run(2, 2), ..waits(4, 4) });
        assert_eq!(journal.so_far().1, SoFar { text_bytes: 2, logprobs_waiting: 0 });
        assert_eq!(journal.unread_bytes(), 2 + 4 * (1 + size_of::<f32>()));
        let news = journal.take(&mut cursor).expect("there is news");
        assert_eq!(news.parts, [Part { piece: content("ab"), logprobs: vec![told(3), told(4)] }]);
        assert_eq!((journal.take(&mut cursor), journal.unread_bytes()), (None, 0));
        // The same piece goes on; then one behind a thought. Read together they stay apart.
        journal.add(Made { pieces: vec![content("c")], runs: run(0, 1), ..waits(5, 5) });
        journal.add(made(&[6], vec![Piece::Reasoning("t".into())]));
        journal.add(waits(7, 7));
        journal.add(Made { pieces: vec![content("d"), call(0)], runs: run(0, 1), ..Made::default() });
        let news = journal.take(&mut cursor).expect("there is news");
        let with = |piece, byte| Part { piece, logprobs: vec![told(byte)] };
        let expected =
            [with(content("c"), 5), part(Piece::Reasoning("t".into())), with(content("d"), 7), part(call(0))];
        assert_eq!(news.parts, expected);
        // A reader from the start gets all of them.
        let news = journal.take(&mut Cursor::default()).expect("there is news");
        let first = Part { piece: content("abc"), logprobs: vec![told(3), told(4), told(5)] };
        assert_eq!(news.parts[0], first);
    }

    #[test]
    fn only_the_first_end_counts_and_nothing_follows_it() {
        let journal = Journal::default();
        journal.end(End::TimedOut);
        journal.add(made(&[1], vec![content("late")]));
        journal.end(End::Unserved);
        let news = journal.take(&mut Cursor::default()).expect("there is news");
        assert_eq!(news, News { is_accepted: false, parts: Vec::new(), end: Some(End::TimedOut) });
    }
}
