"""A running `bulkhead serve` on loopback: its start, its health, requests to it, and its end."""

import http.client
import json
import os
import signal
import subprocess
import tempfile
import time

from .context import Failed

START_S = 60
REQUEST_S = 60
STOP_S = 15


class Service:
    """Starts when it is entered and ends, with its worker, when it is left."""

    def __init__(self, context, model, *flags, device=None):
        self._folder = tempfile.TemporaryDirectory(dir=context.scratch)
        device = device or context.device
        self._command = [
            str(context.program("bulkhead")), "serve", "--listen", "127.0.0.1:0", "--log-format", "json",
            "--runtime-dir", f"{self._folder.name}/run", "--model", str(model), "--device", device, *flags,
        ]
        self._log_path = f"{self._folder.name}/log"
        self._process = None
        self.address = None

    def __enter__(self):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BULKHEAD_")}
        with open(self._log_path, "wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                             stderr=log, env=environment)
        try:
            self.address = self._wait("it listens", START_S, self._find_address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def log(self, lines=6):
        """Gives the last lines of the log."""
        with open(self._log_path, encoding="utf-8", errors="replace") as file:
            return " | ".join(line.strip() for line in file.readlines()[-lines:])

    def _find_address(self):
        with open(self._log_path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if '"bulkhead serves"' in line:
                    return json.loads(line)["fields"]["address"] if "fields" in line else json.loads(line)["address"]
        if self._process.poll() is not None:
            raise Failed(f"bulkhead ended with {self._process.returncode}: {self.log()}")
        return None

    def _wait(self, what, seconds, find):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = find()
            if found:
                return found
            time.sleep(0.02)
        raise Failed(f"gave up waiting until {what} ({seconds} s): {self.log()}")

    def request(self, method, path, body=None, timeout_s=REQUEST_S):
        """Sends a request and gives status and text."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout_s)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8")
        except OSError as error:
            ended = self._process.poll()
            state = "it runs" if ended is None else f"it ended with {ended}"
            raise Failed(f"{path}: {error}; {state}: {self.log()}") from error
        finally:
            connection.close()

    def health(self):
        """Gives the health report."""
        return json.loads(self.request("GET", "/health")[1])

    def worker(self):
        """Gives what the health report says of the worker."""
        return self.health()["workers"][0]

    def wait_for(self, what, seconds, find):
        """Waits until the health report holds something and gives what `find` gives."""
        return self._wait(what, seconds, lambda: find(self.health()))

    def wait_until_running(self, seconds=START_S):
        """Waits until a model answers; fails at once when the worker was given up."""
        def find(health):
            worker = health["workers"][0]
            if worker["state"] == "FATAL":
                raise Failed(f"the worker was given up: {worker.get('last_end')}: {self.log()}")
            return health if health["model_loaded"] else None
        return self.wait_for("the model is loaded", seconds, find)

    def chat(self, text, tokens=96, **more):
        """Asks one question at temperature 0 and gives the answer."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens, **more}
        status, answer = self.request("POST", "/v1/chat/completions", body)
        if status != 200:
            raise Failed(f"{text!r}: {status} {answer[:300]}")
        return json.loads(answer)["choices"][0]["message"].get("content") or ""

    def chat_streamed(self, text, tokens=96):
        """Asks with `stream` and gives the answer and the number of events that held a part of it."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens, "stream": True}
        status, answer = self.request("POST", "/v1/chat/completions", body)
        events = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
        if status != 200 or not events or events[-1] != "[DONE]":
            raise Failed(f"{text!r} streamed: {status}, {len(events)} events, the last {events[-1:]}")
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        parts = [choice["delta"].get("content") for choice in choices]
        parts = [part for part in parts if part]
        return "".join(parts), len(parts)

    def kill_worker(self):
        """Ends the worker with SIGKILL and gives its incarnation."""
        worker = self.worker()
        os.kill(worker["pid"], signal.SIGKILL)
        return worker["incarnation"]
