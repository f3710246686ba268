//! Bringing weights to a card from the mapped files.
//!
//! Several threads copy pieces of the files into small pinned buffers, each with a stream of its own, and the card fetches
//! them from there: never more than those buffers is held twice. Registering the files' own pages with the driver instead,
//! which copies nothing on the host, was measured slower: it pins page by page, and one thread at a time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::driver::Card;
use super::transfer::{Memory, Stage};
use crate::checkpoint::Region;
use crate::device::DeviceError;
use crate::quant::Matrix;

/// What is sent at a time. Units: bytes.
const PIECE_BYTES: usize = 2 << 20;

/// Threads that send, each with two buffers: one is filled while the other is on its way.
const SENDERS_MAX: usize = 16;

/// Rows that are converted at a time.
const CONVERTED_ROWS: usize = 256;

/// Where a part of the weights comes from.
#[derive(Debug)]
pub enum Source {
    /// Bytes as they are stored.
    Region(Region),
    /// Bytes that were put together here.
    Owned(Vec<u8>),
    /// A matrix that becomes 16-bit floats on the way.
    Converted(Matrix),
}

impl Source {
    /// Gives the bytes that it takes on the card.
    #[must_use]
    pub fn card_bytes(&self) -> usize {
        match self {
            Source::Region(region) => region.len(),
            Source::Owned(bytes) => bytes.len(),
            Source::Converted(matrix) => matrix.rows() * matrix.cols() * size_of::<bf16>(),
        }
    }
}

/// A part of a mapped file on its way: its bytes, and the place on the card.
#[derive(Clone, Copy)]
struct Piece<'a> {
    region: &'a Region,
    start: usize,
    bytes: usize,
    to: u64,
}

/// Copies parts to their places in `memory`, and waits until they are there.
///
/// # Errors
/// The driver's.
pub fn upload(
    card: &Card,
    memory: &Memory,
    parts: &[(u64, Source)],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), DeviceError> {
    let total: u64 = parts.iter().map(|(_, source)| source.card_bytes() as u64).sum();
    let mut done = 0;
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    for (to, source) in parts {
        match source {
            Source::Region(region) if region.is_mapped() => {
                pieces.extend(cut(region, *to));
                continue;
            }
            Source::Region(region) => memory.copy_in_plain(*to, region.bytes())?,
            Source::Owned(bytes) => memory.copy_in_plain(*to, bytes)?,
            Source::Converted(matrix) => convert(memory, *to, matrix)?,
        }
        done += source.card_bytes() as u64;
    }
    progress(done, total);
    // In the order of the files, which a disk reads best.
    pieces.sort_unstable_by_key(|piece| piece.region.bytes()[piece.start..].as_ptr() as usize);
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let (sender, sent) = mpsc::sync_channel(64);
        let threads: Vec<_> = (0..cores.min(SENDERS_MAX))
            .map(|_| {
                let sender = sender.clone();
                scope.spawn(|| send_pieces(card, memory, (&pieces, &next), sender))
            })
            .collect();
        drop(sender);
        for bytes in sent {
            done += bytes as u64;
            progress(done, total);
        }
        threads.into_iter().try_for_each(|thread| thread.join().expect("a sender does not panic"))
    })?;
    card.wait()
}

/// Sends pieces until none is left that no other thread has taken.
fn send_pieces(
    card: &Card,
    memory: &Memory,
    (pieces, next): (&[Piece<'_>], &AtomicUsize),
    sent: mpsc::SyncSender<usize>,
) -> Result<(), DeviceError> {
    card.enter()?;
    let mut stages = [Stage::take(card, PIECE_BYTES)?, Stage::take(card, PIECE_BYTES)?];
    for turn in 0.. {
        let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
        let range = piece.start..piece.start + piece.bytes;
        stages[turn % 2].send(memory, piece.to, piece.bytes, |buffer| piece.region.copy_to(range, buffer))?;
        // Nobody listens any more when the load was given up.
        let _ = sent.send(piece.bytes);
    }
    stages.iter().try_for_each(Stage::wait)
}

/// Cuts a part of a mapped file into pieces that fit a buffer.
fn cut(region: &Region, to: u64) -> impl Iterator<Item = Piece<'_>> {
    (0..region.len()).step_by(PIECE_BYTES).map(move |start| {
        let bytes = (region.len() - start).min(PIECE_BYTES);
        Piece { region, start, bytes, to: to + start as u64 }
    })
}

/// Decodes a matrix and rounds it to 16-bit floats, some rows at a time.
fn convert(memory: &Memory, to: u64, matrix: &Matrix) -> Result<(), DeviceError> {
    let row_bytes = matrix.cols() * size_of::<bf16>();
    for first in (0..matrix.rows()).step_by(CONVERTED_ROWS) {
        let rows = matrix.decode_rows(first..matrix.rows().min(first + CONVERTED_ROWS));
        let mut narrow = vec![bf16::ZERO; rows.len()];
        narrow.convert_from_f32_slice(&rows);
        let bytes: Vec<u8> = narrow.iter().flat_map(|value| value.to_le_bytes()).collect();
        memory.copy_in_plain(to + (first * row_bytes) as u64, &bytes)?;
    }
    Ok(())
}
