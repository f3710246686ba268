"""Trains the demonstration model on fresh synthetic conversations and writes a bf16 Hugging Face checkpoint.

On a GPU: bf16 autocast, FlexAttention over packed rows.  On a CPU: dense masks, shorter rows; the defaults take about an hour on
two cores.
"""
import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from data import batches
from harmony import SPECIAL
from model import GptOss, export_state, import_state, make_config
from optimiser import Muon

DEFAULTS = {  # row length, rows per step, minutes
    "cpu": (512, 8, 60.0),
    "cuda": (2048, 32, 9.0),
}
LOG_EVERY = 100
CLIP = 1.0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokenizer", default="build", help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--out", default="build/bf16", help="folder for the checkpoint")
    parser.add_argument("--log", default="build/train.log")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--minutes", type=float, help="length of the schedule")
    parser.add_argument("--steps", type=int, default=10 ** 9, help="end after this many steps instead")
    parser.add_argument("--length", type=int, help="tokens per row")
    parser.add_argument("--rows", type=int, help="rows per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="AdamW: embedding, head, router, norms, biases, sinks")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="Muon: projections and experts")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="generators of conversations")
    parser.add_argument("--attention", choices=["flex", "dense"], default="flex", help="on a GPU; a CPU always uses dense masks")
    parser.add_argument("--resume", help="bf16 checkpoint to start from")
    args = parser.parse_args()
    length, rows, minutes = DEFAULTS[args.device]
    args.length, args.rows, args.minutes = args.length or length, args.rows or rows, args.minutes or minutes
    return args


def full_mask(document):
    return lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j])


def sliding_mask(document, position, window):
    return lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j]) & (position[b, i] - position[b, j] < window)


def flex_masks(model, position, document):
    """Block masks (full, sliding) for FlexAttention."""
    rows, length = position.shape
    build = compiled("mask", create_block_mask)
    sliding = sliding_mask(document, position, model.config["sliding_window"])
    return tuple(build(m, rows, None, length, length, device=position.device) for m in (full_mask(document), sliding))


def flex_hidden(model, ids, position, full, sliding):
    """`model.hidden` with FlexAttention; the sink rescales the output by the share of the softmax that it leaves."""
    def with_mask(mask):
        def attend(q, k, v, sinks):
            out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
            return out * torch.sigmoid(lse - sinks.view(1, -1, 1))[..., None].to(out.dtype)
        return attend

    attends = [with_mask(sliding if kind == "sliding_attention" else full) for kind in model.config["layer_types"]]
    return model.hidden(ids, position, attends)


def dense_hidden(model, ids, position, document):
    return model.hidden(ids, position, model.dense_attends(position, document))


_compiled = {}


def compiled(name, function):
    """`function` compiled once for static shapes."""
    if name not in _compiled:
        _compiled[name] = torch.compile(function, dynamic=False)
    return _compiled[name]


def loss_of(model, hidden, target, weight):
    """(weighted mean loss, mean loss of the tokens that the model has to write)."""
    each = F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), target.flatten(), reduction="none")
    weight = weight.flatten()
    written = (weight == 1).float()
    return (each * weight).sum() / weight.sum(), ((each * written).sum() / written.sum()).detach()


def make_optimisers(model, args):
    matrix = [p for n, p in model.named_parameters() if "_proj" in n and p.dim() > 1 and not n.endswith("bias")]
    known = {id(p) for p in matrix}
    rest = [p for p in model.parameters() if id(p) not in known]
    out = [Muon(matrix, lr=args.matrix_lr), torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    for optimiser in out:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return out


def schedule(step, progress):
    """Warm-up, a plateau, then a linear way down over the last 60 % of the run."""
    return min((step + 1) / 200, 1.0, max(0.01, (1 - progress) / 0.6))


def write_checkpoint(folder, model, tokenizer_folder, special):
    """A complete bf16 folder, as transformers reads it."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    save_file(export_state(model), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({
        "bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"], "do_sample": False,
        "eos_token_id": [special["<|return|>"], special["<|endoftext|>"], special["<|call|>"]]}, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_folder) / name, folder / name)


def train(model, args, source, say):
    """Runs the schedule -> tokens seen."""
    optimisers, cuda = make_optimisers(model, args), args.device == "cuda"
    flex = cuda and args.attention == "flex"
    hidden = compiled("hidden", flex_hidden) if flex else dense_hidden
    criterion = compiled("loss", loss_of) if cuda else loss_of
    start, seen, step, recent, clock = None, 0, 0, [], 0.0
    for arrays in source:
        progress = max(step / args.steps, clock / (args.minutes * 60))
        if progress >= 1:
            break
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(step, progress)
        tokens = int((arrays[4] >= 0).sum())
        ids, target, weight, position, document = (torch.from_numpy(a).to(args.device, non_blocking=True) for a in arrays)
        ids, target, weight, position, document = ids.int(), target.long(), weight.float(), position.int(), document.int()
        masks = flex_masks(model, position, document) if flex else (document,)
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
            states, balance = hidden(model, ids, position, *masks)
            loss, written = criterion(model, states, target, weight)
        (loss + model.config["router_aux_loss_coef"] * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen, step = seen + tokens, step + 1
        recent.append((loss.detach(), written, balance.detach(), norm))
        if start is None:  # the first step compiles: the schedule's clock starts behind it
            float(loss.detach())
            start = time.time()
        clock = time.time() - start
        if step % LOG_EVERY == 0 or step == 10:
            mean = torch.tensor([[float(x) for x in row] for row in recent]).mean(0).tolist()
            clock = time.time() - start
            say(f"step {step} loss {mean[0]:.4f} written {mean[1]:.4f} balance {mean[2]:.3f} norm {mean[3]:.2f} "
                f"rate {schedule(step, progress):.3f} tokens {seen} tokens/s {seen / max(clock, 1e-9):.0f} minutes {clock / 60:.2f}")
            recent = []
    return seen, step, clock


def main():
    args = arguments()
    torch.manual_seed(int(args.seed.split("-")[0]))
    torch.set_float32_matmul_precision("high")
    Path(args.log).parent.mkdir(parents=True, exist_ok=True)
    log = open(args.log, "w")

    def say(*parts):
        print(*parts, flush=True)
        print(*parts, file=log, flush=True)

    path = str(Path(args.tokenizer) / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    model = GptOss(make_config(tokenizer.get_vocab_size(), special))
    if args.resume:
        import_state(model, load_file(str(Path(args.resume) / "model.safetensors")))
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say("device", name, "torch", torch.__version__, "parameters", sum(p.numel() for p in model.parameters()))
    paths = ("tokenizer", "out", "log", "resume")
    say("resumed" if args.resume else "from nothing", "options", json.dumps({k: v for k, v in vars(args).items() if k not in paths}, sort_keys=True))
    began = time.time()
    source = batches(path, args.seed, args.length, args.rows, args.processes)
    seen, steps, seconds = train(model.to(args.device), args, source, say)
    write_checkpoint(args.out, model, args.tokenizer, special)
    say(f"done: {steps} steps, {seen} tokens, {seconds / 60:.2f} minutes of schedule, {(time.time() - began) / 60:.2f} minutes in all")


if __name__ == "__main__":
    main()
