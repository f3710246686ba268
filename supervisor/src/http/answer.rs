//! From a journal to the bytes of an answer, whole or as server-sent events.
//!
//! Invariants: the status is settled before the first byte, so a request that a worker refuses is never a 200; dropping
//! an answer drops its ticket, which cancels the request; a stream that is silent gets comments.

use std::convert::Infallible;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::error::ApiError;
use super::logprobs::Offset;
use super::wire::{Head, Object};
use crate::journal::{Cursor, End, News};
use crate::limits::KEEP_ALIVE_INTERVAL;
use crate::tickets::Ticket;

const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Waits for the end and answers with one object.
///
/// Cancel safety: dropping it cancels the request.
pub(crate) async fn whole(ticket: Ticket, head: Head) -> Result<Response, ApiError> {
    let mut cursor = Cursor::default();
    let mut parts = Vec::new();
    loop {
        let news = ticket.read(&mut cursor).await;
        parts.extend(news.parts);
        match news.end {
            None => {}
            Some(End::Done { reason, usage }) => return Ok(Json(head.whole(parts, reason, usage)).into_response()),
            Some(end) => return Err(ApiError::Ended(end)),
        }
    }
}

/// Waits until the request is accepted and answers with a stream of events.
///
/// Cancel safety: dropping it, or the body of its answer, cancels the request.
pub(crate) async fn stream(ticket: Ticket, head: Head, has_usage: bool) -> Result<Response, ApiError> {
    let mut cursor = Cursor::default();
    let news = ticket.read(&mut cursor).await;
    if let (false, Some(end)) = (news.is_accepted, &news.end) {
        return Err(ApiError::Ended(end.clone()));
    }
    let offset = Offset::default();
    let events = Events { ticket, cursor, head, has_usage, offset, next: Some(Step::Open(news)) };
    let body = Body::from_stream(futures_util::stream::unfold(events, Events::next));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    Ok((headers, body).into_response())
}

struct Events {
    ticket: Ticket,
    cursor: Cursor,
    head: Head,
    has_usage: bool,
    /// Behind the tokens that were told of.
    offset: Offset,
    next: Option<Step>,
}

enum Step {
    Open(News),
    Read,
}

impl Events {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Events)> {
        let mut bytes = Vec::new();
        let news = match self.next.take()? {
            Step::Open(news) => {
                self.head.opening().into_iter().for_each(|chunk| self.write(&mut bytes, chunk));
                news
            }
            Step::Read => {
                let read = self.ticket.read(&mut self.cursor);
                match tokio::time::timeout(KEEP_ALIVE_INTERVAL, read).await {
                    Ok(news) => news,
                    Err(_) => {
                        self.next = Some(Step::Read);
                        return Some((Ok(Bytes::from_static(KEEP_ALIVE)), self));
                    }
                }
            }
        };
        for part in news.parts {
            let chunk = self.head.part(part, &mut self.offset);
            self.write(&mut bytes, chunk);
        }
        match news.end {
            None => self.next = Some(Step::Read),
            Some(end) => self.write_end(&mut bytes, end),
        }
        Some((Ok(bytes.into()), self))
    }

    fn write_end(&self, bytes: &mut Vec<u8>, end: End) {
        match end {
            End::Done { reason, usage } => {
                self.write(bytes, self.head.closing(reason));
                if self.has_usage {
                    event(bytes, &self.head.usage(usage));
                }
                bytes.extend_from_slice(DONE);
            }
            // OpenAI's clients raise an error on any object with the key `error`.
            End::Failed(_)
            | End::Quarantined(_)
            | End::TimedOut
            | End::Unserved
            | End::ShuttingDown
            | End::Unsendable => event(bytes, &ApiError::Ended(end).object()),
        }
    }

    /// Writes a chunk. Where usage was asked for, all chunks but the last carry a `usage` of null.
    fn write(&self, bytes: &mut Vec<u8>, chunk: Object<'_>) {
        event(bytes, &if self.has_usage { chunk.without_usage() } else { chunk });
    }
}

fn event(bytes: &mut Vec<u8>, object: &impl Serialize) {
    bytes.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *bytes, object).expect("what we answer is JSON, and memory takes it");
    bytes.extend_from_slice(b"\n\n");
}
