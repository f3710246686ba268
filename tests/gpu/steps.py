"""A whole decode step of gpt-oss-20b's shape: every kernel of every layer, the output matrix and the choice."""

import cupy as cp

from launches import (DIM, EXPERTS, HIDDEN, KV_HEADS, QUERY_HEADS, USED, VOCABULARY, Attention, Chooser, Dense, Experts,
                      Mixture, Norm)
from weights import Weight, bf16_bits, bf16_values

LAYERS = 24
WINDOW = 128
# Small, so that tokens stay apart and choose experts of their own: a bias is the same for all.
BIAS = 0.01


class Model:
    """Random weights; the output matrix in a format of its own."""

    def __init__(self, form, head_form, layers=LAYERS):
        self.form = form
        self.layers = []
        for _ in range(layers):
            qkv = [Weight(form, 4096, HIDDEN, BIAS), Weight(form, 512, HIDDEN, BIAS, 4096),
                   Weight(form, 512, HIDDEN, BIAS, 4608)]
            mixture = Mixture(form, BIAS)
            # What all tokens have in common says nothing to the router.
            router = bf16_values(mixture.router)
            mixture.router[:] = bf16_bits(router - router.mean(axis=1, keepdims=True))
            mixture.gain[:] = 1
            self.layers.append((qkv, [Weight(form, HIDDEN, 4096, BIAS)], mixture))
        self.head = [Weight(head_form, VOCABULARY, HIDDEN, bias_size=0)]
        # Large against what the layers add, for the same reason.
        self.embedding = bf16_bits(cp.random.standard_normal((1000, HIDDEN), dtype=cp.float32) * 100)
        self.gain = cp.ones(HIDDEN, cp.float32)


class Step:
    """The launches of one step for `tokens` sequences at a depth, in the order that README.md gives."""

    def __init__(self, modules, model, tokens, depth, kind="bf16"):
        self.modules, self.model, self.tokens, self.depth = modules, model, tokens, depth
        self.ids = cp.arange(tokens, dtype=cp.uint32)
        self.x = cp.full((tokens, HIDDEN), cp.nan, dtype=cp.float32)
        gain, self.layers, self.kv_bytes = model.gain, [], 0
        x, parts, weights = self.x, None, None
        for layer, (qkv, out, mixture) in enumerate(model.layers):
            window = 0 if layer % 2 else WINDOW
            qkv = Dense(modules, qkv, cp.zeros((tokens, HIDDEN), cp.uint16))
            norm = Norm(modules, x, gain, parts, weights, narrow=qkv.x)
            attention = Attention(modules, [depth] * tokens, window, kind)
            attention.qkv = qkv.out
            out = Dense(modules, out, attention.out)
            experts = Experts(modules, mixture, x, out.out)
            self.layers.append((norm, qkv, attention, out, experts))
            x, parts, weights = experts.sum, experts.out, experts.weights
            seen = min(depth + 1, window or depth + 1)
            self.kv_bytes += tokens * seen * KV_HEADS * DIM * (4 if kind == "bf16" else 2)
        self.head = Dense(modules, model.head, cp.zeros((tokens, HIDDEN), cp.uint16))
        self.last = Norm(modules, x, gain, parts, weights, narrow=self.head.x)
        self.chooser = Chooser(modules, self.head.out, [1.0] * tokens)

    def launch(self, skip=()):
        self.modules["norm"].launch("embed", [self.tokens], 256, 0,
                                    [self.model.embedding, self.ids, 1000, HIDDEN, self.x], dependent=False)
        for norm, qkv, attention, out, experts in self.layers:
            parts = (("norm", norm.launch), ("qkv", qkv.launch), ("attention", attention.launch), ("o", out.launch),
                     ("route", experts.route), ("gate_up", experts.gate_up), ("down", experts.down))
            for name, launch in parts:
                if name not in skip:
                    launch()
        for name, launch in (("norm", self.last.launch), ("head", self.head.launch), ("choice", self.chooser.launch)):
            if name not in skip:
                launch()

    def bytes(self):
        """What the step must read: weights of the experts that were chosen, everything else once, and the cache."""
        total = self.kv_bytes + self.head.weights[0].bytes()
        for _, qkv, _, out, experts in self.layers:
            total += sum(weight.bytes() for weight in qkv.weights + out.weights)
            mixture = experts.mixture
            total += int(experts.count[0]) * (mixture.gate_up[0].bytes() + mixture.down[0].bytes())
            total += EXPERTS * HIDDEN * 2
        return total
