//! The served decoder: equal bits whatever the batch, the chunks and the threads, and agreement with the plain reference.

use std::path::{Path, PathBuf};

use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::engine::kv_cache::KvCache;
use bulkhead_worker::engine::pager::{Blocks, KvShape};
use bulkhead_worker::model::batch::{Batch, Role, Row};
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::decoder::Decoder;
use bulkhead_worker::model::weights::{self, Quantize};
use bulkhead_worker::quant::cpu::Cpu;

/// Tokens that one step may hold in these tests.
const STEP_TOKENS: u32 = 512;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle/models").join(name)
}

fn decoder(name: &str, threads: usize) -> Decoder {
    let dir = model(name);
    let checkpoint = Checkpoint::open(&dir).expect("the fixture is a checkpoint");
    let config = Config::read(&dir).expect("the fixture has a configuration");
    let weights = weights::load(&checkpoint, &config, Quantize::Nf4, &mut |_, _, _| {}).expect("the fixture is whole");
    Decoder::new(config, weights, Cpu::start(threads).expect("threads start"))
}

/// A sequence of tokens that depends on its seed alone.
fn tokens(seed: u32, count: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % vocabulary as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Computes several sequences side by side, each in chunks of its own size, and gives the logits of every row.
fn logits(decoder: &Decoder, sequences: &[(Vec<u32>, usize)]) -> Vec<Vec<f32>> {
    let blocks_needed: usize = sequences.iter().map(|(tokens, _)| tokens.len().div_ceil(32)).sum();
    let shape = KvShape::of(decoder.config());
    let mut cache = KvCache::new(shape, blocks_needed as u32, sequences.len() as u32, STEP_TOKENS);
    let mut blocks: Vec<Blocks> = sequences.iter().map(|_| Blocks::default()).collect();
    let mut done = vec![0; sequences.len()];
    let mut results = vec![Vec::new(); sequences.len()];
    while sequences.iter().zip(&done).any(|((tokens, _), done)| *done < tokens.len()) {
        let mut batch = Batch { rows: Vec::new(), blocks: Vec::new(), outputs: Vec::new() };
        let mut ends = done.clone();
        for (index, (tokens, chunk)) in sequences.iter().enumerate() {
            ends[index] = tokens.len().min(done[index] + chunk);
            cache.pager.reserve(&mut blocks[index], ends[index] as u32).expect("room for all was made");
            batch.rows.extend((done[index]..ends[index]).map(|position| Row {
                sequence: index,
                position: position as u32,
                token: tokens[position],
                role: Role::Prompt,
            }));
        }
        batch.blocks = blocks.iter().collect();
        batch.outputs = (0..batch.rows.len()).collect();
        let computed = decoder.forward(&batch, &mut cache);
        let rows = batch.rows.clone();
        drop(batch);
        for (row, logits) in rows.iter().zip(computed.chunks_exact(decoder.config().vocab_size)) {
            results[row.sequence].extend_from_slice(logits);
        }
        for (index, end) in ends.iter().enumerate() {
            cache.pager.release_behind(&mut blocks[index], *end as u32);
        }
        done = ends;
    }
    blocks.iter_mut().for_each(|blocks| cache.pager.release(blocks));
    let (all, free) = cache.pager.blocks();
    assert_eq!(all, free, "every block came back");
    results
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn equal_bits_whatever_the_chunks_and_threads() {
    for name in ["gptoss_basic", "gptoss_window_edges"] {
        let one = decoder(name, 1);
        let sequence = tokens(1, 300, one.config().vocab_size);
        let expected = bits(&logits(&one, &[(sequence.clone(), 1)])[0]);
        for threads in [1, 2] {
            let decoder = decoder(name, threads);
            for chunk in [1, 7, 64, 512] {
                let got = bits(&logits(&decoder, &[(sequence.clone(), chunk)])[0]);
                assert!(got == expected, "{name}: {threads} threads and chunks of {chunk} give other bits");
            }
        }
    }
}

#[test]
fn equal_bits_alone_and_among_fifteen_others() {
    let decoder = decoder("gptoss_basic", 2);
    let vocabulary = decoder.config().vocab_size;
    // Lengths and chunks all differ, so the sequences meet in every phase of prompt and answer.
    let sequences: Vec<(Vec<u32>, usize)> =
        (0..16).map(|i| (tokens(i, 20 + 9 * i as usize, vocabulary), 1 + (i as usize * 5) % 17)).collect();
    let together = logits(&decoder, &sequences);
    for (sequence, together) in sequences.iter().zip(&together) {
        let alone = logits(&decoder, &[(sequence.0.clone(), 1)]);
        assert!(bits(&alone[0]) == bits(together), "a neighbour changed a sequence of {} tokens", sequence.0.len());
    }
}
