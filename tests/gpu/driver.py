"""The CUDA driver through ctypes: modules, launches with programmatic dependent launch, and graphs.

Needs libcuda and cupy (for arrays and streams). Every call's return code is checked.
"""

import ctypes

import cupy as cp
import numpy as np

_cuda = ctypes.CDLL("libcuda.so.1")
_SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_BYTES_PLAIN = 16384  # more, with what a kernel declares itself, may need the attribute
_DEPENDENT_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]
        + [("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)]
    )


def _check(code, what):
    if code != 0:
        raise RuntimeError(f"{what}: CUDA error {code}")


class Module:
    """A cubin or PTX file; its kernels by name."""

    def __init__(self, path):
        cp.zeros(1)  # makes the context
        self._module = ctypes.c_void_p()
        with open(path, "rb") as file:
            self._image = file.read() + b"\0"
        _check(_cuda.cuModuleLoadData(ctypes.byref(self._module), self._image), path)
        self._functions = {}

    def launch(self, name, grid, threads, shared, arguments, dependent=True):
        """Launches on cupy's current stream. Arguments: cupy arrays, None, int (u32), float (f32)."""
        function = self._function(name)
        if shared > _SHARED_BYTES_PLAIN:
            _check(_cuda.cuFuncSetAttribute(function, _SHARED_BYTES_ATTRIBUTE, shared), name)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        attribute = _Attribute(_DEPENDENT_LAUNCH, 0, (ctypes.c_int * 16)(1))
        grid = tuple(grid) + (1,) * (3 - len(grid))
        stream = cp.cuda.get_current_stream().ptr
        config = _Config(*grid, threads, 1, 1, shared, stream, ctypes.pointer(attribute), 1 if dependent else 0)
        _check(_cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), name)

    def _function(self, name):
        if name not in self._functions:
            function = ctypes.c_void_p()
            _check(_cuda.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
            self._functions[name] = function
        return self._functions[name]


def _value(argument):
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, cp.ndarray):
        return ctypes.c_void_p(argument.data.ptr)
    if isinstance(argument, (float, np.floating)):
        return ctypes.c_float(argument)
    return ctypes.c_uint(int(argument))


def microseconds(work, repeats=25):
    """Captures what `work()` launches in a graph and gives the median time of a replay."""
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        work()
        stream.synchronize()
        stream.begin_capture()
        work()
        graph = stream.end_capture()
        times = []
        for index in range(repeats + 5):
            start, end = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            if index >= 5:
                times.append(cp.cuda.get_elapsed_time(start, end) * 1e3)
    return sorted(times)[len(times) // 2]
