//! What is made before the worker is compiled: nothing, unless the feature `cuda` asks for the kernels.

#[cfg(feature = "cuda")]
mod kernels;

fn main() {
    println!("cargo::rerun-if-changed=build");
    #[cfg(feature = "cuda")]
    if let Err(error) = kernels::build() {
        println!("cargo::error={error}");
    }
}
