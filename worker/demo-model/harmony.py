"""Renders chat-completions requests as harmony text, byte for byte as openai-harmony does.

A rendering is a list of segments (text, trained).  Segments end where the tokeniser always splits, so encoding them one by
one gives the same ids as encoding the joined text.  `trained` marks the text that the model has to produce itself.
"""
import json

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
TOOL_CHANNEL = "\nCalls to these tools must go to the commentary channel: 'functions'."
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
           "<|message|>", "<|call|>"]


def system_text(effort, date, tools):
    """The system message that stands first in every prompt."""
    text = f"{IDENTITY}\nKnowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: {effort}\n\n{CHANNELS}"
    return f"<|start|>system<|message|>{text}{TOOL_CHANNEL if tools else ''}<|end|>"


def type_text(schema):
    """The TypeScript-like type of one parameter; flat types only (no nested objects, no oneOf)."""
    kind = schema.get("type")
    if schema.get("enum"):
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if kind == "array":
        return type_text(schema.get("items", {})) + "[]"
    return {"integer": "number", None: "any"}.get(kind, kind)


def tool_text(function):
    """One function of the namespace, with its description and the comments of its parameters."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    head = "".join(f"// {line}\n" for line in (function.get("description") or "").splitlines())
    if not properties:
        return f"{head}type {function['name']} = () => any;\n\n"
    body = ""
    for name, schema in properties.items():
        body += "".join(f"// {line}\n" for line in (schema.get("description") or "").splitlines())
        optional = "" if name in parameters.get("required", []) else "?"
        default = schema.get("default")
        if isinstance(default, bool):
            default = json.dumps(default)
        body += f"{name}{optional}: {type_text(schema)},{'' if default is None else f' // default: {default}'}\n"
    return f"{head}type {function['name']} = (_: {{\n{body}}}) => any;\n\n"


def developer_text(instructions, tools):
    """The developer message, or nothing when there is neither an instruction nor a tool."""
    parts = []
    if instructions:
        parts.append(f"# Instructions\n\n{instructions}")
    if tools:
        functions = "".join(tool_text(tool["function"]) for tool in tools)
        parts.append(f"# Tools\n\n## functions\n\nnamespace functions {{\n\n{functions}}} // namespace functions")
    return "<|start|>developer<|message|>" + "\n\n".join(parts) + "<|end|>" if parts else ""


def call_header(name):
    return f" to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>"


def call_segments(message, thoughts):
    """An earlier tool call.  Its header is trained only behind its analysis, where generation would produce it too."""
    function = message["tool_calls"][0]["function"]
    thought = thoughts and message.get("reasoning")
    out = []
    if thought:
        out += [("<|start|>assistant", False), (f"<|channel|>analysis<|message|>{thought}<|end|>", True)]
    out += [("<|start|>assistant", False), (call_header(function["name"]), bool(thought)), (function["arguments"], True)]
    return out + [("<|call|>", True)]


def history_segments(messages):
    """The turns of a conversation without system and developer messages."""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    names, out = {}, []
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "user":
            out.append((f"<|start|>user<|message|>{content}<|end|>", False))
        elif role == "tool":
            name = names.get(message["tool_call_id"])
            out.append((f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>{content}<|end|>", False))
        elif message.get("tool_calls"):
            call = message["tool_calls"][0]
            names[call["id"]] = call["function"]["name"]
            out += call_segments(message, thoughts=i > last_user)
        else:
            out += [("<|start|>assistant<|channel|>final<|message|>", False), (content, True), ("<|end|>", False)]
    return out


def prompt_segments(request, date):
    """Segments of the whole prompt; the last one opens the assistant's turn."""
    messages, tools = request["messages"], request.get("tools")
    instructions = "\n\n".join(m["content"] for m in messages if m["role"] in ("system", "developer") and m["content"])
    head = system_text(request.get("reasoning_effort", "medium"), date, tools) + developer_text(instructions, tools)
    turns = [m for m in messages if m["role"] not in ("system", "developer")]
    return [(head, False)] + history_segments(turns) + [("<|start|>assistant", False)]


def prompt_text(request, date):
    return "".join(text for text, _ in prompt_segments(request, date))


def answer_text(analysis, answer):
    """What the model writes behind `<|start|>assistant` when it answers."""
    return f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant<|channel|>final<|message|>{answer}<|return|>"


def call_text(analysis, name, arguments):
    """What the model writes behind `<|start|>assistant` when it calls a tool."""
    return f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant{call_header(name)}{arguments}<|call|>"


def parse_completion(text):
    """Completion -> dict with reasoning, content, and call (name, parsed arguments) when there is one."""
    out = {"reasoning": "", "content": "", "call": None}
    for part in ("<|start|>assistant" + text).split("<|start|>assistant"):
        head, found, body = part.partition("<|message|>")
        body = body.split("<|end|>")[0].split("<|return|>")[0].split("<|call|>")[0]
        if not found:
            continue
        if "to=functions." in head:
            try:
                name = head.split("to=functions.")[1].split("<|")[0].split(" ")[0]
                out["call"] = {"name": name, "arguments": json.loads(body)}
            except json.JSONDecodeError:
                out["call"] = {"name": "", "arguments": None}
        elif "analysis" in head:
            out["reasoning"] += body
        else:
            out["content"] += body
    return out
