"""OpenAI's own Python SDK."""

import asyncio
import json

import openai
import pytest

MODEL = "bulkhead-demo"
QUESTION = [{"role": "user", "content": "How do I check the health of the server?"}]
WEATHER = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}]


def ask(client, **fields):
    """Asks with the most likely tokens, unless the fields say otherwise."""
    return client.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 300, **fields}
    )


def test_whole(client):
    answer = ask(client)
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content and "<|" not in choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_streamed_equals_whole(client):
    whole = ask(client)
    content, reasoning, last, usage = "", "", None, None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}):
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert usage is None, "usage comes last"
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning", None) or ""
        last = chunk.choices[0].finish_reason
    assert content == whole.choices[0].message.content
    assert reasoning == (getattr(whole.choices[0].message, "reasoning", None) or "")
    assert last == "stop"
    assert usage == whole.usage


def test_stream_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=300) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == ask(client).choices[0].message.content


def test_usage_only_when_asked_for(client):
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_max_tokens(client):
    for name in ("max_tokens", "max_completion_tokens"):
        fields = {"max_tokens": openai.omit, name: 4}
        answer = ask(client, **fields)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 4


def test_stop(client):
    content = ask(client).choices[0].message.content
    stop = content[4:7]
    answer = ask(client, stop=[stop])
    assert answer.choices[0].message.content == content.split(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_seed_and_n(client):
    def sample(seed):
        answer = ask(client, temperature=1.5, seed=seed, n=1, max_tokens=40)
        assert len(answer.choices) == 1
        return answer.choices[0].message

    assert sample(7) == sample(7)
    assert any(sample(seed) != sample(7) for seed in range(8, 14))


def test_tool_call_and_the_answer_from_its_result(client):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = ask(client, messages=messages, tools=WEATHER, tool_choice="auto")
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 17, "sky": "sunny"})}
    messages += [choice.message.model_dump(exclude_none=True), result]
    final = ask(client, messages=messages, tools=WEATHER).choices[0]
    assert final.finish_reason == "stop"
    assert "17" in final.message.content or "sunny" in final.message.content


def test_streamed_tool_call(client):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    calls = {}
    for chunk in ask(client, messages=messages, tools=WEATHER, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            call = calls.setdefault(part.index, {"name": "", "arguments": ""})
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
        reason = chunk.choices[0].finish_reason
    assert reason == "tool_calls"
    assert list(calls) == [0]
    assert json.loads(calls[0]["arguments"]) == {"city": "Paris"}


def test_tool_choice_none_and_required(client):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    assert not ask(client, messages=messages, tools=WEATHER, tool_choice="none").choices[0].message.tool_calls
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, messages=messages, tools=WEATHER, tool_choice="required")
    assert refused.value.param == "tool_choice"


@pytest.mark.parametrize("prompt", ["Bulkhead is", [20, 21, 22]])
def test_completions(client, prompt):
    fields = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**fields)
    assert whole.object == "text_completion"
    assert whole.usage.completion_tokens <= 8
    streamed = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.message.content
    for token in tokens:
        assert token.token.encode() == bytes(token.bytes)
        assert len(token.top_logprobs) == 3
        # At temperature 0 it is the most likely one.
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
    streamed = []
    for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            if choice.logprobs:
                streamed += choice.logprobs.content
    assert streamed == tokens
    assert ask(client).choices[0].logprobs is None


def test_logprobs_of_completions(client):
    fields = {"model": MODEL, "prompt": "Bulkhead is", "temperature": 0, "max_tokens": 8, "logprobs": 2}
    choice = client.completions.create(**fields).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    for token, number, top, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        assert choice.text[offset:].startswith(token)
        assert top[token] == number <= 0
        assert len(top) == 2
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**fields, stream=True)]
    streamed = [part for part in streamed if part]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert sum((getattr(part, name) for part in streamed), []) == getattr(told, name)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-4")
    assert refused.value.code == "model_not_found"
    assert MODEL in refused.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_bad_parameters(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_context_length(client, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, messages=[{"role": "user", "content": "many words " * 8000}], stream=stream)
    assert refused.value.code == "context_length_exceeded"


def test_body_too_large(client):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, messages=[{"role": "user", "content": "x" * (9 << 20)}])
    assert refused.value.status_code == 413


def test_a_client_that_gives_up_leaves_nothing_behind(client, server):
    # The built-in model goes on with this word until its context is full.
    endless = {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 8000}
    stream = client.completions.create(stream=True, **endless)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(**endless)

    def is_idle(health):
        blocks = health["workers"][0]["blocks"]
        return health["queue"] == {"running": 0, "waiting": 0} and blocks["free"] == blocks["total"]

    server.wait_for("nothing runs and all blocks are free", is_idle)


def test_async_client(server):
    async def ask_together():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            answers = await asyncio.gather(*(ask(client) for _ in range(4)))
            stream = await ask(client, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            return [answer.choices[0].message.content for answer in answers], streamed

    answers, streamed = asyncio.run(ask_together())
    assert set(answers) == {streamed}


def test_header_names_the_request(client):
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_tokens=1)
    assert answer.headers["x-request-id"].startswith("req_")
