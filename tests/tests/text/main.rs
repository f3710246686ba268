//! Text in and out, and the choice of tokens, against the values that reference implementations gave.

mod answer;
mod parse;
mod render;
mod sampling;
mod support;
mod template;
mod tokenizer;
