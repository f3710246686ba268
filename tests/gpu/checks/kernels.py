"""Every kernel alone against plain arithmetic, by the scripts beside run.py, where nvcc and cupy are there."""

import importlib.util
import pathlib
import shutil
import sys

from .context import Failed, Skipped, run

FOLDER = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted(script.stem for script in FOLDER.glob("check_*.py"))
SCRIPT_S = 120


def _check_by(script):
    def check(context):
        context.need_cuda()
        if not shutil.which("nvcc"):
            raise Skipped("no nvcc here")
        missing = [name for name in ("cupy", "numpy") if importlib.util.find_spec(name) is None]
        if missing:
            raise Skipped(f"no {' and '.join(missing)} here")
        text = run([sys.executable, FOLDER / f"{script}.py", "--checks-only"], SCRIPT_S)
        lines = text.splitlines()
        context.data[f"kernels.{script}"] = lines
        count = sum(line.startswith("ok") for line in lines)
        if not count:
            raise Failed("the script checked nothing")
        return f"{count} checks"
    return check


CASES = [(f"kernels.{script}", SCRIPT_S + 5, _check_by(script)) for script in SCRIPTS]
