"""Writes held-out.txt: conversations of the generator that training never showed, for measuring perplexity."""
from pathlib import Path

from corpus import conversations, segments

SEED = "perplexity"
COUNT = 64


def text():
    return "".join(text for conversation in conversations(SEED, COUNT, held=True) for text, _ in segments(conversation))


if __name__ == "__main__":
    Path(__file__).with_name("held-out.txt").write_text(text(), encoding="utf-8")
