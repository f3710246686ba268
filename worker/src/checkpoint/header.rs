//! The header of a safetensors file: eight bytes of length, then a JSON object that says where each tensor lies.
//!
//! Owns: every check between hostile bytes and a trusted list of tensors. Pure: bytes in, list out.
//! Refuses: headers over a limit, duplicate names, unknown element types, shapes whose size overflows, and offsets that
//! overlap, leave holes or pass the end of the file.
//! Invariant: the ranges of a `Header` are disjoint, lie behind the header, cover the rest of the file exactly, and each
//! is as long as its shape and element type need.
//!
//! Source: <https://github.com/huggingface/safetensors#format>. The safetensors crate's own reader enforces the same
//! layout, but it merges duplicate names, does not always name the tensor at fault, and buffers the whole header as a
//! tree several times its size; so only its element types are used here.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::limits::{HEADER_BYTES_MAX, NAME_BYTES_MAX, RANK_MAX, TENSORS_MAX};

/// Bytes of the length in front of the header.
const LENGTH_BYTES: u64 = 8;

/// The key that holds free text instead of a tensor.
const METADATA_KEY: &str = "__metadata__";

/// What a header says, checked against the length of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// The tensors in the order of their bytes.
    pub tensors: Vec<Entry>,
}

/// One tensor of a header.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name, unique in the file.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes lie, from the start of the file.
    pub range: Range<usize>,
}

/// Why the bytes of a file are no safetensors header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file cannot even hold the length.
    #[error("the file has {file_bytes} bytes, fewer than the 8 of a header length")]
    TooShort {
        /// Length of the file.
        file_bytes: u64,
    },
    /// The header claims more than the limit.
    #[error("the header claims {bytes} bytes, more than the limit of {max}")]
    TooLong {
        /// Length claimed.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The header claims more than the file has.
    #[error("the header claims {bytes} bytes but the file has only {file_bytes}: the file is truncated")]
    Truncated {
        /// Length claimed.
        bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The header is not the JSON that it must be.
    #[error("the header is malformed{}: {source}", .tensor.as_ref().map(|name| format!(" at tensor {name:?}")).unwrap_or_default())]
    Json {
        /// The tensor being read, where there is one.
        tensor: Option<String>,
        /// What the JSON reader found.
        source: serde_json::Error,
    },
    /// More tensors than the limit.
    #[error("the header lists more than {max} tensors")]
    TooManyTensors {
        /// The limit.
        max: usize,
    },
    /// A name is longer than the limit.
    #[error("a tensor's name has {bytes} bytes, more than {max}")]
    NameTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Two entries have one name.
    #[error("tensor {tensor:?} is listed twice")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// The element type is none that safetensors knows.
    #[error("tensor {tensor:?} has the unknown element type {found:?}")]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The type claimed.
        found: String,
    },
    /// The size of the shape is not a number of bytes that can exist.
    #[error("tensor {tensor:?} of shape {shape:?} has a size that overflows or is no whole number of bytes")]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// The shape claimed.
        shape: Vec<usize>,
    },
    /// The offsets are not as far apart as the shape needs.
    #[error("tensor {tensor:?} of shape {shape:?} needs {needed} bytes but its offsets are {start}..{end}")]
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// The shape claimed.
        shape: Vec<usize>,
        /// Bytes that the shape needs.
        needed: u64,
        /// First byte claimed, from the end of the header.
        start: u64,
        /// End claimed.
        end: u64,
    },
    /// The offsets pass the end of the file.
    #[error("tensor {tensor:?} ends at byte {end} of the data but the file has {data_bytes}: it is truncated")]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// End claimed, from the end of the header.
        end: u64,
        /// Bytes behind the header.
        data_bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("tensor {tensor:?} starts at byte {start} of the data, inside tensor {other:?} which ends at {other_end}")]
    Overlap {
        /// The later tensor.
        tensor: String,
        /// Its first byte.
        start: u64,
        /// The earlier tensor.
        other: String,
        /// Its end.
        other_end: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {start}..{end} of the data belong to no tensor")]
    Unclaimed {
        /// First such byte.
        start: u64,
        /// Their end.
        end: u64,
    },
}

/// Reads the header of a safetensors file and checks every claim against the length of the file.
///
/// `bytes` is the start of the file, at least as far as the header goes (the whole file will do); `file_bytes` is the
/// file's length. Memory: proportional to the header, which is limited before it is read.
///
/// # Errors
/// Each variant of `HeaderError`; the tensor is named wherever there is one.
pub fn parse_header(bytes: &[u8], file_bytes: u64) -> Result<Header, HeaderError> {
    let (json, data_start) = split(bytes, file_bytes)?;
    let raw = read_entries(json)?;
    let mut tensors = Vec::with_capacity(raw.len());
    for entry in raw {
        tensors.push(checked_entry(entry, file_bytes - data_start)?);
    }
    tensors.sort_by_key(|entry| (entry.range.start, entry.range.end));
    check_cover(&tensors, file_bytes - data_start)?;
    let start = to_usize(data_start);
    for entry in &mut tensors {
        entry.range = entry.range.start + start..entry.range.end + start;
    }
    Ok(Header { tensors })
}

/// Finds the JSON of the header and the offset of the data behind it.
fn split(bytes: &[u8], file_bytes: u64) -> Result<(&[u8], u64), HeaderError> {
    let too_short = HeaderError::TooShort { file_bytes };
    let Some(length) = bytes.first_chunk::<8>() else { return Err(too_short) };
    if file_bytes < LENGTH_BYTES {
        return Err(too_short);
    }
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(HeaderError::TooLong { bytes: length, max: HEADER_BYTES_MAX });
    }
    let data_start = LENGTH_BYTES + length;
    let truncated = HeaderError::Truncated { bytes: length, file_bytes };
    if data_start > file_bytes {
        return Err(truncated);
    }
    match bytes.get(to_usize(LENGTH_BYTES)..to_usize(data_start)) {
        Some(json) => Ok((json, data_start)),
        None => Err(truncated),
    }
}

/// Checks one entry by itself; its range is still counted from the end of the header.
fn checked_entry(raw: RawEntry, data_bytes: u64) -> Result<Entry, HeaderError> {
    let RawEntry { name: tensor, info } = raw;
    let Ok(dtype) = Dtype::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(&info.dtype))
    else {
        return Err(HeaderError::UnknownDtype { tensor, found: info.dtype });
    };
    let shape = info.shape.0;
    let bits = shape.iter().try_fold(dtype.bitsize(), |product, dimension| product.checked_mul(*dimension));
    let Some(needed) = bits.filter(|bits| bits % 8 == 0).map(|bits| bits as u64 / 8) else {
        return Err(HeaderError::ShapeOverflow { tensor, shape });
    };
    let [start, end] = info.data_offsets;
    if end > data_bytes {
        return Err(HeaderError::OutOfRange { tensor, end, data_bytes });
    }
    if end.checked_sub(start) != Some(needed) {
        return Err(HeaderError::SizeMismatch { tensor, shape, needed, start, end });
    }
    Ok(Entry { name: tensor, dtype, shape, range: to_usize(start)..to_usize(end) })
}

/// Checks that sorted entries cover the data without overlap or hole.
fn check_cover(sorted: &[Entry], data_bytes: u64) -> Result<(), HeaderError> {
    let mut covered = 0;
    let mut previous = "";
    for entry in sorted {
        let start = entry.range.start as u64;
        if start < covered {
            let (tensor, other) = (entry.name.clone(), previous.to_owned());
            return Err(HeaderError::Overlap { tensor, start, other, other_end: covered });
        }
        if start > covered {
            return Err(HeaderError::Unclaimed { start: covered, end: start });
        }
        covered = entry.range.end as u64;
        previous = &entry.name;
    }
    if covered < data_bytes {
        return Err(HeaderError::Unclaimed { start: covered, end: data_bytes });
    }
    Ok(())
}

/// Converts an offset that was checked against the length of a file in memory.
fn to_usize(offset: u64) -> usize {
    usize::try_from(offset).expect("offsets are bounded by the length of a mapped file")
}

struct RawEntry {
    name: String,
    info: RawInfo,
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: RawShape,
    data_offsets: [u64; 2],
}

/// A shape of at most `RANK_MAX` dimensions: a longer list ends the reading instead of growing.
struct RawShape(Vec<usize>);

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = RawShape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {RANK_MAX} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawShape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = list.next_element()? {
                    if shape.len() == RANK_MAX {
                        return Err(A::Error::invalid_length(RANK_MAX + 1, &self));
                    }
                    shape.push(dimension);
                }
                Ok(RawShape(shape))
            }
        }
        deserializer.deserialize_seq(Shape)
    }
}

/// Where the reader of entries leaves what a JSON error cannot carry.
#[derive(Default)]
struct Trace {
    tensor: Option<String>,
    refusal: Option<HeaderError>,
}

/// Reads the JSON into entries, with duplicates and limits checked on the way.
fn read_entries(json: &[u8]) -> Result<Vec<RawEntry>, HeaderError> {
    let mut trace = Trace::default();
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let read = Entries { trace: &mut trace }.deserialize(&mut deserializer);
    match read.and_then(|entries| deserializer.end().map(|()| entries)) {
        Ok(entries) => Ok(entries),
        Err(source) => Err(trace.refusal.unwrap_or(HeaderError::Json { tensor: trace.tensor, source })),
    }
}

struct Entries<'t> {
    trace: &'t mut Trace,
}

impl Entries<'_> {
    fn refusal(&self, name: &str, seen: &HashSet<String>) -> Option<HeaderError> {
        if name.len() > NAME_BYTES_MAX {
            return Some(HeaderError::NameTooLong { bytes: name.len(), max: NAME_BYTES_MAX });
        }
        if seen.len() == TENSORS_MAX {
            return Some(HeaderError::TooManyTensors { max: TENSORS_MAX });
        }
        seen.contains(name).then(|| HeaderError::Duplicate { tensor: name.to_owned() })
    }
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = Vec<RawEntry>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = Vec<RawEntry>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if let Some(refusal) = self.refusal(&name, &seen) {
                self.trace.refusal = Some(refusal);
                return Err(A::Error::custom("refused"));
            }
            seen.insert(name.clone());
            if name == METADATA_KEY {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            self.trace.tensor = Some(name.clone());
            let info = map.next_value()?;
            self.trace.tensor = None;
            entries.push(RawEntry { name, info });
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        bytes
    }

    fn parse(json: &str, data_bytes: usize) -> Result<Header, HeaderError> {
        let bytes = file(json, data_bytes);
        parse_header(&bytes, bytes.len() as u64)
    }

    #[test]
    fn a_valid_header_gives_its_tensors_in_the_order_of_their_bytes() {
        let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"empty":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}"#;
        let header = parse(json, 16).expect("valid");
        let start = 8 + json.len();
        let found: Vec<_> = header.tensors.iter().map(|t| (t.name.as_str(), t.range.clone())).collect();
        assert_eq!(found, [("a", start..start + 4), ("empty", start + 4..start + 4), ("b", start + 4..start + 16)]);
        assert_eq!((header.tensors[2].dtype, header.tensors[2].shape.as_slice()), (Dtype::BF16, &[2, 3][..]));
    }

    #[test]
    fn every_fault_has_its_own_error_and_names_its_tensor() {
        let wide = format!(r#"{{"{}":0}}"#, "n".repeat(NAME_BYTES_MAX + 1));
        let table: &[(&str, usize, &str)] = &[
            ("", 0, "malformed"),
            ("[]", 0, "malformed"),
            (r#"{"a":3}"#, 0, r#"at tensor "a""#),
            (r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#, 1, r#"at tensor "a""#),
            (r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1, r#"at tensor "a""#),
            (r#"{"a":{"dtype":"U8","shape":[1]}}"#, 1, r#"at tensor "a""#),
            (r#"{} {}"#, 0, "malformed"),
            (&wide, 0, "name has 1025 bytes"),
            (
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
                r#"tensor "a" is listed twice"#,
            ),
            (r#"{"a":{"dtype":"NF4","shape":[1],"data_offsets":[0,1]}}"#, 1, r#"unknown element type "NF4""#),
            (
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,1]}}"#,
                1,
                "overflows or is no whole",
            ),
            (r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#, 1, "overflows or is no whole"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "needs 8 bytes but its offsets are 0..4"),
            (r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[4,2]}}"#, 4, "offsets are 4..2"),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
                3,
                "ends at byte 4 of the data but the file has 3",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[18446744073709551615,3]}}"#,
                3,
                "offsets are 18446744073709551615..3",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                6,
                r#"tensor "b" starts at byte 2 of the data, inside tensor "a""#,
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}"#,
                6,
                "bytes 2..4 of the data belong to no tensor",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
                3,
                "bytes 2..3 of the data belong to no tensor",
            ),
        ];
        for (json, data_bytes, words) in table {
            let error = parse(json, *data_bytes).expect_err(json).to_string();
            assert!(error.contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn the_length_is_checked_before_anything_is_read() {
        let check = |bytes: &[u8], file_bytes| parse_header(bytes, file_bytes).expect_err("refused");
        assert!(matches!(check(&[], 0), HeaderError::TooShort { file_bytes: 0 }));
        assert!(matches!(check(&[0; 7], 7), HeaderError::TooShort { file_bytes: 7 }));
        assert!(matches!(check(&u64::MAX.to_le_bytes(), 8), HeaderError::TooLong { bytes: u64::MAX, .. }));
        let above = (HEADER_BYTES_MAX + 1).to_le_bytes();
        assert!(matches!(check(&above, u64::MAX), HeaderError::TooLong { .. }));
        assert!(matches!(check(&HEADER_BYTES_MAX.to_le_bytes(), 8), HeaderError::Truncated { .. }));
        assert!(matches!(check(&file("{}", 0), 9), HeaderError::Truncated { bytes: 2, file_bytes: 9 }));
    }

    #[test]
    fn deep_nesting_in_the_metadata_is_refused_not_followed() {
        let json = format!(r#"{{"__metadata__":{}}}"#, "[".repeat(100_000));
        assert!(matches!(parse(&json, 0), Err(HeaderError::Json { tensor: None, .. })));
    }
}
