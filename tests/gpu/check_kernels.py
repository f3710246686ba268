"""Compiles the kernels with nvcc, checks each against plain f64 arithmetic, and times them on gpt-oss-20b's shapes.

Usage: python3 tests/gpu/check_kernels.py [--checks-only] [--modules FOLDER]. Needs a card, nvcc (unless FOLDER holds the
modules as cubins) and cupy. Ends with status 1 if a check fails.
"""

import pathlib
import subprocess
import sys
import tempfile
import traceback

import cupy as cp

import times
from driver import Module
from launches import EXPERTS, HIDDEN, USED, VOCABULARY, Attention, Chooser, Dense, Experts, Mixture, Norm
from weights import FORMATS, Weight, bf16_bits, bf16_values

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "worker" / "kernels"
SOURCES = ("matvec", "moe", "route", "norm", "decode", "sample")
failures = []


def build(arguments, suffix, folder):
    jobs = []
    for source in SOURCES:
        target = folder / f"{source}.{suffix}"
        command = ["nvcc", "-std=c++17", "-O3", *arguments, "-o", str(target), str(KERNELS / f"{source}.cu")]
        jobs.append((source, subprocess.Popen(command)))
    for source, job in jobs:
        if job.wait() != 0:
            sys.exit(f"{source}.cu does not compile")
    return load(folder, suffix)


def load(folder, suffix):
    return {source: Module(str(pathlib.Path(folder) / f"{source}.{suffix}")) for source in SOURCES}


def note(what, is_good, details):
    if not is_good:
        failures.append(what)
    print(f"{'ok  ' if is_good else 'FAIL'} {what:46} {details}", flush=True)


def report(what, found, expected, tolerance):
    error = float(cp.linalg.norm(found.astype(cp.float64) - expected) / cp.linalg.norm(expected))
    note(what, error <= tolerance, f"error {error:.1e}, at most {tolerance:.1e}")


def same(what, one, other):
    note(what, bool((one.view(cp.uint8) == other.view(cp.uint8)).all()), "bits equal")


def tolerance(form):
    return 2.5e-3 if form.startswith("nf4") else 2e-6


def check_products(modules, forms):
    for form in forms:
        for rows, columns in (((4096, 512, 512), HIDDEN), ((2880,), 4096)):
            weights, output = [], 0
            for count in rows:
                weights.append(Weight(form, count, columns, output=output))
                output += count
            x = bf16_bits(cp.random.standard_normal((64, columns), dtype=cp.float32))
            expected = bf16_values(x).astype(cp.float64) @ cp.concatenate([w.values() for w in weights]).T
            expected += cp.concatenate([w.bias for w in weights])
            results = {}
            for batch in (64, 32, 16, 8, 7, 1):
                dense = Dense(modules, weights, cp.ascontiguousarray(x[:batch]))
                dense.launch()
                results[batch] = dense.out
            report(f"matvec {form} {rows} x {columns}", results[64], expected, tolerance(form))
            for batch in (32, 16, 8, 7, 1):
                same(f"  batch 64 and {batch}", cp.ascontiguousarray(results[64][:batch]), results[batch])


def check_experts(modules, forms):
    for form in forms:
        mixture = Mixture(form)
        x, change = (cp.random.standard_normal((64, HIDDEN), dtype=cp.float32) for _ in range(2))
        results = {}
        for tokens in (64, 32, 16, 8, 2, 1):
            experts = Experts(modules, mixture, x[:tokens].copy(), change[:tokens].copy())
            experts.launch()
            results[tokens] = experts
            if tokens == 2:
                total, normed, out, weights = experts.expected()
                report("the sum and its norm", experts.sum, total, 1e-6)
                report("  as bf16", bf16_values(experts.x), normed, 2e-3)
                report(f"router weights, {form}", experts.weights, weights, 1e-5)
                report(f"gate_up and down, {form}", experts.out, out, tolerance(form) + 3e-3)
        for tokens in (32, 16, 8, 2, 1):
            same(f"  tokens 64 and {tokens}", results[64].out[:tokens * USED], results[tokens].out)
            same(f"  their weights", results[64].weights[:tokens * USED], results[tokens].weights)
        again = results[64].out.copy()
        results[64].launch()
        same("  the same launch again", results[64].out, again)


def check_attention(modules):
    for kind, limit in (("bf16", 2.5e-3), ("int8", 1.5e-2)):
        for window, dim, heads in ((0, 64, (64, 8)), (128, 64, (64, 8)), (0, 128, (32, 8)), (200, 96, (20, 2)), (0, 40, (6, 3))):
            positions = [0, 31, 127, 128, 300, 1023, 4097, 9000]
            attention = Attention(modules, positions, window, kind, dim, heads)
            expected = attention.expected()
            before = attention.pool.copy()
            last = attention.row(len(positions) - 1)
            attention.launch()
            last.launch()
            report(f"attention {kind}, window {window}, dim {dim}", bf16_values(attention.out), expected, limit)
            same("  the last row alone", last.out, attention.out[-1:])
            together, written = attention.out.copy(), attention.pool.copy()
            attention.pool[:] = before
            attention.launch_apart()
            same("  rotated and written by rope_write", attention.out, together)
            same("  and the cache", attention.pool, written)


def check_rest(modules):
    rows, parts = 3, 4
    x, part = (cp.random.standard_normal(shape, dtype=cp.float32) for shape in ((rows, HIDDEN), (rows, parts, HIDDEN)))
    weights, gain = (cp.random.random(shape, dtype=cp.float32) for shape in ((rows, parts), (HIDDEN,)))
    total = x.astype(cp.float64) + (part * weights[:, :, None]).sum(axis=1)
    expected = total / cp.sqrt((total ** 2).mean(axis=1, keepdims=True) + 1e-5) * gain
    wide = cp.full((rows, HIDDEN), cp.nan, dtype=cp.float32)
    Norm(modules, x, gain, part, weights, wide=wide).launch()
    report("add_norm", wide, expected, 1e-5)
    table = bf16_bits(cp.random.standard_normal((50, HIDDEN), dtype=cp.float32))
    tokens = cp.asarray([49, 0, 50, 7], dtype=cp.uint32)
    x = cp.zeros((4, HIDDEN), cp.float32)
    modules["norm"].launch("embed", [4], 256, 0, [table, tokens, 50, HIDDEN, x])
    same("embedding", x[[0, 1, 3]], bf16_values(table[[49, 0, 7]]))
    note("embedding of no token", bool(cp.isnan(x[2]).all()), "not a number")
    check_gate(modules)
    logits = cp.random.standard_normal((2, VOCABULARY), dtype=cp.float32)
    logits[1, 200000] = 30
    chooser = Chooser(modules, logits, [0.0, 1.0])
    chooser.launch()
    found = cp.asnumpy(chooser.chosen)
    expected = [int(logits[0].argmax()), 200000]
    note("choice of a token", [int(found[0, 0]), int(found[1, 0])] == expected and (found[:, 1] == 0xFFFFFFFF).all(), "")
    check_draws(modules)


def check_gate(modules):
    rows, inner = 3, 8192
    pairs = cp.random.standard_normal((rows, 2, inner), dtype=cp.float32) * 4
    wide = pairs.astype(cp.float64)
    out = cp.zeros((rows, inner), cp.uint16)
    modules["norm"].launch("silu_gate", [inner // 1024, rows], 256, 0, [pairs, inner, out])
    report("silu_gate", bf16_values(out), wide[:, 0] / (1 + cp.exp(-wide[:, 0])) * wide[:, 1], 2e-3)


def check_draws(modules):
    """Where the draws of many positions fall, against the distribution that they are drawn from."""
    row = cp.random.standard_normal((1, 5000), dtype=cp.float32) * 2
    count = 4096
    chooser = Chooser(modules, cp.repeat(row, count, axis=0), [0.7] * count)
    chooser.launch()
    powers = cp.exp((row[0].astype(cp.float64) - row.max()) / 0.7)
    share = cp.cumsum(powers) / powers.sum()
    # The largest distance between both distributions, in units that one draw in a thousand exceeds at 1.95.
    seen = cp.cumsum(cp.bincount(chooser.chosen[:, 0].astype(cp.int64), minlength=5000)) / count
    distance = float(cp.abs(seen - share).max()) * count ** 0.5
    note("draws follow the distribution", distance < 1.95, f"{distance:.2f}")


def guarded(work, *arguments):
    try:
        work(*arguments)
    except Exception:  # one part's failure must not hide the others' results
        failures.append(work.__name__)
        traceback.print_exc()


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        version = cp.cuda.Device().compute_capability
        if "--modules" in sys.argv:
            modules = load(sys.argv[sys.argv.index("--modules") + 1], "cubin")
        else:
            modules = build([f"-arch=sm_{version}", "-cubin"], "cubin", folder)
        for work, arguments in ((check_products, [FORMATS]), (check_experts, [FORMATS]), (check_attention, []), (check_rest, [])):
            guarded(work, modules, *arguments)
        if "--modules" not in sys.argv:
            print("the same checks with Turing's code, compiled for this card by the driver")
            turing = build(["-arch=compute_75", "-ptx"], "ptx", folder)
            turing["is_turing"] = True
            guarded(check_products, turing, FORMATS)
            guarded(check_experts, turing, FORMATS[1:3])
            guarded(check_attention, turing)
        if "--checks-only" not in sys.argv:
            for work in (times.time_steps, times.time_products, times.time_rest):
                guarded(work, modules)
    print(f"failed: {failures}" if failures else "every check passed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
