"""Measures a model beside llama.cpp on this machine, in turns, and prints the ratios with the commands that gave them.

Usage: python3 tools/bench_peers.py --worker BIN --model DIR --llama-bench BIN --gguf FILE
           [--llama-batched-bench BIN] [--bulkhead BIN --llama-server BIN] [--threads N] [--rounds N] [--only WHAT,...]

Needs Python 3.10, builds of both, and one model in both forms; it builds, downloads and makes up nothing. Each round runs
ours and then llama.cpp once, and the medians over all rounds are compared: other work on the machine meets both alike.
Served models listen on 127.0.0.1 and are asked for a few tokens before their memory is read.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

DEPTH, PROMPT, GENERATE = 4096, 512, 32
STREAMS, STREAM_DEPTH = 8, 128
READY_S_MAX = 300
NOTES = {True: "more is better", False: "less is better"}


def parse():
    """Reads the command line and refuses what is not there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    binaries = ["worker", "llama-bench", "llama-batched-bench", "bulkhead", "llama-server"]
    for name in binaries:
        parser.add_argument(f"--{name}", default="", metavar="BIN")
    parser.add_argument("--model", default="", metavar="DIR", help="our checkpoint")
    parser.add_argument("--gguf", default="", metavar="FILE", help="the same shape for llama.cpp")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="engine,depth,streams,served", help="some of: engine, depth, streams, served")
    arguments = parser.parse_args()
    for name in ["worker", "model", "llama-bench", "gguf"]:
        if not value_of(arguments, name):
            parser.error(f"--{name} is missing: make bench-peers takes it from {name.upper().replace('-', '_')}")
    for name in [*binaries, "gguf"]:
        path = value_of(arguments, name)
        if path and not pathlib.Path(path).is_file():
            parser.error(f"--{name} {path}: no such file")
        if path and name in binaries and not os.access(path, os.X_OK):
            parser.error(f"--{name} {path}: not executable")
    if not (pathlib.Path(arguments.model) / "config.json").is_file():
        parser.error(f"--model {arguments.model}: no model folder, for it has no config.json")
    unknown = set(arguments.only.split(",")) - {"engine", "depth", "streams", "served"}
    if unknown:
        parser.error(f"--only {arguments.only}: there is no {', '.join(sorted(unknown))}")
    if arguments.threads < 1 or arguments.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    return arguments


def value_of(arguments, name):
    """Gives an argument by its flag."""
    return getattr(arguments, name.replace("-", "_"))


def output_of(command):
    """Runs a command to its end and gives what it printed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def ours(arguments, *rest):
    """The command of our side."""
    fixed = ["--model", arguments.model, "--threads", str(arguments.threads), "--repetitions", "1", "--json"]
    return [arguments.worker, "bench", *fixed, *map(str, rest)]


def theirs(arguments, *rest):
    """The command of the other side."""
    fixed = ["-m", arguments.gguf, "-t", str(arguments.threads), "-r", "1", "-o", "json"]
    return [arguments.llama_bench, *fixed, *map(str, rest)]


def our_rates(command):
    """Gives (prompt, decode) in tokens a second."""
    report = json.loads(output_of(command))
    return report["prefill_tokens_per_second"]["median"], report["decode_tokens_per_second"]["median"]


def their_rates(command):
    """Gives the rates of llama-bench's tests, by (prompt, generated) tokens."""
    return {(test["n_prompt"], test["n_gen"]): test["avg_ts"] for test in json.loads(output_of(command))}


def engine(arguments):
    """Decode from an empty context, and a prompt."""
    our_command = ours(arguments, "--prompt", PROMPT, "--depth", 0, "--generate", GENERATE)
    their_command = theirs(arguments, "-p", PROMPT, "-n", GENERATE)

    def once():
        prompt, decode = our_rates(our_command)
        rates = their_rates(their_command)
        return {
            "decode, tokens/s": (decode, rates[0, GENERATE]),
            f"prompt of {PROMPT}, tokens/s": (prompt, rates[PROMPT, 0]),
        }

    return once, [our_command, their_command], True


def depth(arguments):
    """Decode behind a long context."""
    our_command = ours(arguments, "--prompt", 1, "--depth", DEPTH, "--generate", GENERATE)
    their_command = theirs(arguments, "-p", 0, "-n", GENERATE, "-d", DEPTH)

    def once():
        return {f"decode at {DEPTH}, tokens/s": (our_rates(our_command)[1], their_rates(their_command)[0, GENERATE])}

    return once, [our_command, their_command], True


def streams(arguments):
    """Several sequences at once."""
    our_command = ours(
        arguments, "--prompt", 1, "--depth", STREAM_DEPTH, "--generate", GENERATE, "--batch", STREAMS
    )
    counts = ["-npp", STREAM_DEPTH, "-ntg", GENERATE, "-npl", STREAMS, "-c", STREAMS * (STREAM_DEPTH + GENERATE)]
    threads = ["-t", arguments.threads, "-tb", arguments.threads, "--output-format", "jsonl"]
    their_command = [*map(str, [arguments.llama_batched_bench, "-m", arguments.gguf, *threads, *counts])]

    def once():
        lines = output_of(their_command).splitlines()
        rates = [json.loads(line)["speed_tg"] for line in lines if line.startswith("{")]
        return {f"decode of {STREAMS} sequences, tokens/s": (our_rates(our_command)[1], rates[-1])}

    return once, [our_command, their_command], True


def free_port():
    """Gives a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(port, path, body):
    """Sends a JSON request and waits for its end."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=READY_S_MAX) as answer:
        answer.read()


def is_ready(port, path):
    """Says whether a health check succeeds."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def resident_mib(pid):
    """Adds up the memory of a process and its children, in MiB; pages that they share with the file count too."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024
    threads = pathlib.Path(f"/proc/{pid}/task").iterdir()
    children = {child for thread in threads for child in (thread / "children").read_text().split()}
    return own + sum(resident_mib(child) for child in children)


def serve_once(command, port, health):
    """Starts a server; gives the seconds until it is ready and its memory after an answer, and stops it."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port, health):
            if process.poll() is not None or time.monotonic() - started > READY_S_MAX:
                raise SystemExit(f"{shlex.join(command)}\nwas not ready after {READY_S_MAX} s, or ended before")
            time.sleep(0.005)
        seconds = time.monotonic() - started
        post(port, "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0})
        return seconds, resident_mib(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=READY_S_MAX)


def served(arguments):
    """Time to a ready server, and its memory."""
    our_port, their_port = free_port(), free_port()
    place = ["--listen", f"127.0.0.1:{our_port}", "--device", "cpu", "--context-tokens", str(2 * DEPTH)]
    our_command = [arguments.bulkhead, "serve", "--model", arguments.model, *place]
    place = ["--host", "127.0.0.1", "--port", str(their_port), "-t", str(arguments.threads), "-c", str(2 * DEPTH)]
    their_command = [arguments.llama_server, "-m", arguments.gguf, *place]

    def once():
        our_ready, our_memory = serve_once(our_command, our_port, "/health/ready")
        their_ready, their_memory = serve_once(their_command, their_port, "/health")
        return {"ready, seconds": (our_ready, their_ready), "resident, MiB": (our_memory, their_memory)}

    return once, [our_command, their_command], False


def measure(arguments, part):
    """Runs the rounds of one part; gives its lines of the table."""
    once, commands, is_rate = part(arguments)
    rounds = []
    for number in range(arguments.rounds):
        print(f"{part.__name__}: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        rounds.append(once())
    lines = []
    for what in rounds[0]:
        our_values, their_values = ([each[what][side] for each in rounds] for side in (0, 1))
        ratio = statistics.median(our_values) / statistics.median(their_values)
        lines.append(f"| {what} | {spread(their_values)} | {spread(our_values)} | {ratio:.2f} | {NOTES[is_rate]} |")
    return lines, commands


def spread(values):
    """Writes the median and the extremes."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    """Measures what was asked for and what there are programs for."""
    arguments = parse()
    needs = {streams: ["llama-batched-bench"], served: ["bulkhead", "llama-server"]}
    lines, commands = ["| what | llama.cpp | ours | ours / llama.cpp | |", "| --- | --- | --- | --- | --- |"], []
    for part in [engine, depth, streams, served]:
        if part.__name__ not in arguments.only.split(","):
            continue
        missing = [name for name in needs.get(part, []) if not value_of(arguments, name)]
        if missing:
            print(f"{part.__name__} is left out: it needs --{' and --'.join(missing)}", file=sys.stderr)
            continue
        more, used = measure(arguments, part)
        lines += more
        commands += used
    print("\n".join(lines), "", *map(shlex.join, commands), sep="\n")


if __name__ == "__main__":
    main()
