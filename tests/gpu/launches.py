"""The kernels as a worker launches them: one class for each part of a step, with its buffers and a launch configuration.

Every class has `launch()`; what it computes stands in arrays named as in worker/kernels/README.md.
"""

import copy

import cupy as cp
import numpy as np

from weights import Weight, bf16_bits, bf16_values, descriptors, scale_values

HIDDEN, INNER, EXPERTS, USED, VOCABULARY = 2880, 2880, 32, 4, 201088
QUERY_HEADS, KV_HEADS, DIM = 64, 8, 64
# What a multiprocessor gives to all its blocks, and what a block may have (9.0); each block costs 1 KiB more.
PROCESSOR_SHARED, BLOCK_SHARED, BLOCK_COST = 233472, 232448, 1024
# What the kernels declare themselves: the block's plan, and the lists of experts.
PLAN, EXPERT_LISTS = 64, 2112
SHARED_DEPTH = 3


def processors():
    return cp.cuda.Device().attributes["MultiProcessorCount"]


def shared_bytes(form, tiles, stage_columns, columns, is_turing=False):
    table = 0 if form == "bf16" else 32768
    pipe = 0 if form == "bf16" or is_turing else 8 * SHARED_DEPTH * 1024
    return table + 1024 + pipe + (16384 if tiles == 4 else 8192) + stage_columns * (columns + 8) * 2


def stage_room(form, tiles, columns, blocks, fixed=0):
    """How many activations fit beside the rest where a multiprocessor is to hold `blocks` blocks."""
    room = min(PROCESSOR_SHARED // blocks - BLOCK_COST, BLOCK_SHARED) - fixed - shared_bytes(form, tiles, 0, columns)
    return max(0, min(tiles * 8, room // (2 * (columns + 8))))


def blocks_for(form, tokens):
    """Blocks of a product that a multiprocessor holds best."""
    return 3 if form != "bf16" and tokens <= 8 else 2


class Dense:
    """A launch of matvec over some matrices that read the same activations."""

    def __init__(self, modules, weights, x, blocks=None):
        self.modules, self.weights, self.x = modules, weights, x
        self.batch, self.columns = x.shape
        form = weights[0].form
        self.tiles = 1 if self.batch <= 8 else 2 if self.batch <= 16 else 4
        self.width = sum(weight.rows for weight in weights)
        self.list, self.map = descriptors(weights), scale_values()
        self.out = cp.full((self.batch, self.width), cp.nan, dtype=cp.float32)
        pieces = sum((weight.rows + 15) // 16 for weight in weights)
        blocks = blocks or blocks_for(form, self.batch)
        self.grid = min(pieces, processors() * blocks)
        self.stage = stage_room(form, self.tiles, self.columns, blocks, PLAN)
        if self.stage < self.batch:
            self.stage = 0
        self.shared = shared_bytes(form, self.tiles, self.stage, self.columns, modules.get("is_turing", False))

    def launch(self):
        self.modules["matvec"].launch(
            f"matvec_{self.weights[0].form}_{self.tiles * 8}", [self.grid], 256, self.shared,
            [self.list, len(self.weights), self.x, self.batch, self.columns, self.out, self.width, self.map, self.stage])


class Mixture:
    """The weights of a layer's mixture."""

    def __init__(self, form, bias_size=1.0):
        self.form = form
        self.gate_up = [Weight(form, 2 * INNER, HIDDEN, bias_size) for _ in range(EXPERTS)]
        self.down = [Weight(form, HIDDEN, INNER, bias_size) for _ in range(EXPERTS)]
        self.router = bf16_bits(cp.random.standard_normal((EXPERTS, HIDDEN), dtype=cp.float32) * 0.02)
        self.router_bias = cp.random.standard_normal(EXPERTS, dtype=cp.float32) * 0.1
        self.gate_up_list, self.down_list, self.map = descriptors(self.gate_up), descriptors(self.down), scale_values()
        self.gain = cp.random.random(HIDDEN, dtype=cp.float32)


class Experts:
    """A layer's mixture from attention's result to each slot's result."""

    def __init__(self, modules, mixture, x, change, blocks=None):
        self.modules, self.mixture, self.residual, self.change = modules, mixture, x, change
        self.tokens = len(x)
        slots = self.tokens * USED
        self.sum = cp.full((self.tokens, HIDDEN), cp.nan, dtype=cp.float32)
        self.x = cp.full((self.tokens, HIDDEN), 0x7FC0, dtype=cp.uint16)
        self.logits = cp.full((self.tokens, EXPERTS), cp.nan, dtype=cp.float32)
        self.chosen, self.slots = cp.zeros(slots, cp.uint32), cp.zeros(slots, cp.uint32)
        self.weights = cp.full(slots, cp.nan, dtype=cp.float32)
        self.count, self.experts, self.firsts = (cp.zeros(n, cp.uint32) for n in (1, EXPERTS, EXPERTS + 1))
        self.counters = cp.zeros(self.tokens + 1, cp.uint32)
        self.inner = cp.full((slots, INNER), 0x7FC0, dtype=cp.uint16)
        self.out = cp.full((slots, HIDDEN), cp.nan, dtype=cp.float32)
        self.tiles = 1 if self.tokens <= 32 else 2
        self.pieces = 32 if self.tokens == 1 else 16 if self.tokens <= 4 else 8
        form = mixture.form
        self.blocks = blocks or (3 if self.tokens <= 2 and form != "bf16" else 2)
        self.stage = [stage_room(form, self.tiles, columns, self.blocks, EXPERT_LISTS) for columns in (HIDDEN, INNER)]
        is_turing = modules.get("is_turing", False)
        self.shared = [shared_bytes(form, self.tiles, stage, columns, is_turing)
                       for stage, columns in zip(self.stage, (HIDDEN, INNER))]

    def route(self):
        m = self.mixture
        self.modules["route"].launch(
            "norm_route", [self.pieces, self.tokens], 256, 0,
            [self.residual, self.change, m.gain, 1e-5, HIDDEN, self.sum, self.x, m.router, m.router_bias, EXPERTS, USED,
             self.logits, self.chosen, self.weights, self.count, self.experts, self.firsts, self.slots, self.counters])

    def gate_up(self):
        m = self.mixture
        self.modules["moe"].launch(
            f"moe_gate_up_{m.form}_{self.tiles * 8}", [processors() * self.blocks], 256, self.shared[0],
            [m.gate_up_list, EXPERTS, self.count, self.experts, self.firsts, self.slots, self.x, USED, HIDDEN, 2 * INNER,
             1.702, 7.0, self.inner, m.map, self.stage[0]])

    def down(self):
        m = self.mixture
        self.modules["moe"].launch(
            f"moe_down_{m.form}_{self.tiles * 8}", [processors() * self.blocks], 256, self.shared[1],
            [m.down_list, EXPERTS, self.count, self.experts, self.firsts, self.slots, self.inner, INNER, HIDDEN, self.out,
             m.map, self.stage[1]])

    def launch(self):
        self.route()
        self.gate_up()
        self.down()

    def expected(self):
        """The sum, the normalised row, each slot's result and weight, in f64."""
        m = self.mixture
        total = self.residual.astype(cp.float64) + self.change
        x = total / cp.sqrt((total ** 2).mean(axis=1, keepdims=True) + 1e-5) * m.gain
        logits = cp.asnumpy(x @ bf16_values(m.router).astype(cp.float64).T + m.router_bias)
        out, weights = cp.zeros(self.out.shape), np.zeros((self.tokens, USED))
        for token in range(self.tokens):
            best = np.argsort(-logits[token], kind="stable")[:USED]
            powers = np.exp(logits[token][best] - logits[token][best[0]])
            weights[token] = powers / powers.sum()
            for rank, expert in enumerate(best):
                both = m.gate_up[expert].values() @ x[token] + m.gate_up[expert].bias
                gate, up = cp.minimum(both[0::2], 7), cp.clip(both[1::2], -7, 7)
                inner = (up + 1) * gate / (1 + cp.exp(-1.702 * gate))
                slot = token * USED + rank
                out[slot] = m.down[expert].values() @ inner + m.down[expert].bias
        return total, x, out, cp.asarray(weights).reshape(-1)


def cuts_of(seen):
    """Pieces of a row that sees so many positions."""
    length = 128
    while length * 64 < seen:
        length *= 2
    return (seen + length - 1) // length


class Attention:
    """Rotation, cache write and attention of one token for each of `positions`, each a sequence of its own."""

    def __init__(self, modules, positions, window=0, kind="bf16", dim=DIM, heads=(QUERY_HEADS, KV_HEADS)):
        self.modules, self.window, self.kind, self.dim = modules, window, kind, dim
        self.query_heads, self.kv_heads = heads
        self.rows = len(positions)
        self.stride = max(positions) // 32 + 1
        blocks = self.rows * self.stride
        values = cp.random.standard_normal(blocks * self.kv_heads * 64 * dim, dtype=cp.float32)
        if kind == "bf16":
            self.pool = bf16_bits(values).view(cp.uint8)
        else:
            codes = cp.clip(cp.rint(values * 40), -127, 127).astype(cp.int8).view(cp.uint8)
            scales = (cp.random.random((blocks * self.kv_heads, 64), dtype=cp.float32) * 0.02 + 0.01).view(cp.uint8)
            codes = codes.reshape(blocks * self.kv_heads, -1)
            self.pool = cp.ascontiguousarray(cp.concatenate([codes, scales.reshape(len(codes), -1)], axis=1)).reshape(-1)
        self.blocks = cp.random.permutation(blocks).astype(cp.uint32).reshape(self.rows, self.stride)
        self.firsts = cp.zeros(self.rows, cp.uint32)
        self.sequences = cp.arange(self.rows, dtype=cp.uint32)
        self.positions = cp.asarray(positions, dtype=cp.uint32)
        self.width = (self.query_heads + 2 * self.kv_heads) * dim
        self.qkv = cp.random.standard_normal((self.rows, self.width), dtype=cp.float32)
        angles = cp.random.random((self.rows, dim // 2), dtype=cp.float32) * 6
        self.cosines, self.sines = cp.cos(angles), cp.sin(angles)
        self.sinks = cp.random.standard_normal(self.query_heads, dtype=cp.float32)
        self.cuts = max(cuts_of(min(p + 1, window or p + 1)) for p in positions)
        self.partial = cp.full((self.rows, self.query_heads, self.cuts, dim + 2), cp.nan, dtype=cp.float32)
        self.counters = cp.zeros(self.rows * self.kv_heads, cp.uint32)
        self.out = cp.full((self.rows, self.query_heads * dim), 0x7FC0, dtype=cp.uint16)
        tile, row = 128 if dim <= 64 else 64, 2 * dim + 16 if kind == "bf16" else dim + 8
        self.shared = max(2 * tile * row, 256 * dim)

    def row(self, row):
        """The same attention of one row alone, with a copy of the cache."""
        other = copy.copy(self)
        other.rows, other.pool = 1, self.pool.copy()
        for name in ("blocks", "sequences", "positions", "qkv", "cosines", "sines"):
            setattr(other, name, getattr(self, name)[row:row + 1].copy())
        other.sequences[:] = 0
        other.partial, other.counters = cp.full_like(self.partial[:1], cp.nan), cp.zeros(self.kv_heads, cp.uint32)
        other.out = cp.full((1, self.query_heads * self.dim), 0x7FC0, dtype=cp.uint16)
        return other

    def cache(self):
        return [self.pool, 1, 0, self.kv_heads, self.dim, self.blocks, self.firsts, self.stride, self.sequences,
                self.positions]

    def launch(self, is_written=0):
        self.modules["decode"].launch(
            f"attend_decode_{self.kind}", [self.cuts, self.kv_heads, self.rows], 256, self.shared,
            [self.qkv, self.cosines, self.sines, self.query_heads, self.window, is_written, *self.cache(), self.sinks,
             self.partial, self.counters, self.out])

    def launch_apart(self):
        """The same with rotation and cache write as a launch of their own; changes the queries."""
        heads = self.query_heads + 2 * self.kv_heads
        self.modules["decode"].launch(
            f"rope_write_{self.kind}", [self.rows, (heads + 7) // 8], 256, 0,
            [self.qkv, self.cosines, self.sines, self.query_heads, *self.cache()])
        self.launch(is_written=1)

    def history(self):
        """Keys and values of the pool: [block, kv head, key or value, token, dim]."""
        if self.kind == "bf16":
            return bf16_values(self.pool.view(cp.uint16)).astype(cp.float64).reshape(-1, self.kv_heads, 2, 32, self.dim)
        rows = self.pool.reshape(-1, 64 * (self.dim + 4))
        codes = rows[:, :64 * self.dim].view(cp.int8).astype(cp.float64).reshape(-1, 64, self.dim)
        scales = cp.ascontiguousarray(rows[:, 64 * self.dim:]).view(cp.float32).astype(cp.float64)
        return (codes * scales[:, :, None]).reshape(-1, self.kv_heads, 2, 32, self.dim)

    def expected(self):
        """In f64, from the projections before rotation and the cache before the launch."""
        pool, half, group = self.history(), self.dim // 2, self.query_heads // self.kv_heads
        results = []
        for row in range(self.rows):
            heads = self.qkv[row].astype(cp.float64).reshape(-1, self.dim)
            turned, cos, sin = heads.copy(), self.cosines[row], self.sines[row]
            turned[:, :half] = heads[:, :half] * cos - heads[:, half:] * sin
            turned[:, half:] = heads[:, half:] * cos + heads[:, :half] * sin
            position = int(self.positions[row])
            history = pool[self.blocks[row]].transpose(2, 1, 0, 3, 4).reshape(2, self.kv_heads, -1, self.dim).copy()
            history[0, :, position] = turned[self.query_heads:self.query_heads + self.kv_heads]
            history[1, :, position] = heads[self.query_heads + self.kv_heads:]
            first = max(0, position + 1 - self.window) if self.window else 0
            keys, values = history[:, :, first:position + 1]
            queries = turned[:self.query_heads].reshape(self.kv_heads, group, self.dim)
            scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(self.dim)
            sinks = self.sinks.astype(cp.float64).reshape(self.kv_heads, -1, 1)
            largest = cp.maximum(scores.max(axis=2, keepdims=True), sinks)
            powers = cp.exp(scores - largest)
            results.append((powers / (powers.sum(axis=2, keepdims=True) + cp.exp(sinks - largest))) @ values)
        return cp.stack(results).reshape(self.rows, -1)


class Norm:
    """Adds parts to rows of x and normalises them."""

    def __init__(self, modules, x, gain, parts=None, weights=None, narrow=None, wide=None, rows=None):
        count = 0 if parts is None else parts.size // x.size
        outputs = len(x) if rows is None else len(rows)
        self.modules, self.grid, self.threads = modules, [outputs], min(768, (HIDDEN // 4 + 31) // 32 * 32)
        self.arguments = [x, parts, count, weights, rows, gain, 1e-5, HIDDEN, narrow, wide]

    def launch(self):
        self.modules["norm"].launch("add_norm", self.grid, self.threads, 0, self.arguments)


class Chooser:
    """The choice of a token for each row of logits."""

    def __init__(self, modules, logits, temperatures):
        self.modules, self.logits = modules, logits
        self.rows, self.vocabulary = logits.shape
        self.chunks = (self.vocabulary + 1023) // 1024
        self.temperatures = cp.asarray(temperatures, dtype=cp.float32)
        self.seeds, self.positions = cp.arange(self.rows, dtype=cp.uint64), cp.arange(self.rows, dtype=cp.uint64)
        self.partials = cp.zeros((self.rows * self.chunks, 24), cp.uint8)
        self.chosen = cp.zeros((self.rows, 2), cp.uint32)

    def launch(self):
        sample = self.modules["sample"]
        sample.launch("choose_scan", [self.chunks, self.rows], 256, 0,
                      [self.logits, self.vocabulary, self.temperatures, self.partials])
        sample.launch("choose_pick", [self.rows], 256, 0,
                      [self.logits, self.vocabulary, self.temperatures, self.seeds, self.positions, self.partials,
                       self.chunks, self.chosen])
