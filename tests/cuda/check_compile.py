"""Compiles every kernel for every supported card and prints registers and shared memory; a spill is a failure.

Usage: python3 tests/cuda/check_compile.py [--write]. With --write the table in worker/kernels/README.md is renewed;
without, it is compared. tools/cuda_toolkit.py finds or fetches nvcc. No card is needed.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_toolkit import find_nvcc

KERNELS = ROOT / "worker" / "kernels"
README = KERNELS / "README.md"
ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
BEGIN, END = "<!-- registers: begin -->\n", "<!-- registers: end -->\n"


def modules():
    """Lists the modules as worker/build/kernels.rs does: the sources that no other one includes."""
    sources = {source.name: source.read_text() for source in KERNELS.glob("*.cu")}
    parts = {name for text in sources.values() for name in re.findall(r'^#include "(.*)"', text, flags=re.MULTILINE)}
    return sorted(name.removesuffix(".cu") for name in sources if name not in parts)


def compile_one(nvcc, folder, source, architecture):
    """Compiles a module for one architecture; gives what the compiler says of each kernel."""
    special = "a" if source.endswith("_90a") else ""
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}{special}", "-cubin", "-Xptxas", "-v", "-o",
               pathlib.Path(folder) / f"{source}.{architecture}.cubin", KERNELS / f"{source}.cu"]
    run = subprocess.run(command, capture_output=True, text=True)
    # ptxas says "Potential Performance Loss" where it makes wgmma's products wait for each other.
    if run.returncode != 0 or "warning" in run.stderr or "Potential" in run.stderr:
        raise SystemExit(f"{source}.cu, sm_{architecture}:\n{run.stderr}")
    return run.stderr


def compile_all(nvcc):
    """Gives {kernel: {architecture: (registers, spilled bytes, static shared bytes)}}."""
    found = {}
    jobs = [(source, architecture) for source in modules()
            for architecture in (("90",) if source.endswith("_90a") else ARCHITECTURES)]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda job: compile_one(nvcc, folder, *job), jobs)
        for (_, architecture), report in zip(jobs, reports):
            for entry in report.split("Compiling entry function '")[1:]:
                numbers = [re.search(pattern, entry) for pattern in
                           (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")]
                numbers = tuple(int(number.group(1)) if number else 0 for number in numbers)
                found.setdefault(entry.split("'")[0], {})[architecture] = numbers
    return found


def table(found):
    lines = ["| kernel | static shared, bytes | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
             "| --- |" + " --- |" * (len(ARCHITECTURES) + 1)]
    for kernel, numbers in sorted(found.items()):
        registers = " | ".join(str(numbers[a][0]) if a in numbers else "" for a in ARCHITECTURES)
        lines.append(f"| {kernel} | {numbers['90'][2]} | {registers} |")
    return "\n".join(lines) + "\n"


def main():
    found = compile_all(find_nvcc())
    spilled = [f"{kernel} on sm_{a}: {numbers[a][1]} bytes"
               for kernel, numbers in found.items() for a in numbers if numbers[a][1] > 0]
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
