"""Accuracy per skill on held-out conversations, judged on what is generated greedily.

Either against a running server, over HTTP in OpenAI's wire format (--base-url), or in this process with PyTorch (--checkpoint).
A tool call is right when name and parsed arguments are; a JSON answer when its parsed value is; any other answer when its text is.
"""
import argparse
import datetime
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from corpus import SKILLS, conversations
from harmony import parse_completion, prompt_text

SEED = "held-out"
MAX_TOKENS = 420
TIMEOUT = 300


def wire_messages(messages):
    """Messages as clients send them: without our own field for kept reasoning."""
    return [{key: value for key, value in message.items() if key != "reasoning"} for message in messages]


def ask_server(base_url, model, conversation):
    """One request -> dict with reasoning, content and call; or error."""
    body = dict(conversation["request"], model=model, temperature=0, max_tokens=MAX_TOKENS)
    body["messages"] = wire_messages(body["messages"])
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            message = json.load(reply)["choices"][0]["message"]
    except (urllib.error.URLError, TimeoutError, ValueError, KeyError) as error:
        return {"error": f"{error}", "content": "", "reasoning": "", "call": None}
    calls = message.get("tool_calls") or []
    call = None
    if calls:
        function = calls[0]["function"]
        try:
            call = {"name": function["name"], "arguments": json.loads(function["arguments"])}
        except ValueError:
            call = {"name": function["name"], "arguments": None}
    return {"reasoning": message.get("reasoning") or message.get("reasoning_content") or "", "content": message.get("content") or "", "call": call}


def over_http(base_url, model, cases, parallel):
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda case: ask_server(base_url, model, case), cases))


def in_process(folder, device, cases):
    from tokenizers import Tokenizer

    from export import load_checkpoint
    from generate import generate, load_model
    config, state = load_checkpoint(folder)
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    model = load_model(config, state, device)
    stop = json.loads((Path(folder) / "generation_config.json").read_text())["eos_token_id"]
    prompts = [tokenizer.encode(prompt_text(c["request"], c["date"]), add_special_tokens=False).ids for c in cases]
    outputs = generate(model, prompts, MAX_TOKENS, stop)
    return [parse_completion(tokenizer.decode(ids, skip_special_tokens=False)) for ids, _ in outputs]


def is_right(case, got):
    call = case.get("call")
    if call:
        return bool(got["call"]) and got["call"] == {"name": call["name"], "arguments": json.loads(call["arguments"])}
    if got["call"]:
        return False
    if case["skill"] == "json":
        try:
            return json.loads(got["content"]) == json.loads(case["answer"])
        except ValueError:
            return False
    return got["content"].strip() == case["answer"].strip()


def make_cases(skills, count, today):
    """(skill, conversation) pairs; `today` replaces the random date where a server inserts its own."""
    out = []
    for skill in skills:
        for case in conversations(f"{SEED}-{skill}", count, True, skill):
            if today:
                case["answer"] = case.get("answer") and case["answer"].replace(case["date"], today)
            out.append((skill, case))
    return out


def summary(cases, results, elapsed):
    skills = {}
    for (skill, case), got in zip(cases, results):
        row = skills.setdefault(skill, {"right": 0, "count": 0, "with_reasoning": 0, "errors": 0})
        row["count"] += 1
        row["right"] += is_right(case, got)
        row["with_reasoning"] += bool(got["reasoning"])
        row["errors"] += "error" in got
    for row in skills.values():
        row["accuracy"] = round(100 * row["right"] / row["count"], 1)
    total = sum(row["right"] for row in skills.values()) / len(cases)
    return {"accuracy": round(100 * total, 1), "seconds": round(elapsed, 1), "skills": skills}


def failures(cases, results):
    return [{"skill": skill, "user": case["request"]["messages"][-1]["content"], "expected": case.get("call") or case["answer"], "got": got}
            for (skill, case), got in zip(cases, results) if not is_right(case, got)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base-url", help="for example http://127.0.0.1:8000/v1")
    where.add_argument("--checkpoint", help="folder of a bf16 or NF4 checkpoint")
    parser.add_argument("--device", default="cpu", help="for --checkpoint")
    parser.add_argument("--model", default="bulkhead-demo", help="for --base-url")
    parser.add_argument("--parallel", type=int, default=4, help="requests at once, for --base-url")
    parser.add_argument("--count", type=int, default=128, help="conversations per skill")
    parser.add_argument("--skills", nargs="*", default=SKILLS)
    parser.add_argument("--out", help="file for the summary and the failures, as JSON")
    args = parser.parse_args()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat() if args.base_url else None
    cases = make_cases(args.skills, args.count, today)
    plain, start = [case for _, case in cases], time.time()
    if args.base_url:
        results = over_http(args.base_url.rstrip("/"), args.model, plain, args.parallel)
    else:
        results = in_process(args.checkpoint, args.device, plain)
    report = summary(cases, results, time.time() - start)
    for skill, row in report["skills"].items():
        print(f"{skill:14} {row['accuracy']:6.1f} %  ({row['right']} of {row['count']}, {row['with_reasoning']} with reasoning, {row['errors']} errors)")
    print(f"{'all':14} {report['accuracy']:6.1f} %  in {report['seconds']} s")
    if args.out:
        Path(args.out).write_text(json.dumps({**report, "failures": failures(cases, results)}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
