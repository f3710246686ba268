//! Bringing weights to a card straight from the mapped files.
//!
//! A file's pages are registered with the driver a piece at a time and copied from where they lie, so there is never a
//! second copy in host memory; while one piece is being copied the next is registered. Where the system does not allow
//! registering, the same copies go through the driver's own buffers.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::driver::Card;
use super::transfer::{Memory, PAGE_BYTES, Registered};
use crate::checkpoint::Region;
use crate::device::DeviceError;
use crate::quant::Matrix;

/// What is registered at a time. Two pieces are registered at once. Units: bytes.
const PIECE_BYTES: usize = 256 << 20;

/// Threads that bring pages into memory ahead of the copies.
const READERS_MAX: usize = 8;

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

/// A copy of bytes that lie in a mapped file: from an address, to a place.
#[derive(Clone, Copy)]
struct Copy<'a> {
    bytes: &'a [u8],
    to: u64,
}

/// Copies parts to their places in `memory`, and waits until they are there.
///
/// # Errors
/// The driver's.
pub fn upload(
    card: &Card,
    memory: &Memory,
    parts: Vec<(u64, Source)>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), DeviceError> {
    let total: u64 = parts.iter().map(|(_, source)| source.card_bytes() as u64).sum();
    let mut done = 0;
    let mut mapped: Vec<Copy<'_>> = Vec::new();
    for (to, source) in &parts {
        match source {
            Source::Region(region) if region.is_mapped() => {
                mapped.push(Copy { bytes: region.bytes(), to: *to });
                continue;
            }
            Source::Region(region) => memory.copy_in_plain(*to, region.bytes())?,
            Source::Owned(bytes) => memory.copy_in_plain(*to, bytes)?,
            Source::Converted(matrix) => convert(memory, *to, matrix)?,
        }
        done += source.card_bytes() as u64;
    }
    progress(done, total);
    mapped.sort_unstable_by_key(|copy| copy.bytes.as_ptr() as usize);
    let pieces = pieces(&mapped);
    let pages: Vec<Option<Pages<'_>>> =
        pieces.iter().map(|piece| parts.iter().find_map(|(_, source)| whole_pages(source, piece))).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| -> Result<(), DeviceError> {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(READERS_MAX) {
            scope.spawn(|| read_ahead(&pages, &next));
        }
        let mut before: Option<Registered<'_>> = None;
        for (piece, pages) in pieces.iter().zip(&pages) {
            let registered = pages.as_ref().and_then(|pages| Registered::new(card, pages.bytes));
            for copy in piece {
                memory.copy_in_plain(copy.to, copy.bytes)?;
                done += copy.bytes.len() as u64;
            }
            // The end of the piece before waits for its copies, which went on while this one was registered.
            before = registered;
            progress(done, total);
        }
        drop(before);
        Ok(())
    })?;
    card.wait()?;
    progress(total, total);
    Ok(())
}

/// Whole pages of a mapped file.
struct Pages<'a> {
    region: &'a Region,
    range: Range<usize>,
    bytes: &'a [u8],
}

/// Brings the pages of all pieces into memory, in order, a part at a time; several threads share the work.
fn read_ahead(pages: &[Option<Pages<'_>>], next: &AtomicUsize) {
    const PART_BYTES: usize = 8 << 20;
    const PARTS: usize = PIECE_BYTES / PART_BYTES;
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(pages) = pages.get(index / PARTS) else { return };
        let Some(Pages { region, range, .. }) = pages else { continue };
        let start = range.start + index % PARTS * PART_BYTES;
        if start < range.end {
            region.populate(start..range.end.min(start + PART_BYTES));
        }
    }
}

/// Cuts copies into pieces that span at most `PIECE_BYTES` of address space, at multiples of it.
fn pieces<'a>(copies: &[Copy<'a>]) -> Vec<Vec<Copy<'a>>> {
    let mut pieces: Vec<(usize, Vec<Copy<'a>>)> = Vec::new();
    for copy in copies {
        let mut rest = *copy;
        while !rest.bytes.is_empty() {
            let address = rest.bytes.as_ptr() as usize;
            let piece = address / PIECE_BYTES;
            let length = rest.bytes.len().min((piece + 1) * PIECE_BYTES - address);
            let (head, tail) = rest.bytes.split_at(length);
            let part = Copy { bytes: head, to: rest.to };
            match pieces.last_mut() {
                Some((last, copies)) if *last == piece => copies.push(part),
                Some(_) | None => pieces.push((piece, vec![part])),
            }
            rest = Copy { bytes: tail, to: rest.to + length as u64 };
        }
    }
    pieces.into_iter().map(|(_, copies)| copies).collect()
}

/// Gives the whole pages of a mapped file around a piece's copies, if the file is that of `source`.
fn whole_pages<'a>(source: &'a Source, piece: &[Copy<'_>]) -> Option<Pages<'a>> {
    let Source::Region(region) = source else { return None };
    let whole = region.mapping()?;
    let start = whole.as_ptr() as usize;
    let (first, last) = (piece.first()?.bytes, piece.last()?.bytes);
    let from = (first.as_ptr() as usize).checked_sub(start)?;
    let to = (last.as_ptr() as usize + last.len()).checked_sub(start)?;
    if to > whole.len() {
        return None;
    }
    let from = from / PAGE_BYTES * PAGE_BYTES;
    // Never beyond the file: its last page may be a part of one.
    let to = to.next_multiple_of(PAGE_BYTES).min(whole.len());
    Some(Pages { region, range: from..to, bytes: &whole[from..to] })
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
