//! Which instructions to compute with: found out, or forced by name.

use std::fmt;

/// A way to compute on the processor. The integer ways give equal bits; `Scalar` computes in f32 and gives others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuPath {
    /// Weights decoded to f32 and activations in f32: exact but for the order of sums, and slow. The reference.
    Scalar,
    /// Integer products in plain Rust, for processors without any of the below: what the others must equal bit by bit.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX2, and products of bytes added up at once (AVX-VNNI).
    AvxVnni,
    /// AVX-512 (F, BW, DQ, VL) with VNNI.
    Avx512,
    /// AVX-512 with VNNI, and prompts by AMX in int8.
    Amx,
}

/// A path that the processor lacks the instructions for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this processor lacks {feature}, which {path} needs: leave the choice at auto, or take another")]
pub struct MissingFeature {
    /// The path that was asked for.
    pub path: CpuPath,
    /// The first feature that is missing.
    pub feature: &'static str,
}

impl CpuPath {
    /// All of them, the best last.
    pub const ALL: [CpuPath; 6] =
        [CpuPath::Scalar, CpuPath::Portable, CpuPath::Avx2, CpuPath::AvxVnni, CpuPath::Avx512, CpuPath::Amx];

    /// Finds the best one that this processor has.
    #[must_use]
    pub fn detect() -> CpuPath {
        let found = CpuPath::ALL.into_iter().rev().find(|path| path.check().is_ok());
        found.unwrap_or(CpuPath::Portable)
    }

    /// Says whether the processor has what this needs.
    ///
    /// # Errors
    /// Names the first feature that is missing.
    pub fn check(self) -> Result<(), MissingFeature> {
        match self.features().into_iter().find(|(_, has)| !has) {
            None => Ok(()),
            Some((feature, _)) => Err(MissingFeature { path: self, feature }),
        }
    }

    /// Gives the word for settings and status lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            CpuPath::Scalar => "scalar",
            CpuPath::Portable => "portable",
            CpuPath::Avx2 => "avx2",
            CpuPath::AvxVnni => "avxvnni",
            CpuPath::Avx512 => "avx512",
            CpuPath::Amx => "amx",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn features(self) -> Vec<(&'static str, bool)> {
        let avx2 = [("avx2", is_x86_feature_detected!("avx2")), ("fma", is_x86_feature_detected!("fma"))];
        let avx512 = [
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512dq", is_x86_feature_detected!("avx512dq")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx512_vnni", is_x86_feature_detected!("avx512vnni")),
        ];
        match self {
            CpuPath::Scalar | CpuPath::Portable => Vec::new(),
            CpuPath::Avx2 => avx2.to_vec(),
            CpuPath::AvxVnni => [&avx2[..], &[("avx_vnni", is_x86_feature_detected!("avxvnni"))]].concat(),
            CpuPath::Avx512 => [&avx2[..], &avx512].concat(),
            CpuPath::Amx => [&avx2[..], &avx512, &super::amx::features()].concat(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn features(self) -> Vec<(&'static str, bool)> {
        match self {
            CpuPath::Scalar | CpuPath::Portable => Vec::new(),
            CpuPath::Avx2 | CpuPath::AvxVnni | CpuPath::Avx512 | CpuPath::Amx => vec![("x86-64", false)],
        }
    }
}

impl fmt::Display for CpuPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
