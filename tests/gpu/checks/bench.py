"""Speed on gpt-oss-20b's shape in NF4: load, prefill, decode at several depths and batches, and with less memory.

The checkpoint of random weights (about 12 GB) is written to the scratch folder while the other checks run.
"""

import json

from .card import open_card
from .context import Failed, Skipped, TimedOut, run
from .memory import start_synthesis, wait_for_synthesis
from .service import Service

NAME = "twenty"
SYNTHESIS_S = 240
# (batch, depth, prompt, device memory), the ones that matter most first: what time is left for is measured. Without a
# figure the worker takes its usual share, in which many deep contexts have no room.
POINTS = (
    (1, 0, 512, None),
    (1, 8192, 8192, None),
    (8, 0, 512, None),
    (32, 0, 512, None),
    (1, 0, 512, "16GiB"),
    (1, 0, 512, "12GiB"),
    (8, 8192, 512, None),
    (32, 8192, 512, "72GiB"),
    (1, 32768, 512, None),
    (8, 32768, 512, "72GiB"),
    (32, 32768, 512, "72GiB"),
)
LLAMA_POINTS = ((1, 0, 512), (1, 8192, 8192), (32, 0, 512))
POINTS_QUICK = POINTS[:3]
POINT_S = 75
PLAN_S = 60
REPETITIONS = 3


def prepare(context):
    """Begins to write the checkpoint. On the processor the built-in model stands in."""
    if context.is_cuda:
        start_synthesis(context, NAME, "gpt-oss-20b.json")


def synthesis(context):
    """The checkpoint is there."""
    context.need_cuda()
    _, text = wait_for_synthesis(context, NAME)
    return text


def plan(context):
    """What the card holds with the whole model is what was planned, to a fiftieth."""
    context.need_cuda()
    card, model = open_card(context), wait_for_synthesis(context, NAME)[0]
    base = card.used_bytes()
    with Service(context, model) as service:
        worker = service.wait_until_running(PLAN_S)["workers"][0]
        service.request("POST", "/v1/completions", {"prompt": [1, 2, 3, 4], "max_tokens": 8, "temperature": 0})
        held = card.used_bytes() - base
    planned = sum(worker["memory"][part] for part in ("weights", "kv_cache", "scratch", "reserve"))
    text = f"planned {planned >> 20} MiB, held {held >> 20} MiB, {held / planned - 1:+.1%}"
    if abs(held - planned) > planned / 50:
        raise Failed(text)
    return text


def _measure(context, batch, depth, prompt, device_memory):
    model = wait_for_synthesis(context, NAME)[0] if context.is_cuda else context.demo_model()
    command = [context.worker(), "bench", "--model", model, "--batch", batch, "--depth", depth, "--prompt", prompt,
               "--repetitions", REPETITIONS, "--json", *context.device_flags()]
    command += ["--device-memory", device_memory] if device_memory else []
    return json.loads(run(command, POINT_S))


def _point(batch, depth, prompt, device_memory):
    def check(context):
        if context.is_quick and (batch, depth, prompt, device_memory) not in POINTS_QUICK:
            raise Skipped("left out by --quick")
        if device_memory or depth > 0:
            context.need_cuda()
        try:
            report = _measure(context, batch, depth, prompt, device_memory)
        except TimedOut as late:
            # Filling that many contexts takes longer here than a point may: no fault.
            raise Skipped(str(late)) from late
        context.data[_name(batch, depth, prompt, device_memory)] = report
        prefill, decode = (report[f"{what}_tokens_per_second"]["median"] for what in ("prefill", "decode"))
        share = report.get("share_of_bandwidth")
        text = f"load {report['load_seconds']:.1f} s, prefill {prefill:.0f}/s, decode {decode:.1f}/s"
        given_up = report.get("memory", {}).get("given_up")
        text += f", {share:.0%} of bandwidth" if share is not None else ""
        return text + (f"; given up: {given_up}" if given_up else "")
    return check


def _llama(batch, depth, prompt):
    """Llama-3.2-1B's shape, of which each prompt's token takes 1.95 GFLOP in the products of its layers."""
    def check(context):
        context.need_cuda()
        if "llama" not in context.background:
            start_synthesis(context, "llama", "llama-3.2-1b.json")
        model = wait_for_synthesis(context, "llama")[0]
        command = [context.worker(), "bench", "--model", model, "--batch", batch, "--depth", depth, "--prompt", prompt,
                   "--repetitions", REPETITIONS, "--json", *context.device_flags()]
        report = json.loads(run(command, POINT_S))
        context.data[f"bench.llama_b{batch}_d{depth}_p{prompt}"] = report
        prefill, decode = (report[f"{what}_tokens_per_second"]["median"] for what in ("prefill", "decode"))
        return f"prefill {prefill:.0f}/s, decode {decode:.1f}/s, {report.get('share_of_bandwidth') or 0:.0%} of bandwidth"
    return check


def _name(batch, depth, prompt, device_memory):
    return f"bench.b{batch}_d{depth}_p{prompt}" + (f"_{device_memory}" if device_memory else "")


CASES = [("bench.synthesis", SYNTHESIS_S, synthesis), ("bench.plan", PLAN_S + 10, plan)]
CASES += [(f"bench.llama_b{batch}_d{depth}_p{prompt}", POINT_S, _llama(batch, depth, prompt))
          for batch, depth, prompt in LLAMA_POINTS]
CASES += [(_name(*point), POINT_S + 5, _point(*point)) for point in POINTS]
