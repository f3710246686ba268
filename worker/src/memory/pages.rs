//! Large pages for memory that is read all over: fewer addresses to look up.

use std::io;

/// Bytes of a page that every processor of the target can map.
const PAGE_BYTES: usize = 4096;

/// Asks the system to back a buffer with large pages where it has them. Nothing else about the buffer changes, and untouched
/// parts still take no memory.
///
/// # Errors
/// What the system says, where it has no such pages: the buffer is as good as before.
#[expect(unsafe_code, reason = "the advice has no safe form for memory that a vector owns")]
pub fn ask_for_large(buffer: &mut [u16]) -> io::Result<()> {
    let (start, bytes) = (buffer.as_mut_ptr().cast::<u8>(), size_of_val(buffer));
    let skipped = start.align_offset(PAGE_BYTES);
    let whole = bytes.saturating_sub(skipped) / PAGE_BYTES * PAGE_BYTES;
    if whole == 0 {
        return Ok(());
    }
    // SAFETY: the range lies within a buffer that is borrowed for this call, and this advice changes no byte of it.
    match unsafe { libc::madvise(start.wrapping_add(skipped).cast(), whole, libc::MADV_HUGEPAGE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_any_size_keep_what_they_hold() {
        for len in [0, 1, 4095, 8192, 3 << 20] {
            let mut buffer: Vec<u16> = (0..len).map(|index| index as u16).collect();
            // A system without such pages says so.
            let _ = ask_for_large(&mut buffer);
            assert!(buffer.iter().enumerate().all(|(index, value)| *value == index as u16), "{len}");
        }
    }
}
