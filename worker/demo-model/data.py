"""Turns conversations into packed rows of token ids, in as many processes as there are cores."""
import collections
import itertools
import multiprocessing
import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from corpus import conversations, segments

CONVERSATIONS_PER_CHUNK = 1500
# Tokens of prompts count a little in the loss: predicting them teaches the model early what follows what.
PROMPT_WEIGHT = 0.05
# Now and then a conversation is torn apart: all positions behind one of its borders move on by up to LARGEST_GAP.  So the model
# meets the distances of long contexts without having to read long rows.
GAP_SHARE = 0.12
LARGEST_GAP = 12000


@dataclass
class Rows:
    """Arrays [rows, length]; `document` is -1 on padding, positions count within a document."""
    ids: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    position: np.ndarray
    document: np.ndarray

    def arrays(self):
        return [self.ids, self.target, self.weight, self.position, self.document]


def encode(tokenizer, batch, rng):
    """Conversations -> list of (ids, trained, positions)."""
    pieces = [(i, text, trained) for i, c in enumerate(batch) for text, trained in segments(c)]
    ids, trained, borders = [[] for _ in batch], [[] for _ in batch], [[] for _ in batch]
    encoded = tokenizer.encode_batch([text for _, text, _ in pieces], add_special_tokens=False)
    for (i, _, flag), e in zip(pieces, encoded):
        borders[i].append(len(ids[i]))
        ids[i] += e.ids
        trained[i] += [flag] * len(e.ids)
    out = []
    for i in range(len(batch)):
        position = np.arange(len(ids[i]), dtype=np.int32)
        if rng.random() < GAP_SHARE:
            position[rng.choice(borders[i]):] += int(LARGEST_GAP * rng.random() ** 2)
        out.append((np.array(ids[i], np.int16), np.array(trained[i], bool), position))
    return out


def fit(documents, length):
    """First fit of documents into rows -> list of lists; longer documents are left out."""
    done, open_rows = [], []
    for document in documents:
        size = document[0].size
        if size > length:
            continue
        row = next((row for row in open_rows if row[0] + size <= length), None)
        if row is None:
            row = [0, []]
            open_rows.append(row)
        row[0] += size
        row[1].append(document)
        if row[0] > length - 64 or len(open_rows) > 24:
            fullest = max(open_rows, key=lambda r: r[0])
            open_rows = [r for r in open_rows if r is not fullest]
            done.append(fullest[1])
    return done + [row[1] for row in open_rows]


def pack(documents, length):
    rows = fit(documents, length)
    n = len(rows)
    out = Rows(np.zeros((n, length), np.int16), np.zeros((n, length), np.int16), np.zeros((n, length), np.float16),
               np.zeros((n, length), np.int32), np.full((n, length), -1, np.int16))
    for i, row in enumerate(rows):
        at = 0
        for k, (ids, trained, position) in enumerate(row):
            end = at + ids.size
            out.ids[i, at:end], out.position[i, at:end], out.document[i, at:end] = ids, position, k
            out.target[i, at:end - 1] = ids[1:]
            out.weight[i, at:end - 1] = np.where(trained[1:], 1.0, PROMPT_WEIGHT)
            at = end
    return out


_tokenizer = None


def start_worker(path):
    global _tokenizer
    _tokenizer = Tokenizer.from_file(path)


def make_chunk(job):
    """(seed, chunk number, row length) -> Rows; the same job always gives the same rows."""
    seed, number, length = job
    name = f"{seed}-{number}"
    return pack(encode(_tokenizer, conversations(name, CONVERSATIONS_PER_CHUNK), random.Random(name)), length)


def batches(tokenizer_path, seed, length, rows, processes):
    """Endless batches of `rows` packed rows, fresh conversations every time."""
    store, have, pending = [], 0, collections.deque()
    with multiprocessing.get_context("fork").Pool(processes, start_worker, (tokenizer_path,)) as pool:
        for number in itertools.count():
            pending.append(pool.apply_async(make_chunk, ((seed, number, length),)))
            if len(pending) < 3 * processes:
                continue
            chunk = pending.popleft().get()
            store.append(chunk.arrays())
            have += len(chunk.ids)
            while have >= rows:
                joined = [np.concatenate(parts) for parts in zip(*store)]
                yield [a[:rows] for a in joined]
                store, have = [[a[rows:] for a in joined]], have - rows
