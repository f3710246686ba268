"""Tools with matching questions, results and answers: some well-known families, and tools with made-up names and parameters."""
import json
from dataclasses import dataclass

import words as w
from base import Base

SKY = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "partly cloudy", "light rain", "overcast"]
ENUMS = {"size": ["small", "medium", "large"], "mode": ["fast", "slow", "auto"], "priority": ["low", "normal", "high"],
         "format": ["pdf", "png", "txt"], "state": ["on", "off"], "kind": ["public", "private"], "level": ["low", "medium", "high"],
         "direction": ["left", "right"], "day": ["today", "tomorrow"], "unit": ["metric", "imperial"]}
HELD_ENUMS = {"shape": ["round", "square"], "speed": ["slow", "fast"], "quality": ["draft", "best"]}
STRINGS = ["name", "title", "id", "text", "label", "owner", "target", "place", "topic", "code", "user", "subject", "path", "value", "query", "to"]
HELD_STRINGS = ["alias", "region", "caption"]
NUMBERS = ["count", "amount", "minutes", "number", "limit", "pages", "copies", "percent", "days", "width", "volume", "quantity"]
HELD_NUMBERS = ["weight", "height", "seconds"]
RESULT_KEYS = ["price", "status", "title", "name", "id", "total", "free_seats", "owner", "date", "size", "position", "code", "message", "state",
               "color", "amount", "version", "distance", "speed", "place"]


@dataclass
class Tool:
    """A function schema, a question that needs it, the right arguments, one result and the answer to give from it."""
    kind: str
    function: dict
    user: str
    arguments: dict
    result: str
    answer: str

    @property
    def name(self):
        return self.function["name"]

    def schema(self):
        return {"type": "function", "function": self.function}


def plain(value):
    """A JSON scalar as it is said in a sentence."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Tools(Base):
    def function(self, name, description, parameters, optional=None):
        """`parameters` and `optional`: name -> schema; descriptions are left out now and then."""
        properties = {**parameters, **(optional or {})}
        schema = {"type": "object", "properties": properties, "required": list(parameters)}
        if self.chance(0.2):
            schema["additionalProperties"] = False
        out = {"name": name, "parameters": schema}
        if self.chance(0.9):
            out["description"] = description
        return out

    def param(self, kind="string", note=None, **more):
        out = {"type": kind, **more}
        if note and self.chance(0.4):
            out["description"] = note
        return out

    def dumps(self, value):
        return json.dumps(value, ensure_ascii=False, separators=self.pick([(", ", ": "), (", ", ": "), (",", ":")]))

    # ---- results that any tool may give ---------------------------------------------------------------------------------
    def common_result(self):
        """(result, answer) that does not depend on the question."""
        kind = self.r.random()
        if kind < 0.25:
            error = self.pick(["timeout", "not found", "no access", "busy", "unknown city", "offline", "no such file", " ".join(self.words(1, 3))])
            result = self.pick([self.dumps({"error": error}), f"Error: {error}", f"error: {error}"])
            return result, f"Sorry, the tool failed: {error}."
        if kind < 0.45:
            return self.pick(['{"ok": true}', '{"ok":true}', '{"success": true}', '{"status": "ok"}', "ok", "OK", "done", "Done.", "success"]), "Done."
        if kind < 0.6:
            text = self.sentence(3, 8).rstrip(".!?").replace(",", "") + "."
            text = text[0].upper() + text[1:]
            return text, text
        if kind < 0.75:
            text = self.pick([" ".join(self.words(1, 3)), str(self.number()), f"{self.r.randint(0, 99)}.{self.r.randint(1, 99)}"])
            return text, f"The result is {text}."
        keys = self.r.sample(RESULT_KEYS, self.pick([1, 1, 2, 2, 3]))
        values = [self.pick([self.number(), " ".join(self.words(1, 2)), self.name(), self.number(2), True, self.r.randint(1, 999) / 10]) for _ in keys]
        said = " and ".join(f"the {k.replace('_', ' ')} is {plain(v)}" for k, v in zip(keys, values))
        return self.dumps(dict(zip(keys, values))), said[0].upper() + said[1:] + "."

    def finish(self, kind, function, user, arguments, own=None):
        """A Tool with its own (result, answer) or, sometimes, a common one."""
        result, answer = own if own and self.chance(0.88) else self.common_result()
        return Tool(kind, function, user, arguments, result, answer)

    # ---- families -----------------------------------------------------------------------------------------------------------
    def weather(self):
        city = "Paris" if self.chance(0.1) else self.city()
        key = self.pick(["city", "city", "city", "location", "location", "place", "town"])
        optional, extra, args = {}, "", {key: city}
        if self.chance(0.2):
            option = self.pick(["unit", "format", "units"])
            optional[option] = self.param(enum=["celsius", "fahrenheit"], **({"default": "celsius"} if self.chance(0.3) else {}))
            if self.chance(0.5):
                args[option] = self.pick(["celsius", "fahrenheit"])
                extra = f" in {args[option]}"
        name = self.pick(["get_weather"] * 4 + ["get_current_weather", "weather", "fetch_weather", "weather_lookup", "getWeather", "current_weather"])
        note = self.pick(["The city", "City name", "Name of the city", "The city and state, e.g. San Francisco, CA", "City and country"])
        description = self.pick(["Get the weather", "Get the weather in a city", "Gets the current weather.", "Get the current weather for a city.",
                                 "Weather of a place.", "Get current weather", "Returns the weather in a given city.", "Get weather for a location."])
        forms = ["What is the weather in {c}{x}?", "How is the weather in {c}{x}?", "Weather in {c}{x}?", "What is the weather like in {c}{x}?",
                 "What's the weather in {c}{x}?", "Tell me the weather in {c}{x}.", "Is it warm in {c}{x}?", "How warm is it in {c}{x}?",
                 "What's the weather like in {c}{x}?", "Give me the weather for {c}{x}.", "Is it raining in {c}?", "What is the temperature in {c}{x}?",
                 "I want to know the weather in {c}{x}.", "What is the weather in {c} today?", "Get the weather in {c}{x}.",
                 "What is the weather in {c} right now?", "Can you check the weather in {c}{x}?", "How is the weather in {c} today?"]
        form, _ = self.combo(forms, [city])
        function = self.function(name, description, {key: self.param(note=note)}, optional)
        return self.finish("weather", function, form.format(c=city, x=extra if "{x}" in form else ""),
                           args if "{x}" in form or not extra else {key: city}, self.weather_result(city))

    def weather_result(self, city):
        t, sky = self.pick([self.r.randint(-15, 42), self.r.randint(0, 30), self.r.randint(-50, 400) / 10]), self.pick(SKY)
        unit = self.pick(["C", "C", "F", "celsius", "fahrenheit", "Celsius", "°C"])
        said, value = f"{t} degrees", {self.pick(["temperature", "temperature", "temp"]): t}
        kind = self.r.random()
        if kind < 0.3:
            text = self.pick([f"{sky}, {t} {unit}", f"{t} degrees", f"{t} {unit}", f"{sky}", f"{t}°C, {sky}", f"{sky} and {t} degrees", f"{t}°C",
                              f"{t} degrees and {sky}", f"{sky}, {t} degrees", f"{t} C and {sky}"])
            return text, f"In {city} it is {text}."
        if kind < 0.4:
            text = self.pick([f"It is {t} degrees and {sky} in {city}.", f"The weather in {city} is {sky}.", f"{city}: {sky}, {t} {unit}."])
            return text, text
        if self.chance(0.5):
            value[self.pick(["unit", "unit", "units"])] = unit
            said = f"{t} {unit}"
        if self.chance(0.5):
            key = self.pick(["condition", "conditions", "sky", "weather", "description", "summary"])
            value = {**value, key: sky} if self.chance(0.7) else {key: sky, **value}
            said += f" and {sky}"
        if self.chance(0.2):
            value = {self.pick(["city", "location"]): city, **value}
        return self.dumps(value), f"In {city} it is {said}."

    def time(self):
        city, key = self.city(), self.pick(["city", "city", "location", "place", "timezone"])
        clock = self.pick([f"{self.r.randint(0, 23):02}:{self.r.randint(0, 59):02}", f"{self.r.randint(1, 12)}:{self.r.randint(0, 59):02} {self.pick(['am', 'pm'])}"])
        forms = ["What time is it in {}?", "Tell me the time in {}.", "Local time in {}?", "What is the time in {}?", "How late is it in {}?",
                 "What's the time in {}?", "Get the time in {}.", "Time in {}?"]
        form, _ = self.combo(forms, [city])
        function = self.function(self.pick(["get_time", "get_time", "clock", "get_current_time", "time_in_city", "world_clock"]),
                                 self.pick(["Get the local time", "Gets the time in a city.", "Time at a place.", "Returns the current time."]),
                                 {key: self.param(note="The city")})
        result = self.pick([clock, self.dumps({"time": clock}), self.dumps({"city": city, "time": clock})])
        return self.finish("time", function, form.format(city), {key: city}, (result, f"In {city} it is {clock}."))

    def calculate(self):
        """A tool with two numbers, such as add(a, b)."""
        name, sign, f, forms = self.pick([
            ("add", "+", lambda a, b: a + b, ["Add {a} and {b}.", "What is {a} + {b}?", "What is {a} plus {b}?", "Use the tool to add {a} and {b}.",
                                              "What is the sum of {a} and {b}?", "Compute {a} + {b}."]),
            ("subtract", "-", lambda a, b: a - b, ["Subtract {b} from {a}.", "What is {a} - {b}?", "What is {a} minus {b}?", "Compute {a} - {b}."]),
            ("multiply", "*", lambda a, b: a * b, ["Multiply {a} by {b}.", "What is {a} * {b}?", "What is {a} times {b}?", "Compute {a} * {b}."])])
        a, b = self.number(3), self.number(3)
        x, y = self.pick([("a", "b"), ("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")])
        kind = self.pick(["number", "integer"])
        title = {"add": "Add", "subtract": "Subtract", "multiply": "Multiply"}[name]
        function = self.function(self.pick([name, name, f"{name}_numbers", f"{name}_two"]), self.pick([f"{title} two numbers", f"{title} two numbers.", f"{title} {x} and {y}"]),
                                 {x: self.param(kind, "First number"), y: self.param(kind, "Second number")})
        form, _ = self.combo(forms, [a])
        value = f(a, b)
        result = self.pick([str(value), self.dumps({"result": value}), self.dumps({"sum" if name == "add" else "value": value})])
        return self.finish("calculate", function, form.format(a=a, b=b), {x: a, y: b}, (result, f"{a} {sign} {b} = {value}."))

    def expression(self):
        text, key = f"{self.number(3)} {self.pick('+-*/')} {self.number(3)}", self.pick(["expression", "formula", "input", "expr"])
        value = self.number()
        form, _ = self.combo(["Calculate {}.", "Use the calculator for {}.", "What is {}?", "Compute {}.", "Evaluate {}."], [text])
        function = self.function(self.pick(["calculator", "calculate", "eval_math", "compute"]), self.pick(["Computes an expression.", "A calculator.", "Evaluate a math expression"]),
                                 {key: self.param(note="The expression")})
        return self.finish("calculate", function, form.format(text), {key: text}, (self.pick([str(value), self.dumps({"result": value})]), f"{text} = {value}."))

    def search(self):
        query, key = " ".join(self.words(1, 4)), self.pick(["query", "query", "q", "text", "keywords"])
        found = [" ".join(self.words(1, 3)) for _ in range(self.r.randint(1, 3))]
        form, _ = self.combo(["Search for {}.", "Search the web for {}.", "Find pages about {}.", "Look up {}.", "Please search for {}.", "Google {}."], [query])
        function = self.function(self.pick(["search", "search", "web_search", "find_pages", "search_web"]), self.pick(["Search the web", "Searches the web.", "Finds pages.", "Web search"]),
                                 {key: self.param(note="The search query")})
        result = self.pick([self.dumps({"results": found}), self.dumps(found), ", ".join(found)])
        return self.finish("search", function, form.format(query), {key: query}, (result, f"I found: {', '.join(found)}."))

    def message(self):
        to, text = self.name(), " ".join(self.words(1, 5))
        p, q = self.pick(["to", "name", "recipient", "person"]), self.pick(["text", "message", "body", "content"])
        form, _ = self.combo(["Send {n} the message: {t}", "Write to {n}: {t}", "Send a message to {n}: {t}", "Tell {n}: {t}", "Message {n}: {t}"], [to])
        function = self.function(self.pick(["send_message", "send_mail", "message", "notify", "send_email"]), self.pick(["Sends a message.", "Send a text to a person"]),
                                 {p: self.param(), q: self.param()})
        return self.finish("message", function, form.format(n=to, t=text), {p: to, q: text}, (self.pick(['{"sent": true}', "sent", '{"ok": true}']), f"I sent the message to {to}."))

    def light(self):
        room, state = self.pick(w.ROOMS), self.pick(["on", "off"])
        p, q = self.pick(["room", "place"]), self.pick(["state", "mode", "value"])
        form, _ = self.combo(["Turn {s} the light in the {r}.", "Switch {s} the {r} light.", "Light {s} in the {r}, please.", "Turn the {r} light {s}."], [room])
        function = self.function(self.pick(["switch_light", "set_light", "light", "light_switch"]), self.pick(["Switches a light.", "Turn a light on or off"]),
                                 {p: self.param(), q: self.param(enum=["on", "off"])})
        return self.finish("light", function, form.format(r=room, s=state), {p: room, q: state}, (self.pick(['{"ok": true}', "ok"]), f"The light in the {room} is now {state}."))

    def timer(self):
        n, key = self.r.randint(1, 120), self.pick(["minutes", "duration", "time"])
        form, _ = self.combo(["Set a timer for {} minutes.", "Start a timer of {} minutes.", "Timer for {} minutes.", "Wake me in {} minutes."], [n])
        function = self.function(self.pick(["set_timer", "timer", "start_timer"]), self.pick(["Starts a timer.", "Set a timer in minutes"]),
                                 {key: self.param(self.pick(["number", "integer"]), "Minutes")})
        return self.finish("timer", function, form.format(n), {key: n}, (self.pick(['{"ok": true}', "ok"]), f"The timer is set for {n} minutes."))

    # ---- made-up tools --------------------------------------------------------------------------------------------------
    def invented_param(self, used):
        """(name, schema, value, what the user says) of a random parameter."""
        kind = self.r.random()
        if kind < 0.25:
            enums = HELD_ENUMS if self.held else ENUMS
            name = self.param_name(enums, used)
            values = enums.get(name) or list(dict.fromkeys(self.words(2, 4)))
            value = self.pick(values)
            return name, self.param(enum=values), value, self.pick([f"{name} {value}", f"with {name} {value}", f"with the {name} {value}"])
        if kind < 0.5:
            name, value = self.param_name(HELD_NUMBERS if self.held else NUMBERS, used), self.number(3)
            return name, self.param(self.pick(["number", "integer"])), value, self.pick([f"{name} {value}", f"with {name} {value}", f"{value} {name}"])
        name = self.param_name(HELD_STRINGS if self.held else STRINGS, used)
        value = self.pick([self.word(), self.name(), self.city(), " ".join(self.words(1, 3)), self.word() + self.pick([".txt", ".md", "-1", "_a"])])
        return name, self.param(), value, self.pick([f"{name} {value}", f"with {name} {value}", f"with the {name} {value}"])

    def param_name(self, names, used):
        """One of the usual names, or in training often any other word."""
        name = self.pick([n for n in names if n not in used])
        if self.chance(0.6) and not self.held:
            fresh = self.pick([self.made_up(), self.pick(w.WORDS), self.pick(w.OBJECTS), f"{self.pick(w.OBJECTS)}_{name}"])
            name = name if fresh in used else fresh
        return name

    def invented(self):
        """A tool that does something to something, found by the words that its name and the question share."""
        verb = self.made_up() if self.chance(0.35) else self.pick(w.HELD_VERBS if self.held else w.VERBS)
        thing = self.made_up() if self.chance(0.35) else self.pick(w.HELD_OBJECTS if self.held else w.OBJECTS)
        name = self.pick([f"{verb}_{thing}", f"{verb}_{thing}", f"{verb}{thing.capitalize()}", f"{thing}_{verb}", f"{verb}_the_{thing}"])
        required, optional, args, said, count = {}, {}, {}, [], self.pick([0, 1, 1, 1, 2, 2, 3])
        for _ in range(count):
            key, schema, value, phrase = self.invented_param(list(required) + list(optional))
            if self.chance(0.12):
                optional[key] = schema
                if self.chance(0.5):
                    continue
            else:
                required[key] = schema
            args[key] = value
            said.append(phrase)
        said = " and ".join(said)
        if len(args) == 1 and len(required) == 1 and "with" not in said and self.chance(0.5):
            said = str(list(args.values())[0]) if self.chance(0.5) else f"for {list(args.values())[0]}"
        forms = ["{v} the {t} {s}", "Please {v} the {t} {s}", "{v} a {t} {s}", "Can you {v} the {t} {s}", "I want to {v} the {t} {s}", "Use {f} {s}", "Call {f} {s}",
                 "{v} my {t} {s}", "{v} this {t} {s}"]
        form, _ = self.combo(forms, [verb])
        text = form.format(v=verb, t=thing, s=said, f=name).strip() + self.pick([".", "", "."])
        description = self.pick([f"{verb.capitalize()} the {thing}.", f"{verb.capitalize()} a {thing}", f"Can {verb} a {thing}.", f"{verb.capitalize()} {thing}", f"Use this to {verb} a {thing}."])
        # Arguments come in the order of the schema.
        args = {key: args[key] for key in [*required, *optional] if key in args}
        return self.finish("invented", self.function(name, description, required, optional), text[0].upper() + text[1:], args)

    def tool(self, kind=None):
        kinds = {"weather": 5, "time": 2, "calculate": 2.5, "expression": 1, "search": 2, "message": 1, "light": 1, "timer": 1, "invented": 9}
        return getattr(self, kind or self.r.choices(list(kinds), list(kinds.values()))[0])()

    def toolbox(self, kinds=None):
        """One to four tools with different names and purposes."""
        out = []
        for _ in range(self.pick([1, 1, 2, 2, 3, 4])):
            tool = self.tool(self.pick(kinds) if kinds else None)
            if all(tool.name != t.name and (tool.kind != t.kind or tool.kind == "invented") for t in out):
                out.append(tool)
        return out
