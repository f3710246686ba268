"""Random weights in the kernels' formats, with the plain values that they stand for."""

import cupy as cp
import numpy as np

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
FP4 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6])
DESCRIPTOR = np.dtype([("codes", "u8"), ("scales", "u8"), ("nested", "u8"), ("bias", "u8"),
                       ("offset", "f4"), ("rows", "u4"), ("output", "u4"), ("reserved", "u4")])
FORMATS = ("nf4", "nf4_nested", "mxfp4", "bf16")
OFFSET = 0.03


def bf16_bits(values):
    """Rounds f32 to bf16, to even; gives the bits."""
    bits = cp.asarray(values, dtype=cp.float32).view(cp.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(cp.uint16)


def bf16_values(bits):
    return (bits.astype(cp.uint32) << 16).view(cp.float32)


def scale_values():
    return cp.asarray((np.arange(256) - 128) / 128.0, dtype=cp.float32)


class Weight:
    """`rows` x `columns` random weights in one of FORMATS."""

    def __init__(self, form, rows, columns, bias_size=1.0, output=0):
        self.form, self.rows, self.columns, self.output = form, rows, columns, output
        self.bias = cp.random.standard_normal(rows, dtype=cp.float32) * cp.float32(bias_size) if bias_size else None
        self.scales = self.nested = None
        if form == "bf16":
            self.codes = bf16_bits(cp.random.standard_normal((rows, columns), dtype=cp.float32) * 0.05)
            return
        self.codes = cp.random.randint(0, 2**32, rows * columns // 8, dtype=cp.uint32).view(cp.uint8)
        blocks = rows * columns // 64
        if form == "nf4":
            self.scales = cp.random.random(blocks, dtype=cp.float32) * 0.05 + 0.01
        elif form == "nf4_nested":
            self.scales = cp.random.randint(0, 256, blocks, dtype=cp.uint8)
            self.nested = cp.random.random((blocks + 255) // 256, dtype=cp.float32) * 0.02
        else:
            self.scales = cp.random.randint(117, 125, blocks * 2, dtype=cp.uint8)

    def bytes(self):
        return sum(part.nbytes for part in (self.codes, self.scales, self.nested) if part is not None)

    def values(self):
        """The weight in f64."""
        if self.form == "bf16":
            return bf16_values(self.codes).astype(cp.float64)
        high, low = self.codes >> 4, self.codes & 15
        first, second = (low, high) if self.form == "mxfp4" else (high, low)
        table = cp.asarray(FP4 if self.form == "mxfp4" else NF4)
        plain = table[cp.stack([first, second], axis=1).reshape(-1)]
        if self.form == "mxfp4":
            scales = cp.exp2(self.scales.astype(cp.float64) - 127)
        elif self.form == "nf4":
            scales = self.scales.astype(cp.float64)
        else:
            groups = cp.arange(len(self.scales)) // 256
            scales = scale_values()[self.scales].astype(cp.float64) * self.nested[groups] + OFFSET
        return (plain.reshape(len(scales), -1) * scales[:, None]).reshape(self.rows, self.columns)


def descriptors(weights):
    """The list of `Matrix` that a kernel takes."""
    listed = np.zeros(len(weights), DESCRIPTOR)
    for entry, weight in zip(listed, weights):
        for name in ("codes", "scales", "nested", "bias"):
            part = getattr(weight, name)
            entry[name] = 0 if part is None else part.data.ptr
        entry["offset"] = OFFSET if weight.form == "nf4_nested" else 0
        entry["rows"], entry["output"] = weight.rows, weight.output
    return cp.asarray(listed.view(np.uint8))
