"""Holds nearly all free memory of a card until it is killed.

Usage: hog.py INDEX. Prints `holds BYTES` when it has what it can get.
"""

import ctypes
import sys

KEPT_FREE_BYTES = 96 << 20
STEP_BYTES_MIN = 1 << 20


def call(function, *arguments):
    code = function(*arguments)
    if code != 0:
        raise SystemExit(f"{function.__name__}: error {code}")


def take_memory(index):
    """Takes memory in halves until little is left, says how much, and waits to be killed."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, handle = ctypes.c_int(), ctypes.c_void_p()
    call(cuda.cuInit, 0)
    call(cuda.cuDeviceGet, ctypes.byref(device), index)
    call(cuda.cuCtxCreate_v2, ctypes.byref(handle), 0, device)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call(cuda.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
    held, step = 0, free.value
    while step >= STEP_BYTES_MIN:
        call(cuda.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
        step = min(step, max(0, free.value - KEPT_FREE_BYTES))
        pointer = ctypes.c_uint64()
        if step and cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(step)) == 0:
            held += step
        else:
            step //= 2
    print("holds", held, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    take_memory(int(sys.argv[1]))
