//! Memory of a card, memory of the host that a card copies from and to, and the copies.
//!
//! Owns: allocations and their ends. Invariants: a copy never passes the end of either side; host memory that the card may
//! be writing is read by copying out of it, never by reference, and is only freed once the stream is done with it.
#![expect(clippy::wildcard_enum_match_arm, reason = "the codes are the driver's, which adds to them")]

use std::ffi::c_void;

use bulkhead_shared::units::Bytes;
use cudarc::driver::sys::{self, CUresult};

use super::driver::{Card, Handle, check};
use crate::device::DeviceError;

/// Numbers that may be copied byte by byte: any bits are a value.
pub trait Plain: Copy + private::Sealed {}

mod private {
    pub trait Sealed {}
}

macro_rules! plain {
    // A macro, because the list is two empty impls for each type and nothing else.
    ($($number:ty),*) => { $(impl private::Sealed for $number {} impl Plain for $number {})* };
}
plain!(u8, u16, u32, u64, f32);

/// Memory of a card.
#[derive(Debug)]
pub struct Memory {
    card: Card,
    address: u64,
    bytes: u64,
}

impl Memory {
    /// Takes memory of a card. It holds whatever was there before.
    ///
    /// # Errors
    /// `OutOfMemory`, after which the card is as it was; the driver's.
    pub fn take(card: &Card, bytes: u64, what: &'static str) -> Result<Memory, DeviceError> {
        let mut address = 0;
        // The driver refuses to allocate nothing.
        let length = bytes.max(1);
        // SAFETY: `address` is a place for one address, and the context is current.
        match unsafe { sys::cuMemAlloc_v2(&raw mut address, length as usize) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(DeviceError::OutOfMemory { wanted: Bytes(bytes), what, free: card.free_memory()? })
            }
            code => {
                check("cuMemAlloc", code)?;
                Ok(Memory { card: card.clone(), address, bytes: length })
            }
        }
    }

    /// Gives the address on the card of a place inside.
    ///
    /// # Panics
    /// When the place is outside.
    #[must_use]
    pub fn at(&self, offset: u64) -> u64 {
        assert!(offset < self.bytes, "a place lies inside its memory");
        self.address + offset
    }

    /// Sets every byte to zero, on the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn clear(&self) -> Result<(), DeviceError> {
        // SAFETY: the range is the whole allocation.
        let code = unsafe { sys::cuMemsetD8Async(self.address, 0, self.bytes as usize, self.card.stream()) };
        check("cuMemsetD8Async", code)
    }

    /// Copies from pinned memory, on the stream: the source must stay as it is until the stream is done.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy_in(&self, offset: u64, from: &HostBuffer, from_offset: usize, bytes: usize) -> Result<(), DeviceError> {
        assert!(offset + bytes as u64 <= self.bytes, "a copy ends inside the card's memory");
        assert!(from_offset + bytes <= from.bytes, "a copy ends inside the host's memory");
        // SAFETY: both ranges lie inside their allocations, which live until the stream is done: dropping either waits.
        let code = unsafe {
            let source = from.address.0.byte_add(from_offset);
            sys::cuMemcpyHtoDAsync_v2(self.address + offset, source, bytes, self.card.stream())
        };
        check("cuMemcpyHtoDAsync", code)
    }

    /// Copies to pinned memory, on the stream: the target may be read once the stream is done.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy_out(&self, offset: u64, to: &HostBuffer, to_offset: usize, bytes: usize) -> Result<(), DeviceError> {
        assert!(offset + bytes as u64 <= self.bytes, "a copy ends inside the card's memory");
        assert!(to_offset + bytes <= to.bytes, "a copy ends inside the host's memory");
        // SAFETY: as for `copy_in`; nobody holds a reference into the buffer.
        let code = unsafe {
            let target = to.address.0.byte_add(to_offset);
            sys::cuMemcpyDtoHAsync_v2(target, self.address + offset, bytes, self.card.stream())
        };
        check("cuMemcpyDtoHAsync", code)
    }

    /// Copies bytes of the host that are not pinned. They have been read when this returns, and are on the card when the
    /// stream is done.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy_in_plain(&self, offset: u64, from: &[u8]) -> Result<(), DeviceError> {
        assert!(offset + from.len() as u64 <= self.bytes, "a copy ends inside the card's memory");
        // SAFETY: the range lies inside the allocation, and pageable memory is read before the call returns.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(self.address + offset, from.as_ptr().cast(), from.len(), self.card.stream())
        };
        check("cuMemcpyHtoDAsync", code)
    }

    /// Copies from other memory of the card, on the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy_from(&self, from: &Memory, bytes: u64) -> Result<(), DeviceError> {
        assert!(bytes <= self.bytes && bytes <= from.bytes, "a copy ends inside both");
        // SAFETY: both ranges lie inside their allocations.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(self.address, from.address, bytes as usize, self.card.stream()) };
        check("cuMemcpyDtoDAsync", code)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // An error says that the context is broken; the process is about to end then.
        let _ = self.card.enter().and_then(|()| self.card.wait());
        // SAFETY: the allocation is ours, and the stream is done with it.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Memory of the host for copies: pinned, or plain memory where the system gives no pinned.
#[derive(Debug)]
pub struct HostBuffer {
    card: Card,
    address: Handle<*mut c_void>,
    bytes: usize,
    /// The memory, where it could not be pinned; reached through `address` alone.
    plain: Option<Vec<u64>>,
}

impl HostBuffer {
    /// Takes zeroed memory.
    ///
    /// # Errors
    /// The driver's; that there is no pinned memory is none.
    pub fn take(card: &Card, bytes: usize) -> Result<HostBuffer, DeviceError> {
        let bytes = bytes.max(1);
        let mut address = std::ptr::null_mut();
        // SAFETY: `address` is a place for one address, and the context is current.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut address, bytes, 0) };
        let plain = match code {
            CUresult::CUDA_SUCCESS => {
                // SAFETY: the driver just gave these bytes, and nobody else knows of them.
                unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
                None
            }
            CUresult::CUDA_ERROR_OUT_OF_MEMORY | CUresult::CUDA_ERROR_NOT_PERMITTED => {
                let mut plain = vec![0u64; bytes.div_ceil(size_of::<u64>())];
                address = plain.as_mut_ptr().cast();
                Some(plain)
            }
            code => {
                check("cuMemHostAlloc", code)?;
                None
            }
        };
        Ok(HostBuffer { card: card.clone(), address: Handle(address), bytes, plain })
    }

    /// Says whether the memory is pinned.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.plain.is_none()
    }

    /// Writes numbers from a place on.
    ///
    /// # Panics
    /// When they pass the end.
    pub fn write<T: Plain>(&mut self, offset: usize, numbers: &[T]) {
        assert!(offset + size_of_val(numbers) <= self.bytes, "what is written ends inside");
        // SAFETY: the range lies inside the allocation, which `&mut self` has alone on this side; the card only reads from
        // places that the caller has put on the stream, and at worst reads old and new numbers mixed.
        unsafe {
            let target = self.address.0.byte_add(offset).cast::<u8>();
            std::ptr::copy_nonoverlapping(numbers.as_ptr().cast::<u8>(), target, size_of_val(numbers));
        }
    }

    /// Reads numbers from a place on. What the card wrote is there once the stream is done.
    ///
    /// # Panics
    /// When they pass the end.
    pub fn read<T: Plain>(&self, offset: usize, numbers: &mut [T]) {
        assert!(offset + size_of_val(numbers) <= self.bytes, "what is read ends inside");
        // SAFETY: the range lies inside the allocation, and any bytes are numbers of a `Plain` type.
        unsafe {
            let source = self.address.0.byte_add(offset).cast::<u8>();
            std::ptr::copy_nonoverlapping(source, numbers.as_mut_ptr().cast::<u8>(), size_of_val(numbers));
        }
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        let _ = self.card.enter().and_then(|()| self.card.wait());
        if self.plain.is_none() {
            // SAFETY: the driver gave this memory, and the stream is done with it.
            let _ = unsafe { sys::cuMemFreeHost(self.address.0) };
        }
    }
}

/// A pinned buffer on whose own stream bytes travel to the card, so that several threads can send side by side.
#[derive(Debug)]
pub struct Stage {
    stream: Handle<sys::CUstream>,
    buffer: HostBuffer,
}

impl Stage {
    /// Takes a buffer of so many bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn take(card: &Card, bytes: usize) -> Result<Stage, DeviceError> {
        let buffer = HostBuffer::take(card, bytes)?;
        Ok(Stage { stream: card.new_stream()?, buffer })
    }

    /// Waits until the buffer is free, has `bytes` of it filled, and sends them to a place.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When the bytes do not fit the buffer, or pass the end of the memory.
    pub fn send(
        &mut self,
        memory: &Memory,
        offset: u64,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), DeviceError> {
        assert!(offset + bytes as u64 <= memory.bytes, "a copy ends inside the card's memory");
        assert!(bytes <= self.buffer.bytes, "what is sent fits the buffer");
        self.wait()?;
        // SAFETY: the range lies inside the allocation, whose bytes are initialised; the stream, the only one that knows of
        // it, is done, and `&mut self` keeps all else away.
        fill(unsafe { std::slice::from_raw_parts_mut(self.buffer.address.0.cast::<u8>(), bytes) });
        // SAFETY: both ranges lie inside their allocations. Whoever frees the memory has ended
        // this stage or waited for it before; the buffer is freed by `drop`, behind a wait.
        let code =
            unsafe { sys::cuMemcpyHtoDAsync_v2(memory.address + offset, self.buffer.address.0, bytes, self.stream.0) };
        check("cuMemcpyHtoDAsync", code)
    }

    /// Waits until what was sent is on the card.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream is ours.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream.0) })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // An error says that the context is broken; the process is about to end then.
        let _ = self.buffer.card.enter().and_then(|()| self.wait());
        // SAFETY: the stream is ours, and nothing runs on it any more.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream.0) };
    }
}
