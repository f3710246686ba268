"""Compares harmony.py with renderings recorded from openai-harmony (a JSON file of conversations, see README.md)."""
import json
import sys

from harmony import prompt_text

# Nested schemas, another model identity and training renderings never occur in the corpus; a result without a call is an error.
SKIPPED = {"tools_nested", "model_identity", "no_generation_prompt", "tool_without_call"}


def request_of(case):
    """The recorded chat-completions request in the form that harmony.py takes."""
    messages = []
    for message in case["messages"]:
        message = dict(message)
        message["reasoning"] = message.get("thinking") or message.get("reasoning_content")
        for call in message.get("tool_calls") or []:
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if message["role"] == "tool" and not isinstance(message["content"], str):
            message["content"] = json.dumps(message["content"])
        messages.append(message)
    return {"messages": messages, "tools": case["tools"], **case["kwargs"]}


def main():
    recorded = json.load(open(sys.argv[1]))
    cases = [case for case in recorded["cases"] if case["name"] not in SKIPPED]
    wrong = [c["name"] for c in cases if prompt_text(request_of(c), recorded["current_date"]) != c["harmony"]["text"]]
    print(f"{len(cases) - len(wrong)} of {len(cases)} conversations equal", *wrong)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
