"""Speed on gpt-oss-20b's shape in NF4: load, prefill, decode at several depths and batches, and with less memory.

The checkpoint of random weights (about 12 GB) is written to the scratch folder while the other checks run.
"""

import json

from .context import Skipped, TimedOut, run
from .memory import start_synthesis, wait_for_synthesis

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
POINTS_QUICK = POINTS[:3]
POINT_S = 75
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


def _name(batch, depth, prompt, device_memory):
    return f"bench.b{batch}_d{depth}_p{prompt}" + (f"_{device_memory}" if device_memory else "")


CASES = [("bench.synthesis", SYNTHESIS_S, synthesis)] + [(_name(*point), POINT_S + 5, _point(*point))
                                                        for point in POINTS]
