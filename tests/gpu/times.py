"""How long the kernels take on gpt-oss-20b's shapes, beside what reading their bytes would take at copy speed."""

import cupy as cp

from driver import microseconds
from launches import HIDDEN, KV_HEADS, DIM, VOCABULARY, Attention, Chooser, Dense, Experts, Mixture, Norm
from steps import Model, Step
from weights import FORMATS, Weight, bf16_bits


def copy_bandwidth():
    """Bytes read plus written per microsecond."""
    one, other = (cp.random.randint(0, 2**32, 1 << 28, dtype=cp.uint32) for _ in range(2))
    return 2 * one.nbytes / microseconds(lambda: cp.copyto(other, one), 10)


def line(title, time, size, copy):
    floor = size / copy
    print(f"{title:38} {time:8.2f} us, floor {floor:8.2f}, ratio {time / floor:5.2f}, {size / time / copy:6.1%} of copy", flush=True)


def time_steps(modules):
    copy = copy_bandwidth()
    print(f"copy {copy / 1e3:.0f} GB/s")
    model = Model("nf4_nested", "bf16")
    for tokens, depths in ((1, (0, 1024, 8192, 32768)), (8, (0, 1024, 8192)), (32, (0, 1024))):
        for depth in depths:
            step = Step(modules, model, tokens, depth)
            time = microseconds(step.launch)
            line(f"step nf4_nested, batch {tokens}, depth {depth}", time, step.bytes(), copy)
            groups = sum(int(layer[-1].count[0]) for layer in step.layers) / len(step.layers)
            print(f"{'':38} {tokens * 1e6 / time:8.0f} tokens a second, {groups:.1f} experts a layer", flush=True)
            if depth == 1024:
                for part in ("norm", "qkv", "attention", "o", "route", "gate_up", "down", "head", "choice"):
                    less = time - microseconds(lambda: step.launch(skip=(part,)))
                    print(f"    {part:34} {less:8.1f} us less without", flush=True)
            del step


def time_products(modules):
    copy = copy_bandwidth()
    for form in FORMATS:
        shapes = [("qkv", (4096, 512, 512), HIDDEN), ("o", (2880,), 4096), ("output", (VOCABULARY,), HIDDEN)]
        for name, rows, columns in shapes:
            copies = max(2, int(2e8 // (sum(rows) * columns / 2)))
            sets = [[Weight(form, count, columns) for count in rows] for _ in range(copies)]
            for batch in (1, 8, 16, 32):
                x = bf16_bits(cp.random.standard_normal((batch, columns), dtype=cp.float32))
                jobs = [Dense(modules, weights, x) for weights in sets]
                time = microseconds(lambda: [job.launch() for job in jobs], 10) / copies
                line(f"{form} {name} batch {batch}", time, sum(weight.bytes() for weight in sets[0]), copy)
            del sets, jobs


def time_rest(modules):
    copy = copy_bandwidth()
    for form in FORMATS[:3]:
        mixtures = [Mixture(form) for _ in range(3)]
        for tokens in (1, 8, 32):
            x, change = (cp.random.standard_normal((tokens, HIDDEN), dtype=cp.float32) for _ in range(2))
            jobs = [Experts(modules, mixture, x, change) for mixture in mixtures]
            for part in ("route", "gate_up", "down"):
                time = microseconds(lambda: [getattr(job, part)() for job in jobs]) / 3
                weights = getattr(mixtures[0], part, [mixtures[0].gate_up[0]])
                size = weights[0].bytes() * float(sum(int(job.count[0]) for job in jobs)) / 3
                line(f"{form} {part}, {tokens} tokens", time, size if part != "route" else mixtures[0].router.nbytes, copy)
            del jobs
        del mixtures
    for kind in ("bf16", "int8"):
        for positions, window in (([127], 128), ([1023], 0), ([8191], 0), ([65535], 0), ([1023] * 32, 0)):
            attention = Attention(modules, positions, window, kind)
            time = microseconds(lambda: [attention.launch() for _ in range(10)]) / 10
            seen = sum(min(p + 1, window or p + 1) for p in positions)
            size = seen * KV_HEADS * DIM * (4 if kind == "bf16" else 2)
            line(f"attention {kind}, {len(positions)} x {positions[0] + 1}", time, size, copy)
    x, gain = cp.ones((1, HIDDEN), cp.float32), cp.ones(HIDDEN, cp.float32)
    parts, weights = cp.ones((4, HIDDEN), cp.float32), cp.ones(4, cp.float32)
    norm = Norm(modules, x, gain, parts, weights, narrow=cp.zeros((1, HIDDEN), cp.uint16))
    line("add_norm", microseconds(lambda: [norm.launch() for _ in range(10)]) / 10, 6 * x.nbytes, copy)
    chooser = Chooser(modules, cp.random.standard_normal((1, VOCABULARY), dtype=cp.float32), [1.0])
    line("choice at temperature 1", microseconds(lambda: [chooser.launch() for _ in range(10)]) / 10, VOCABULARY * 4, copy)
