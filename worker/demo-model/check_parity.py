"""Compares the logits of model.py with transformers' GptOssForCausalLM on a bf16 checkpoint, both in float32."""
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from corpus import conversations
from export import load_checkpoint
from generate import load_model
from harmony import prompt_text


@torch.no_grad()
def main():
    folder = sys.argv[1]
    config, state = load_checkpoint(folder)
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    case = conversations("parity", 1, True, "long")[0]
    ids = torch.tensor([tokenizer.encode(prompt_text(case["request"], case["date"]), add_special_tokens=False).ids])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()(ids).logits
    ours = load_model(config, state, "cpu")(ids)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{ids.shape[1]} tokens, relative error {error:.2e}")
    sys.exit(error > 1e-4)


if __name__ == "__main__":
    main()
