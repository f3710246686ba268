//! The Bulkhead supervisor: everything that clients touch, and the lives of its workers.
#![forbid(unsafe_code)]
