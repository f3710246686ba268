//! What a step tells the card beside the weights: which token stands where, and which blocks are whose.
//!
//! Owns: pinned buffers that mirror memory of the card, and what of them has changed. Invariant: a buffer is written only
//! while nothing on the stream reads it, which holds because every step ends with a wait.

use super::driver::Card;
use super::transfer::{HostBuffer, Memory, Plain};
use crate::device::DeviceError;
use crate::engine::pager::{Blocks, Kind};

/// Every part begins at a multiple of this. Units: bytes.
const ALIGNMENT: usize = 256;

/// Places of a step's inputs, counted from the start of their memory. Units: bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputPlaces {
    /// [rows] u32.
    pub tokens: usize,
    /// [rows] u32.
    pub sequences: usize,
    /// [rows] u32.
    pub positions: usize,
    /// [rows, half a head] f32.
    pub cosines: usize,
    /// [rows, half a head] f32.
    pub sines: usize,
    /// [outputs] u32.
    pub output_rows: usize,
    /// [outputs] f32.
    pub temperatures: usize,
    /// [outputs] u64.
    pub seeds: usize,
    /// [outputs] u64.
    pub choice_positions: usize,
    /// [tiles, 2] u32.
    pub tiles: usize,
    bytes: usize,
}

impl InputPlaces {
    /// Lays out the inputs of a step of at most `rows` tokens with `outputs` results.
    #[must_use]
    pub fn new(rows: usize, outputs: usize, half: usize, tiles: usize) -> InputPlaces {
        let mut bytes = 0;
        let mut part = |length: usize| {
            let at = bytes;
            bytes = (at + length).next_multiple_of(ALIGNMENT);
            at
        };
        InputPlaces {
            tokens: part(rows * 4),
            sequences: part(rows * 4),
            positions: part(rows * 4),
            cosines: part(rows * half * 4),
            sines: part(rows * half * 4),
            output_rows: part(outputs * 4),
            temperatures: part(outputs * 4),
            seeds: part(outputs * 8),
            choice_positions: part(outputs * 8),
            tiles: part(tiles * 8),
            bytes,
        }
    }
}

/// Inputs of a step on both sides.
#[derive(Debug)]
pub struct Inputs {
    /// Where what is.
    pub places: InputPlaces,
    host: HostBuffer,
    card: Memory,
}

impl Inputs {
    /// Takes memory on both sides.
    ///
    /// # Errors
    /// `OutOfMemory` and the driver's.
    pub fn take(card: &Card, places: InputPlaces) -> Result<Inputs, DeviceError> {
        let host = HostBuffer::take(card, places.bytes)?;
        Ok(Inputs { places, host, card: Memory::take(card, places.bytes as u64, "the inputs of a step")? })
    }

    /// Writes numbers to a place of the host's side.
    pub fn write<T: Plain>(&mut self, place: usize, numbers: &[T]) {
        self.host.write(place, numbers);
    }

    /// Gives the address on the card of a place.
    #[must_use]
    pub fn at(&self, place: usize) -> u64 {
        self.card.at(place as u64)
    }

    /// Puts the copy of everything on the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn send(&self) -> Result<(), DeviceError> {
        self.card.copy_in(0, &self.host, 0, self.places.bytes)
    }
}

/// The blocks of the sequences of a step, in one pool, on both sides.
#[derive(Debug)]
pub struct BlockTables {
    kind: Kind,
    stride: usize,
    /// What the card has: the blocks of each sequence, then the index of each one's first.
    known: Vec<u32>,
    sequences: usize,
    host: HostBuffer,
    card: Memory,
}

impl BlockTables {
    /// Takes memory for `sequences` sequences that hold at most `stride` blocks.
    ///
    /// # Errors
    /// `OutOfMemory` and the driver's.
    pub fn take(card: &Card, kind: Kind, sequences: usize, stride: usize) -> Result<BlockTables, DeviceError> {
        let entries = sequences * stride.max(1) + sequences;
        let host = HostBuffer::take(card, entries * 4)?;
        let memory = Memory::take(card, entries as u64 * 4, "the tables of blocks")?;
        memory.clear()?;
        Ok(BlockTables { kind, stride: stride.max(1), known: vec![0; entries], sequences, host, card: memory })
    }

    /// Gives the address of the blocks: [sequences, stride] u32.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.card.at(0)
    }

    /// Gives the address of each sequence's first index: [sequences] u32.
    #[must_use]
    pub fn firsts(&self) -> u64 {
        self.card.at((self.sequences * self.stride * 4) as u64)
    }

    /// Gives the entries of a sequence.
    #[must_use]
    pub fn stride(&self) -> u32 {
        self.stride as u32
    }

    /// Brings the card up to date: puts copies of what changed on the stream.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When there are more sequences or blocks than room was made for.
    pub fn update(&mut self, blocks: &[&Blocks]) -> Result<(), DeviceError> {
        assert!(blocks.len() <= self.sequences, "room was made for every sequence");
        let firsts_at = self.sequences * self.stride;
        for (sequence, blocks) in blocks.iter().enumerate() {
            let table = blocks.table(self.kind);
            let held: Vec<u32> = table.held().collect();
            assert!(held.len() <= self.stride, "a sequence holds no more blocks than its table has entries");
            self.set(sequence * self.stride, &held)?;
            self.set(firsts_at + sequence, &[table.first()])?;
        }
        Ok(())
    }

    /// Copies entries from the first to the last that differ.
    fn set(&mut self, at: usize, entries: &[u32]) -> Result<(), DeviceError> {
        let known = &mut self.known[at..at + entries.len()];
        let Some(first) = known.iter().zip(entries).position(|(known, entry)| known != entry) else { return Ok(()) };
        let last = known.iter().zip(entries).rposition(|(known, entry)| known != entry).unwrap_or(first);
        let changed = &entries[first..=last];
        known[first..=last].copy_from_slice(changed);
        let offset = (at + first) * 4;
        self.host.write(offset, changed);
        self.card.copy_in(offset as u64, &self.host, offset, size_of_val(changed))
    }
}
