"""The skill of answering in JSON when the system message or the user asks for it."""
import json

from base import Base, Task
from words import COLOURS

THOUGHTS = ("JSON.", "The answer must be JSON, so I write an object.", "I am told to answer in JSON. I take the values from the user and write one object.")


class JsonSkill(Base):
    """`json_task` gives (system text, Task); the answer is one JSON object."""

    def json_task(self):
        if self.chance(0.25):
            return self.wrapped_answer()
        user, value, props = self.shopping() if self.chance(0.3) else self.person()
        keys = list(value)
        listed = self.pick([", ".join(keys), " and ".join([", ".join(keys[:-1]), keys[-1]]) if len(keys) > 1 else keys[0]])
        answer = json.dumps(value, ensure_ascii=False)
        if self.chance(0.4):
            forms = ["{u} Answer in JSON with the keys {k}.", "Answer in JSON with the keys {k}: {u}", "Give me a JSON object with {k}: {u}",
                     "{u} Give me JSON with {k}.", "Extract {k} as JSON: {u}", "Return JSON with the keys {k}. {u}", "{u} Reply only with JSON, keys: {k}.",
                     "Write this as JSON with {k}: {u}", "Turn this into JSON with the keys {k}: {u}"]
            form, _ = self.combo(forms, keys)
            return "", Task("json", form.format(u=user, k=listed), answer, THOUGHTS)
        forms = ["Answer in JSON with the keys {k}.", "Reply only with JSON. Keys: {k}.", "Return a JSON object with the keys {k}.",
                 "Always answer in JSON with {k}.", "Extract {k} and answer in JSON.", "You extract data. Output JSON with the keys {k}.",
                 "Respond with a JSON object that has the keys {k}.", "Output only JSON with the keys {k}."]
        form, _ = self.combo(forms, keys)
        system = form.format(k=listed)
        if self.chance(0.35):
            schema = {"type": "object", "properties": props, "required": keys}
            if self.chance(0.5):
                schema["additionalProperties"] = False
            text = json.dumps(schema, separators=self.pick([(",", ":"), (", ", ": ")]))
            intro = self.pick(["", "You are a helpful assistant.\n\n", "Be brief.\n\n", "Extract the data.\n\n"])
            system = f"{intro}# Response Formats\n\n## {self.pick(['answer', 'response', 'data', self.word()])}\n\n{text}"
        elif self.chance(0.25):
            system = "You are a helpful assistant. " + system
        return system, Task("json", user, answer, THOUGHTS)

    def shopping(self):
        items = list(dict.fromkeys(self.words(2, 5)))
        joined = self.pick([", ".join(items), " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]])
        user = self.pick(["I need to buy {}.", "My list: {}.", "Please note {}.", "I want {}.", "We need {}.", "Buy {}."]).format(joined)
        key = self.pick(["items", "list", "things", "words", "products", "shopping"])
        return user, {key: items}, {key: {"type": "array", "items": {"type": "string"}}}

    def person(self):
        fields = {"name": self.name(), "age": self.r.randint(1, 99), "city": self.city(), "colour": self.pick(COLOURS)}
        n, a, c, k = fields.values()
        user = self.pick([f"{n} is {a} years old, lives in {c} and likes {k}.", f"I am {n}, I am {a}, I live in {c} and I like {k}.",
                          f"Name {n}, age {a}, city {c}, colour {k}.", f"My name is {n}. I am {a} years old and I live in {c}. I like {k}.",
                          f"{n}, {a}, from {c}, likes {k}.", f"{n} lives in {c}. {n} is {a}. The favourite colour is {k}."])
        keys = self.r.sample(list(fields), self.r.randint(1, 4))
        if self.chance(0.35):
            keys = self.r.sample(["name", "age"], self.r.randint(1, 2))
            user = self.pick([f"{n} is {a} years old.", f"{n} is {a}.", f"I am {n} and I am {a}.", f"My name is {n} and I am {a} years old.",
                              f"name {n}, age {a}", f"This is {n}, age {a}."])
        props = {key: {"type": "integer" if key == "age" else "string"} for key in keys}
        return user, {key: fields[key] for key in keys}, props

    def wrapped_answer(self):
        """A plain question whose answer is put under the key `answer`."""
        task = self.r.choices([self.faq, self.arithmetic, self.small_talk, self.repeat, self.unknown, self.identity], [3, 4, 1, 2, 1, 1])[0]()
        value = json.dumps({"answer": task.extra.get("json", task.answer)}, ensure_ascii=False)
        if self.chance(0.5):
            system = self.pick(["Answer in JSON.", "Always answer in JSON.", "Reply in JSON.", "Answer only in JSON.", "Respond with JSON.",
                                "You are a helpful assistant. Answer in JSON.", "Answer as JSON.", "You answer in JSON."])
            return system, Task("json", task.user, value, THOUGHTS)
        text = self.pick(["Answer in JSON: {}", "Reply in JSON: {}", "In JSON: {}", "As JSON: {}", "Answer as JSON: {}"]).format(task.user)
        return "", Task("json", text, value, THOUGHTS)
