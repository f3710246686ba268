//! What one running request has produced so far.
//!
//! Owns: the token ids and the text of the answer, and how it ended. The link writes, one reader (the HTTP answer) follows
//! by a cursor and is woken; neither waits for the other, so a client that reads slowly costs the memory of its own
//! answer and nothing else. Invariants: nothing is written behind an end; there is exactly one end; what was read once is
//! not read again. The token ids stay: they are what a later worker would be given to continue from.

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
    /// The worker that ran it ended.
    Lost(Cause),
    /// Its deadline passed.
    TimedOut,
    /// No worker will come to run it.
    Unserved,
    /// The supervisor is ending and could not wait any longer.
    ShuttingDown,
    /// It does not fit a frame, which the limits on bodies rule out.
    Unsendable,
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
}

#[derive(Debug, Default)]
struct Written {
    is_accepted: bool,
    tokens: Vec<u32>,
    pieces: Vec<Piece>,
    end: Option<End>,
}

impl Journal {
    /// Notes that the worker has accepted the prompt.
    pub(crate) fn accept(&self) {
        self.write(|written| written.is_accepted = true);
    }

    /// Adds what a worker has produced.
    pub(crate) fn add(&self, tokens: &[u32], pieces: Vec<Piece>) {
        self.write(|written| {
            written.tokens.extend_from_slice(tokens);
            pieces.into_iter().for_each(|piece| append(&mut written.pieces, piece));
        });
    }

    /// Ends the journal. Only the first end counts.
    pub(crate) fn end(&self, end: End) {
        self.write(|written| written.end = Some(end));
    }

    /// Counts the tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.lock().tokens.len()
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
        let written = self.lock();
        let is_newly_accepted = written.is_accepted && !cursor.has_acceptance;
        let pieces = take_pieces(&written.pieces, cursor);
        if pieces.is_empty() && written.end.is_none() && !is_newly_accepted {
            return None;
        }
        cursor.has_acceptance = written.is_accepted;
        Some(News { is_accepted: written.is_accepted, pieces, end: written.end.clone() })
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
        journal.accept();
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
        assert_eq!(journal.tokens(), 4);
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
    fn only_the_first_end_counts_and_nothing_follows_it() {
        let journal = Journal::default();
        journal.end(End::TimedOut);
        journal.add(&[1], vec![content("late")]);
        journal.end(End::Unserved);
        let news = journal.take(&mut Cursor::default()).expect("there is news");
        assert_eq!(news, News { is_accepted: false, pieces: Vec::new(), end: Some(End::TimedOut) });
    }
}
