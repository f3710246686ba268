"""Checks a packed build on a machine with a card, without building anything: kernels, numbers, chat, faults, speed.

Usage: python3 tests/gpu/run.py [--pack DIR] [--only NAME,...] [--quick] [--json FILE] [--device cuda:0]

`make gpu-pack` makes the folder, target/gpu-pack, on a machine with Rust; copied elsewhere it brings this script along.
Needs Linux, Python 3.10, the driver; the kernels' own checks need nvcc and cupy too. Prints a line for each check and
the counts last; ends with 1 if a check failed. With `--device cpu` the checks try themselves on the worker without CUDA.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

from checks import bench, chat, kernels, life, memory, oracle
from checks.context import Context, Failed, Skipped

HERE = pathlib.Path(__file__).resolve()
GROUPS = {"kernels": kernels, "oracle": oracle, "chat": chat, "memory": memory, "life": life, "bench": bench}
TOTAL_S = 470
DETAIL_MAX = 600


class OutOfTime(BaseException):
    """A check reached its limit. No Exception, so that no handler on the way takes it for one of its own."""


def _on_alarm(*_):
    raise OutOfTime


def parse():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--pack", type=pathlib.Path, default=HERE.parents[2], help="the folder of make gpu-pack")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups or single checks, with commas between")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here [gpu-run.json in $OUT, if set]")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the checks without a card")
    parser.add_argument("--seconds", type=int, default=TOTAL_S, help="time for all; what is left over is skipped")
    return parser, parser.parse_args()


def chosen_cases(only):
    """Lists the checks whose group or name is chosen."""
    names = set(only.split(","))
    cases = [(group, case) for group, module in GROUPS.items() for case in module.CASES]
    known = set(GROUPS) | {case[0] for _, case in cases}
    if names - known:
        unknown, all_names = (", ".join(sorted(some)) for some in (names - known, known))
        raise SystemExit(f"no check is called {unknown}; there are: {all_names}")
    return [(group, case) for group, case in cases if group in names or case[0] in names]


def run_case(context, limit_s, function):
    """Runs a check within its time; gives (outcome, detail)."""
    if limit_s < 1:
        return "skip", "no time is left"
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return "ok", function(context) or ""
    except Skipped as reason:
        return "skip", str(reason)
    except OutOfTime:
        return "FAIL", f"not done after {limit_s:.0f} s"
    except Failed as reason:
        return "FAIL", str(reason)
    except Exception as error:  # A fault of one check is its own result and does not end the others.
        return "FAIL", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def make_scratch():
    """Makes a folder where most room is: in memory, or on the disk."""
    places = [place for place in ("/dev/shm", tempfile.gettempdir()) if os.access(place, os.W_OK)]
    return tempfile.TemporaryDirectory(dir=max(places, key=lambda place: shutil.disk_usage(place).free))


def run_all(context, cases, total_s):
    """Runs the checks and prints a line for each; gives the results."""
    started, results = time.monotonic(), []
    for _, (name, limit_s, function) in cases:
        begun = time.monotonic()
        outcome, detail = run_case(context, min(limit_s, total_s - (begun - started)), function)
        seconds = time.monotonic() - begun
        detail = " ".join(detail.split())[:DETAIL_MAX]
        results.append({"name": name, "outcome": outcome, "seconds": round(seconds, 2), "detail": detail})
        print(f"{outcome:4} {name:34} {seconds:6.1f}  {detail}", flush=True)
    return results


def write_json(path, context, results):
    """Writes what was found and all numbers behind it."""
    if path is None and os.environ.get("OUT"):
        path = pathlib.Path(os.environ["OUT"]) / "gpu-run.json"
    if path is not None:
        path.write_text(json.dumps({"device": context.device, "cases": results, "data": context.data}, indent=1))


def print_summary(results):
    """Prints what was not passed once more, and the counts last; gives their numbers."""
    counts = [sum(result["outcome"] == outcome for result in results) for outcome in ("ok", "FAIL", "skip")]
    print()
    for result in results:
        if result["outcome"] != "ok":
            print(f"{result['outcome']:4} {result['name']:34} {result['detail'][:120]}")
    print("{} passed, {} failed, {} skipped".format(*counts))
    return counts


def main():
    """Runs what was chosen."""
    parser, arguments = parse()
    pack = arguments.pack.resolve()
    if not (pack / "bin").is_dir():
        parser.error(f"{pack} is no pack: make gpu-pack makes target/gpu-pack")
    cases = chosen_cases(arguments.only)
    signal.signal(signal.SIGALRM, _on_alarm)
    with make_scratch() as scratch:
        context = Context(pack, pathlib.Path(scratch), arguments.device, arguments.quick)
        try:
            if any(group == "bench" for group, _ in cases):
                bench.prepare(context)
            results = run_all(context, cases, arguments.seconds)
        except Failed as reason:
            raise SystemExit(str(reason)) from reason
        finally:
            for process in context.background.values():
                process.kill()
                process.wait()
    write_json(arguments.json, context, results)
    return 1 if print_summary(results)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
