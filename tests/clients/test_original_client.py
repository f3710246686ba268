"""The client of the service that Bulkhead replaces: urllib, a health poll, one kind of request."""

import json
import urllib.error
import urllib.request

import pytest


def call(server, path, body=None):
    """Sends JSON and returns the answer's JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
        return json.load(answer)


def test_health_until_the_model_is_loaded(server):
    health = server.wait_for("the model is loaded", lambda health: health["model_loaded"] is True)
    assert health["status"] == "healthy"
    assert isinstance(health["gpu_memory_used"], float)
    assert isinstance(health["gpu_memory_total"], float)


def test_chat(server):
    body = {
        "model": "bulkhead-demo", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 200,
        "temperature": 0.7, "top_p": 0.9,
    }
    content = call(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert isinstance(content, str)


def test_models(server):
    assert "bulkhead-demo" in [model["id"] for model in call(server, "/v1/models")["data"]]


def test_errors_carry_a_message(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(server, "/v1/chat/completions", {"model": "bulkhead-demo"})
    assert refused.value.code == 400
    assert "messages" in json.load(refused.value)["error"]["message"]
