//! A small fuzzer for stable Rust: valid inputs, changed with knowledge of their structure, for a bounded time.
//!
//! Owns: randomness that a number determines, changes to bytes and to JSON, and the loop around a target. Every input is a
//! function of the printed seed and its index, so a failure names what repeats it. Written here because the coverage-guided
//! fuzzers need a nightly compiler, and the property testing crates bring value generators where what is wanted is damage
//! to real files and requests.

use std::time::{Duration, Instant};

use serde_json::Value;

/// The variable with the seconds that each target runs.
pub const SECONDS_VARIABLE: &str = "BULKHEAD_FUZZ_SECONDS";

/// The variable with the seed. Equal seeds give equal inputs.
pub const SEED_VARIABLE: &str = "BULKHEAD_FUZZ_SEED";

const SECONDS_DEFAULT: u64 = 2;
const SEED_DEFAULT: u64 = 20_261_123;

/// Numbers at which parsers change their minds.
const EDGES: [u64; 14] =
    [0, 1, 2, 0x7f, 0x80, 0xfb, 0xff, 0xffff, 1 << 31, u32::MAX as u64, 1 << 53, i64::MAX as u64, 1 << 63, u64::MAX];

/// A source of randomness determined by its seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts a sequence.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Gives the next 64 bits.
    ///
    /// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (SplitMix64).
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Gives a number below `end`.
    ///
    /// # Panics
    /// When `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("usize has at most 64 bits");
        usize::try_from(self.bits() % end).expect("below a usize")
    }

    /// Says yes once in `times`, on average.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Picks one of several.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Gives up to `max` random bytes.
    pub fn bytes(&mut self, max: usize) -> Vec<u8> {
        (0..self.below(max + 1)).map(|_| self.bits().to_le_bytes()[0]).collect()
    }
}

/// Prints what repeats a failure.
struct Repeat<'a> {
    target: &'a str,
    seed: u64,
    index: u64,
}

impl Drop for Repeat<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Repeat { target, seed, index } = self;
            eprintln!("target {target} failed at input {index} of {SEED_VARIABLE}={seed}");
        }
    }
}

/// Runs a target on inputs until its time is over, with at least one input.
///
/// # Panics
/// When the target does, or a variable is no number.
pub fn run(target: &str, mut check: impl FnMut(&mut Random)) {
    let number = |name: &str, default| match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} must be a whole number, not {text:?}")),
        Err(_) => default,
    };
    let time = Duration::from_secs(number(SECONDS_VARIABLE, SECONDS_DEFAULT));
    let seed = number(SEED_VARIABLE, SEED_DEFAULT);
    let start = Instant::now();
    let mut index = 0;
    loop {
        let repeat = Repeat { target, seed, index };
        let mut random = Random::new(seed.wrapping_add(index.wrapping_mul(0x2545_f491_4f6c_dd1d)));
        check(&mut random);
        drop(repeat);
        index += 1;
        if start.elapsed() >= time {
            break;
        }
    }
    println!("{target}: {index} inputs from seed {seed}");
}

/// Changes bytes in one to eight places: flips, overwrites with edge values, cuts, doubles, splices.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(8) {
        if bytes.is_empty() {
            *bytes = random.bytes(32);
            continue;
        }
        let at = random.below(bytes.len());
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.bits().to_le_bytes()[0],
            2 => overwrite(bytes, at, random),
            3 => bytes.truncate(at),
            4 => {
                let end = at + random.below(bytes.len() - at + 1).min(64);
                bytes.drain(at..end);
            }
            5 => {
                let end = at + random.below(bytes.len() - at + 1).min(64);
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            6 => {
                let inserted = random.bytes(16);
                bytes.splice(at..at, inserted);
            }
            _ => bytes[at] = random.pick(b"{}[]\",:0-9e\\u\0\xff\xfd\xfc\xfb"),
        }
    }
}

/// Writes an edge value of 1, 2, 4 or 8 bytes.
fn overwrite(bytes: &mut [u8], at: usize, random: &mut Random) {
    let edge = random.pick(&EDGES).to_le_bytes();
    let width = (1 << random.below(4)).min(bytes.len() - at);
    bytes[at..at + width].copy_from_slice(&edge[..width]);
}

/// Changes one to four places in a JSON value, so that it stays JSON: replaces, removes, doubles, nests, renames.
pub fn mutate_json(value: &mut Value, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let place = random_place(value, random);
        match (random.below(6), place) {
            (0, Value::Object(fields)) if !fields.is_empty() => {
                let key = fields.keys().nth(random.below(fields.len())).cloned().expect("the index is in range");
                fields.remove(&key);
            }
            (1, Value::Object(fields)) if !fields.is_empty() => {
                let key = fields.keys().nth(random.below(fields.len())).cloned().expect("the index is in range");
                let moved = fields.remove(&key).expect("the key was found");
                fields.insert(format!("{key}{}", random.below(10)), moved);
            }
            (0, Value::Array(items)) if !items.is_empty() => {
                items.remove(random.below(items.len()));
            }
            (1, Value::Array(items)) if !items.is_empty() => {
                let copy = items[random.below(items.len())].clone();
                items.extend(std::iter::repeat_n(copy, random.below(8)));
            }
            (2, place) => *place = Value::Array(vec![place.take()]),
            (3, Value::String(text)) => {
                let mut bytes = std::mem::take(text).into_bytes();
                mutate(&mut bytes, random);
                *text = String::from_utf8_lossy(&bytes).into_owned();
            }
            (_, place) => *place = random_value(random),
        }
    }
}

/// Walks down to some place in a value.
fn random_place<'v>(value: &'v mut Value, random: &mut Random) -> &'v mut Value {
    let children = match value {
        Value::Object(fields) => fields.len(),
        Value::Array(items) => items.len(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    };
    if children == 0 || random.once_in(4) {
        return value;
    }
    let index = random.below(children);
    let child = match value {
        Value::Object(fields) => fields.values_mut().nth(index),
        Value::Array(items) => items.get_mut(index),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    };
    random_place(child.expect("the index is below the number of children"), random)
}

fn random_value(random: &mut Random) -> Value {
    match random.below(10) {
        0 => Value::Null,
        1 => Value::Bool(random.once_in(2)),
        2 => random.pick(&EDGES).into(),
        3 => random.pick(&EDGES).cast_signed().into(),
        4 => random.pick(&[-0.0, 0.5, 1e-300, f64::MAX, -1e9, 2.000001]).into(),
        5 => String::from_utf8_lossy(&random.bytes(40)).into_owned().into(),
        6 => "x".repeat(random.below(4096)).into(),
        7 => Value::Array(Vec::new()),
        8 => (0..random.below(80)).fold(Value::Null, |inner, _| serde_json::json!({"items": inner})),
        _ => Value::Object(serde_json::Map::new()),
    }
}
