"""NF4 with double quantisation, byte for byte as bitsandbytes stores it, and the checkpoint layout of the shipped model.

Attention projections are stored as bitsandbytes 4-bit linears.  The experts of a layer are stored in one tensor per projection:
every expert is quantised alone, as a row-major [out, in] matrix, and the results are stacked along the first axis.
"""
import json

import numpy as np
import torch

CODE = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                 -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
MIDPOINTS = (CODE[1:] + CODE[:-1]) / np.float32(2)
BLOCK, NESTED_BLOCK = 64, 256
TINY = np.float32(1e-38)
LINEARS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
EXPERTS = ("gate_up_proj", "down_proj")
QUANTIZATION_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                       "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}


def dynamic_code():
    """The 256 entries of bitsandbytes' signed dynamic 8-bit code, ascending."""
    values = [0.0, 1.0]
    for e in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** e + 1, dtype=np.float64).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        values += [np.float32(sign * 10.0 ** (e - 6) * m) for sign in (1, -1) for m in middles]
    return np.sort(np.array(values, np.float32))


def quantise(matrix):
    """float32 [out, in], in a multiple of 64 -> (packed u8 [n / 2], absmax f32 [n / 64]); first element in the high nibble."""
    blocks = matrix.astype(np.float32).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(1).astype(np.float32)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, TINY))[:, None]
    # A value on a midpoint takes the lower code.
    index = np.searchsorted(MIDPOINTS, np.clip(scaled, -1, 1).reshape(-1), side="left").astype(np.uint8)
    return index[0::2] << 4 | index[1::2], absmax


def quantise_absmax(absmax, offset):
    """Scales [b] -> (u8 [b], nested absmax f32 [ceil(b / 256)]): centred, then the nearest entry of the dynamic code.

    bitsandbytes' CPU build first rounds the scaled value to a grid of 65536 points; so does this.
    """
    code = dynamic_code().astype(np.float64)
    centred = (absmax - np.float32(offset)).astype(np.float32)
    out, nested = np.zeros(centred.size, np.uint8), []
    for start in range(0, centred.size, NESTED_BLOCK):
        part = centred[start:start + NESTED_BLOCK]
        largest = np.abs(part).max()
        nested.append(largest)
        if largest > 0:
            with np.errstate(over="ignore"):
                y = np.clip(part * (np.float32(1) / largest), -1, 1).astype(np.float32)
            grid = -1 + 2 * np.floor((y + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)) / 65535
            out[start:start + NESTED_BLOCK] = np.abs(grid[:, None] - code[None]).argmin(1)
    return out, np.array(nested, np.float32)


def double_quantise(matrix):
    """-> dict of packed, absmax (u8), nested_absmax, offset."""
    packed, absmax = quantise(matrix)
    offset = np.float32(torch.from_numpy(absmax).mean().item())
    bytes_, nested = quantise_absmax(absmax, offset)
    return {"packed": packed, "absmax": bytes_, "nested_absmax": nested, "offset": offset}


def dequantise(q, shape):
    """Inverse of `double_quantise` up to rounding -> float32 of `shape`."""
    index = np.stack([q["packed"] >> 4, q["packed"] & 15], 1).reshape(-1)
    scale = dynamic_code()[q["absmax"]] * np.repeat(q["nested_absmax"], NESTED_BLOCK)[:q["absmax"].size]
    scale = scale.astype(np.float32) + np.float32(q["offset"])
    return (CODE[index].reshape(-1, BLOCK) * scale[:, None]).astype(np.float32).reshape(shape)


def quant_state(shape, offset=None):
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape), "nested_blocksize": NESTED_BLOCK,
             "nested_dtype": "float32"}
    if offset is not None:
        state["nested_offset"] = float(offset)
    return np.frombuffer(json.dumps(state).encode(), np.uint8).copy()


def stored_linear(name, w):
    q = double_quantise(w.float().numpy())
    return {name: q["packed"][:, None], f"{name}.absmax": q["absmax"], f"{name}.nested_absmax": q["nested_absmax"],
            f"{name}.quant_state.bitsandbytes__nf4": quant_state(w.shape, q["offset"])}


def stored_experts(name, w):
    """w [E, in, out] as bf16 checkpoints have it."""
    w = w.float().transpose(1, 2).contiguous()
    every = [double_quantise(expert.numpy()) for expert in w]
    out = {part: np.stack([q[key] for q in every]) for part, key in
           [(name, "packed"), (f"{name}.absmax", "absmax"), (f"{name}.nested_absmax", "nested_absmax"), (f"{name}.nested_offset", "offset")]}
    return {**out, f"{name}.quant_state.bitsandbytes__nf4": quant_state(w.shape)}


def quantised_state(state):
    """Tensors of a bf16 checkpoint -> tensors of the NF4 checkpoint; what is not quantised stays bf16."""
    out = {}
    for name, w in state.items():
        if not name.endswith(LINEARS + EXPERTS):
            out[name] = w.to(torch.bfloat16)
            continue
        stored = (stored_linear if name.endswith(LINEARS) else stored_experts)(name, w)
        stored[f"{name}.quant_map"], stored[f"{name}.nested_quant_map"] = CODE, dynamic_code()
        out.update({key: torch.from_numpy(np.array(value)) for key, value in stored.items()})
    return out


def restored_state(stored):
    """Tensors of an NF4 checkpoint -> float32 tensors in the layout of a bf16 checkpoint."""
    out = {}
    for name in stored:
        base = name.removesuffix(".quant_state.bitsandbytes__nf4")
        if base == name:
            continue
        meta = json.loads(bytes(stored[name].numpy()))
        q = {"packed": stored[base].numpy(), "absmax": stored[f"{base}.absmax"].numpy(), "nested_absmax": stored[f"{base}.nested_absmax"].numpy()}
        if len(meta["shape"]) == 2:
            w = dequantise({**q, "packed": q["packed"][:, 0], "offset": meta["nested_offset"]}, meta["shape"])
        else:
            offsets = stored[f"{base}.nested_offset"].numpy()
            parts = [dequantise({key: value[e] for key, value in {**q, "offset": offsets}.items()}, meta["shape"][1:]) for e in range(len(offsets))]
            w = np.stack(parts).transpose(0, 2, 1).copy()
        out[base] = torch.from_numpy(w)
    plain = {name: w.float() for name, w in stored.items() if w.dtype == torch.bfloat16}
    return {**out, **plain}
