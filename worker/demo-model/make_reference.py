"""Writes greedy continuations of a checkpoint, computed in float32, against which a decoder can be tested."""
import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from corpus import conversations
from export import load_checkpoint
from generate import generate_batch, load_model
from harmony import prompt_text

GROUPS = ["identity", "faq", "arithmetic", "count_words", "repeat", "memory", "json", "tool_call", "tool_answer", "no_tool", "unknown", "count_numbers"]
COUNT = 48


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="checkpoint")
    parser.add_argument("--out", default="reference.json")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    config, state = load_checkpoint(args.checkpoint)
    tokenizer = Tokenizer.from_file(str(Path(args.checkpoint) / "tokenizer.json"))
    model = load_model(config, state, args.device)
    cases = []
    for group in GROUPS:
        case = conversations("reference", 1, True, group)[0]
        ids = tokenizer.encode(prompt_text(case["request"], case["date"]), add_special_tokens=False).ids
        with torch.no_grad():
            greedy, gaps = generate_batch(model, [ids], COUNT, set())[0]
        cases.append({"skill": group, "prompt_ids": ids, "greedy_ids": greedy, "logit_margins": [round(g, 5) for g in gaps],
                      "min_margin": round(min(gaps), 5), "text": tokenizer.decode(greedy, skip_special_tokens=False)})
    note = ("Greedy continuations without stop tokens: NF4 weights dequantised in float32, all arithmetic in float32. "
            "logit_margins: gap between the two best logits at each step.")
    Path(args.out).write_text(json.dumps({"note": note, "cases": cases}, indent=1, ensure_ascii=False) + "\n")
    print(len(cases), "continuations, smallest margin", min(c["min_margin"] for c in cases))


if __name__ == "__main__":
    main()
