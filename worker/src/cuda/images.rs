//! The compiled kernels, packed inside the binary: which image a card can run, and its bytes.
//!
//! An image is machine code for one architecture. It runs on cards of the same major compute capability and the same or
//! a higher minor one; a module whose name ends with `_90a` runs on 9.0 alone. There is no code for others to translate.

use thiserror::Error;

/// Made by the build script: each module for each architecture.
static KERNELS: &[Image] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The ending of modules that use what only 9.0 has.
const SPECIAL_ENDING: &str = "_90a";

/// One module for one architecture.
#[derive(Debug)]
struct Image {
    /// The compute capability that it was compiled for, times ten.
    architecture: u32,
    module: &'static str,
    unpacked_bytes: usize,
    packed: &'static [u8],
}

impl Image {
    fn runs_on(&self, (major, minor): (u32, u32)) -> bool {
        let built = (self.architecture / 10, self.architecture % 10);
        let is_special = self.module.ends_with(SPECIAL_ENDING);
        built.0 == major && if is_special { built.1 == minor } else { built.1 <= minor }
    }
}

/// Why there is no image to load.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ImageError {
    #[error("no module of kernels is called {name}")]
    UnknownModule { name: String },
    #[error("a card of compute capability {major}.{minor} cannot run {name}, which is built for {built:?}")]
    UnknownArchitecture { name: String, major: u32, minor: u32, built: Vec<u32> },
    #[error("the image of {name} for {architecture} does not unpack to {expected_bytes} bytes")]
    Damaged { name: String, architecture: u32, expected_bytes: usize },
}

/// Gives the image of a module for a card of this compute capability (major, minor).
///
/// # Errors
/// `UnknownModule` if this build has none of the name, `UnknownArchitecture` if none of its images runs on the card.
pub fn module(compute_capability: (u32, u32), name: &str) -> Result<Vec<u8>, ImageError> {
    find(KERNELS, compute_capability, name)
}

fn find(images: &[Image], (major, minor): (u32, u32), name: &str) -> Result<Vec<u8>, ImageError> {
    let images: Vec<_> = images.iter().filter(|image| image.module == name).collect();
    if images.is_empty() {
        return Err(ImageError::UnknownModule { name: name.to_owned() });
    }
    let fitting = images.iter().filter(|image| image.runs_on((major, minor)));
    let Some(image) = fitting.max_by_key(|image| image.architecture) else {
        let built = images.iter().map(|image| image.architecture).collect();
        return Err(ImageError::UnknownArchitecture { name: name.to_owned(), major, minor, built });
    };
    let bytes = miniz_oxide::inflate::decompress_to_vec_with_limit(image.packed, image.unpacked_bytes);
    bytes.ok().filter(|bytes| bytes.len() == image.unpacked_bytes).ok_or_else(|| ImageError::Damaged {
        name: name.to_owned(),
        architecture: image.architecture,
        expected_bytes: image.unpacked_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list whose images unpack to their architecture's number.
    fn list(entries: &[(u32, &'static str)]) -> Vec<Image> {
        let image = |&(architecture, module): &(u32, &'static str)| {
            let bytes = [u8::try_from(architecture).expect("small")];
            let packed = miniz_oxide::deflate::compress_to_vec(&bytes, 9).leak();
            Image { architecture, module, unpacked_bytes: 1, packed }
        };
        entries.iter().map(image).collect()
    }

    #[test]
    fn a_card_gets_the_newest_image_that_it_can_run() {
        let images = list(&[75, 80, 86, 89, 90, 120].map(|architecture| (architecture, "norm")));
        let cases = [
            ((7, 5), Some(75)),
            ((8, 0), Some(80)),
            ((8, 6), Some(86)),
            ((8, 7), Some(86)),
            ((8, 9), Some(89)),
            ((9, 0), Some(90)),
            ((12, 0), Some(120)),
            ((12, 1), Some(120)),
            ((7, 0), None),
            ((10, 0), None),
            ((11, 0), None),
            ((13, 0), None),
        ];
        for (capability, expected) in cases {
            assert_eq!(find(&images, capability, "norm").ok(), expected.map(|number| vec![number]), "{capability:?}");
        }
    }

    #[test]
    fn a_module_for_9_0_alone_runs_nowhere_else() {
        let images = list(&[(90, "matmul_90a")]);
        assert_eq!(find(&images, (9, 0), "matmul_90a"), Ok(vec![90]));
        let error = find(&images, (9, 1), "matmul_90a").expect_err("9.1 is another architecture");
        let text = "a card of compute capability 9.1 cannot run matmul_90a, which is built for [90]";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = find(&list(&[(75, "norm")]), (7, 5), "moe").expect_err("there is none");
        assert_eq!(error, ImageError::UnknownModule { name: "moe".to_owned() });
    }

    #[test]
    fn an_image_of_another_length_is_damaged() {
        for unpacked_bytes in [0, 2] {
            let mut images = list(&[(75, "norm")]);
            images[0].unpacked_bytes = unpacked_bytes;
            let error = find(&images, (7, 5), "norm").expect_err("the length is wrong");
            assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
        }
    }

    #[test]
    fn every_image_unpacks_to_machine_code() {
        for name in ["decode", "matvec", "moe", "norm", "sample"] {
            assert!(KERNELS.iter().any(|image| image.module == name), "{name}");
        }
        for image in KERNELS {
            let capability = (image.architecture / 10, image.architecture % 10);
            let bytes = module(capability, image.module).expect("it is there and whole");
            assert!(bytes.starts_with(b"\x7fELF"), "{}", image.module);
        }
    }
}
