"""Compiles every kernel for every supported card and prints registers and shared memory; a spill is a failure.

Usage: python3 tests/cuda/check_compile.py [--write]. With --write the table in worker/kernels/README.md is renewed;
without, it is compared. nvcc is taken from CUDA_HOME or PATH, or else from NVIDIA's Python wheels, which are fetched once
into target/cuda-toolkit (150 MB). No card is needed.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "worker" / "kernels"
README = KERNELS / "README.md"
TOOLKIT = ROOT / "target" / "cuda-toolkit"
SOURCES = ("matvec", "moe", "norm", "decode", "sample")
ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
WHEELS = ("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88",
          "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85")
BEGIN, END = "<!-- registers: begin -->\n", "<!-- registers: end -->\n"


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    if home and (pathlib.Path(home) / "bin" / "nvcc").exists():
        return pathlib.Path(home) / "bin" / "nvcc"
    if shutil.which("nvcc"):
        return pathlib.Path(shutil.which("nvcc"))
    nvcc = TOOLKIT / "nvidia" / "cu13" / "bin" / "nvcc"
    if not nvcc.exists():
        fetch_toolkit()
    return nvcc


def fetch_toolkit():
    wheels = TOOLKIT / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", wheels,
                    *WHEELS], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(TOOLKIT)
    home = TOOLKIT / "nvidia" / "cu13"
    for folder in (home / "bin", home / "nvvm" / "bin"):
        for program in folder.iterdir():
            program.chmod(0o755)
    if not (home / "lib64").exists():
        (home / "lib64").symlink_to("lib")
    shutil.rmtree(wheels)


def compile_all(nvcc):
    """Gives {kernel: {architecture: (registers, spilled bytes, static shared bytes)}}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            for architecture in ARCHITECTURES:
                command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-o",
                           pathlib.Path(folder) / "out.cubin", KERNELS / f"{source}.cu"]
                run = subprocess.run(command, capture_output=True, text=True)
                if run.returncode != 0 or "warning" in run.stderr:
                    sys.exit(f"{source}.cu, sm_{architecture}:\n{run.stderr}")
                for entry in run.stderr.split("Compiling entry function '")[1:]:
                    numbers = [re.search(pattern, entry) for pattern in
                               (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")]
                    numbers = tuple(int(number.group(1)) if number else 0 for number in numbers)
                    found.setdefault(entry.split("'")[0], {})[architecture] = numbers
    return found


def table(found):
    lines = ["| kernel | static shared, bytes | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
             "| --- |" + " --- |" * (len(ARCHITECTURES) + 1)]
    for kernel, numbers in sorted(found.items()):
        registers = " | ".join(str(numbers[a][0]) for a in ARCHITECTURES)
        lines.append(f"| {kernel} | {numbers['90'][2]} | {registers} |")
    return "\n".join(lines) + "\n"


def main():
    found = compile_all(find_nvcc())
    spilled = [f"{kernel} on sm_{a}: {numbers[a][1]} bytes"
               for kernel, numbers in found.items() for a in ARCHITECTURES if numbers[a][1] > 0]
    if spilled:
        sys.exit("registers are spilled: " + "; ".join(spilled))
    text = README.read_text()
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    if "--write" in sys.argv:
        README.write_text(before + BEGIN + table(found) + END + after)
    elif old != table(found):
        sys.exit("the table in worker/kernels/README.md is not what the compiler says: run this with --write")
    print(f"{len(found)} kernels for {len(ARCHITECTURES)} architectures, no spill")


if __name__ == "__main__":
    main()
