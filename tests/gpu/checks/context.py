"""What every check gets: the pack, the device, a scratch folder; and how a check says that it failed or was skipped."""

import json
import pathlib
import subprocess
from dataclasses import dataclass, field


class Failed(Exception):
    """The check found something wrong."""


class TimedOut(Failed):
    """A command was not done in time."""


class Skipped(Exception):
    """The check cannot be made here."""


@dataclass
class Context:
    """The surroundings of a run."""

    pack: pathlib.Path
    scratch: pathlib.Path
    device: str
    is_quick: bool
    # Running in the background from the start: {name: process}.
    background: dict = field(default_factory=dict)
    # Numbers for the JSON file, by the name of the case.
    data: dict = field(default_factory=dict)

    @property
    def is_cuda(self):
        """Says whether the run is about a card; a run on the processor tries the checks themselves."""
        return self.device.startswith("cuda")

    def program(self, name):
        """Gives the path of a packed program."""
        path = self.pack / "bin" / name
        if not path.is_file():
            raise Failed(f"{path} is missing: make gpu-pack")
        return path

    def worker(self):
        """Gives the worker that is checked."""
        return self.program("bulkhead-worker-cuda" if self.is_cuda else "bulkhead-worker")

    def device_flags(self):
        """Gives the flags that choose the device, for eval and bench; the worker without CUDA has none."""
        return ["--device", self.device] if self.is_cuda else []

    def need_cuda(self):
        """Skips a check that says nothing without a card."""
        if not self.is_cuda:
            raise Skipped(f"means nothing on {self.device}")

    def demo_model(self):
        """Gives the folder of the built-in model."""
        return self.pack / "demo-model"


def run(command, timeout_s):
    """Runs a command and gives what it printed; raises Failed with its last lines, or TimedOut."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        name = pathlib.Path(command[0]).name
        raise TimedOut(f"{name} {command[1]}: not done after {timeout_s:.0f} s") from expired
    if done.returncode != 0:
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise Failed(f"{pathlib.Path(command[0]).name} {command[1]} ended with {done.returncode}: {last}")
    return done.stdout


def read_json(path):
    """Reads a JSON file."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
