//! What one running request has produced so far.
//!
//! Owns: the token ids and the text of the answer, and how it ended. The link writes, one reader (the HTTP answer) follows
//! by a cursor and is woken; neither waits for the other. How much is unread is known, so that the sequence of a client
//! that reads slowly can be stopped, and nobody else's. Invariants: nothing is written behind an end; there is exactly one end; what was read once is
//! not read again; tokens and their text are written together, so that a later worker, which is given the token ids to
//! continue from, says neither too much nor too little.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_shared::message::{Failure, FinishReason, Piece, Usage};
use tokio::sync::Notify;

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

/// What a reader gets: everything since it last asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Whether the worker has accepted the prompt.
    pub is_accepted: bool,
    /// New text, runs of one kind joined.
    pub pieces: Vec<Piece>,
    /// The end, when everything before it was read.
    pub end: Option<End>,
}

/// How far a reader has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    has_acceptance: bool,
    /// Pieces before this one were read whole.
    piece: usize,
    /// Bytes of this one's text that were read.
    bytes: usize,
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
    /// How many of them the reader has taken.
    read_bytes: usize,
    end: Option<End>,
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
    pub(crate) fn add(&self, tokens: &[u32], pieces: Vec<Piece>) {
        self.write(|written| {
            written.tokens.extend_from_slice(tokens);
            written.text_bytes += pieces.iter().map(text_bytes).sum::<usize>();
            pieces.into_iter().for_each(|piece| append(&mut written.pieces, piece));
        });
    }

    /// Counts the bytes of text that the reader has not taken.
    pub(crate) fn unread_bytes(&self) -> usize {
        let written = self.lock();
        written.text_bytes - written.read_bytes
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

    /// Gives what another worker needs to go on: the tokens so far, and the bytes of text that they made.
    pub(crate) fn so_far(&self) -> (Vec<u32>, usize) {
        let written = self.lock();
        (written.tokens.clone(), written.text_bytes)
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
        let pieces = take_pieces(&written.pieces, cursor);
        if pieces.is_empty() && written.end.is_none() && !is_newly_accepted {
            return None;
        }
        cursor.has_acceptance = is_accepted;
        written.read_bytes = written.text_bytes;
        Some(News { is_accepted, pieces, end: written.end.clone() })
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
fn take_pieces(pieces: &[Piece], cursor: &mut Cursor) -> Vec<Piece> {
    let mut news = Vec::new();
    while let Some(piece) = pieces.get(cursor.piece) {
        let (rest, bytes) = match piece {
            Piece::Reasoning(text) => (Piece::Reasoning(text[cursor.bytes..].to_owned()), text.len()),
            Piece::Content(text) => (Piece::Content(text[cursor.bytes..].to_owned()), text.len()),
            Piece::ToolCall { .. } => (piece.clone(), 1),
        };
        if cursor.bytes < bytes {
            news.push(rest);
        }
        // The last piece may grow, so the cursor stays in it.
        if cursor.piece + 1 == pieces.len() {
            cursor.bytes = bytes;
            break;
        }
        (cursor.piece, cursor.bytes) = (cursor.piece + 1, 0);
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(text: &str) -> Piece {
        Piece::Content(text.into())
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
        journal.add(&[1], vec![Piece::Reasoning("a".into()), content("b")]);
        journal.add(&[2, 3], vec![content("c"), content("")]);
        let news = journal.take(&mut cursor).expect("there is news");
        assert_eq!(news.pieces, [Piece::Reasoning("a".into()), content("bc")]);
        assert_eq!(journal.take(&mut cursor), None);
        journal.add(&[4], vec![content("d"), call(0), call(1), content("e")]);
        let news = journal.take(&mut cursor).expect("there is news");
        assert_eq!(news.pieces, [content("d"), call(0), call(1), content("e")]);
        assert_eq!(journal.take(&mut cursor), None);
        assert_eq!((journal.tokens(), journal.unread_bytes()), (4, 0));
        journal.add(&[5], vec![content("fgh")]);
        assert_eq!(journal.unread_bytes(), 3);
    }

    #[test]
    fn a_call_at_the_end_is_read_once() {
        let journal = Journal::default();
        let mut cursor = Cursor::default();
        journal.add(&[1], vec![call(0)]);
        assert_eq!(journal.take(&mut cursor).expect("there is news").pieces, [call(0)]);
        assert_eq!(journal.take(&mut cursor), None);
        journal.add(&[2], vec![call(1)]);
        assert_eq!(journal.take(&mut cursor).expect("there is news").pieces, [call(1)]);
    }

    #[test]
    fn what_another_worker_needs_is_kept_whole() {
        let journal = Journal::default();
        journal.accept(3);
        journal.add(&[5, 6], vec![content("ab"), call(0)]);
        journal.add(&[7], Vec::new());
        journal.accept(0);
        assert_eq!(journal.so_far(), (vec![5, 6, 7], 2 + "f{}".len()));
        let usage =
            |cached_tokens| Usage { prompt_tokens: 9, cached_tokens, completion_tokens: 3, reasoning_tokens: 0 };
        journal.end(End::Done { reason: FinishReason::Stop, usage: usage(0) });
        let end = journal.take(&mut Cursor::default()).expect("there is news").end;
        assert_eq!(end, Some(End::Done { reason: FinishReason::Stop, usage: usage(3) }));
    }

    #[test]
    fn only_the_first_end_counts_and_nothing_follows_it() {
        let journal = Journal::default();
        journal.end(End::TimedOut);
        journal.add(&[1], vec![content("late")]);
        journal.end(End::Unserved);
        let news = journal.take(&mut Cursor::default()).expect("there is news");
        assert_eq!(news, News { is_accepted: false, pieces: Vec::new(), end: Some(End::TimedOut) });
    }
}
