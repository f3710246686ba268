"""The card as its driver's management library sees it, through ctypes; and a child that takes its memory away."""

import contextlib
import ctypes
import pathlib
import select
import subprocess
import sys

from .context import Failed

HOG_START_S = 30
_HOG = pathlib.Path(__file__).with_name("hog.py")


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Card:
    """One card. Other processes on it disturb what is measured."""

    def __init__(self, index):
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise Failed(f"no management library of the driver: {error}") from error
        self._check(self._nvml.nvmlInit_v2(), "nvmlInit")
        self._handle = ctypes.c_void_p()
        self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle)), "device")

    @staticmethod
    def _check(code, what):
        if code != 0:
            raise Failed(f"NVML, {what}: error {code}")

    def used_bytes(self):
        """Gives the memory in use on the whole card."""
        memory = _Memory()
        self._check(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)), "memory")
        return memory.used

    def total_bytes(self):
        """Gives the memory of the card."""
        memory = _Memory()
        self._check(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)), "memory")
        return memory.total

    def name(self):
        """Gives the name of the card."""
        text = ctypes.create_string_buffer(96)
        self._check(self._nvml.nvmlDeviceGetName(self._handle, text, 96), "name")
        return text.value.decode()


def open_card(context):
    """Opens the card that the run is about."""
    context.need_cuda()
    return Card(int(context.device.partition(":")[2] or 0))


@contextlib.contextmanager
def hog(context):
    """Holds nearly all memory of the card in a child process; gives the bytes that it took."""
    index = context.device.partition(":")[2] or "0"
    command = [sys.executable, str(_HOG), index]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ready, _, _ = select.select([child.stdout], [], [], HOG_START_S)
        line = child.stdout.readline() if ready else ""
        if not line.startswith("holds "):
            raise Failed(f"the hog took nothing: {line.strip()!r}")
        yield int(line.split()[1])
    finally:
        child.kill()
        child.wait()
