"""A real server for the clients: started once, on a port that the system chose, ended with the tests."""

import json
import os
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60


@dataclass
class Server:
    """Where a server listens."""

    url: str

    def health(self) -> dict:
        """Asks for the health report; a 503 carries one too."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def wait_for(self, what: str, condition) -> dict:
        """Asks for the health until a condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            health = self.health()
            if condition(health):
                return health
            time.sleep(0.01)
        raise AssertionError(f"gave up waiting until {what}: {health}")


def bound_address(line: str) -> str | None:
    """Finds the address in the log line with which a server begins to listen."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields.get("address") if fields.get("message") == "bulkhead serves" else None


@pytest.fixture(scope="session")
def server():
    """Gives a running server whose model is loaded."""
    folder = os.environ.get("BULKHEAD_BIN", str(ROOT / "target" / "debug"))
    with tempfile.TemporaryDirectory() as runtime_dir:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BULKHEAD_")}
        process = subprocess.Popen(
            [f"{folder}/bulkhead", "serve", "--listen", "127.0.0.1:0", "--log-format", "json", "--runtime-dir",
             f"{runtime_dir}/run", "--context-tokens", "8192"],
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment, text=True,
        )
        try:
            address = None
            for line in process.stderr:
                address = bound_address(line)
                if address:
                    break
            assert address, "the server did not start"
            # The pipe must not fill up.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            running = Server(f"http://{address}")
            running.wait_for("the model is loaded", lambda health: health["model_loaded"])
            yield running
        finally:
            process.terminate()
            try:
                assert process.wait(timeout=DEADLINE_S) == 0, "a server that is asked to end does so in order"
            finally:
                process.kill()


@pytest.fixture(scope="session")
def client(server):
    """Gives OpenAI's client without retries, so that every refusal is seen."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S)
