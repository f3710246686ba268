"""Too little memory on the card: a budget that is too tight, and another process that holds nearly everything."""

import concurrent.futures
import contextlib
import json
import subprocess

from .card import hog, open_card
from .context import Failed, Skipped, run
from .service import Service

# Six layers of the 20b's shape: about 5 GB in NF4.
CONFIG = "gpt-oss-20b-6-layers.json"
BUDGET = "3GiB"
BUDGET_BYTES = 3 << 30
# The driver's context and the code of the kernels, which no plan can make smaller.
CONTEXT_BYTES = 1 << 30
# The least that may be asked for, in which the six layers' output matrix alone has no room.
TINY_BUDGET = "256MiB"
# Sequences that are too long to be held side by side.
TURNS, TURN_TOKENS = 7, 6000
LAYER_QUESTIONS = ("What is 7 plus 5?", "How do I check the health of the server?", "Count from 3 to 8.")
LOAD_S = 60
FREED_S = 60


def start_synthesis(context, name, config):
    """Begins to write a checkpoint of random weights."""
    folder = context.scratch / name
    command = [context.program("synth-model"), "--config", context.pack / "configs" / config, "--quant", "nf4",
               "--out", folder]
    with open(context.scratch / f"{name}.log", "w", encoding="utf-8") as log:
        context.background[name] = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL,
                                                    stdout=log, stderr=subprocess.STDOUT)


def wait_for_synthesis(context, name):
    """Waits until it is there; gives the folder and what the program said."""
    code = context.background[name].wait()
    text = (context.scratch / f"{name}.log").read_text(encoding="utf-8").strip()
    if code != 0:
        raise Failed(f"synth-model ended with {code}: {text[-300:]}")
    return context.scratch / name, text


def _six_layers(context):
    """Gives the folder of the checkpoint that the budgets are about; the first caller has it written."""
    context.need_cuda()
    if context.is_quick:
        raise Skipped("left out by --quick")
    if "six-layers" not in context.background:
        start_synthesis(context, "six-layers", CONFIG)
    return wait_for_synthesis(context, "six-layers")[0]


def _outcome(service, seconds):
    """Waits until the worker runs or is refused, and gives (runs, health)."""
    def find(health):
        worker = health["workers"][0]
        ended = worker["state"] == "FATAL" or (worker["last_end"] and worker["state"] != "LOADING")
        return health if health["model_loaded"] or ended else None
    health = service.wait_for("the model is loaded or refused", seconds, find)
    return health["model_loaded"], health


def tight_budget(context):
    """A budget below the model's size: something is given up, or the load is refused with the reason."""
    card, folder = open_card(context), _six_layers(context)
    base = card.used_bytes()
    with Service(context, folder, "--device-memory", BUDGET, "--context-tokens", "8192") as service:
        runs, health = _outcome(service, LOAD_S)
        if not runs:
            return _refused(service, health)
        taken = card.used_bytes() - base
        if taken > BUDGET_BYTES + CONTEXT_BYTES:
            raise Failed(f"{taken >> 20} MiB were taken, the budget is {BUDGET}")
        service.request("POST", "/v1/completions", {"prompt": [1, 2, 3, 4], "max_tokens": 4, "temperature": 0})
        worker = service.wait_until_running()["workers"][0]
        return f"runs in {taken >> 20} MiB: {worker['memory']}, blocks {worker['blocks']['total']}"


def no_budget(context):
    """A budget in which nothing fits is refused with the reason, and the API stays up."""
    folder = _six_layers(context)
    with Service(context, folder, "--device-memory", TINY_BUDGET, "--context-tokens", "8192") as service:
        runs, health = _outcome(service, LOAD_S)
        if runs:
            raise Failed(f"runs in {TINY_BUDGET}: {health['workers'][0]['memory']}")
        return _refused(service, health)


def _refused(service, health):
    text = f"{health.get('reason')} {health['workers'][0]['last_end']} {service.log(20)}"
    if "memory" not in text:
        raise Failed(f"refused without the reason: {text[:300]}")
    return f"refused: {health.get('reason')}; {health['workers'][0]['last_end']}"


def full_card(context):
    """While another process holds the memory the worker says so; when that is gone, the service comes back."""
    card = open_card(context)
    with contextlib.ExitStack() as stack:
        with hog(context) as held:
            left = card.total_bytes() - card.used_bytes()
            service = stack.enter_context(Service(context, context.demo_model()))
            runs, health = _outcome(service, LOAD_S)
            end = health["workers"][0]["last_end"]
            if not runs and "memory" not in f"{end} {service.log(20)}":
                raise Failed(f"with {left >> 20} MiB left: {end}: {service.log()}")
        service.wait_until_running(FREED_S)
        answer = service.chat("What is 7 plus 5?")
    if "12" not in answer:
        raise Failed(f"afterwards: {answer!r}")
    return f"{held >> 20} MiB held, {left >> 20} left: {'runs in that' if runs else end}; answers afterwards"


def whole_layers(context):
    """Where not even the keys and values fit, the last layers are the host's altogether, and answers are the same."""
    context.need_cuda()
    with Service(context, context.demo_model()) as service:
        worker = service.wait_until_running()["workers"][0]
        expected = {question: service.chat(question) for question in LAYER_QUESTIONS}
    plan = [context.worker(), "plan", context.demo_model(), "--json", "--sequences", "1", "--context", "16384", "--vram"]
    for hundredths in range(100, 60, -1):
        row = json.loads(run([*plan, hundredths / 100], 20))["plans"][0]
        if row.get("whole_layers"):
            break
    else:
        raise Failed(f"no budget sends layers to the host: {row}")
    flags = ("--device-memory", f"{row['budget'] >> 20}MiB", "--sequences-max", "1", "--context-tokens", "16384")
    with Service(context, context.demo_model(), *flags) as service:
        health = service.wait_until_running()
        found = {question: service.chat(question) for question in LAYER_QUESTIONS}
    device = health["workers"][0]["device"]
    if "whole layers" not in device:
        raise Failed(f"the plan {row} came to {device}, before {worker['memory']}")
    if found != expected:
        raise Failed(f"{found}, on the card alone {expected}")
    return f"{device}: {row['given_up']}"


def _complete(service, seed):
    """Continues a long prompt that differs by its seed."""
    prompt = [(place * 7919 + seed * 104729) % 1000 for place in range(TURN_TOKENS)]
    body = {"prompt": prompt, "max_tokens": 40, "seed": seed, "temperature": 1}
    status, text = service.request("POST", "/v1/completions", body)
    if status != 200:
        raise Failed(f"status {status}: {text[:300]}")
    return json.loads(text)["choices"][0]["text"]


def taking_turns(context):
    """Sequences whose keys and values do not fit together take turns, and come to what they come to alone."""
    context.need_cuda()
    with Service(context, context.demo_model()) as service:
        memory = service.wait_until_running()["workers"][0]["memory"]
        alone = [_complete(service, seed) for seed in range(TURNS)]
    fixed = sum(memory[purpose] for purpose in ("weights", "scratch", "reserve"))
    budget = f"{(fixed + memory['kv_cache'] // 5) >> 20}MiB"
    with Service(context, context.demo_model(), "--device-memory", budget) as service:
        blocks = service.wait_until_running()["workers"][0]["blocks"]
        if blocks["total"] * blocks["tokens"] >= TURNS * TURN_TOKENS:
            raise Failed(f"{blocks} hold everything: the budget of {budget} shows nothing")
        with concurrent.futures.ThreadPoolExecutor(TURNS) as pool:
            together = list(pool.map(lambda seed: _complete(service, seed), range(TURNS)))
        incarnation = service.worker()["incarnation"]
    if together != alone or incarnation != 1:
        raise Failed(f"incarnation {incarnation}; alone {alone!r}, taking turns {together!r}")
    return f"{TURNS} sequences of {TURN_TOKENS} tokens in {blocks['total'] * blocks['tokens']}"


CASES = [
    ("memory.taking_turns", 60, taking_turns),
    ("memory.whole_layers", 60, whole_layers),
    ("memory.tight_budget", 120, tight_budget),
    ("memory.no_budget", 75, no_budget),
    ("memory.full_card", 150, full_card),
]
