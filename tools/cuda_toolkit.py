"""Prints the path of an nvcc that compiles the kernels: CUDA_HOME's or PATH's, or else that of NVIDIA's Python wheels.

Usage: python3 tools/cuda_toolkit.py [--no-fetch]. With --no-fetch it ends with 1 where there is none yet. The wheels are
fetched once, with pip, into target/cuda-toolkit (150 MB). They hold a compiler and the headers that it includes unasked,
no library; no card is needed. nvcc calls the machine's own g++.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLKIT = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve() / "cuda-toolkit"
HOME = pathlib.Path("nvidia") / "cu13"
WHEELS = ("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88",
          "nvidia-cuda-runtime==13.0.96")


def find_nvcc():
    """Gives the path of nvcc, and fetches it where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home and (pathlib.Path(home) / "bin" / "nvcc").is_file():
        return pathlib.Path(home) / "bin" / "nvcc"
    if shutil.which("nvcc"):
        return pathlib.Path(shutil.which("nvcc"))
    if not (TOOLKIT / HOME / "bin" / "nvcc").is_file():
        if "--no-fetch" in sys.argv:
            sys.exit("no CUDA compiler here")
        fetch()
    return TOOLKIT / HOME / "bin" / "nvcc"


def fetch():
    """Unpacks the wheels beside their place and moves them there whole: a break leaves nothing that looks done."""
    print("fetching a CUDA compiler (150 MB, once)", file=sys.stderr)
    TOOLKIT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLKIT.parent, prefix="cuda-toolkit-") as folder:
        wheels, unpacked = pathlib.Path(folder) / "wheels", pathlib.Path(folder) / "unpacked"
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "-d", str(wheels), *WHEELS]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            sys.exit("no CUDA compiler: set CUDA_HOME to a CUDA 13 toolkit, or let pip reach its package index")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        # An archive of this kind carries no permission that unpacking keeps.
        for programs in (unpacked / HOME / "bin", unpacked / HOME / "nvvm" / "bin"):
            for program in programs.iterdir():
                program.chmod(0o755)
        shutil.rmtree(TOOLKIT, ignore_errors=True)
        unpacked.rename(TOOLKIT)


if __name__ == "__main__":
    print(find_nvcc())
