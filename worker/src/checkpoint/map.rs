//! Bytes of weights: a mapping of a file, or memory of our own, behind one type.
//!
//! Owns: the only `unsafe` of reading checkpoints. Refuses: anything but regular files.
//! A mapping serves decoding as it is: with the kernels asking for memory ahead, products of one token over a warm mapping came
//! within 4 % of those over anonymous memory in huge pages, where that was measured, and a restart has nothing to copy. So
//! there is one copy of the weights, which the page cache shares with the next worker.
//!
//! Invariant: a `Region` lies inside its source, and keeps it alive.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

/// A range of bytes that many owners share; cloning copies no byte.
#[derive(Clone)]
pub struct Region {
    source: Arc<Source>,
    range: Range<usize>,
}

enum Source {
    Mapped { map: Mmap, file: File },
    Owned(Vec<u8>),
}

impl Region {
    /// Maps a whole file for reading. Symbolic links are followed: a hub cache is made of them.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` for what is no regular file, which is not opened (a pipe would block).
    #[expect(unsafe_code, reason = "a mapping is the one way to hold the weights once")]
    pub fn map_file(path: &Path) -> io::Result<Region> {
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the mapping is read-only. That the file does not change while it is mapped cannot be ensured by any
        // call; whoever changes or truncates it ends at worst this worker (SIGBUS, or wrong weights), which the
        // supervisor replaces. Reading into memory instead would be safe but needs a second copy of the whole model.
        let map = unsafe { Mmap::map(&file)? };
        let range = 0..map.len();
        Ok(Region { source: Arc::new(Source::Mapped { map, file }), range })
    }

    /// Takes bytes that were computed here.
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Region {
        let range = 0..bytes.len();
        Region { source: Arc::new(Source::Owned(bytes)), range }
    }

    /// Gives the bytes. They may start at any address: element types must be read unaligned.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.source.bytes()[self.range.clone()]
    }

    /// Gives the number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Says whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Gives a part of this region that shares its source.
    ///
    /// # Panics
    /// When the range is not inside the region: ranges from a file are checked before.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Region {
        assert!(range.start <= range.end, "a range runs forward");
        assert!(range.end <= self.range.len(), "a part lies inside its region");
        let start = self.range.start + range.start;
        Region { source: Arc::clone(&self.source), range: start..start + range.len() }
    }

    /// Copies a part out. Of a mapped file it is read rather than touched, which spares the mapping a page for each 4 KiB.
    ///
    /// # Panics
    /// When the range is not inside the region, or `to` is of another length.
    pub fn copy_to(&self, range: Range<usize>, to: &mut [u8]) {
        assert!(range.start <= range.end && range.end <= self.range.len(), "a range lies inside its region");
        if let Source::Mapped { map: _, file } = &*self.source
            && file.read_exact_at(to, (self.range.start + range.start) as u64).is_ok()
        {
            return;
        }
        to.copy_from_slice(&self.bytes()[range]);
    }

    /// Says whether the bytes are those of a mapped file rather than memory of our own.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(*self.source, Source::Mapped { .. })
    }
}

impl Source {
    fn bytes(&self) -> &[u8] {
        match self {
            Source::Mapped { map, file: _ } => map,
            Source::Owned(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_mapped() { "mapped" } else { "owned" };
        write!(f, "Region({kind}, {:?})", self.range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_parts_share_the_source() {
        let region = Region::from_vec((0..10).collect());
        let part = region.slice(2..8).slice(1..4);
        assert_eq!((part.bytes(), part.len(), part.is_mapped()), (&[3, 4, 5][..], 3, false));
        assert!(region.slice(10..10).is_empty());
    }

    #[test]
    fn a_file_is_mapped_and_outlives_its_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("weights");
        std::fs::write(&path, b"bytes").expect("written");
        let region = Region::map_file(&path).expect("mapped");
        std::fs::remove_file(&path).expect("removed");
        assert_eq!((region.bytes(), region.is_mapped()), (&b"bytes"[..], true));
        for part in [region.slice(1..5), Region::from_vec(b"ytes".to_vec())] {
            let mut copied = [0; 2];
            part.copy_to(1..3, &mut copied);
            assert_eq!(&copied, b"te");
        }
        assert!(Region::map_file(folder.path()).is_err());
        assert!(Region::map_file(&path).is_err());
    }
}
