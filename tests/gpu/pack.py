"""Makes the folder that tests/gpu/run.py needs on a machine with a card and without Rust.

Usage: python3 tests/gpu/pack.py BINARIES FOLDER, where BINARIES holds the release binaries. Fails when it grows too
large to be carried about; prints its size.
"""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BYTES_MAX = 60 << 20
PROGRAMS = ("bulkhead", "bulkheadctl", "bulkhead-worker", "bulkhead-worker-cuda", "synth-model")
# Where things lie in the repository, and in the pack.
FOLDERS = {
    "worker/demo-model/checkpoint": "demo-model",
    "worker/kernels": "worker/kernels",
    "tests/fixtures/configs": "configs",
    "tests/gpu": "tests/gpu",
    **{f"tests/fixtures/oracle/models/{name}": f"oracle/{name}"
       for name in ("gptoss_basic", "gptoss_long", "gptoss_mxfp4", "gptoss_window_edges", "llama_tied", "llama3_untied_sharded")},
}


def copy_programs(binaries, folder):
    """Copies the programs without their symbols."""
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        shutil.copy2(binaries / name, folder / name)
        if shutil.which("strip"):
            subprocess.run(["strip", str(folder / name)], check=True)


def main():
    """Makes the folder anew."""
    binaries, folder = (pathlib.Path(argument).resolve() for argument in sys.argv[1:])
    shutil.rmtree(folder, ignore_errors=True)
    copy_programs(binaries, folder / "bin")
    for source, target in FOLDERS.items():
        shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "worker/demo-model/reference.json", folder / "demo-reference.json")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / (1 << 20):.1f} MiB")
    if size > BYTES_MAX:
        sys.exit(f"the pack is larger than {BYTES_MAX >> 20} MiB")


if __name__ == "__main__":
    main()
