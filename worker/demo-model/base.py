"""Random choices shared by all skills: vocabulary, and variation of what users write."""
import random
import re
import zlib
from dataclasses import dataclass, field

import words as w
from faq import FAQ


def known_words():
    """Every word of the lists and of the questions and answers about Bulkhead."""
    listed = [*w.WORDS, *w.NAMES, *w.CITIES, *w.VERBS, *w.OBJECTS, *w.COLOURS, *w.STOP_WORDS]
    texts = [text for answer, *lists in FAQ for text in [answer, *lists[0], *lists[1], *lists[2][:-1]]]
    return sorted(set(re.findall("[a-z]+", " ".join(listed + texts).lower())))


KNOWN = known_words()
# Pieces of words: put together at random they make the model copy every token of its vocabulary, not only familiar words.
FRAGMENTS = sorted({word[i:j] for word in KNOWN for i in range(len(word)) for j in range(i + 1, min(len(word), i + 6) + 1)})


@dataclass
class Task:
    """One user turn and its answer; `thoughts` are the analysis texts for low, medium and high effort."""
    skill: str
    user: str
    answer: str
    thoughts: tuple
    call: dict | None = None
    extra: dict = field(default_factory=dict)


def is_held(*parts):
    """Whether a combination of a phrasing and its content belongs to the held-out seventh."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 7 == 0


class Base:
    """A random generator; with `held` it draws from what training never shows."""

    def __init__(self, seed, held=False):
        self.r, self.held = random.Random(f"{seed}-{held}"), held

    def chance(self, p):
        return self.r.random() < p

    def pick(self, items):
        return self.r.choice(items)

    def combo(self, frames, phrases):
        """A (frame, phrase) pair on this generator's side of the held-out split."""
        for _ in range(200):
            frame, phrase = self.pick(frames), self.pick(phrases)
            if is_held(frame, phrase) == self.held:
                break
        return frame, phrase

    def pseudo(self):
        return "".join(self.pick(w.ONSETS) + self.pick(w.NUCLEI) + self.pick(w.CODAS) for _ in range(self.pick([1, 2, 2, 3])))

    def made_up(self):
        """Something like a word that no list has: syllables, or pieces of words; at times a word from anywhere."""
        kind = self.r.random()
        if kind < 0.3:
            return self.pseudo()
        if kind < 0.8:
            return "".join(self.pick(FRAGMENTS) for _ in range(self.pick([1, 2, 2, 2, 3])))
        return self.pick(KNOWN)

    def _from(self, train, held, pseudo):
        return self.made_up() if self.chance(pseudo) else self.pick(held if self.held else train)

    def word(self, pseudo=0.45):
        return self._from(w.WORDS, w.HELD_WORDS, pseudo)

    def words(self, low, high, pseudo=0.45):
        return [self.word(pseudo) for _ in range(self.r.randint(low, high))]

    def name(self):
        return self._from(w.NAMES, w.HELD_NAMES, 0.45).capitalize()

    def city(self):
        if self.chance(0.12):
            return " ".join(self.made_up().capitalize() for _ in range(2))
        city = self._from(w.CITIES, w.HELD_CITIES, 0.45)
        return city if city[0].isupper() else city.capitalize()

    def number(self, digits=4):
        return self.r.randint(0, 10 ** self.r.randint(1, digits) - 1)

    def sentence(self, low=2, high=8):
        """A made-up sentence: words with some capitals, numbers and punctuation."""
        out = self.words(low, high)
        if self.chance(0.2):
            at = self.r.randrange(len(out))
            out.insert(at, out[self.r.randrange(len(out))] if self.chance(0.4) else out[at])
        if self.chance(0.15):
            out.insert(self.r.randrange(len(out) + 1), str(self.number()))
        if self.chance(0.1) and len(out) > 2:
            at = self.r.randrange(len(out) - 1)
            out[at] += ","
        text = " ".join(out)
        if self.chance(0.5):
            text = text[0].upper() + text[1:]
        return text + (self.pick([".", "!", "?", "."]) if self.chance(0.35) else "")

    def typo(self, text):
        """One slip of the keyboard inside a longer word."""
        at = [i for i in range(1, len(text) - 1) if text[i - 1:i + 2].isalpha()]
        if not at:
            return text
        i, kind = self.pick(at), self.r.randrange(3)
        if kind == 0:
            return text[:i] + text[i + 1:]
        if kind == 1:
            return text[:i] + text[i] + text[i:]
        return text[:i] + text[i + 1] + text[i] + text[i + 2:]

    def reword(self, text):
        """Some words replaced by others of about the same meaning."""
        def other(match):
            same = w.SYNONYMS.get(match[0].lower())
            return self.pick(same) if same and self.chance(0.25) else match[0]

        return re.sub("[A-Za-z]+", other, text)

    def wrap(self, text):
        """Politeness around a question whose own text must stay as it is."""
        if self.chance(0.22):
            start = self.pick(w.GREETING_PREFIXES if self.chance(0.6) else w.POLITE_PREFIXES)
            text = start + (text[0].lower() + text[1:] if text[1:2].islower() and self.chance(0.6) else text)
        return text

    def vary(self, text, typos=0.06):
        """A question as people write it: other case, no punctuation, extra or missing words, a typo."""
        r = self.r
        if self.chance(0.08):
            kept = [x for x in text.split() if x.strip("?.!,").lower() not in w.STOP_WORDS]
            text = " ".join(kept) if len(kept) > 1 else text
        if self.chance(0.08):
            text = text.rstrip("?.!") + self.pick(w.POLITE_SUFFIXES)
        if self.chance(0.25):
            text = text.rstrip("?.!")
        text = self.wrap(text)
        if self.chance(0.2):
            text = text.lower()
        elif self.chance(0.02):
            text = text.upper()
        if self.chance(typos):
            text = self.typo(text)
        if self.chance(0.04):
            text = r.choice(["  ", " ", "\n"]) + text if self.chance(0.5) else text + r.choice([" ", "\n", "!", "??", "...", " :)"])
        return text
