"""Runs every test: Rust, the clients, the code for cards; then a summary of what passed, failed and was skipped.

Needs nothing beside Python's standard library. The clients get a virtual environment inside the build folder; where it
cannot be made (no network, no venv module) they count as skipped with the reason, and the summary says so. Set
BULKHEAD_CLIENT_TESTS=required to make that a failure.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARGO = os.environ.get("CARGO", "cargo")
REQUIREMENTS = ROOT / "tests" / "clients" / "requirements.txt"


@dataclass
class Part:
    """What one runner did."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> "Part":
        """Counts a failure of the runner itself."""
        self.failed += 1
        self.reasons.append(reason)
        return self


def run(command: list[str], **options) -> tuple[int, str]:
    """Runs a command, shows what it prints as it comes, and returns its exit code and that text."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", **options,
    )
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line)
    return process.wait(), "".join(lines)


def has_nextest() -> bool:
    """Tells whether cargo-nextest is installed."""
    found = subprocess.run([CARGO, "nextest", "--version"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return found.returncode == 0


def ignored_reasons() -> list[str]:
    """Lists the reasons of ignored tests, from the sources."""
    pattern = re.compile(r'#\[ignore = "([^"]+)"\]')
    files = (path for member in ("shared", "supervisor", "worker", "tests") for path in (ROOT / member).rglob("*.rs"))
    return sorted({reason for path in files for reason in pattern.findall(path.read_text(encoding="utf-8"))})


def rust_tests() -> Part:
    """Builds the binaries, then runs the tests beside them."""
    part = Part("rust")
    code, _ = run([CARGO, "build", "--workspace", "--bins"])
    if code != 0:
        return part.fail("the build failed")
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as skipped:
        options = {"env": {**os.environ, "BULKHEAD_TESTS_SKIPPED": skipped.name}}
        if has_nextest():
            code, text = run([CARGO, "nextest", "run", "--workspace", "--no-fail-fast"], **options)
            count_nextest(part, text)
        else:
            command = [CARGO, "test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests"]
            code, text = run(command, **options)
            count_cargo_test(part, text)
        reasons = sorted(skipped.read().splitlines())
    ignored = part.skipped
    # To the runner a test that found nothing to test has passed.
    part.passed -= len(reasons)
    part.skipped += len(reasons)
    part.reasons.extend(reasons)
    if ignored:
        part.reasons.extend(ignored_reasons() or ["ignored without a reason"])
    if part.passed == 0:
        return part.fail("no test ran")
    if code != 0 and part.failed == 0:
        return part.fail(f"the runner ended with {code}")
    return part


def cuda_tests() -> Part:
    """Runs the unit tests of the code for cards, where a compiler for its kernels is at hand."""
    part = Part("cuda")
    tool = [sys.executable, "tools/cuda_toolkit.py", "--no-fetch"]
    found = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if found.returncode != 0:
        part.skipped += 1
        part.reasons.append("no CUDA compiler is here: make build-cuda fetches one")
        return part
    command = [CARGO, "test", "--workspace", "--features", "bulkhead-worker/cuda", "--no-fail-fast", "--lib", "cuda::"]
    code, text = run(command, env={**os.environ, "BULKHEAD_NVCC": found.stdout.strip()})
    count_cargo_test(part, text)
    if part.passed == 0 or (code != 0 and part.failed == 0):
        return part.fail(f"the runner ended with {code}")
    return part


def count_nextest(part: Part, text: str) -> None:
    """Reads the summary line of cargo-nextest."""
    summaries = re.findall(r"Summary \[.*", re.sub(r"\x1b\[[0-9;]*m", "", text))
    for summary in summaries[-1:]:
        part.passed += sum(int(count) for count in re.findall(r"(\d+) passed", summary))
        part.failed += sum(int(count) for count in re.findall(r"(\d+) (?:failed|timed out|exec failed)", summary))
        part.skipped += sum(int(count) for count in re.findall(r"(\d+) skipped", summary))


def count_cargo_test(part: Part, text: str) -> None:
    """Adds up the result lines of cargo test."""
    pattern = r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored"
    for passed, failed, ignored in re.findall(pattern, text):
        part.passed += int(passed)
        part.failed += int(failed)
        part.skipped += int(ignored)


def target_folder() -> Path:
    """Asks cargo where it builds."""
    metadata = subprocess.run(
        [CARGO, "metadata", "--format-version", "1", "--no-deps"], cwd=ROOT, capture_output=True, check=True,
        stdin=subprocess.DEVNULL,
    )
    return Path(json.loads(metadata.stdout)["target_directory"])


def make_environment(folder: Path) -> str | None:
    """Makes the virtual environment of the clients, or finds the one of an earlier run. Returns why it cannot."""
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    stamp = folder / "requirements.stamp"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    code, _ = run([sys.executable, "-m", "venv", str(folder)])
    if code != 0:
        return "python cannot make a virtual environment"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    code, _ = run([*pip, "--requirement", str(REQUIREMENTS)])
    if code != 0:
        return "the client packages cannot be installed (is there a network?)"
    stamp.write_text(wanted, encoding="utf-8")
    return None


def client_tests() -> Part:
    """Runs the tests with the SDKs against a server that they start."""
    part = Part("clients")
    target = target_folder()
    environment = target / "clients-venv"
    reason = make_environment(environment)
    if reason is not None:
        if os.environ.get("BULKHEAD_CLIENT_TESTS") == "required":
            return part.fail(reason)
        part.skipped += len(list((ROOT / "tests" / "clients").glob("test_*.py")))
        part.reasons.append(f"{reason}: whole files were left out")
        return part
    binaries = {**os.environ, "BULKHEAD_BIN": str(target / "debug"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-q", "-rs", "tests/clients"]
    code, text = run(command, env=binaries)
    for line in text.splitlines()[-1:]:
        part.passed += sum(int(count) for count in re.findall(r"(\d+) passed", line))
        part.failed += sum(int(count) for count in re.findall(r"(\d+) (?:failed|errors?)", line))
        part.skipped += sum(int(count) for count in re.findall(r"(\d+) skipped", line))
    part.reasons.extend(re.findall(r"^SKIPPED \[\d+\] (.*)", text, flags=re.MULTILINE))
    if part.passed == 0 or (code != 0 and part.failed == 0):
        return part.fail(f"pytest ended with {code}")
    return part


def main() -> int:
    """Runs all parts and prints the summary last."""
    start = time.monotonic()
    parts = [rust_tests()]
    # Without binaries there is nothing that clients could talk to.
    if parts[0].passed:
        parts.append(client_tests())
        parts.append(cuda_tests())
    print(f"\nSummary after {time.monotonic() - start:.0f} s")
    for part in parts:
        print(f"  {part.name}: {part.passed} passed, {part.failed} failed, {part.skipped} skipped")
        for reason in part.reasons:
            print(f"    {reason}")
    total = [sum(getattr(part, name) for part in parts) for name in ("passed", "failed", "skipped")]
    print("{} passed, {} failed, {} skipped".format(*total))
    return 1 if total[1] else 0


if __name__ == "__main__":
    sys.exit(main())
