"""Trains the byte-level BPE of the demonstration model and writes tokenizer.json and tokenizer_config.json."""
import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import conversations, segments
from harmony import SPECIAL

# White space never joins a word, so a word has the same tokens behind a space, a quote or a line break, which makes copying a
# pure repetition of tokens.  Digits and punctuation marks stand alone for the same reason.
PATTERN = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s*[\r\n]+|\s+"
CONTEXT = 16384


def texts(seed, count):
    """Corpus text without its special tokens."""
    for conversation in conversations(seed, count):
        text = "".join(part for part, _ in segments(conversation))
        for special in SPECIAL:
            text = text.replace(special, "\n")
        yield text


def train(vocabulary, corpus):
    """BPE with `vocabulary` entries: all 256 bytes, merges, and the special tokens, which get the last ids."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="build", help="folder for the two files")
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--conversations", type=int, default=20000)
    args = parser.parse_args()
    tokenizer = train(args.vocabulary, texts("tokenizer", args.conversations))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>", "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}, indent=1) + "\n")
    print("vocabulary", tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
