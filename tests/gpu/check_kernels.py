"""Compiles the kernels with nvcc, checks each against plain f64 arithmetic, and times them on gpt-oss-20b's shapes.

Usage: python3 tests/gpu/check_kernels.py [--checks-only]. Needs a card, nvcc, cupy. Ends with status 1 if a check fails.
"""

import pathlib
import subprocess
import sys
import tempfile
import traceback

import cupy as cp
import numpy as np

from driver import Module, microseconds
from weights import FORMATS, Weight, bf16_bits, bf16_values, descriptors, scale_values

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "worker" / "kernels"
SOURCES = ("matvec", "moe", "norm", "decode", "sample")
HIDDEN, INNER, EXPERTS, USED, VOCABULARY = 2880, 2880, 32, 4, 201088
QUERY_HEADS, KV_HEADS, DIM = 64, 8, 64
LAYERS = 24
failures = []


def build(arguments, suffix, folder):
    jobs = []
    for source in SOURCES:
        target = folder / f"{source}.{suffix}"
        command = ["nvcc", "-std=c++17", "-O3", *arguments, "-o", str(target), str(KERNELS / f"{source}.cu")]
        jobs.append((source, target, subprocess.Popen(command)))
    for source, _, job in jobs:
        if job.wait() != 0:
            sys.exit(f"{source}.cu does not compile")
    return {source: Module(str(target)) for source, target, _ in jobs}


def report(what, found, expected, tolerance):
    error = float(cp.linalg.norm(found.astype(cp.float64) - expected) / cp.linalg.norm(expected))
    is_good = error <= tolerance
    if not is_good:
        failures.append(what)
    print(f"{'ok  ' if is_good else 'FAIL'} {what:46} error {error:.1e}, at most {tolerance:.1e}", flush=True)


def same(what, one, other):
    is_good = bool((one.view(cp.uint32) == other.view(cp.uint32)).all())
    if not is_good:
        failures.append(what)
    print(f"{'ok  ' if is_good else 'FAIL'} {what:46} bits equal: {is_good}", flush=True)


def tolerance(form):
    return 2.5e-3 if form.startswith("nf4") else 2e-6


def shared_bytes(form, tiles, staged, columns):
    return (0 if form == "bf16" else 32768) + 1024 + tiles * 4096 + staged * (columns + 8) * 2


def processors():
    return cp.cuda.Device().attributes["MultiProcessorCount"]


class Dense:
    """A launch of matvec over some matrices that read the same activations."""

    def __init__(self, modules, weights, x, blocks_per_processor=2):
        self.modules, self.weights, self.x = modules, weights, x
        self.batch, self.columns = x.shape
        self.tiles = 1 if self.batch <= 8 else 2
        self.width = sum(weight.rows for weight in weights)
        self.list, self.map = descriptors(weights), scale_values()
        self.out = cp.full((self.batch, self.width), cp.nan, dtype=cp.float32)
        pieces = sum((weight.rows + 15) // 16 for weight in weights)
        self.grid = min(pieces, processors() * blocks_per_processor)

    def launch(self):
        form = self.weights[0].form
        staged = self.batch if self.batch <= 8 else 0
        self.modules["matvec"].launch(
            f"matvec_{form}_{self.tiles * 8}", [self.grid], 256, shared_bytes(form, self.tiles, staged, self.columns),
            [self.list, len(self.weights), self.x, self.batch, self.columns, self.out, self.width, self.map, int(staged > 0)])


class Experts:
    """A layer's mixture from normalised activations to each slot's result."""

    def __init__(self, modules, form, tokens, gate_up=None, down=None):
        self.modules, self.form, self.tokens = modules, form, tokens
        self.gate_up = gate_up or [Weight(form, 2 * INNER, HIDDEN) for _ in range(EXPERTS)]
        self.down = down or [Weight(form, HIDDEN, INNER) for _ in range(EXPERTS)]
        self.router = bf16_bits(cp.random.standard_normal((EXPERTS, HIDDEN), dtype=cp.float32) * 0.02)
        self.router_bias = cp.random.standard_normal(EXPERTS, dtype=cp.float32) * 0.1
        self.gate_up_list, self.down_list, self.map = descriptors(self.gate_up), descriptors(self.down), scale_values()
        slots = tokens * USED
        self.wide = bf16_values(bf16_bits(cp.random.standard_normal((tokens, HIDDEN), dtype=cp.float32)))
        self.x = bf16_bits(self.wide)
        self.logits = cp.full((tokens, EXPERTS), cp.nan, dtype=cp.float32)
        self.chosen, self.slots = cp.zeros(slots, cp.uint32), cp.zeros(slots, cp.uint32)
        self.weights = cp.full(slots, cp.nan, dtype=cp.float32)
        self.count, self.experts, self.firsts = (cp.zeros(n, cp.uint32) for n in (1, EXPERTS, EXPERTS + 1))
        self.inner = cp.full((slots, INNER), 0x7FC0, dtype=cp.uint16)
        self.out = cp.full((slots, HIDDEN), cp.nan, dtype=cp.float32)

    def route(self):
        moe = self.modules["moe"]
        moe.launch("moe_router", [EXPERTS, self.tokens], 128, 0,
                   [self.router, self.router_bias, self.wide, HIDDEN, self.logits])
        moe.launch("moe_route", [1], 256, 0,
                   [self.logits, self.tokens, EXPERTS, USED, self.chosen, self.weights, self.count, self.experts,
                    self.firsts, self.slots])

    def products(self):
        tiles, staged = (1, self.tokens) if self.tokens <= 8 else (2, 0)
        grid, moe = [processors() * 2], self.modules["moe"]
        groups = [self.count, self.experts, self.firsts, self.slots]
        moe.launch(f"moe_gate_up_{self.form}_{tiles * 8}", grid, 256, shared_bytes(self.form, tiles, staged, HIDDEN),
                   [self.gate_up_list, *groups, self.x, USED, HIDDEN, 2 * INNER, 1.702, 7.0, self.inner, self.map,
                    int(staged > 0)])
        moe.launch(f"moe_down_{self.form}_{tiles * 8}", grid, 256, shared_bytes(self.form, tiles, staged, INNER),
                   [self.down_list, *groups, self.inner, INNER, HIDDEN, self.out, self.map, int(staged > 0)])

    def expected(self):
        """Each slot's result and weight, in f64."""
        x = self.wide.astype(cp.float64)
        logits = cp.asnumpy(x @ bf16_values(self.router).astype(cp.float64).T + self.router_bias)
        out, weights = cp.zeros(self.out.shape), np.zeros((self.tokens, USED))
        for token in range(self.tokens):
            best = np.argsort(-logits[token], kind="stable")[:USED]
            powers = np.exp(logits[token][best] - logits[token][best[0]])
            weights[token] = powers / powers.sum()
            for rank, expert in enumerate(best):
                both = self.gate_up[expert].values() @ x[token] + self.gate_up[expert].bias
                gate, up = cp.minimum(both[0::2], 7), cp.clip(both[1::2], -7, 7)
                inner = (up + 1) * gate / (1 + cp.exp(-1.702 * gate))
                slot = token * USED + rank
                out[slot] = self.down[expert].values() @ inner + self.down[expert].bias
        return out, cp.asarray(weights).reshape(-1)


class Attention:
    """Rotation, cache write and attention of one token for each of `positions`, each a sequence of its own."""

    def __init__(self, modules, positions, window=0, kind="bf16"):
        self.modules, self.window, self.kind = modules, window, kind
        self.rows = len(positions)
        self.stride = max(positions) // 32 + 1
        blocks = self.rows * self.stride
        self.block_bytes = KV_HEADS * 64 * (DIM * 2 if kind == "bf16" else DIM + 4)
        values = cp.random.standard_normal(blocks * KV_HEADS * 64 * DIM, dtype=cp.float32)
        if kind == "bf16":
            self.pool = bf16_bits(values).view(cp.uint8)
        else:
            self.pool = cp.zeros(blocks * self.block_bytes, cp.uint8)
        self.blocks = cp.random.permutation(blocks).astype(cp.uint32).reshape(self.rows, self.stride)
        self.firsts = cp.zeros(self.rows, cp.uint32)
        self.sequences = cp.arange(self.rows, dtype=cp.uint32)
        self.positions = cp.asarray(positions, dtype=cp.uint32)
        self.width = (QUERY_HEADS + 2 * KV_HEADS) * DIM
        self.qkv = cp.random.standard_normal((self.rows, self.width), dtype=cp.float32)
        angles = cp.random.random((self.rows, DIM // 2), dtype=cp.float32) * 6
        self.cosines, self.sines = cp.cos(angles), cp.sin(angles)
        self.sinks = cp.random.standard_normal(QUERY_HEADS, dtype=cp.float32)
        self.cuts = max(p // 128 - (max(0, p + 1 - window) // 128 if window else 0) + 1 for p in positions)
        self.partial = cp.full((self.rows, QUERY_HEADS, self.cuts, DIM + 2), cp.nan, dtype=cp.float32)
        self.out = cp.full((self.rows, QUERY_HEADS * DIM), 0x7FC0, dtype=cp.uint16)

    def launch(self):
        decode, cache = self.modules["decode"], [self.pool, 1, 0, KV_HEADS, DIM, self.blocks, self.firsts, self.stride,
                                                 self.sequences, self.positions]
        decode.launch(f"rope_write_{self.kind}", [self.rows, 10], 256, 0,
                      [self.qkv, self.cosines, self.sines, QUERY_HEADS, *cache])
        decode.launch(f"attend_decode_{self.kind}", [self.cuts, KV_HEADS, self.rows], 128, 0,
                      [self.qkv, QUERY_HEADS, self.window, *cache, self.partial])
        decode.launch("attend_combine", [QUERY_HEADS, self.rows], 64, 0,
                      [self.partial, self.sinks, self.positions, self.window, self.cuts, DIM, self.out])

    def expected(self, qkv):
        """From the projections before rotation, in f64; bf16 only."""
        pool = bf16_values(self.pool.view(cp.uint16)).astype(cp.float64).reshape(-1, KV_HEADS, 2, 32, DIM)
        results = []
        for row in range(self.rows):
            heads = qkv[row].astype(cp.float64).reshape(-1, DIM)
            turned, cos, sin = heads.copy(), self.cosines[row], self.sines[row]
            turned[:, :32] = heads[:, :32] * cos - heads[:, 32:] * sin
            turned[:, 32:] = heads[:, 32:] * cos + heads[:, :32] * sin
            position = int(self.positions[row])
            history = pool[self.blocks[row]].transpose(2, 1, 0, 3, 4).reshape(2, KV_HEADS, -1, DIM).copy()
            history[0, :, position] = bf16_values(bf16_bits(turned[QUERY_HEADS:QUERY_HEADS + KV_HEADS]))
            history[1, :, position] = bf16_values(bf16_bits(heads[QUERY_HEADS + KV_HEADS:]))
            first = max(0, position + 1 - self.window) if self.window else 0
            keys, values = history[:, :, first:position + 1]
            queries = turned[:QUERY_HEADS].reshape(KV_HEADS, -1, DIM)
            scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(DIM)
            sinks = self.sinks.astype(cp.float64).reshape(KV_HEADS, -1, 1)
            largest = cp.maximum(scores.max(axis=2, keepdims=True), sinks)
            powers = cp.exp(scores - largest)
            results.append((powers / (powers.sum(axis=2, keepdims=True) + cp.exp(sinks - largest))) @ values)
        return cp.stack(results).reshape(self.rows, -1)


def check_products(modules, forms):
    for form in forms:
        for rows, columns in (((4096, 512, 512), HIDDEN), ((2880,), 4096)):
            weights, output = [], 0
            for count in rows:
                weights.append(Weight(form, count, columns, output=output))
                output += count
            x = bf16_bits(cp.random.standard_normal((16, columns), dtype=cp.float32))
            expected = bf16_values(x).astype(cp.float64) @ cp.concatenate([w.values() for w in weights]).T
            expected += cp.concatenate([w.bias for w in weights])
            results = []
            for batch in (16, 7, 1):
                dense = Dense(modules, weights, cp.ascontiguousarray(x[:batch]))
                dense.launch()
                results.append(dense.out)
            report(f"matvec {form} {rows} x {columns}", results[0], expected, tolerance(form))
            same(f"  batch 16, 7 and 1", cp.concatenate([results[0][:7], results[0][:1]]), cp.concatenate(results[1:]))


def check_experts(modules, forms):
    for form in forms:
        experts = Experts(modules, form, 2)
        experts.route()
        experts.products()
        out, weights = experts.expected()
        report(f"router weights, {form}", experts.weights, weights, 1e-5)
        report(f"gate_up and down, {form}", experts.out, out, tolerance(form) + 3e-3)
        many = Experts(modules, form, 14, experts.gate_up, experts.down)
        many.router, many.router_bias = experts.router, experts.router_bias
        many.x[:2], many.wide[:2] = experts.x, experts.wide
        many.route()
        many.products()
        same(f"  tokens 2 and 14", many.out[:8], experts.out)


def check_rest(modules):
    for window in (0, 128):
        attention = Attention(modules, [0, 31, 300, 1023, 4097], window)
        qkv = attention.qkv.copy()
        expected = attention.expected(qkv)
        attention.launch()
        report(f"rope, cache and attention, window {window}", bf16_values(attention.out), expected, 2.5e-3)
    rows, parts = 3, 4
    x, part = (cp.random.standard_normal(shape, dtype=cp.float32) for shape in ((rows, HIDDEN), (rows, parts, HIDDEN)))
    weights, gain = (cp.random.random(shape, dtype=cp.float32) for shape in ((rows, parts), (HIDDEN,)))
    total = x.astype(cp.float64) + (part * weights[:, :, None]).sum(axis=1)
    expected = total / cp.sqrt((total ** 2).mean(axis=1, keepdims=True) + 1e-5) * gain
    wide = cp.full((rows, HIDDEN), cp.nan, dtype=cp.float32)
    modules["norm"].launch("add_norm", [rows], 512, 0, [x, part, parts, weights, None, gain, 1e-5, HIDDEN, None, wide])
    report("add_norm", wide, expected, 1e-5)
    logits = cp.random.standard_normal((2, VOCABULARY), dtype=cp.float32)
    logits[1, 200000] = 30
    chooser = Chooser(modules, logits, [0.0, 1.0])
    chooser.launch()
    found = cp.asnumpy(chooser.chosen)
    expected = [int(logits[0].argmax()), 200000]
    is_good = [int(found[0, 0]), int(found[1, 0])] == expected and (found[:, 1] == 0xFFFFFFFF).all()
    if not is_good:
        failures.append("choice")
    print(f"{'ok  ' if is_good else 'FAIL'} choice of a token", flush=True)


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


def copy_bandwidth():
    """Bytes read plus written per microsecond."""
    one, other = (cp.random.randint(0, 2**32, 1 << 28, dtype=cp.uint32) for _ in range(2))
    return 2 * one.nbytes / microseconds(lambda: cp.copyto(other, one), 10)


def time_products(modules, copy):
    print(f"copy {copy / 1e3:.0f} GB/s\n{'product':34} {'us':>8} {'GB/s':>7} {'of copy':>8}")
    for form in FORMATS:
        shapes = [("qkv", (4096, 512, 512), HIDDEN), ("o", (2880,), 4096), ("output", (VOCABULARY,), HIDDEN)]
        for name, rows, columns in shapes:
            size = sum(rows) * columns
            copies = max(2, int(2e8 // (size / 2)))
            for batch in (1, 16):
                x = bf16_bits(cp.random.standard_normal((batch, columns), dtype=cp.float32))
                sets = [[Weight(form, count, columns) for count in rows] for _ in range(copies)]
                for blocks in (1, 2, 3) if batch == 1 and form == "nf4_nested" else (2,):
                    jobs = [Dense(modules, weights, x, blocks) for weights in sets]
                    time = microseconds(lambda: [job.launch() for job in jobs]) / copies
                    rate = sum(weight.bytes() for weight in sets[0]) / time
                    title = f"{form} {name} batch {batch} blocks {blocks}"
                    print(f"{title:34} {time:8.2f} {rate / 1e3:7.0f} {rate / copy:8.1%}", flush=True)
                del sets, jobs


def time_rest(modules, copy):
    for form in FORMATS[:3]:
        for tokens in (1, 8):
            jobs = [Experts(modules, form, tokens) for _ in range(3)]
            for job in jobs:
                job.route()
            cp.cuda.get_current_stream().synchronize()
            groups = float(np.mean([int(job.count[0]) for job in jobs]))
            time = microseconds(lambda: [job.products() for job in jobs]) / 3
            rate = (jobs[0].gate_up[0].bytes() + jobs[0].down[0].bytes()) * groups / time
            title = f"{form} {groups:.0f} experts, {tokens} tokens"
            print(f"{title:34} {time:8.2f} {rate / 1e3:7.0f} {rate / copy:8.1%}", flush=True)
            del jobs
    for positions, window in (([127], 128), ([1023], 0), ([8191], 0), ([65535], 0), ([8191] * 8, 0)):
        attention = Attention(modules, positions, window)
        time = microseconds(lambda: [attention.launch() for _ in range(10)]) / 10
        seen = sum(min(p + 1, window or p + 1) for p in positions)
        rate = seen * KV_HEADS * DIM * 4 / time
        print(f"{f'rope + attention, {len(positions)} x {positions[0] + 1}':34} {time:8.2f} {rate / 1e3:7.0f} {rate / copy:8.1%}")
    experts = Experts(modules, "nf4_nested", 1)
    print(f"{'router and choice of experts':34} {microseconds(lambda: [experts.route() for _ in range(10)]) / 10:8.2f}")
    x, gain = cp.ones((1, HIDDEN), cp.float32), cp.ones(HIDDEN, cp.float32)
    norm = [x, experts.out, USED, experts.weights, None, gain, 1e-5, HIDDEN, experts.x, experts.wide]
    time = microseconds(lambda: [modules["norm"].launch("add_norm", [1], 512, 0, norm) for _ in range(10)]) / 10
    print(f"{'add_norm':34} {time:8.2f}")
    chooser = Chooser(modules, cp.random.standard_normal((1, VOCABULARY), dtype=cp.float32), [1.0])
    print(f"{'choice at temperature 1':34} {microseconds(lambda: [chooser.launch() for _ in range(10)]) / 10:8.2f}")


def time_step(modules, form, tokens, depth):
    """A whole decode step of gpt-oss-20b's shape: every kernel of every layer, the output matrix and the choice."""
    x = cp.random.standard_normal((tokens, HIDDEN), dtype=cp.float32)
    gain = cp.ones(HIDDEN, cp.float32)
    layers, weight_bytes = [], 0
    for layer in range(LAYERS):
        qkv = Dense(modules, [Weight(form, 4096, HIDDEN), Weight(form, 512, HIDDEN, output=4096),
                              Weight(form, 512, HIDDEN, output=4608)], cp.zeros((tokens, HIDDEN), cp.uint16))
        attention = Attention(modules, [depth - 1] * tokens, 0 if layer % 2 else 128)
        attention.qkv = qkv.out
        out = Dense(modules, [Weight(form, HIDDEN, 4096)], attention.out)
        experts = Experts(modules, form, tokens)
        layers.append((qkv, attention, out, experts))
        weight_bytes += sum(w.bytes() for w in qkv.weights + out.weights)
        weight_bytes += USED * (experts.gate_up[0].bytes() + experts.down[0].bytes())
    head = Dense(modules, [Weight(form, VOCABULARY, HIDDEN, has_bias=False)], cp.zeros((tokens, HIDDEN), cp.uint16))
    weight_bytes += head.weights[0].bytes()
    chooser = Chooser(modules, head.out, [1.0] * tokens)

    def norm(parts, count, weights, bf16, wide):
        modules["norm"].launch("add_norm", [tokens], 512, 0,
                               [x, parts, count, weights, None, gain, 1e-5, HIDDEN, bf16, wide])

    def step():
        parts, count, weights = None, 0, None
        for qkv, attention, out, experts in layers:
            norm(parts, count, weights, qkv.x, None)
            qkv.launch()
            attention.launch()
            out.launch()
            norm(out.out, 1, None, experts.x, experts.wide)
            experts.route()
            experts.products()
            parts, count, weights = experts.out, USED, experts.weights
        norm(parts, count, weights, head.x, None)
        head.launch()
        chooser.launch()

    time = microseconds(step)
    title = f"step {form} batch {tokens} depth {depth}"
    print(f"{title:34} {time:8.1f} us, {tokens * 1e6 / time:.0f} tok/s, {weight_bytes / 1e9:.2f} GB for one token", flush=True)


def guarded(work, *arguments):
    try:
        work(*arguments)
    except Exception:  # one part's failure must not hide the others' results
        failures.append(work.__name__)
        traceback.print_exc()


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        major = cp.cuda.Device().compute_capability
        modules = build([f"-arch=sm_{major}", "-cubin"], "cubin", folder)
        guarded(check_products, modules, FORMATS)
        guarded(check_experts, modules, FORMATS)
        guarded(check_rest, modules)
        print("the same checks with Turing's code, compiled for this card by the driver")
        turing = build(["-arch=compute_75", "-ptx"], "ptx", folder)
        guarded(check_products, turing, FORMATS)
        guarded(check_experts, turing, FORMATS[1:3])
        if "--checks-only" not in sys.argv:
            copy = copy_bandwidth()
            guarded(time_step, modules, "nf4_nested", 1, 1024)
            guarded(time_products, modules, copy)
            guarded(time_rest, modules, copy)
            guarded(time_step, modules, "nf4_nested", 8, 1024)
    print(f"failed: {failures}" if failures else "every check passed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
