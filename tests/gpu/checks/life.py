"""Killing the worker again and again, and what the worker may still do while it lives."""

import pathlib
import time

from .card import open_card
from .context import Failed
from .service import Service

KILLS = 20
KILLS_QUICK = 5
RECOVERY_S = 30
# What the driver keeps or frees with a delay; a leak of the model's own memory would add up over the kills.
SLACK_BYTES = 64 << 20
# RLIMIT_CORE, RLIMIT_FSIZE, RLIMIT_NOFILE as worker/src/sandbox/limits.rs sets them on the processor; the last may be
# higher on a card, whose driver opens more.
LIMITS = {"Max core file size": 0, "Max file size": 0}
OPEN_FILES_MAX = 4096


def _wait_until_used(card, bytes_max, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        used = card.used_bytes()
        if used <= bytes_max:
            return used
        time.sleep(0.05)
    return card.used_bytes()


def kills(context):
    """A killed worker is replaced, its memory on the card comes back, and requests go on."""
    card = open_card(context) if context.is_cuda else None
    base = card.used_bytes() if card else 0
    seconds, used = [], []
    count = KILLS_QUICK if context.is_quick else KILLS
    with Service(context, context.demo_model()) as service:
        service.wait_until_running()
        question = "What is 7 plus 5?"
        expected = service.chat(question)
        first = card.used_bytes() if card else 0
        for number in range(count):
            incarnation = service.kill_worker()
            killed = time.monotonic()
            service.wait_for("another worker runs", RECOVERY_S, lambda health: (
                health["model_loaded"] and health["workers"][0]["incarnation"] > incarnation))
            seconds.append(time.monotonic() - killed)
            answer = service.chat(question)
            if answer != expected:
                raise Failed(f"after kill {number + 1}: {answer!r}, before {expected!r}")
            if card:
                used.append(card.used_bytes())
                if used[-1] > first + SLACK_BYTES:
                    raise Failed(f"after kill {number + 1}: {used[-1] >> 20} MiB in use, at first {first >> 20}")
    context.data["life.kills"] = {"seconds": seconds, "used_bytes": used, "base_bytes": base, "first_bytes": first}
    text = f"{count} kills, running again after {min(seconds):.2f} to {max(seconds):.2f} s"
    if card:
        after = _wait_until_used(card, base + SLACK_BYTES, 10)
        if after > base + SLACK_BYTES:
            raise Failed(f"{after >> 20} MiB in use after the end, {base >> 20} before the start")
        text += f"; MiB on the card: {base >> 20} before, {first >> 20} to {max(used) >> 20} with, {after >> 20} after"
    return text


def _status(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _limits(pid):
    """Gives the hard limits by their names; the file's columns begin at fixed places."""
    lines = pathlib.Path(f"/proc/{pid}/limits").read_text().splitlines()
    start = lines[0].index("Hard Limit")
    return {line[:26].strip(): line[start:start + 21].strip() for line in lines[1:]}


def sandbox(context):
    """The kernel says of the worker what the health report says of its walls."""
    with Service(context, context.demo_model()) as service:
        worker = service.wait_until_running()["workers"][0]
        layers, pid = worker["isolation"], worker["pid"]
        service.chat("What is 7 plus 5?")
        status, limits = _status(pid), _limits(pid)
    expected = {"NoNewPrivs": "1", "Seccomp": "2"}
    wrong = [f"{name} is {status.get(name)}, expected {value}" for name, value in expected.items()
             if status.get(name) != value]
    wrong += [f"{name} is {status[name]}" for name in ("CapEff", "CapPrm", "CapInh", "CapAmb") if int(status[name], 16)]
    wrong += [f"{name} is {limits[name]}" for name, value in LIMITS.items() if limits[name] != str(value)]
    files = limits["Max open files"]
    if not files.isdigit() or int(files) > OPEN_FILES_MAX:
        wrong.append(f"Max open files is {files}")
    if worker["sandbox"] != "full":
        wrong.append(f"the health report says sandbox: {worker['sandbox']}, without {worker.get('isolation_missing')}")
    for layer in ("no-new-privileges", "no-capabilities", "resource-limits", "parent-death-signal", "landlock-files",
                  "system-call-filter"):
        if layer not in layers:
            wrong.append(f"the health report lacks {layer}")
    if wrong:
        raise Failed("; ".join(wrong))
    context.data["life.sandbox"] = {"layers": layers, "status": status, "limits": limits}
    return f"sandbox: {worker['sandbox']} ({', '.join(layers)}); Seccomp {status['Seccomp']}, {files} files, {status['Threads']} threads"


CASES = [("life.sandbox", 60, sandbox), ("life.kills", 150, kills)]
