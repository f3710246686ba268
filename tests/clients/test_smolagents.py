"""smolagents: its model class, and one step of each of its agents. The small model solves nothing; no call may fail."""

import pytest
from smolagents import ChatMessage, CodeAgent, OpenAIModel, ToolCallingAgent, tool
from smolagents.models import MessageRole

STOP = ["Observation:", "Calling tools:"]


@pytest.fixture(scope="module")
def model(server):
    return OpenAIModel(
        model_id="bulkhead-demo", api_base=f"{server.url}/v1", api_key="any", temperature=0, max_tokens=200
    )


def question(text="How do I check the health of the server?"):
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])]


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def test_generate(model):
    message = model.generate(question(), stop_sequences=STOP)
    assert message.role == "assistant"
    assert message.content
    assert message.token_usage.output_tokens > 0


def test_generate_stream_equals_generate(model):
    deltas = list(model.generate_stream(question(), stop_sequences=STOP))
    text = "".join(delta.content or "" for delta in deltas)
    assert text == model.generate(question(), stop_sequences=STOP).content
    assert sum(delta.token_usage.output_tokens for delta in deltas if delta.token_usage) > 0


def steps_without_http_errors(agent):
    """Runs an agent for one step; gives the errors of its steps, of which none may come from the server."""
    agent.run("What is 7 plus 5?", max_steps=1)
    assert agent.memory.steps
    return [step.error for step in agent.memory.steps if getattr(step, "error", None)]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_code_agent_step(model, is_streamed):
    agent = CodeAgent(tools=[add], model=model, stream_outputs=is_streamed, verbosity_level=0)
    for error in steps_without_http_errors(agent):
        assert "Error code" not in str(error), "the answer may be no code, but it is an answer"


def test_tool_calling_agent_is_told_what_is_missing(model):
    """It sends tool_choice "required", which is refused by name until calls can be enforced."""
    agent = ToolCallingAgent(tools=[add], model=model, verbosity_level=0)
    with pytest.raises(Exception, match="tool_choice") as refused:
        agent.run("What is 7 plus 5?", max_steps=1)
    assert "400" in str(refused.value)
