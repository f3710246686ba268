//! Items into safetensors files: which goes into which, and where in it every tensor lies.
//!
//! Invariants: the layout follows from the items alone. Within a file tensors lie by the size of their elements, the largest
//! first, so that each is aligned.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::ConvertError;
use super::files::{PART_SUFFIX, publish, write_whole};
use super::manifest::Shard;
use super::plan::{Item, Output};
use super::produce::{Places, Sink, produce};
use super::progress::Progress;
use crate::checkpoint::limits::SHARDS_MAX;
use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};

/// Header bytes are filled up to a multiple of this.
const HEADER_ALIGNMENT: usize = 8;

/// A file that is to be made.
#[derive(Debug)]
pub(super) struct Planned<'i> {
    pub(super) name: String,
    items: &'i [Item],
    header: Vec<u8>,
    /// For each item the offsets of its outputs in the file.
    offsets: Vec<Vec<u64>>,
    pub(super) bytes: u64,
}

/// Divides items, in their order, into files of at most `bytes_max`; a larger item gets one of its own.
///
/// # Errors
/// `Shards` when that makes more files than are read.
pub(super) fn divide(items: &[Item], bytes_max: u64) -> Result<Vec<Planned<'_>>, ConvertError> {
    let (mut ends, mut filled) = (Vec::new(), 0);
    for (index, item) in items.iter().enumerate() {
        if filled > 0 && filled + item.bytes() > bytes_max {
            ends.push(index);
            filled = 0;
        }
        filled += item.bytes();
    }
    ends.push(items.len());
    let count = ends.len();
    if count > SHARDS_MAX {
        return Err(ConvertError::Shards { shards: count, max: SHARDS_MAX });
    }
    let starts = [0].into_iter().chain(ends.iter().copied());
    let files = starts.zip(&ends).enumerate().map(|(number, (start, end))| {
        let name = match count {
            1 => SINGLE_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        lay_out(name, &items[start..*end])
    });
    Ok(files.collect())
}

/// Gives every output of a file its place.
fn lay_out(name: String, items: &[Item]) -> Planned<'_> {
    let mut order: Vec<(usize, usize, &Output)> = Vec::new();
    for (item, outputs) in items.iter().map(|item| &item.outputs).enumerate() {
        order.extend(outputs.iter().enumerate().map(|(number, output)| (item, number, output)));
    }
    order.sort_by_key(|(_, _, output)| std::cmp::Reverse(output.dtype.bitsize()));
    let mut offsets: Vec<Vec<u64>> = items.iter().map(|item| vec![0; item.outputs.len()]).collect();
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for (item, number, output) in order {
        let start = end;
        end += output.bytes();
        offsets[item][number] = start;
        let entry = json!({"dtype": output.dtype, "shape": output.shape, "data_offsets": [start, end]});
        entries.insert(output.name.clone(), entry);
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    let start = header.len() as u64;
    offsets.iter_mut().flatten().for_each(|offset| *offset += start);
    Planned { name, items, header, offsets, bytes: start + end }
}

impl Planned<'_> {
    pub(super) fn source_bytes(&self) -> u64 {
        self.items.iter().map(Item::source_bytes).sum()
    }

    /// Makes the file.
    ///
    /// # Errors
    /// Those of `produce`.
    pub(super) fn make(&self, folder: &Path, threads: usize, progress: &Progress) -> Result<Shard, ConvertError> {
        let path = folder.join(format!("{}{PART_SUFFIX}", self.name));
        let file = File::create(&path).map_err(ConvertError::write(&path))?;
        let sink = Sink { file, path };
        sink.write(&self.header, 0)?;
        let mut relative_error = BTreeMap::new();
        for (item, offsets) in self.items.iter().zip(&self.offsets) {
            if let Some(error) = produce(item, &Places { sink: &sink, offsets }, threads, progress)? {
                relative_error.insert(item.name.clone(), error);
            }
        }
        publish(&sink.file, folder, &self.name)?;
        Ok(Shard { bytes: self.bytes, relative_error })
    }
}

/// Writes the list of which tensor lies in which file, where there are several.
///
/// # Errors
/// `Write`.
pub(super) fn write_index(folder: &Path, files: &[Planned<'_>]) -> Result<(), ConvertError> {
    if files.len() == 1 {
        return Ok(());
    }
    let mut map = BTreeMap::new();
    for file in files {
        let outputs = file.items.iter().flat_map(|item| &item.outputs);
        map.extend(outputs.map(|output| (output.name.as_str(), file.name.as_str())));
    }
    let total: u64 = files.iter().flat_map(|file| file.items).map(Item::bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut text = serde_json::to_vec_pretty(&index).expect("a value is JSON");
    text.push(b'\n');
    write_whole(folder, INDEX_FILE, &text)
}
