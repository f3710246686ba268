"""Deterministic generator of synthetic conversations: chat-completions requests, what the model should think and answer.

`Conversations(seed, held=True)` uses names, words, tools and phrasings that training never shows.
"""
import json

import words as w
from harmony import answer_text, call_text, prompt_segments
from json_skill import JsonSkill
from skills import Skills
from tools import Tools

EFFORTS = ["low", "medium", "high"]
# Share of each group of conversations in training.
GROUPS = {"plain": 40, "memory": 9, "json": 9, "date": 2, "tool_call": 14, "tool_answer": 13, "no_tool": 6, "tool_history": 5, "long": 2}
# Skills that are judged one by one; each is the name of a group, of a plain skill, or of a variant of one.
SKILLS = ["small_talk", "identity", "faq", "faq_new", "arithmetic", "count_words", "repeat", "repeat_times", "count_numbers", "memory", "date", "unknown",
          "json", "tool_call", "tool_answer", "no_tool", "tool_history", "long"]


class Conversations(Skills, JsonSkill, Tools):
    def conversation(self, group=None):
        """dict: skill, request, date, analysis, and answer (text) or call (name, arguments)."""
        name = group or self.r.choices(list(GROUPS), list(GROUPS.values()))[0]
        self.effort = self.r.choices(EFFORTS, [3, 5, 3])[0]
        self.date_text = f"{self.r.randint(2023, 2033)}-{self.r.randint(1, 12):02}-{self.r.randint(1, 28):02}"
        make = {"plain": self.chat, "memory": self.memory_chat, "json": self.json_chat, "date": self.date_chat, "tool_call": self.call_chat,
                "tool_answer": self.answer_chat, "no_tool": self.no_tool_chat, "tool_history": self.history_chat, "long": self.long_chat}
        if name in make:
            return make[name]()
        return self.close([self.faq(new=True) if name == "faq_new" else getattr(self, name)()])

    # ---- building blocks ------------------------------------------------------------------------------------------------
    def system(self, force=False):
        """Messages in front of the conversation: often nothing, often a common persona, rarely a long text."""
        if not force and self.chance(0.5):
            return []
        if self.chance(0.85):
            text = self.pick(w.PERSONAS)
        elif self.chance(0.8):
            text = " ".join(self.sentence(3, 10) for _ in range(self.r.randint(1, 5)))
        else:
            text = "\n\n".join(" ".join(self.sentence(3, 12) for _ in range(self.r.randint(1, 6))) for _ in range(self.r.randint(2, 6)))
        return [{"role": self.pick(["system", "system", "system", "developer"]), "content": text}]

    def history(self, turns):
        out = []
        for task in turns:
            out += [{"role": "user", "content": task.user}, {"role": "assistant", "content": task.answer}]
        return out

    def thought(self, task):
        return task.thoughts[EFFORTS.index(self.effort)]

    def result(self, skill, messages, analysis, tools=None, answer=None, call=None):
        request = {"messages": messages, "reasoning_effort": self.effort}
        if tools:
            request["tools"] = [tool.schema() for tool in tools]
        out = {"skill": skill, "request": request, "date": self.date_text, "analysis": analysis}
        return {**out, "call": call} if call else {**out, "answer": answer}

    def close(self, turns, system=None, skill=None, before=(), tools=None):
        """A conversation whose last turn is answered with text."""
        task = turns[-1]
        messages = (self.system() if system is None else system) + list(before) + self.history(turns[:-1])
        messages.append({"role": "user", "content": task.user})
        return self.result(skill or task.skill, messages, self.thought(task), tools, task.answer)

    # ---- groups ---------------------------------------------------------------------------------------------------------
    def chat(self):
        return self.close([self.plain() for _ in range(self.pick([1, 1, 1, 2, 3, 4]))])

    def memory_chat(self):
        return self.close(self.memory(), skill="memory")

    def date_chat(self):
        turns = [self.plain() for _ in range(self.pick([0, 0, 1, 2]))]
        return self.close(turns + [self.date(self.date_text)])

    def json_chat(self):
        text, task = self.json_task()
        system = [{"role": self.pick(["system", "developer"]), "content": text}] if text else None
        before = self.history([self.plain()]) if not text and self.chance(0.1) else []
        return self.close([task], system, before=before)

    def long_chat(self):
        """Many turns, with a question about the first ones at the end."""
        turns = self.memory()
        for _ in range(self.r.randint(6, 26)):
            turns.insert(self.r.randint(1, len(turns) - 1) if len(turns) > 2 else 1, self.plain())
        return self.close(turns, skill="long")

    def call_thoughts(self, tool):
        return {"low": f"Call {tool.name}.", "medium": f"I call {tool.name} for this.",
                "high": f"The user asks for something that a tool can do. I call {tool.name} and copy the arguments from the question."}[self.effort]

    def ask(self, tool):
        return {"role": "user", "content": self.wrap(tool.user) if self.chance(0.7) else self.wrap(tool.user.rstrip("?.") if tool.kind != "message" else tool.user)}

    def call_message(self, tool, keep=True):
        """The assistant's message with the call, with or without its reasoning, and the tool's message with the result."""
        call = f"call_{self.r.randrange(10 ** 6)}"
        arguments = json.dumps(tool.arguments, ensure_ascii=False)
        message = {"role": "assistant", "content": None,
                   "tool_calls": [{"id": call, "type": "function", "function": {"name": tool.name, "arguments": arguments}}]}
        if keep:
            message["reasoning"] = self.call_thoughts(tool)
        return [message, {"role": "tool", "tool_call_id": call, "content": tool.result}]

    def close_call(self, skill, messages, tool, tools):
        arguments = json.dumps(tool.arguments, ensure_ascii=False)
        return self.result(skill, messages + [self.ask(tool)], self.call_thoughts(tool), tools, call={"name": tool.name, "arguments": arguments})

    def call_chat(self):
        tools = self.toolbox()
        before = self.history([self.plain_no_math() for _ in range(self.pick([0, 0, 0, 1, 2]))])
        return self.close_call("tool_call", self.system() + before, self.pick(tools), tools)

    def answer_chat(self):
        tools = self.toolbox()
        tool = self.pick(tools)
        messages = self.system() + [self.ask(tool)] + self.call_message(tool, keep=self.chance(0.5))
        analysis = {"low": "The result.", "medium": "I have the result of the tool.", "high": "I have the result of the tool. I tell it to the user in one sentence."}
        return self.result("tool_answer", messages, analysis[self.effort], tools, tool.answer)

    def plain_no_math(self):
        """A plain task that no tool could be meant for."""
        task = self.plain()
        while task.skill in ("arithmetic", "unknown"):
            task = self.plain()
        return task

    def no_tool_chat(self):
        kind = self.r.random()
        if kind < 0.7:
            return self.close([self.plain_no_math() for _ in range(self.pick([1, 1, 2]))], skill="no_tool", tools=self.toolbox())
        if kind < 0.8:
            return self.close(self.memory(), skill="no_tool", tools=self.toolbox(["invented"]))
        task = self.unknown() if kind < 0.9 else self.arithmetic()
        return self.close([task], skill="no_tool", tools=self.toolbox(["invented"]))

    def history_chat(self):
        """An answered call lies behind; then another call, its answer, or a plain question follows."""
        tools = self.toolbox()
        first = self.pick(tools)
        messages = self.system() + [self.ask(first)] + self.call_message(first, keep=False) + [{"role": "assistant", "content": first.answer}]
        if self.chance(0.35):
            return self.close([self.plain_no_math()], messages, "tool_history", tools=tools)
        second = self.again(first) if self.chance(0.6) else self.pick(tools)
        if second is first:
            second = self.again(first)
        if self.chance(0.6):
            return self.close_call("tool_history", messages, second, tools)
        messages += [self.ask(second)] + self.call_message(second, keep=self.chance(0.5))
        return self.result("tool_history", messages, {"low": "The result.", "medium": "I have the result of the tool.",
                                                      "high": "I have the result of the tool. I tell it to the user in one sentence."}[self.effort], tools, second.answer)

    def again(self, tool):
        """The same function asked once more: another city for weather and time, else the same question."""
        if tool.kind in ("weather", "time"):
            fresh = self.tool(tool.kind)
            key, city = list(tool.arguments)[0], list(fresh.arguments.values())[0]
            forms = ["And in {}?", "And {}?", "What about {}?", "How about {}?", "And what about {}?", "Now {}."]
            form, _ = self.combo(forms, [city])
            return type(tool)(tool.kind, tool.function, form.format(city), {key: city}, fresh.result, fresh.answer)
        result, answer = self.common_result()
        return type(tool)(tool.kind, tool.function, tool.user, tool.arguments, result, answer)


def segments(conversation):
    """(text, trained) pieces of prompt and completion."""
    call = conversation.get("call")
    if call:
        completion = call_text(conversation["analysis"], call["name"], call["arguments"])
    else:
        completion = answer_text(conversation["analysis"], conversation["answer"])
    return prompt_segments(conversation["request"], conversation["date"]) + [(completion, True)]


def conversations(seed, count, held=False, group=None):
    """`count` conversations; the same arguments always give the same list."""
    generator = Conversations(seed, held)
    return [generator.conversation(group) for _ in range(count)]


if __name__ == "__main__":
    for example in conversations(0, 12):
        print(example["skill"], "|", "".join(text for text, _ in segments(example)), "\n")
