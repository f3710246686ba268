//! The CUDA kernels, run without a card: each .cu file is built as C++ (tests/cuda) and compared with the CPU's functions
//! on random shapes; and faults are planted in it that the same comparison must notice.

mod attention;
mod emulator;
mod matmul;
mod matvec;
mod moe;
mod moe_many;
mod norm;
mod prefill;
mod route;
mod sample;
mod support;
