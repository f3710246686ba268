//! What the tests of several kinds share.
