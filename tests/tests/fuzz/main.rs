//! Everything that parses bytes from another trust zone, on damaged input: no panic, and memory bounded by the input.
//!
//! Each target runs for `BULKHEAD_FUZZ_SECONDS`; the seed is printed. Inputs that ever failed belong into the unit tests of
//! the parser.

mod frames;
mod memory;
mod model_files;
mod requests;
mod supervisor;
mod template;
mod text;
