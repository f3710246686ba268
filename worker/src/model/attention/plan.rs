//! Cuts the tokens of a step into tiles, and the work on them into parts that threads take. Pure; nothing of what it
//! decides shows in a result.

use std::ops::Range;

use super::Heads;
use super::tile::{SPLIT_TOKENS, State, TILE_QUERIES};
use crate::engine::pager::Span;
use crate::model::batch::Row;
use crate::model::config::Config;

/// Parts for each thread below which the splits of a tile are computed apart.
const PARTS_PER_THREAD_MIN: usize = 4;

/// Floats of states of splits, at most: beyond, tiles are computed whole.
const SPLIT_STATES_MAX: usize = 8 << 20;

/// The work of one thread on one tile.
#[derive(Debug)]
pub(super) struct Part {
    /// The row of the first token.
    pub(super) row: usize,
    pub(super) tokens: usize,
    pub(super) kv_head: usize,
    pub(super) splits: Range<u32>,
}

/// Parts whose states have one size.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// By tile, then head, then split.
    pub(super) parts: Vec<Part>,
    /// Whether each split has a part of its own.
    pub(super) is_split: bool,
    /// Floats of a part's state.
    pub(super) state_len: usize,
    pub(super) states: Vec<f32>,
}

/// Where the states of a row are.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) pass: usize,
    /// The first part of its tile, and the parts for each head.
    pub(super) part: usize,
    pub(super) parts: usize,
    /// Its index in the tile.
    pub(super) token: usize,
}

/// The tiles and parts of a step in one layer.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// That of tokens alone and that of tiles of several.
    pub(super) passes: [Pass; 2],
    /// For each row.
    pub(super) places: Vec<Place>,
    tiles: Vec<Tile>,
}

#[derive(Clone, Debug)]
struct Tile {
    row: usize,
    tokens: usize,
    splits: Range<u32>,
}

impl Tile {
    fn pass(&self) -> usize {
        usize::from(self.tokens > 1)
    }
}

impl Plan {
    /// Plans a step anew, in the memory of the last.
    pub(super) fn lay_out(&mut self, rows: &[Row], heads: Heads, span: Span, threads: usize) {
        let group = heads.query / heads.kv;
        self.cut(rows, (TILE_QUERIES / group).max(1), span);
        self.places.clear();
        for (index, pass) in self.passes.iter_mut().enumerate() {
            let tiles = || self.tiles.iter().filter(|tile| tile.pass() == index);
            pass.parts.clear();
            pass.state_len = State::len(group * tiles().map(|tile| tile.tokens).max().unwrap_or(0), heads.dim);
            let splits: usize = tiles().map(|tile| tile.splits.len()).sum();
            let is_idle = tiles().count() * heads.kv < PARTS_PER_THREAD_MIN * threads;
            pass.is_split = threads > 1 && is_idle && splits * heads.kv * pass.state_len <= SPLIT_STATES_MAX;
        }
        for tile in &self.tiles {
            let (pass, index) = (&mut self.passes[tile.pass()], tile.pass());
            let parts = if pass.is_split { tile.splits.len() } else { 1 };
            let part = pass.parts.len();
            self.places.extend((0..tile.tokens).map(|token| Place { pass: index, part, parts, token }));
            let of = |kv_head, splits| Part { row: tile.row, tokens: tile.tokens, kv_head, splits };
            for kv_head in 0..heads.kv {
                match pass.is_split {
                    true => pass.parts.extend(tile.splits.clone().map(|split| of(kv_head, split..split + 1))),
                    false => pass.parts.push(of(kv_head, tile.splits.clone())),
                }
            }
        }
        for pass in &mut self.passes {
            // Each part writes its state before it reads it: what was there before is of no account.
            let len = pass.parts.len() * pass.state_len;
            if pass.states.len() < len {
                pass.states.resize(len, 0.0);
            }
        }
    }

    fn cut(&mut self, rows: &[Row], tokens_max: usize, span: Span) {
        self.tiles.clear();
        for (index, row) in rows.iter().enumerate() {
            let end = (row.position + 1).div_ceil(SPLIT_TOKENS);
            if let Some(last) = self.tiles.last_mut() {
                let first = rows[last.row];
                let is_next = first.sequence == row.sequence && first.position + last.tokens as u32 == row.position;
                if is_next && last.tokens < tokens_max {
                    last.tokens += 1;
                    last.splits.end = end;
                    continue;
                }
            }
            let splits = span.first_visible(row.position) / SPLIT_TOKENS..end;
            self.tiles.push(Tile { row: index, tokens: 1, splits });
        }
    }
}

/// Gives the bytes of states that a step of `rows` tokens takes at most.
#[must_use]
pub fn scratch_bytes(config: &Config, rows: u64) -> u64 {
    let state = State::len(config.heads, config.head_dim) as u64;
    let splits = (config.context_tokens as u64).div_ceil(u64::from(SPLIT_TOKENS));
    let split = (rows * splits * state).min(SPLIT_STATES_MAX as u64);
    (rows * state + split) * size_of::<f32>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::batch::Role;

    const HEADS: Heads = Heads { query: 16, kv: 2, dim: 4 };

    fn row(sequence: usize, position: u32) -> Row {
        Row { sequence, position, token: 0, role: Role::Prompt }
    }

    #[test]
    fn neighbours_make_tiles_and_idle_threads_get_splits() {
        let rows: Vec<Row> = [row(0, 600)].into_iter().chain((250..262).map(|p| row(1, p))).collect();
        let parts = |span, threads| {
            let mut plan = Plan::default();
            plan.lay_out(&rows, HEADS, span, threads);
            let of = |pass: &Pass| -> Vec<_> {
                pass.parts.iter().map(|p| (p.row, p.tokens, p.kv_head, p.splits.clone())).collect()
            };
            (plan.places.iter().map(|place| (place.pass, place.part, place.token)).collect::<Vec<_>>(), {
                let [alone, several] = &plan.passes;
                [of(alone), of(several)]
            })
        };
        let (places, [alone, several]) = parts(Span::Full, 1);
        assert_eq!(alone, [(0, 1, 0, 0..3), (0, 1, 1, 0..3)]);
        assert_eq!(several, [(1, 8, 0, 0..2), (1, 8, 1, 0..2), (9, 4, 0, 0..2), (9, 4, 1, 0..2)]);
        assert_eq!((places[0], places[1], places[8], places[9]), ((0, 0, 0), (1, 0, 0), (1, 0, 7), (1, 2, 0)));
        let (_, [alone, several]) = parts(Span::Window(128), 1);
        assert_eq!(alone[0], (0, 1, 0, 1..3));
        assert_eq!(several[0], (1, 8, 0, 0..2));
        let (_, [alone, _]) = parts(Span::Full, 8);
        let splits: Vec<_> = (0..3).map(|split| (0, 1, 0, split..split + 1)).collect();
        assert_eq!((&alone[..3], alone.len()), (&splits[..], 6));
    }
}
