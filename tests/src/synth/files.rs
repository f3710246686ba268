//! Tensors into safetensors files: headers first, then every slice at its place, by several threads.
//!
//! Invariant: what is written where follows from the list of tensors alone; threads only share out the slices.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use bulkhead_worker::checkpoint::limits::SHARDS_MAX;
use bulkhead_worker::checkpoint::{INDEX_FILE, SINGLE_FILE};
use nix::sys::statvfs::statvfs;
use serde_json::{Map, Value, json};

use super::content::{Generator, SLICE_BYTES};
use super::layout::Tensor;

/// Header bytes are filled up to a multiple of this, so that tensors start aligned.
const HEADER_ALIGNMENT: usize = 8;

/// Tensors, divided into files.
#[derive(Debug)]
pub(super) struct Shards(Vec<Vec<Tensor>>);

/// One file and what goes into it.
struct Shard<'a> {
    path: PathBuf,
    file: File,
    /// Each tensor, with the offset of its first byte in the file.
    tensors: Vec<(&'a Tensor, u64)>,
}

/// A piece of work for one thread.
#[derive(Clone, Copy)]
struct Slice {
    shard: usize,
    tensor: usize,
    index: usize,
}

impl Shards {
    /// Divides tensors, in their order, into files of at most `bytes_max`; a larger tensor gets one of its own.
    ///
    /// # Errors
    /// When that makes more files than the worker reads.
    pub(super) fn divide(tensors: Vec<Tensor>, bytes_max: u64) -> Result<Shards> {
        let mut shards: Vec<Vec<Tensor>> = vec![Vec::new()];
        let mut filled = 0;
        for tensor in tensors {
            let last = shards.last_mut().expect("never empty");
            if filled + tensor.bytes() > bytes_max && !last.is_empty() {
                filled = 0;
                shards.push(Vec::new());
            }
            filled += tensor.bytes();
            shards.last_mut().expect("never empty").push(tensor);
        }
        let count = shards.len();
        ensure!(count <= SHARDS_MAX, "{count} shards are more than {SHARDS_MAX}: allow larger ones");
        Ok(Shards(shards))
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn tensors(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// Gives the bytes of all tensors together.
    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().flatten().map(Tensor::bytes).sum()
    }

    /// Writes all files into an empty folder.
    ///
    /// # Errors
    /// What the system says, with the file.
    pub(super) fn write(&self, folder: &Path, generator: &Generator, threads: NonZeroUsize) -> Result<()> {
        let names: Vec<String> = match self.count() {
            1 => vec![SINGLE_FILE.to_owned()],
            count => (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect(),
        };
        let files = names.iter().zip(&self.0);
        let shards: Vec<Shard<'_>> =
            files.map(|(name, tensors)| begin(folder.join(name), tensors)).collect::<Result<_>>()?;
        write_slices(&shards, generator, threads)?;
        if self.count() > 1 {
            self.write_index(&folder.join(INDEX_FILE), &names)?;
        }
        Ok(())
    }

    fn write_index(&self, path: &Path, names: &[String]) -> Result<()> {
        let in_shard = |(name, tensors): (&String, &Vec<Tensor>)| {
            tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())).collect::<Vec<_>>()
        };
        let map: BTreeMap<String, String> = names.iter().zip(&self.0).flat_map(in_shard).collect();
        let index = json!({"metadata": {"total_size": self.bytes()}, "weight_map": map});
        std::fs::write(path, serde_json::to_string_pretty(&index)?).with_context(|| path.display().to_string())
    }
}

/// Makes a file of its full length with its header.
fn begin(path: PathBuf, tensors: &[Tensor]) -> Result<Shard<'_>> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut end = 0;
    let mut placed = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let start = end;
        end += tensor.bytes();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
        placed.push((tensor, start));
    }
    let mut bytes = serde_json::to_vec(&Value::Object(header))?;
    bytes.resize(bytes.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let length = bytes.len() as u64;
    let data = size_of_val(&length) as u64 + length;
    let write = || {
        let file = File::create_new(&path)?;
        file.set_len(data + end)?;
        file.write_all_at(&length.to_le_bytes(), 0)?;
        file.write_all_at(&bytes, size_of_val(&length) as u64)?;
        Ok::<_, std::io::Error>(file)
    };
    let file = write().with_context(|| path.display().to_string())?;
    placed.iter_mut().for_each(|(_, start)| *start += data);
    Ok(Shard { path, file, tensors: placed })
}

fn write_slices(shards: &[Shard<'_>], generator: &Generator, threads: NonZeroUsize) -> Result<()> {
    let mut slices = Vec::new();
    for (shard, content) in shards.iter().enumerate() {
        for (tensor, (spec, _)) in content.tensors.iter().enumerate() {
            let count = usize::try_from(spec.bytes().div_ceil(SLICE_BYTES as u64))?;
            slices.extend((0..count).map(|index| Slice { shard, tensor, index }));
        }
    }
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let mut buffer = vec![0; SLICE_BYTES];
        while let Some(slice) = slices.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = write_slice(&shards[slice.shard], *slice, generator, &mut buffer) {
                // The others stop after the slice that they are at.
                next.store(slices.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.get()).map(|_| scope.spawn(work)).collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("a thread reports its errors"))
    })
}

fn write_slice(shard: &Shard<'_>, slice: Slice, generator: &Generator, buffer: &mut [u8]) -> Result<()> {
    let (tensor, start) = &shard.tensors[slice.tensor];
    let from = slice.index as u64 * SLICE_BYTES as u64;
    let bytes = &mut buffer[..usize::try_from((tensor.bytes() - from).min(SLICE_BYTES as u64))?];
    generator.fill(&tensor.name, &tensor.content, slice.index, bytes);
    shard.file.write_all_at(bytes, start + from).with_context(|| shard.path.display().to_string())
}

/// Gives the bytes that an ordinary user may still write into a folder's disk.
///
/// # Errors
/// What the system says.
pub(super) fn available_bytes(folder: &Path) -> Result<u64> {
    let disk = statvfs(folder).with_context(|| folder.display().to_string())?;
    Ok(disk.blocks_available().saturating_mul(disk.fragment_size()))
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::super::content::Content;
    use super::*;

    fn tensor(name: &str, bytes: usize) -> Tensor {
        let content = Content::Stored(vec![7; bytes]);
        Tensor { name: name.to_owned(), dtype: Dtype::U8, shape: vec![bytes], content }
    }

    #[test]
    fn tensors_are_divided_in_order_below_at_and_above_the_limit() {
        let divided = |sizes: &[usize]| -> Vec<usize> {
            let tensors = sizes.iter().enumerate().map(|(i, size)| tensor(&i.to_string(), *size)).collect();
            Shards::divide(tensors, 10).expect("few").0.iter().map(Vec::len).collect()
        };
        assert_eq!(divided(&[4, 5]), [2]);
        assert_eq!(divided(&[5, 5, 1]), [2, 1]);
        assert_eq!(divided(&[5, 6]), [1, 1]);
        assert_eq!(divided(&[11, 1, 12]), [1, 1, 1]);
        let many = (0..=SHARDS_MAX).map(|i| tensor(&i.to_string(), 10)).collect();
        assert!(Shards::divide(many, 10).expect_err("too many").to_string().contains("4097 shards"));
    }

    #[test]
    fn a_tensor_of_several_slices_comes_out_whole() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bytes: Vec<u8> = (0..SLICE_BYTES * 5 / 2).map(|i| (i % 251) as u8).collect();
        let mut large = tensor("large", bytes.len());
        large.content = Content::Stored(bytes.clone());
        let shards = Shards::divide(vec![tensor("small", 3), large], u64::MAX).expect("one");
        shards.write(folder.path(), &Generator::new(0), NonZeroUsize::MIN).expect("written");
        let file = crate::checkpoint::Tensors::read(&folder.path().join(SINGLE_FILE)).expect("a safetensors file");
        assert_eq!(file.get("small").expect("there").bytes, [7; 3]);
        assert!(file.get("large").expect("there").bytes == bytes);
    }
}
