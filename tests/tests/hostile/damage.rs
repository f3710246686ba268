//! Ways to change the files of a model folder.

use std::fs;
use std::path::Path;

use bulkhead_tests::checkpoint::Tensors;
use serde_json::Value;

pub(crate) const WEIGHTS: &str = "model.safetensors";

/// Writes a file anew.
pub(crate) fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(folder.join(name), bytes).expect("ours");
}

/// Edits the bytes of a file.
pub(crate) fn bytes(folder: &Path, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(folder.join(name)).expect("it is there");
    edit(&mut bytes);
    write(folder, name, bytes);
}

/// Edits a JSON file.
pub(crate) fn json(folder: &Path, name: &str, edit: impl FnOnce(&mut Value)) {
    bytes(folder, name, |bytes| {
        let mut value = serde_json::from_slice(bytes).expect("the fixture is JSON");
        edit(&mut value);
        *bytes = value.to_string().into_bytes();
    });
}

/// Writes another header in front of the data of the weights.
pub(crate) fn header(folder: &Path, make: impl FnOnce(Value) -> String) {
    bytes(folder, WEIGHTS, |bytes| {
        let length = u64::from_le_bytes(*bytes.first_chunk().expect("a valid file")) as usize;
        let data = bytes.split_off(8 + length);
        let header = make(serde_json::from_slice(&bytes[8..]).expect("a valid header"));
        *bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    });
}

/// Edits the entry of a tensor in the header of the weights.
pub(crate) fn entry(folder: &Path, tensor: &str, key: &str, value: Value) {
    header(folder, |mut header| {
        header[tensor][key] = value;
        header.to_string()
    });
}

/// Edits the tensors of the weights; the file stays valid.
pub(crate) fn tensors(folder: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = folder.join(WEIGHTS);
    let mut tensors = Tensors::read(&path).expect("a valid file");
    edit(&mut tensors);
    tensors.write(&path).expect("ours");
}
