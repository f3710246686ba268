//! What the tests of several kinds share.

pub mod checkpoint;
pub mod oracle;
