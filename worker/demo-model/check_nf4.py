"""Compares nf4.py with bytes recorded from bitsandbytes (a safetensors file and its JSON index, see README.md)."""
import json
import sys

import numpy as np
from safetensors.torch import load_file

import nf4


def main():
    tensors = load_file(sys.argv[1])
    cases = sorted({name.split(".")[0] for name in tensors})
    wrong, checked = [], 0
    for name in cases:
        x = tensors[f"{name}.input"].float().numpy()
        if x.size % nf4.BLOCK:
            continue
        checked += 1
        packed, absmax = nf4.quantise(x)
        same = np.array_equal(packed, tensors[f"{name}.packed"].numpy().reshape(-1)) and np.array_equal(absmax, tensors[f"{name}.absmax"].numpy())
        if f"{name}.dq.absmax_u8" in tensors:
            q = nf4.double_quantise(x)
            nested = tensors[f"{name}.dq.nested_absmax"].numpy()
            part = np.repeat(nested, nf4.NESTED_BLOCK)[:q["absmax"].size] > 0  # equal scales are stored as any byte
            same &= np.array_equal(q["absmax"][part], tensors[f"{name}.dq.absmax_u8"].numpy()[part]) and np.array_equal(q["nested_absmax"], nested)
            same &= q["offset"] == tensors[f"{name}.dq.offset"].numpy()[0]
        if not same:
            wrong.append(name)
    print(f"{checked - len(wrong)} of {checked} cases equal", json.dumps(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
