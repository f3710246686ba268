//! The numbers of the worker against those of the reference implementations (fixtures/oracle/README.md).

mod layouts;
mod llama;
mod logits;
mod rope;
mod served;
mod vectors;
