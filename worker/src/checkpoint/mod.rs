//! Checkpoints: a Hugging Face folder as a list of named tensors over mapped files.
//!
//! Owns: finding the files of a model folder, checking them, and handing out tensors as ranges of mapped bytes; reading
//! the 4-bit layouts (`bnb4bit`, `mxfp4`) into matrices. Refuses: to know what a tensor is for (that is `model`), to copy
//! or convert whole files, and every malformed file, with a typed error.
//! Invariant: the bytes of a `Tensor` are exactly as long as its shape and element type say.

pub mod bnb4bit;
mod error;
mod header;
mod index;
pub mod limits;
mod map;
pub mod mxfp4;
mod tensor;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

pub use bnb4bit::QuantStateError;
pub use error::CheckpointError;
pub use header::{Entry, Header, HeaderError, parse_header};
pub use index::{IndexError, ShardTensors, parse_index};
pub use map::Region;
pub use tensor::Tensor;

/// The weights of a model in one file.
pub const SINGLE_FILE: &str = "model.safetensors";

/// The list of the files that hold a model's weights.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// A model folder whose every safetensors header has been checked.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<MappedFile>,
    tensors: HashMap<String, Place>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    bytes: Region,
}

#[derive(Debug)]
struct Place {
    file: usize,
    entry: Entry,
}

impl Checkpoint {
    /// Opens a model folder: `model.safetensors` where there is one, else the shards of its index.
    ///
    /// # Errors
    /// Those of `CheckpointError` that concern files; tensors are judged when they are asked for.
    pub fn open(folder: &Path) -> Result<Checkpoint, CheckpointError> {
        let folder_error = |source| CheckpointError::Folder { folder: folder.to_owned(), source };
        if !std::fs::metadata(folder).map_err(folder_error)?.is_dir() {
            return Err(folder_error(io::ErrorKind::NotADirectory.into()));
        }
        let mut checkpoint = Checkpoint { folder: folder.to_owned(), files: Vec::new(), tensors: HashMap::new() };
        let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
        if exists(&single)? {
            checkpoint.add_file(single)?;
        } else if exists(&index)? {
            checkpoint.add_shards(&index)?;
        } else {
            return Err(CheckpointError::NoWeights { folder: folder.to_owned() });
        }
        Ok(checkpoint)
    }

    /// Gives the folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Gives the files that hold weights.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Gives the names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Says whether there is a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Gives the bytes of all tensors together.
    #[must_use]
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|place| place.entry.range.len() as u64).sum()
    }

    /// Gives a tensor.
    ///
    /// # Errors
    /// `MissingTensor` when no file holds it.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let Some(Place { file, entry }) = self.tensors.get(name) else {
            return Err(CheckpointError::MissingTensor { folder: self.folder.clone(), tensor: name.to_owned() });
        };
        let file = &self.files[*file];
        let bytes = file.bytes.slice(entry.range.clone());
        Ok(Tensor::new(file.path.clone(), entry.name.clone(), entry.dtype, entry.shape.clone(), bytes))
    }

    fn add_shards(&mut self, index: &Path) -> Result<(), CheckpointError> {
        let file = index.to_owned();
        let shards = match parse_index(&read_limited(index, limits::INDEX_BYTES_MAX)?) {
            Ok(shards) => shards,
            Err(IndexError::Json(source)) => return Err(CheckpointError::Index { file, source }),
            Err(IndexError::ShardCount { shards, max }) => {
                return Err(CheckpointError::ShardCount { file, shards, max });
            }
            Err(IndexError::ShardName { shard }) => return Err(CheckpointError::ShardName { file, shard }),
        };
        for (name, tensors) in shards {
            let path = self.folder.join(&name);
            if !exists(&path)? {
                return Err(CheckpointError::MissingShard { file: path });
            }
            let shard = self.add_file(path.clone())?;
            let is_absent = |tensor: &String| self.tensors.get(tensor).is_none_or(|place| place.file != shard);
            if let Some(tensor) = tensors.into_iter().find(is_absent) {
                return Err(CheckpointError::NotInShard { file: path, tensor });
            }
        }
        Ok(())
    }

    /// Maps a file, checks its header and takes in its tensors; gives the file's number.
    fn add_file(&mut self, path: PathBuf) -> Result<usize, CheckpointError> {
        let bytes = Region::map_file(&path).map_err(|source| CheckpointError::Read { file: path.clone(), source })?;
        let header = parse_header(bytes.bytes(), bytes.len() as u64)
            .map_err(|source| CheckpointError::Header { file: path.clone(), source })?;
        let file = self.files.len();
        if self.tensors.len() + header.tensors.len() > limits::TENSORS_MAX {
            return Err(CheckpointError::TooManyTensors { file: path, max: limits::TENSORS_MAX });
        }
        for entry in header.tensors {
            if let Some(other) = self.tensors.get(&entry.name) {
                let other = self.files[other.file].path.clone();
                return Err(CheckpointError::DuplicateTensor { file: path, other, tensor: entry.name });
            }
            self.tensors.insert(entry.name.clone(), Place { file, entry });
        }
        self.files.push(MappedFile { path, bytes });
        Ok(file)
    }
}

/// Reads a small file whole, after its length was checked.
///
/// # Errors
/// `TooLarge` above `bytes_max`; `Read` when the system refuses, or for what is no regular file.
pub fn read_limited(path: &Path, bytes_max: u64) -> Result<Vec<u8>, CheckpointError> {
    use io::Read as _;
    let read_error = |source| CheckpointError::Read { file: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(read_error)?;
    if !metadata.is_file() {
        return Err(read_error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let too_large = |bytes| CheckpointError::TooLarge { file: path.to_owned(), bytes, max: bytes_max };
    if metadata.len() > bytes_max {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(read_error)?;
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(read_error)?;
    match bytes.len() as u64 {
        length if length > bytes_max => Err(too_large(length)),
        _ => Ok(bytes),
    }
}

fn exists(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(|source| CheckpointError::Read { file: path.to_owned(), source })
}
