//! Reads the body of a request within its bounds: of one body, of all together, and of time.

use std::time::Duration;

use axum::body::{Body, Bytes};
use bulkhead_shared::limits::BODY_BYTES_MAX;
use http_body_util::BodyExt;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::error::ApiError;
use crate::limits::{BODY_TIMEOUT, BODY_WINDOW, BODY_WINDOW_BYTES, DRAIN_BYTES_MAX};

/// A body and its share of the bytes of all bodies.
#[derive(Debug)]
pub(super) struct Read<'a> {
    pub(super) bytes: Bytes,
    _share: Option<SemaphorePermit<'a>>,
}

/// Reads a whole body.
pub(super) async fn read(budget: &Semaphore, mut body: Body) -> Result<Read<'_>, ApiError> {
    let read = tokio::time::timeout(BODY_TIMEOUT, collect(budget, &mut body)).await;
    match read.unwrap_or(Err(ApiError::BodyTimeout)) {
        Err(ApiError::BodyTooLarge) => {
            drain(body, DRAIN_BYTES_MAX).await;
            Err(ApiError::BodyTooLarge)
        }
        other => other,
    }
}

async fn collect<'a>(budget: &'a Semaphore, body: &mut Body) -> Result<Read<'a>, ApiError> {
    let mut share: Option<SemaphorePermit<'a>> = None;
    let mut bytes = Vec::new();
    let (mut deadline, mut due) = (Instant::now() + BODY_WINDOW, BODY_WINDOW_BYTES);
    loop {
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Ok(Some(frame)) => frame.map_err(|_| ApiError::BodyBroken)?,
            Ok(None) => break,
            Err(_) if bytes.len() >= due => {
                (deadline, due) = (Instant::now() + BODY_WINDOW, bytes.len() + BODY_WINDOW_BYTES);
                continue;
            }
            Err(_) => return Err(ApiError::BodyTimeout),
        };
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > BODY_BYTES_MAX {
            return Err(ApiError::BodyTooLarge);
        }
        let more = u32::try_from(data.len()).map_err(|_| ApiError::BodyTooLarge)?;
        let permit = budget.try_acquire_many(more).map_err(|_| ApiError::Busy)?;
        match &mut share {
            Some(share) => share.merge(permit),
            None => share = Some(permit),
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Read { bytes: bytes.into(), _share: share })
}

/// Reads on for a while and throws away: a client that is still sending would lose the answer with the connection.
pub(super) async fn drain(mut body: Body, bytes_max: usize) {
    const TIME: Duration = Duration::from_secs(5);
    let mut left = bytes_max;
    let read = async {
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    // The answer is the same whether the client stopped sending in time or not.
    drop(tokio::time::timeout(TIME, read).await);
}
