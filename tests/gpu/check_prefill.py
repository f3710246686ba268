"""Checks the kernels for prompts against plain f64 arithmetic, and times them on gpt-oss-20b's shapes.

Usage: python3 tests/gpu/check_prefill.py [--checks-only]. Needs a card, nvcc, cupy; with torch the rates are compared with
that of its own product in bf16. Ends with status 1 if a check fails.
"""

import pathlib
import subprocess
import sys
import tempfile

import cupy as cp
import numpy as np

from check_kernels import failures, guarded, report, same
from driver import Module, microseconds
from launches import EXPERTS, HIDDEN, INNER, USED, processors
from weights import FORMATS, Weight, bf16_bits, bf16_values, descriptors, scale_values

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "worker" / "kernels"
SOURCES = ("matmul", "moe_many", "prefill")
SOURCES_90A = ("prompt_90a",)
QUERY_HEADS, KV_HEADS, DIM = 64, 8, 64


def build(arguments, suffix, folder, sources=SOURCES):
    jobs = []
    for source in sources:
        target = folder / f"{source}.{suffix}"
        command = ["nvcc", "-std=c++17", "-O3", *arguments, "-o", str(target), str(KERNELS / f"{source}.cu")]
        jobs.append((source, target, subprocess.Popen(command)))
    for source, _, job in jobs:
        if job.wait() != 0:
            sys.exit(f"{source}.cu does not compile")
    return {source: Module(str(target)) for source, target, _ in jobs}


def tolerance(form):
    """NF4's scaled values are rounded to bf16; a long sum in the tensor cores loses some of f32's last bits."""
    return 2.5e-3 if form.startswith("nf4") else 2e-5


def shared_bytes(form, tokens, card):
    if card == "90a":
        return 4 * (tokens * 128 + 16384) + tokens * 4 + 5248
    if card == "75":
        return min(tokens, 64) * 132 + 16384 + 1024 + 2080
    return 3 * tokens * 128 + (3 if form == "bf16" else 2) * 16384 + 2080


def product_size(kind, card):
    """Tokens of a tile, threads, blocks for each multiprocessor, and the end of the kernel's name."""
    if card == "90a":
        return 256, 256, 1, "_90a"
    return (128, 128, 2, "") if kind == "many" else (32, 128, 4, "")


class Dense:
    """A launch of matmul over some matrices that read the same activations."""

    def __init__(self, modules, weights, x, card=None):
        self.modules, self.weights, self.x, self.card = modules, weights, x, card
        self.tokens, self.columns = x.shape
        self.width = sum(weight.rows for weight in weights)
        self.list, self.map = descriptors(weights), scale_values()
        self.out = cp.full((self.tokens, self.width), cp.nan, dtype=cp.float32)

    def launch(self):
        form, (tokens, threads, blocks, end) = self.weights[0].form, product_size("many", self.card)
        self.modules["prompt_90a" if end else "matmul"].launch(
            f"matmul_{form}{end}", [blocks * processors()], threads, shared_bytes(form, tokens, self.card),
            [self.list, len(self.weights), self.x, self.tokens, self.columns, self.out, self.width, self.map])

    def operations(self):
        return 2 * self.tokens * self.columns * self.width


class Experts:
    """A layer's mixture from the router's judgements to each slot's result."""

    def __init__(self, modules, form, tokens, like=None, kind="many", card=None):
        self.modules, self.form, self.tokens, self.kind, self.card = modules, form, tokens, kind, card
        self.gate_up = like.gate_up if like else [Weight(form, 2 * INNER, HIDDEN) for _ in range(EXPERTS)]
        self.down = like.down if like else [Weight(form, HIDDEN, INNER) for _ in range(EXPERTS)]
        self.gate_up_list, self.down_list, self.map = descriptors(self.gate_up), descriptors(self.down), scale_values()
        slots = tokens * USED
        if like:
            self.x, self.logits = like.x[:tokens], like.logits[:tokens]
        else:
            self.x = bf16_bits(cp.random.standard_normal((tokens, HIDDEN), dtype=cp.float32))
            self.logits = cp.random.standard_normal((tokens, EXPERTS), dtype=cp.float32)
        self.chosen, self.slots = (cp.full(slots, 0xFFFFFFFF, cp.uint32) for _ in range(2))
        self.weights = cp.full(slots, cp.nan, dtype=cp.float32)
        self.count, self.experts, self.firsts = (cp.full(n, 0xFFFFFFFF, cp.uint32) for n in (1, EXPERTS, EXPERTS + 1))
        self.inner = cp.full((slots, INNER), 0x7FC0, dtype=cp.uint16)
        self.out = cp.full((slots, HIDDEN), cp.nan, dtype=cp.float32)

    def route(self):
        moe = self.modules["moe_many"]
        moe.launch("moe_choose_many", [(self.tokens + 7) // 8], 256, 0,
                   [self.logits, self.tokens, EXPERTS, USED, self.chosen, self.weights])
        moe.launch("moe_group_many", [1], 1024, 0,
                   [self.chosen, self.tokens, EXPERTS, USED, self.count, self.experts, self.firsts, self.slots])

    def products(self, parts=("gate_up", "down")):
        tokens, threads, blocks, end = product_size(self.kind, self.card)
        moe, shared = self.modules["prompt_90a" if end else "moe_many"], shared_bytes(self.form, tokens, self.card)
        groups = [self.count, self.experts, self.firsts, self.slots]
        grid = [processors() * blocks]
        if "gate_up" in parts:
            moe.launch(f"moe_gate_up_{self.form}_{self.kind}{end}", grid, threads, shared,
                       [self.gate_up_list, *groups, self.x, USED, HIDDEN, 2 * INNER, 1.702, 7.0, self.inner, self.map])
        if "down" in parts:
            moe.launch(f"moe_down_{self.form}_{self.kind}{end}", grid, threads, shared,
                       [self.down_list, *groups, self.inner, INNER, HIDDEN, self.out, self.map])

    def operations(self):
        return 2 * self.tokens * USED * 3 * INNER * HIDDEN

    def expected(self):
        """Each slot's result and weight, in f64."""
        x = bf16_values(self.x).astype(cp.float64)
        order = cp.argsort(-self.logits, axis=1)[:, :USED]
        powers = cp.exp(cp.take_along_axis(self.logits, order, axis=1).astype(cp.float64))
        out = cp.zeros(self.out.shape)
        for expert in range(EXPERTS):
            tokens, ranks = cp.nonzero(order == expert)
            both = x[tokens] @ self.gate_up[expert].values().T + self.gate_up[expert].bias
            gate, up = cp.minimum(both[:, 0::2], 7), cp.clip(both[:, 1::2], -7, 7)
            inner = (up + 1) * gate / (1 + cp.exp(-1.702 * gate))
            out[tokens * USED + ranks] = inner @ self.down[expert].values().T + self.down[expert].bias
        return out, (powers / powers.sum(axis=1, keepdims=True)).reshape(-1)


class Attention:
    """Attention of a prompt's tokens from `start` to `end` of a sequence that is `end` long, its keys and values random."""

    def __init__(self, modules, end, window=0, kind="bf16", heads=(QUERY_HEADS, KV_HEADS, DIM), card=None):
        self.modules, self.end, self.window, self.kind, self.card = modules, end, window, kind, card
        self.query_heads, self.kv_heads, self.dim = heads
        stride = (end + 31) // 32
        self.keys, self.values = (cp.random.standard_normal((self.kv_heads, stride * 32, self.dim), dtype=cp.float32)
                                  for _ in range(2))
        self.blocks = cp.random.permutation(stride).astype(cp.uint32)
        both = cp.stack([self.keys, self.values], axis=1).reshape(self.kv_heads, 2, stride, 32, self.dim)
        both = both.transpose(2, 0, 1, 3, 4)  # block, head, key or value, token, element
        if kind == "bf16":
            stored = cp.ascontiguousarray(bf16_bits(both)).view(cp.uint8).reshape(stride, -1)
            self.keys, self.values = (bf16_values(bf16_bits(part)) for part in (self.keys, self.values))
        else:
            scales = cp.abs(both).max(axis=4) / cp.float32(127)
            codes = cp.rint(both / scales[..., None]).astype(cp.int8)
            parts = [codes.reshape(stride, self.kv_heads, -1).view(cp.uint8),
                     cp.ascontiguousarray(scales).view(cp.uint8).reshape(stride, self.kv_heads, -1)]
            stored = cp.concatenate(parts, axis=2).reshape(stride, -1)
            restored = (codes.astype(cp.float32) * scales[..., None]).transpose(2, 1, 0, 3, 4)
            self.keys, self.values = restored.reshape(2, self.kv_heads, stride * 32, self.dim)
        self.pool = cp.zeros_like(stored)
        self.pool[self.blocks] = stored
        # What stands after the end must not be read as a number.
        if kind == "bf16" and end % 32:
            last = self.pool[int(self.blocks[-1])].view(cp.uint16).reshape(self.kv_heads, 2, 32, self.dim)
            last[:, :, end % 32:] = 0x7FC0
        self.qkv = cp.random.standard_normal((end, (self.query_heads + 2 * self.kv_heads) * self.dim), dtype=cp.float32)
        self.sinks = cp.random.standard_normal(self.query_heads, dtype=cp.float32)

    def prepare(self, start=0, end=None, tile_rows=None):
        """Gives the launch for rows `start` to `end`, in tiles of `tile_rows`, and where its results go."""
        end = end or self.end
        most = 128 // (self.query_heads // self.kv_heads)
        step, rows = min(tile_rows or most, most), end - start
        tiles = cp.asarray([(first, min(step, rows - first)) for first in range(0, rows, step)], dtype=cp.uint32)
        sequences, positions = cp.zeros(rows, cp.uint32), cp.arange(start, end, dtype=cp.uint32)
        firsts, qkv = cp.zeros(1, cp.uint32), self.qkv[start:]
        out = cp.full((rows, self.query_heads * self.dim), 0x7FC0, dtype=cp.uint16)
        wide = 64 if self.dim <= 64 else 128
        stages = 1 if self.card == "75" else 2
        keys = 16 if wide == 128 else 32 if self.card == "75" else 64
        shared = 128 * wide * 2 + stages * keys * (wide * 4 + 8) + 512
        arguments = [qkv, self.query_heads, self.window, self.pool, 1, 0, self.kv_heads, self.dim, self.blocks, firsts,
                     len(self.blocks), sequences, positions, self.sinks, tiles, out]
        name, grid = f"attend_prefill_{self.kind}", [len(tiles), self.kv_heads]
        return lambda: self.modules["prefill"].launch(name, grid, 128, shared, arguments), out

    def launch(self, *which):
        launch, out = self.prepare(*which)
        launch()
        return out

    def operations(self):
        pairs = sum(min(p + 1, self.window or p + 1) for p in range(self.end))
        return 4 * pairs * self.query_heads * self.dim

    def expected(self):
        group = self.query_heads // self.kv_heads
        queries = self.qkv.reshape(self.end, -1, self.dim)[:, :self.query_heads].astype(cp.float64)
        positions, out = cp.arange(self.end), []
        hidden = positions[None, :] > positions[:, None]
        if self.window:
            hidden |= positions[None, :] + self.window <= positions[:, None]
        for head in range(self.query_heads):
            keys, values = (part[head // group, :self.end].astype(cp.float64) for part in (self.keys, self.values))
            scores = queries[:, head] @ keys.T / np.sqrt(self.dim)
            scores[hidden] = -cp.inf
            sink = float(self.sinks[head])
            largest = cp.maximum(scores.max(axis=1, keepdims=True), sink)
            powers = cp.exp(scores - largest)
            out.append(powers @ values / (powers.sum(axis=1, keepdims=True) + cp.exp(sink - largest)))
        return cp.stack(out, axis=1).reshape(self.end, -1)


def check_attention(modules, card=None):
    for kind, heads, window, end in (("bf16", (64, 8, 64), 0, 777), ("bf16", (64, 8, 64), 128, 777),
                                     ("int8", (64, 8, 64), 0, 777), ("int8", (64, 8, 64), 128, 300),
                                     ("bf16", (12, 4, 128), 100, 300), ("bf16", (8, 8, 48), 0, 200),
                                     ("int8", (20, 4, 112), 0, 300), ("bf16", (40, 1, 96), 0, 150)):
        attention = Attention(modules, end, window, kind, heads, card)
        whole = attention.launch()
        report(f"attention {kind} {heads} window {window}", bf16_values(whole), attention.expected(), 5e-3)
        edges = [0, 1, 64, 65, end // 2 + 1, end]
        parts = [attention.launch(start, stop, rows) for start, stop, rows in zip(edges, edges[1:], (1, 5, 16, 16, 3))]
        same("  at once and in chunks and smaller tiles", cp.concatenate(parts).view(cp.uint32), whole.view(cp.uint32))


def time_attention(modules, rate):
    for kind in ("bf16", "int8"):
        for end, window in ((8192, 0), (8192, 128), (2048, 0), (512, 0)):
            attention = Attention(modules, end, window, kind)
            time = microseconds(attention.prepare()[0], 9)
            line(f"attention {kind} {end} window {window}", time, attention.operations(), rate)


def check_products(modules, forms, card=None):
    for form in forms:
        for rows, columns in (((4096, 512, 512), HIDDEN), ((1000, 77), 4096)):
            weights, output = [], 0
            for count in rows:
                weights.append(Weight(form, count, columns, output=output))
                output += count
            x = bf16_bits(cp.random.standard_normal((300, columns), dtype=cp.float32))
            expected = bf16_values(x).astype(cp.float64) @ cp.concatenate([w.values() for w in weights]).T
            expected += cp.concatenate([w.bias for w in weights])
            whole = Dense(modules, weights, x, card)
            whole.launch()
            report(f"matmul {form} {rows} x {columns}", whole.out, expected, tolerance(form))
            parts = []
            for start, end in ((0, 1), (1, 65), (65, 180), (180, 300)):
                part = Dense(modules, weights, cp.ascontiguousarray(x[start:end]), card)
                part.launch()
                parts.append(part.out)
            same("  at once and in 1, 64, 115 and 120 tokens", cp.concatenate(parts), whole.out)


def check_gate(modules, forms):
    """A dense layer's gate in one launch is what both products and silu_gate's arithmetic give, rounded to bf16."""
    for form in forms:
        for inner, tokens in ((704, 300), (2048, 33)):
            weights = [Weight(form, inner, HIDDEN, output=inner * i) for i in range(2)]
            x = bf16_bits(cp.random.standard_normal((tokens, HIDDEN), dtype=cp.float32))
            both = Dense(modules, weights, x, "90a")
            both.launch()
            gate, up = both.out[:, :inner], both.out[:, inner:]
            out = cp.full((tokens, inner), 0x7FC0, dtype=cp.uint16)
            wide, threads, blocks, _ = product_size("many", "90a")
            modules["prompt_90a"].launch(f"dense_gate_{form}_90a", [blocks * processors()], threads,
                                         shared_bytes(form, wide, "90a"), [both.list, x, tokens, HIDDEN, out, both.map])
            report(f"dense_gate {form}, {inner} rows, {tokens} tokens", bf16_values(out),
                   (gate * (up / (1 + cp.exp(-gate)))).astype(cp.float64), 2e-3)


def check_experts(modules, forms, card=None):
    for form in forms:
        experts = Experts(modules, form, 700, card=card)
        experts.route()
        experts.products()
        out, weights = experts.expected()
        report(f"choice, {form}", experts.weights, weights, 1e-5)
        report(f"gate_up and down, {form}", experts.out, out, tolerance(form) + 3e-3)
        few = "many" if card == "90a" else "few"
        for kind, tokens in ((few, 700), (few, 33), ("many", 33), ("many", 1)):
            other = Experts(modules, form, tokens, experts, kind, card)
            other.route()
            other.products()
            same(f"  {kind}, {tokens} tokens", other.out, experts.out[:tokens * USED])


class Router:
    """The experts judged for every token."""

    def __init__(self, modules, tokens):
        self.modules, self.tokens = modules, tokens
        self.weight = bf16_bits(cp.random.standard_normal((EXPERTS, HIDDEN), dtype=cp.float32) * 0.02)
        self.bias = cp.random.standard_normal(EXPERTS, dtype=cp.float32)
        self.x = cp.random.standard_normal((tokens, HIDDEN), dtype=cp.float32)
        self.logits = cp.full((tokens, EXPERTS), cp.nan, dtype=cp.float32)

    def launch(self):
        self.modules["moe_many"].launch(
            "moe_router_many", [(self.tokens + 31) // 32, (EXPERTS + 31) // 32], 256, 0,
            [self.weight, self.bias, self.x, self.tokens, EXPERTS, HIDDEN, self.logits])


def check_router(modules):
    router = Router(modules, 777)
    router.launch()
    expected = router.x.astype(cp.float64) @ bf16_values(router.weight).astype(cp.float64).T + router.bias
    report("router", router.logits, expected, 1e-6)


def product_rate():
    """Operations per microsecond of a large product in bf16, by torch; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for index in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        one @ other
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * 8192 ** 3 / sorted(times[5:])[5]


def line(title, time, operations, rate):
    share = f"{operations / time / rate:8.1%}" if rate else ""
    print(f"{title:40} {time:9.1f} us {operations / time / 1e6:7.1f} TFLOP/s {share}", flush=True)


def time_products(modules, forms, rate, card=None, sizes=(8192, 2048, 1024, 512, 128)):
    for form in forms:
        qkv_weights = [Weight(form, 4096, HIDDEN), Weight(form, 512, HIDDEN, output=4096),
                       Weight(form, 512, HIDDEN, output=4608)]
        o_weights = [Weight(form, HIDDEN, 4096)]
        full = Experts(modules, form, max(sizes), card=card)
        for tokens in sizes:
            x, y = (bf16_bits(cp.random.standard_normal((tokens, n), dtype=cp.float32)) for n in (HIDDEN, 4096))
            qkv, o = Dense(modules, qkv_weights, x, card), Dense(modules, o_weights, y, card)
            total = operations = 0
            for name, job in (("qkv", qkv), ("o", o)):
                time = microseconds(job.launch, 9)
                line(f"{form} {name} {tokens}", time, job.operations(), rate)
                total, operations = total + time, operations + job.operations()
            best = None
            for kind in ("many", "few") if tokens <= 512 and card != "90a" else ("many",):
                experts = Experts(modules, form, tokens, full, kind, card)
                experts.route()
                times = [microseconds(lambda: experts.products((part,)), 9) for part in ("gate_up", "down")]
                for part, time, share in zip(("gate_up", "down"), times, (2, 1)):
                    line(f"{form} {part} {tokens} {kind}", time, experts.operations() * share / 3, rate)
                best = min(best or 1e9, sum(times))
            line(f"{form} all products {tokens}", total + best, operations + experts.operations(), rate)
        router = Router(modules, max(sizes))
        print(f"router of {max(sizes)} tokens {microseconds(router.launch, 9):9.1f} us")
        time = microseconds(full.route, 9)
        print(f"choice and grouping of {max(sizes)} tokens {time:9.1f} us", flush=True)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder, capability = pathlib.Path(name), cp.cuda.Device().compute_capability
        modules = build([f"-arch=sm_{capability}", "-cubin"], "cubin", folder)
        cards = [None]
        if capability == "90":
            target = "-gencode=arch=compute_90a,code=sm_90a"
            modules.update(build([target, "-cubin"], "cubin", folder, SOURCES_90A))
            cards.append("90a")
        for card in cards:
            print(f"products by {'wgmma' if card else 'mma'}")
            guarded(check_products, modules, FORMATS, card)
            guarded(check_experts, modules, FORMATS, card)
        if "90a" in cards:
            guarded(check_gate, modules, FORMATS)
        guarded(check_router, modules)
        guarded(check_attention, modules)
        print("the same checks with Turing's code, compiled for this card by the driver")
        turing = build(["-arch=compute_75", "-ptx"], "ptx", folder)
        guarded(check_products, turing, FORMATS, "75")
        guarded(check_experts, turing, FORMATS[1:], "75")
        guarded(check_attention, turing, "75")
        if "--checks-only" not in sys.argv:
            rate = product_rate()
            print(f"product in bf16, 8192 x 8192 x 8192: {rate / 1e6 if rate else 0:.0f} TFLOP/s")
            guarded(time_attention, modules, rate)
            for card in cards:
                print(f"products by {'wgmma' if card else 'mma'}")
                guarded(time_products, modules, FORMATS, rate, card)
    print(f"failed: {failures}" if failures else "every check passed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
