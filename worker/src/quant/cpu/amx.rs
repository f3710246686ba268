//! Tiles of bytes by AMX.

/// Says which of the features are there.
pub(super) fn features() -> [(&'static str, bool); 1] {
    [("amx_int8", false)]
}
