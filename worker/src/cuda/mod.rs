//! The worker on NVIDIA cards, through the driver alone: libcuda is opened at run time and nothing of CUDA is linked.

pub mod images;
