use super::*;
use crate::engine::pager::{Blocks, KvShape, Span};
use crate::model::batch::{Role, Row};

fn random(count: usize, seed: u32, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..count).map(|_| next()).collect()
}

/// A sequence with all its keys and values, and the queries of all its tokens.
struct Case {
    heads: Heads,
    tokens: usize,
    sinks: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    cache: KvCache,
    blocks: Blocks,
}

impl Case {
    fn new(heads: Heads, span: Span, tokens: usize) -> Case {
        let width = heads.kv * heads.dim;
        let rounded = |values: Vec<f32>| values.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect();
        let (keys, values): (Vec<f32>, Vec<f32>) =
            (rounded(random(tokens * width, 1, 2.0)), rounded(random(tokens * width, 2, 3.0)));
        let shape = KvShape { spans: vec![Span::Full, span], kv_heads: heads.kv, head_dim: heads.dim };
        let mut cache = KvCache::for_one(shape, tokens as u32 + 64, tokens as u32 + 64);
        let mut blocks = Blocks::default();
        cache.pager.reserve(&mut blocks, tokens as u32 + 64).expect("there is room");
        // What stands behind the sequence is not to be seen, whatever it is.
        let behind = vec![f32::NAN; width];
        for position in 0..tokens + 1 {
            let at = |all: &[f32]| all.get(position * width..(position + 1) * width).unwrap_or(&behind).to_vec();
            cache.write(1, &blocks, position as u32, &at(&keys), &at(&values));
        }
        let (sinks, queries) = (random(heads.query, 3, 4.0), random(tokens * heads.query * heads.dim, 4, 2.0));
        Case { heads, tokens, sinks, queries, keys, values, cache, blocks }
    }

    /// Attends in chunks.
    fn attend(&self, vectors: Vectors, threads: usize, chunk: usize) -> Vec<f32> {
        let (cpu, attention) = (Cpu::start(threads).expect("threads start"), Attention::new(vectors));
        let (heads, row_len) = (self.heads, self.heads.query * self.heads.dim);
        let mut out = vec![0.0; self.queries.len()];
        for (start, out) in (0..self.tokens).step_by(chunk).zip(out.chunks_mut(chunk * row_len)) {
            let end = self.tokens.min(start + chunk);
            let row = |position| Row { sequence: 0, position: position as u32, token: 0, role: Role::Prompt };
            let rows = (start..end).map(row).collect();
            let batch = Batch { rows, blocks: vec![&self.blocks], outputs: Vec::new() };
            let layer = LayerAttention {
                cpu: &cpu,
                attention: &attention,
                heads,
                sinks: &self.sinks,
                cache: &self.cache,
                layer: 1,
            };
            layer.attend(&batch, &self.queries[start * row_len..end * row_len], out);
        }
        out
    }

    /// The formula, in f64, for the last token at a position.
    fn exact(&self, position: usize, head: usize) -> Vec<f64> {
        let Heads { query, kv, dim } = self.heads;
        let wide = |all: &[f32], at: usize| -> Vec<f64> { all[at..at + dim].iter().map(|v| f64::from(*v)).collect() };
        let q = wide(&self.queries, (position * query + head) * dim);
        let first = self.cache.span(1).first_visible(position as u32) as usize;
        let place = |j: usize| (j * kv + head / (query / kv)) * dim;
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let powers: Vec<f64> =
            (first..=position).map(|j| (dot(&q, &wide(&self.keys, place(j))) / (dim as f64).sqrt()).exp()).collect();
        let sink = self.sinks.get(head).map_or(0.0, |sink| f64::from(*sink).exp());
        let total = powers.iter().sum::<f64>() + sink;
        let mut out = vec![0.0; dim];
        for (j, power) in (first..).zip(powers) {
            out.iter_mut().zip(wide(&self.values, place(j))).for_each(|(out, value)| *out += power / total * value);
        }
        out
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

const SHAPES: [Heads; 6] = [
    Heads { query: 16, kv: 2, dim: 64 },
    Heads { query: 12, kv: 4, dim: 32 },
    Heads { query: 3, kv: 3, dim: 64 },
    Heads { query: 13, kv: 1, dim: 18 },
    Heads { query: 4, kv: 2, dim: 2 },
    Heads { query: 2, kv: 1, dim: 136 },
];

const SPANS: [Span; 5] = [Span::Full, Span::Window(1), Span::Window(7), Span::Window(128), Span::Window(300)];

#[test]
fn every_kind_of_vector_agrees_with_the_formula() {
    for heads in SHAPES {
        for span in SPANS {
            let case = Case::new(heads, span, 600);
            for vectors in Vectors::here() {
                let out = case.attend(vectors, 2, 200);
                for position in [0, 1, 6, 7, 31, 32, 127, 128, 129, 255, 256, 257, 299, 300, 555, 599] {
                    for head in [0, heads.query / 2, heads.query - 1] {
                        let at = (position * heads.query + head) * heads.dim;
                        let pairs = out[at..at + heads.dim].iter().zip(case.exact(position, head));
                        let error = pairs.map(|(got, exact)| (f64::from(*got) - exact).abs()).fold(0.0, f64::max);
                        // Scores of at most 4 sqrt(dim) carry as many roundings as the head has elements, and their
                        // errors come out relative to values of at most 3.
                        let size = 4.0 * (heads.dim as f64).sqrt() * heads.dim as f64;
                        let tolerance = 3.0 * f64::from(f32::EPSILON) * (size + 40.0);
                        assert!(error <= tolerance, "{vectors:?}, {heads:?}, {span:?}, {position}, {head}: {error:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn equal_bits_whatever_the_chunks_the_threads_and_the_width_of_fused_vectors() {
    for heads in SHAPES {
        for span in SPANS {
            let case = Case::new(heads, span, 600);
            let mut fused = None;
            for vectors in Vectors::here() {
                let expected = bits(&case.attend(vectors, 1, 1));
                assert!(expected.iter().all(|value| f32::from_bits(*value).is_finite()), "{vectors:?}, {heads:?}");
                // Many threads for few tokens compute splits apart.
                for (threads, chunk) in [(1, 600), (2, 64), (5, 1), (5, 7), (2, 511)] {
                    let got = bits(&case.attend(vectors, threads, chunk));
                    assert!(got == expected, "{vectors:?}, {heads:?}, {span:?}: {threads} threads, chunks of {chunk}");
                }
                if vectors != Vectors::Plain {
                    assert!(
                        fused.get_or_insert_with(|| expected.clone()) == &expected,
                        "{vectors:?}, {heads:?}, {span:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_sink_takes_its_share_and_large_scores_stay_finite() {
    let heads = Heads { query: 1, kv: 1, dim: 2 };
    let mut case = Case::new(heads, Span::Full, 2);
    let (cpu, scale) = (Cpu::start(1).expect("a thread starts"), 2f32.sqrt());
    for position in 0..2 {
        case.cache.write(1, &case.blocks, position, &[1000.0, 0.0], &[3.0, -6.0]);
    }
    for (sinks, expected) in
        [(vec![1000.0], [2.0, -4.0]), (vec![], [3.0, -6.0]), (vec![f32::NEG_INFINITY], [3.0, -6.0])]
    {
        for vectors in Vectors::here() {
            let attention = Attention::new(vectors);
            let rows = vec![Row { sequence: 0, position: 1, token: 0, role: Role::Generated }];
            let batch = Batch { rows, blocks: vec![&case.blocks], outputs: Vec::new() };
            let mut out = [0.0; 2];
            LayerAttention { cpu: &cpu, attention: &attention, heads, sinks: &sinks, cache: &case.cache, layer: 1 }
                .attend(&batch, &[scale, 0.0], &mut out);
            let is_near = |(got, exact): (&f32, &f32)| (got - exact).abs() < 1e-3;
            assert!(out.iter().zip(&expected).all(is_near), "{vectors:?}: {out:?} instead of {expected:?}");
        }
    }
}
