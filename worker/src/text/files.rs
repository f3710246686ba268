//! Reads the small files of a model folder whole, but never more than their kind can sensibly be.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::text::error::TextError;

/// Reads a file of at most `bytes_max` bytes; `None` where there is none.
///
/// # Errors
/// `Read` when it exists and cannot be read, or is no regular file, which is not opened (a pipe would block); `FileTooLarge`
/// above the limit, before anything is reserved for it.
pub(crate) fn read_capped(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, TextError> {
    let failed = |source| TextError::Read { path: path.to_owned(), source };
    let too_large = |bytes| TextError::FileTooLarge { path: path.to_owned(), bytes, max: bytes_max };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    if metadata.len() > bytes_max {
        return Err(too_large(metadata.len()));
    }
    let mut file = File::open(path).map_err(failed)?;
    let mut content = Vec::new();
    // The file may grow, or have no size to tell, so the limit holds for what is read too.
    file.by_ref().take(bytes_max + 1).read_to_end(&mut content).map_err(failed)?;
    match content.len() as u64 {
        read if read > bytes_max => Err(too_large(read)),
        _ => Ok(Some(content)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("file");
        assert!(matches!(read_capped(&path, 3), Ok(None)));
        std::fs::write(&path, b"abc").expect("writable");
        assert_eq!(read_capped(&path, 3).expect("at the limit"), Some(b"abc".to_vec()));
        assert!(matches!(read_capped(&path, 2), Err(TextError::FileTooLarge { bytes: 3, max: 2, .. })));
        assert!(matches!(read_capped(dir.path(), 1 << 20), Err(TextError::Read { .. })));
    }
}
