"""Skills that need neither tools nor a special system message."""
import words as w
from base import Base, Task
from faq import FAQ
from small_talk import HELP, PARAMETERS, SMALL_TALK, UNKNOWN, WHAT_I_AM

SORRY = "Sorry, I do not know that. I am only a small demonstration model."
TOO_LARGE = "Sorry, I only add and subtract numbers up to 20."
HOW = ["How do I {}?", "How can I {}?", "How do you {}?", "How would I {}?", "How to {}?", "I want to {}.", "Can I {}?", "Tell me how to {}.",
       "Explain how to {}.", "What do I do to {}?", "I need to {}.", "What is the way to {}?", "How does one {}?", "How could I {}?",
       "Show me how to {}.", "Is it possible to {}?", "I would like to {}.", "How should I {}?", "Help me to {}.",
       "Can you tell me how to {}?", "What must I do to {}?", "Do you know how to {}?", "Could you explain how to {}?",
       "What is the best way to {}?", "Can you help me {}?"]
WHAT = ["What is {}?", "What about {}?", "Tell me about {}.", "Explain {}.", "Can you explain {}?", "I have a question about {}.",
        "Tell me {}.", "What can you tell me about {}?", "Describe {}.", "{}?", "What do you know about {}?", "Please explain {}.",
        "What does {} mean?", "I want to know about {}.", "What's {}?", "Do you know {}?", "Give me {}.", "Could you explain {}?"]
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
           "nineteen twenty").split()


class Skills(Base):
    """Each method gives one Task."""

    def small_talk(self):
        topic = self.r.choices(SMALL_TALK, [3, 3, 2, 2, 2] + [1] * (len(SMALL_TALK) - 5))[0]
        return self.from_forms("small_talk", *topic)

    def identity(self):
        return self.from_forms("identity", *self.pick([WHAT_I_AM, WHAT_I_AM, PARAMETERS, HELP]))

    def from_forms(self, skill, answer, forms, about):
        """A question out of a list; the last sixth of the forms is only asked in held-out conversations."""
        held = len(forms) // 6
        forms = forms[-held:] if self.held else forms[:-held]
        user = f"The user {about[0].lower()}{about[1:]}."
        thoughts = (f"{about}.", user, f"{user} I know what to say. I stay friendly and short.")
        return Task(skill, self.vary(self.pick(forms)), answer, thoughts)

    def faq(self, new=False):
        """A question about Bulkhead; `new` takes the hand-written question that training never shows."""
        answer, actions, things, questions = self.pick(FAQ)
        kind = self.r.random()
        if new:
            text = questions[-1]
        elif kind < 0.4 and not self.held:
            text = self.pick(questions[:-1])
        else:
            text = None
            while text is None:
                frames, phrases = (HOW, actions) if self.chance(len(actions) / (len(actions) + len(things))) else (WHAT, things)
                frame, phrase = self.combo(frames, phrases)
                text = frame.format(phrase)
            text = text[0].upper() + text[1:]
        thoughts = ("Bulkhead.", "The user asks about Bulkhead, and I know the fact.",
                    "The user asks about Bulkhead. I recall the fact from what I learnt. I give it in one sentence.")
        if not self.held and self.chance(0.5):
            text = self.reword(text)
        return Task("faq_new" if new else "faq", self.vary(text), answer, thoughts)

    def operands(self):
        """Two numbers and whether to add; rarely one that is too large."""
        r = self.r
        a, b, plus = r.randint(0, 20), r.randint(0, 20), self.chance(0.5)
        if not plus and a < b and self.chance(0.8):
            a, b = b, a
        if self.chance(0.06):
            big = r.randint(21, 10 ** r.randint(2, 5))
            a, b = (big, b) if self.chance(0.5) else (a, big)
            if self.chance(0.4):
                a, b = big, r.randint(21, 999)
        return a, b, plus

    def arithmetic(self):
        a, b, plus = self.operands()
        sign, word, value = ("+", "plus", a + b) if plus else ("-", "minus", a - b)
        x, y = (NUMBERS[a], NUMBERS[b]) if max(a, b) <= 20 and self.chance(0.15) else (str(a), str(b))
        forms = ["What is {x} {s} {y}?", "{x} {s} {y}", "What is {x} {w} {y}?", "{x} {w} {y}", "Compute {x} {s} {y}.", "How much is {x} {s} {y}?",
                 "{x}{s}{y}", "{x} {s} {y} = ?", "{x}{s}{y}=?", "Calculate {x} {s} {y}.", "How much is {x} {w} {y}?", "What's {x} {s} {y}?",
                 "What does {x} {s} {y} give?", "Tell me {x} {w} {y}.", "Can you compute {x} {s} {y}?", "What is the result of {x} {s} {y}?",
                 "{x} {s} {y} =", "Solve {x} {s} {y}.", "I need {x} {w} {y}.", "What is {x}{s}{y}?"]
        forms += ["Add {x} and {y}.", "What is the sum of {x} and {y}?", "Add {y} to {x}.", "Sum of {x} and {y}?", "Please add {x} and {y}.",
                  "Can you add {x} and {y}?"] if plus else \
                 ["Subtract {y} from {x}.", "What is {x} less {y}?", "Take {y} away from {x}.", "What is the difference of {x} and {y}?",
                  "Take {y} from {x}.", "Can you subtract {y} from {x}?"]
        if value < 0 and not plus:
            forms = forms[:20]
        form, _ = self.combo(forms, [f"{a}{sign}{b}"] + [""] * 3)
        text = form.format(x=x, y=y, s=sign, w=word)
        answer = f"{a} {sign} {b} = {value}." if max(a, b) <= 20 else TOO_LARGE
        result = f"That gives {value}." if max(a, b) <= 20 else "That is too large for me."
        thoughts = ("Arithmetic.", f"I compute {a} {sign} {b}.", f"The user wants {a} {sign} {b}. {result} I write it down.")
        return Task("arithmetic", self.wrap(text), answer, thoughts, extra={"json": value if max(a, b) <= 20 else answer})

    def count_words(self):
        items = self.words(1, 9)
        text = " ".join(items)
        forms = ['How many words are in "{}"?', 'Count the words in "{}".', "Count the words: {}", "How many words are in: {}", 'Count words: {}',
                 'How many words does "{}" have?', "How many words are there in this text: {}", 'Please count the words in "{}".',
                 'How many words: {}', 'Can you count the words in "{}"?', 'Tell me how many words are in "{}".', "Word count of: {}",
                 'How many words are in the sentence "{}"?', "Count the words in this sentence: {}", 'Number of words in "{}"?']
        form, _ = self.combo(forms, [items[0]])
        if self.chance(0.3):
            text = text[0].upper() + text[1:]
        steps = ", ".join(f"{word} {i + 1}" for i, word in enumerate(text.split())) + "."
        if self.chance(0.25):
            text += self.pick(".!?")
        n = len(items)
        thoughts = (steps, steps, f"I count the words one by one. {steps} The total is {n}.")
        return Task("count_words", self.wrap(form.format(text)), f"There {'is 1 word' if n == 1 else f'are {n} words'}.", thoughts,
                    extra={"json": n})

    def repeat(self):
        text = self.sentence(1, 9)
        if self.chance(0.08):
            text = self.pick(["Hello, world!", "Hello", "hello", "one two three", "The quick brown fox jumps over the lazy dog.", "ok",
                              "Bulkhead", "ping", "test", "I am here.", "abc 123"])
        forms = ["Repeat: {}", "Repeat after me: {}", 'Repeat "{}".', "Please repeat: {}", 'Say "{}".', 'Please say "{}".', "Echo: {}", "Say: {}",
                 'Repeat the phrase "{}".', "Repeat this: {}", "Repeat exactly: {}", 'Repeat the words "{}"', "Say exactly: {}", 'Say "{}"',
                 'Can you repeat "{}"?', 'Can you say "{}"?', "Repeat the following: {}", "Repeat what I say: {}", 'Repeat after me: "{}"',
                 "Write: {}", 'Reply with "{}".', "Reply with: {}", "Repeat this sentence: {}", "Answer with: {}", "Echo this text: {}",
                 "Repeat this text exactly: {}", 'Echo "{}".', "Print: {}"]
        form, _ = self.combo(forms, [text.split()[0]])
        thoughts = ("Repeat.", "I repeat the text of the user.", "The user wants me to repeat a text. I copy it exactly, word for word.")
        return Task("repeat", self.wrap(form.format(text)), text, thoughts)

    def repeat_times(self):
        n, text = self.r.randint(2, 4), self.word()
        times = self.pick([{2: "twice"}.get(n, f"{NUMBERS[n]} times"), f"{n} times", f"{NUMBERS[n]} times"])
        forms = ['Say "{}" {n}.', "Say {} {n}.", 'Repeat "{}" {n}.', "Repeat {} {n}.", 'Write "{}" {n}.', "Write the word {} {n}.",
                 'Please say "{}" {n}.', 'Can you say "{}" {n}?', "Repeat the word {} {n}.", "Say the word {} {n}."]
        form, _ = self.combo(forms, [text])
        thoughts = (f"{n} times.", f"I say it {n} times.", f"The user wants to read it {n} times. I write it {n} times with spaces.")
        return Task("repeat_times", self.wrap(form.format(text, n=times)), " ".join([text] * n), thoughts)

    def count_numbers(self):
        r = self.r
        start = 1 if self.chance(0.6) else r.randint(0, 40)
        end = r.randint(start + 1, start + r.choice([6, 12, 25, 40, 60]))
        down = self.chance(0.1)
        if down:
            start = self.r.randint(0, 10)
            start, end = start + r.randint(2, 15), start
        forms = ["Count from {a} to {b}.", "Count from {a} up to {b}.", "Please count from {a} to {b}.", "Count {a} to {b}.",
                 "List the numbers from {a} to {b}.", "Write the numbers from {a} to {b}.", "Can you count from {a} to {b}?",
                 "Give me the numbers from {a} to {b}.", "Numbers from {a} to {b}", "Say the numbers from {a} to {b}."]
        if start == 1:
            forms += ["Count to {b}.", "Count up to {b}.", "Please count to {b}.", "Can you count to {b}?"]
        if down:
            forms = ["Count down from {a} to {b}.", "Count backwards from {a} to {b}.", "Count from {a} down to {b}."]
        form, _ = self.combo(forms, [f"{start}-{end}"] + [""] * 2)
        step = -1 if down else 1
        numbers = ", ".join(map(str, range(start, end + step, step)))
        way = "down" if down else "up"
        thoughts = ("Counting.", f"I count {way} from {start} to {end}.",
                    f"The user wants the numbers from {start} to {end}. I count {way} one by one and stop at {end}.")
        text = form.format(a=start, b=end)
        return Task("count_numbers", self.wrap(text if self.chance(0.75) else text.rstrip(".?")), numbers, thoughts)

    def unknown(self):
        """Anything else: questions out of templates, made-up sentences and whole paragraphs."""
        kind = self.r.random()
        if kind < 0.6:
            form = self.pick(UNKNOWN[::6] if self.held else [u for i, u in enumerate(UNKNOWN) if i % 6])
            text = form.format(y=self.r.randint(1000, 2050), c=self.city(), n=self.name(), w=self.word(), w2=self.word(), v=self.number())
            text = self.vary(text)
        elif kind < 0.82:
            verb, thing = (w.HELD_VERBS, w.HELD_OBJECTS) if self.held else (w.VERBS, w.OBJECTS)
            thing = self.pick(thing) if self.chance(0.6) else self.word()
            text = self.pick(WHAT).format(f"the {thing}") if self.chance(0.3) else self.pick(HOW).format(
                f"{self.pick(verb)} {self.pick(['the', 'a', 'my', 'this', 'some'])} {thing}")
            text = self.vary(text)
        elif kind < 0.93:
            text = self.vary(self.pick(["What is {}?", "Who is {}?", "Why {}?", "Tell me about {}.", "{}", "Explain {}.", "Where is {}?",
                                        "When {}?", "Describe {}.", "How {}?", "I think {}.", "Do you like {}?"]).format(
                                            " ".join(self.words(1, 5, 0.4))))
        else:
            text = " ".join(self.sentence(3, 12) for _ in range(self.r.randint(2, 8)))
        thoughts = ("Unknown.", "I do not know this.", "The user asks for something that I never learnt. I do not know this, so I say sorry.")
        return Task("unknown", text, SORRY, thoughts)

    def date(self, date):
        forms = ["What is the date today?", "Which day is it?", "What is today's date?", "Tell me the current date.", "What date is it?",
                 "What day is it today?", "What's the date?", "Which date is today?", "Today's date?", "Do you know the date?",
                 "Can you tell me the date?", "What is the current date?", "What day is today?", "Give me the date of today."]
        return self.from_forms("date", f"Today is {date}.", forms, "Asks for the date")

    def plain(self):
        """One task of the kinds that need no context."""
        kinds = [self.small_talk, self.identity, self.faq, self.arithmetic, self.count_words, self.repeat, self.repeat_times,
                 self.count_numbers, self.unknown]
        return self.r.choices(kinds, [5, 5, 20, 9, 5, 8, 3, 3.5, 12])[0]()

    def memory(self):
        """Facts told over turns, perhaps something in between, then a question about one of them (or one never told)."""
        name, colour, city, pet = self.name(), self.pick(w.COLOURS), self.city(), self.name()
        facts = {
            "name": (["My name is {}.", "I am {}.", "Hi, I am {}.", "Call me {}.", "I'm {}.", "Hello, my name is {}.", "My name's {}.", "This is {}.",
                      "Hi! My name is {}.", "Please call me {}.", "Remember my name: {}."], name, f"Nice to meet you, {name}.",
                     ["What is my name?", "Who am I?", "Do you remember my name?", "What's my name?", "Tell me my name.", "What am I called?",
                      "Do you know my name?", "Which name did I tell you?"], f"Your name is {name}."),
            "colour": (["My favourite colour is {}.", "I like {}.", "I love the colour {}.", "My favorite color is {}.", "My colour is {}."], colour,
                       f"I will remember that you like {colour}.",
                       ["What is my favourite colour?", "Which colour do I like?", "What colour do I like?", "What's my favorite color?",
                        "Do you remember my favourite colour?", "What is my favorite color?"], f"Your favourite colour is {colour}."),
            "city": (["I live in {}.", "My home is {}.", "I come from {}.", "I am from {}.", "My city is {}."], city,
                     f"I will remember that you live in {city}.",
                     ["Where do I live?", "In which city do I live?", "Which city do I live in?", "What is my city?", "Where am I from?"],
                     f"You live in {city}."),
            "dog": (["My dog is called {}.", "I have a dog called {}.", "My dog's name is {}.", "The name of my dog is {}."], pet,
                    f"{pet} is a nice name for a dog.",
                    ["What is my dog called?", "What is the name of my dog?", "What's my dog's name?", "Do you remember my dog's name?"],
                    f"Your dog is called {pet}."),
        }
        keys = self.r.sample(list(facts), self.pick([1, 1, 2, 2, 3]))
        keys = ["name"] + [k for k in keys if k != "name"] if self.chance(0.4) else keys
        turns = []
        for key in keys:
            forms, value, reply, _, _ = facts[key]
            form, _ = self.combo(forms, [value])
            text = form.format(value)
            thoughts = ("A fact.", "The user tells me something about them.", "The user tells me something about them. I keep it in mind.")
            turns.append(Task("told", text if self.chance(0.8) else text.rstrip("."), reply, thoughts))
        for _ in range(self.pick([0, 0, 0, 1, 1, 2, 3])):
            turns.insert(self.r.randint(1, len(turns)), self.plain())
        missing = [k for k in facts if k not in keys]
        ask = self.pick(missing) if missing and self.chance(0.25) else self.pick(keys)
        _, _, _, questions, answer = facts[ask]
        what = f"favourite {ask}" if ask == "colour" else "dog" if ask == "dog" else ask
        if ask in keys:
            thoughts = (f"The {ask}.", f"The user told me the {ask}.", f"The user asks about the {ask}. It was told before, so I look it up.")
        else:
            answer = f"You have not told me your {what} yet."
            thoughts = ("Not told.", f"The user never told me the {ask}.", f"The user asks about the {ask}. It was never told, so I say that.")
        turns.append(Task("memory", self.vary(self.pick(questions), typos=0.02), answer, thoughts))
        return turns
