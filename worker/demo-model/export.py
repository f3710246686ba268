"""Writes the NF4 checkpoint of a bf16 checkpoint (see nf4.py for the layout)."""
import argparse
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from nf4 import QUANTIZATION_CONFIG, quantised_state, restored_state


def load_checkpoint(folder):
    """(config, float32 state in the bf16 layout) of a bf16 or an NF4 checkpoint folder."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(str(folder / "model.safetensors"))
    if "quantization_config" in config:
        return config, restored_state(stored)
    return config, {name: w.float() for name, w in stored.items()}


def export(source, target):
    """Builds the folder aside and moves it into place, so that a reader never sees half of it."""
    source, target = Path(source), Path(target)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION_CONFIG
    state = quantised_state(load_file(str(source / "model.safetensors")))
    save_file(state, str(fresh / "model.safetensors"), metadata={"format": "pt"})
    (fresh / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (fresh / "model.safetensors").chmod(0o644)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, fresh / name)
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(fresh, target)
        shutil.rmtree(old)
    else:
        os.rename(fresh, target)
    return sum(f.stat().st_size for f in target.iterdir())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bf16", default="build/bf16", help="folder of the bf16 checkpoint")
    parser.add_argument("--out", default="checkpoint")
    args = parser.parse_args()
    print(f"{args.out}: {export(args.bf16, args.out)} bytes")


if __name__ == "__main__":
    main()
