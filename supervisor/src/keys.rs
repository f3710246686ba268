//! The API keys: read from a file, compared in constant time, told apart by name.
//!
//! Owns: the form of the file, the keys in force, and their exchange while the service runs. Refuses: to print a key. A
//! file has a key in each line, with a name in front or without, and may have comments:
//!
//! ```text
//! # made with: openssl rand -hex 32
//! laptop:5f3c1d...
//! 77a09be2...
//! ```
//!
//! Invariants: a key that is shown is compared with every key, each time over as many bytes, so that the time tells
//! nothing of where they differ; a file that cannot be used leaves the keys that were in force.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use subtle::{ConditionallySelectable, ConstantTimeEq};
use tracing::{info, warn};

use crate::limits::{KEY_BYTES_MAX, KEY_BYTES_MIN, KEY_NAME_BYTES_MAX, KEYS_FILE_BYTES_MAX, KEYS_MAX};

/// Why a file of keys cannot be used. What stands in the file is never told.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("API keys {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is no key.
    #[error("API keys {}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: LineFault,
    },
    /// There are too many.
    #[error("API keys {} has more than {KEYS_MAX} keys or {KEYS_FILE_BYTES_MAX} bytes", .0.display())]
    TooMany(PathBuf),
    /// There is none.
    #[error("API keys {} holds no key: write one in a line, such as `openssl rand -hex 32` makes", .0.display())]
    Empty(PathBuf),
}

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineFault {
    /// The name.
    #[error("a name has from 1 to {KEY_NAME_BYTES_MAX} letters, digits, dots, dashes and underscores")]
    Name,
    /// What the key consists of.
    #[error("a key has letters, digits and signs, and no spaces")]
    Bytes,
    /// How long the key is.
    #[error("a key has from {KEY_BYTES_MIN} to {KEY_BYTES_MAX} characters: make one with `openssl rand -hex 32`")]
    Length,
    /// The name or the key stands there twice.
    #[error("the name or the key stands in a line above too")]
    Twice,
}

/// A key, padded so that every comparison takes the same steps.
#[derive(Clone)]
struct Secret {
    bytes: [u8; KEY_BYTES_MAX],
    length: u64,
}

impl Secret {
    fn new(key: &[u8]) -> Option<Secret> {
        let mut bytes = [0; KEY_BYTES_MAX];
        bytes.get_mut(..key.len())?.copy_from_slice(key);
        Some(Secret { bytes, length: key.len() as u64 })
    }

    fn is_equal(&self, other: &Secret) -> subtle::Choice {
        self.bytes[..].ct_eq(&other.bytes[..]) & self.length.ct_eq(&other.length)
    }
}

#[derive(Clone)]
struct Key {
    name: Arc<str>,
    secret: Secret,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:<redacted>", self.name)
    }
}

/// The keys in force.
#[derive(Debug)]
pub struct Keys {
    file: Option<PathBuf>,
    list: RwLock<Vec<Key>>,
}

/// What reading the file has given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How many keys are in force.
    pub keys: usize,
    /// What is wrong with the file, though it can be used.
    pub warning: Option<String>,
}

impl Keys {
    /// Reads the keys; without a file there are none, and whoever comes is served.
    ///
    /// # Errors
    /// `KeysError` when the file cannot be used.
    pub fn load(file: Option<PathBuf>) -> Result<(Keys, Outcome), KeysError> {
        let keys = Keys { file, list: RwLock::default() };
        let outcome = keys.reload()?;
        Ok((keys, outcome))
    }

    /// Reads the file anew.
    ///
    /// # Errors
    /// `KeysError` when it cannot be used; the keys stay as they were then.
    pub fn reload(&self) -> Result<Outcome, KeysError> {
        let Some(path) = &self.file else { return Ok(Outcome { keys: 0, warning: None }) };
        let (text, warning) = read(path)?;
        let list = parse(path, &text)?;
        let keys = list.len();
        // Whoever panicked with the lock left a whole list.
        *self.list.write().unwrap_or_else(PoisonError::into_inner) = list;
        Ok(Outcome { keys, warning })
    }

    /// Reads the file anew and logs what came of it.
    ///
    /// # Errors
    /// As [`Keys::reload`].
    pub fn reload_and_log(&self) -> Result<Outcome, KeysError> {
        let result = self.reload();
        match &result {
            Ok(outcome) => {
                info!(keys = outcome.keys, "API keys were read anew");
                outcome.warning.iter().for_each(|warning| warn!("{warning}"));
            }
            Err(error) => warn!(%error, "the API keys stay as they were"),
        }
        result
    }

    /// Says whether clients have to show a key.
    #[must_use]
    pub fn are_needed(&self) -> bool {
        self.file.is_some()
    }

    /// Gives the name of a key that a client shows; `None` when there is no such key.
    #[must_use]
    pub fn find(&self, shown: &[u8]) -> Option<Arc<str>> {
        // That a key is longer than any can be is no secret.
        let shown = Secret::new(shown)?;
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = u64::MAX;
        for (index, key) in (0u64..).zip(list.iter()) {
            found.conditional_assign(&index, key.secret.is_equal(&shown));
        }
        let found = usize::try_from(found).ok()?;
        list.get(found).map(|key| key.name.clone())
    }
}

fn read(path: &Path) -> Result<(Vec<u8>, Option<String>), KeysError> {
    let unreadable = |source| KeysError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode();
    let is_open = mode & 0o007 != 0;
    let warning =
        is_open.then(|| format!("API keys {} can be read by anyone on this machine: chmod o= it", path.display()));
    let mut bytes = Vec::new();
    file.take(KEYS_FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > KEYS_FILE_BYTES_MAX {
        return Err(KeysError::TooMany(path.to_owned()));
    }
    Ok((bytes, warning))
}

fn parse(path: &Path, text: &[u8]) -> Result<Vec<Key>, KeysError> {
    let mut keys: Vec<Key> = Vec::new();
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let number = index + 1;
        let fault = |reason| KeysError::Line { path: path.to_owned(), line: number, reason };
        let key = parse_line(line, number).map_err(fault)?;
        // The file's owner sees the time that this takes, and nobody else.
        if keys.iter().any(|other| other.name == key.name || other.secret.is_equal(&key.secret).into()) {
            return Err(fault(LineFault::Twice));
        }
        if keys.len() == KEYS_MAX {
            return Err(KeysError::TooMany(path.to_owned()));
        }
        keys.push(key);
    }
    if keys.is_empty() { Err(KeysError::Empty(path.to_owned())) } else { Ok(keys) }
}

fn parse_line(line: &[u8], number: usize) -> Result<Key, LineFault> {
    let (name, key) = match line.iter().position(|byte| *byte == b':') {
        Some(colon) => (String::from_utf8_lossy(&line[..colon]).into_owned(), &line[colon + 1..]),
        None => (format!("line-{number}"), line),
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.len() > KEY_NAME_BYTES_MAX || !name.chars().all(is_name) {
        return Err(LineFault::Name);
    }
    if !key.iter().all(u8::is_ascii_graphic) {
        return Err(LineFault::Bytes);
    }
    let secret = Secret::new(key).filter(|_| key.len() >= KEY_BYTES_MIN).ok_or(LineFault::Length)?;
    Ok(Key { name: name.into(), secret })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "0123456789abcdef";
    const SECOND: &str = "sk-proj-0123456789abcdef";

    fn load(text: &str) -> Result<Keys, String> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("is written");
        let loaded = Keys::load(Some(file.path().to_owned()));
        loaded.map(|(keys, _)| keys).map_err(|error| error.to_string())
    }

    #[test]
    fn a_key_is_found_by_its_name_or_line() {
        let keys = load(&format!("# ours\n\nlaptop:{FIRST}\r\n  {SECOND}  \n")).expect("is good");
        let find = |shown: &str| keys.find(shown.as_bytes()).map(|name| name.to_string());
        assert_eq!(find(FIRST).as_deref(), Some("laptop"));
        assert_eq!(find(SECOND).as_deref(), Some("line-4"));
        for shown in ["", "0123456789abcde", "0123456789abcdeF", "0123456789abcdef0", "0123456789abcdef\0", "laptop"] {
            assert_eq!(find(shown), None, "{shown:?}");
        }
        assert_eq!(find(&"x".repeat(KEY_BYTES_MAX + 1)), None);
        assert!(keys.are_needed());
        assert!(!format!("{keys:?}").contains("0123"), "{keys:?}");
    }

    #[test]
    fn the_bounds_of_a_file_are_told_by_line_and_never_with_a_key() {
        let longest = "k".repeat(KEY_BYTES_MAX);
        for (text, expected) in [
            (format!("a:{longest}"), None),
            (format!("a:{longest}k"), Some(":1: a key has from 16 to 256 characters")),
            ("a:0123456789abcde".to_owned(), Some(":1: a key has from 16 to 256 characters")),
            (format!("\n:{FIRST}"), Some(":2: a name has from 1 to 64 letters")),
            (format!("a b:{FIRST}"), Some(":1: a name has")),
            (format!("{}:{FIRST}", "n".repeat(64)), None),
            (format!("{}:{FIRST}", "n".repeat(65)), Some(":1: a name has")),
            (format!("a:{FIRST} {FIRST}"), Some(":1: a key has letters")),
            (format!("a:{FIRST}é"), Some(":1: a key has letters")),
            (format!("a:{FIRST}\nb:{FIRST}"), Some(":2: the name or the key stands in a line above too")),
            (format!("a:{FIRST}\na:{SECOND}"), Some(":2: the name or the key stands")),
            ("# none\n".to_owned(), Some("holds no key")),
            ("x".repeat(KEYS_FILE_BYTES_MAX + 1), Some("has more than 1024 keys or")),
            ((0..KEYS_MAX).map(|n| format!("{n:016}\n")).collect(), None),
            ((0..=KEYS_MAX).map(|n| format!("{n:016}\n")).collect(), Some("has more than 1024 keys or")),
        ] {
            match (load(&text), expected) {
                (Ok(_), None) => {}
                (Err(got), Some(expected)) => {
                    assert!(got.contains(expected), "{got}");
                    assert!(!got.contains("0123"), "{got}");
                }
                (got, expected) => panic!("{got:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn keys_are_exchanged_whole_or_stay() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), format!("a:{FIRST}")).expect("is written");
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o640)).expect("ours");
        let (keys, outcome) = Keys::load(Some(file.path().to_owned())).expect("is good");
        assert_eq!(outcome, Outcome { keys: 1, warning: None });
        std::fs::write(file.path(), format!("a:{SECOND}\nb:broken")).expect("is written");
        assert!(keys.reload().is_err());
        assert!(keys.find(FIRST.as_bytes()).is_some() && keys.find(SECOND.as_bytes()).is_none());
        std::fs::write(file.path(), format!("a:{SECOND}")).expect("is written");
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o644)).expect("ours");
        let outcome = keys.reload().expect("is good");
        assert!(outcome.warning.is_some_and(|warning| warning.contains("can be read by anyone")));
        assert!(keys.find(FIRST.as_bytes()).is_none() && keys.find(SECOND.as_bytes()).is_some());
        std::fs::remove_file(file.path()).expect("ours");
        assert!(matches!(keys.reload(), Err(KeysError::Unreadable { .. })));
        assert!(keys.find(SECOND.as_bytes()).is_some());
    }

    #[test]
    fn without_a_file_no_key_is_needed() {
        let (keys, _) = Keys::load(None).expect("nothing to read");
        assert!(!keys.are_needed());
        assert_eq!(keys.find(FIRST.as_bytes()), None);
    }
}
