"""Chat from end to end with the built-in model: whole and streamed, alone and side by side, beside the processor."""

import concurrent.futures

from .card import open_card
from .context import Failed
from .service import Service

QUESTIONS = (
    "What is 7 plus 5?",
    "What is 12 minus 9?",
    "Hello!",
    "Who are you?",
    "How do I check the health of the server?",
    "Count from 3 to 8.",
    "What is the capital of France?",
    "Tell me a joke.",
)
# The card rounds activations to bf16 before products and the processor does not: where two tokens are nearly as likely,
# the choice may differ, and all that follows.
EQUAL_MIN = len(QUESTIONS) - 2
GIB = 1 << 30


def _answers(service):
    return {question: service.chat(question) for question in QUESTIONS}


def health(context):
    """The health report names the device and the card's memory."""
    with Service(context, context.demo_model()) as service:
        report = service.wait_until_running()
        worker = report["workers"][0]
        device = worker["device"]
        if not context.is_cuda:
            return f"{device}"
        card = open_card(context)
        # The card is measured from time to time, for the first time when the device is chosen.
        report = service.wait_for("the card is measured", 10, lambda health: health["gpu_memory_used"] > 0 and health)
        used, total = report["gpu_memory_used"], report["gpu_memory_total"]
        if not 0 < used <= total:
            raise Failed(f"gpu_memory_used {used}, gpu_memory_total {total}")
        if abs(total - card.total_bytes() / GIB) > 1:
            raise Failed(f"gpu_memory_total {total}, the card has {card.total_bytes() / GIB:.1f} GiB")
        return f"{device}: {used:.2f} of {total:.1f} GiB, {worker['memory']}"


def answers(context):
    """Whole and streamed answers are equal, and the processor's too but for near ties."""
    with Service(context, context.demo_model()) as service:
        service.wait_until_running()
        found = _answers(service)
        for question in QUESTIONS[:3]:
            text, parts = service.chat_streamed(question)
            if text != found[question] or parts < 2:
                raise Failed(f"{question!r}: streamed {text!r} in {parts} parts, whole {found[question]!r}")
    if "12" not in found[QUESTIONS[0]]:
        raise Failed(f"{QUESTIONS[0]!r}: {found[QUESTIONS[0]]!r}")
    with Service(context, context.demo_model(), device="cpu") as service:
        service.wait_until_running()
        expected = _answers(service)
    different = [question for question in QUESTIONS if found[question] != expected[question]]
    context.data["chat.answers"] = {"found": found, "expected": expected}
    if len(QUESTIONS) - len(different) < EQUAL_MIN:
        question = different[0]
        raise Failed(f"{len(different)} of {len(QUESTIONS)} differ: {found[question]!r}, {expected[question]!r}")
    return f"{len(QUESTIONS) - len(different)} of {len(QUESTIONS)} as on the processor" + (
        f"; not {different}" if different else "")


def int8_cache(context):
    """Keys and values in 8 bits take half the room and change next to no answer."""
    context.need_cuda()
    found = {}
    for kv_type in ("bf16", "int8"):
        with Service(context, context.demo_model(), "--kv-cache-type", kv_type) as service:
            memory = service.wait_until_running()["workers"][0]["memory"]
            found[kv_type] = (_answers(service), memory["kv_cache"])
    (expected, wide), (answers_8, narrow) = found["bf16"], found["int8"]
    if not 0.4 < narrow / wide < 0.7:
        raise Failed(f"{narrow} bytes in 8 bits, {wide} in 16")
    equal = sum(answers_8[question] == expected[question] for question in QUESTIONS)
    if equal < EQUAL_MIN or "12" not in answers_8[QUESTIONS[0]]:
        raise Failed(f"{equal} of {len(QUESTIONS)} as in 16 bits: {answers_8}")
    return f"{equal} of {len(QUESTIONS)} as in 16 bits, in {narrow / wide:.0%} of the room"


def side_by_side(context):
    """What runs beside a request changes no token of its answer."""
    with Service(context, context.demo_model()) as service:
        service.wait_until_running()
        alone = _answers(service)
        jobs = [question for _ in range(4) for question in QUESTIONS]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(service.chat, jobs))
    for question, answer in zip(jobs, together):
        if answer != alone[question]:
            raise Failed(f"{question!r}: alone {alone[question]!r}, beside others {answer!r}")
    return f"{len(jobs)} requests, 8 at a time"


def long_prompt(context):
    """A prompt of thousands of tokens is taken in, in parts and beside short ones."""
    text = "My name is Ada. " + "I like the colour blue. " * 300 + "What is 2 plus 2?"
    with Service(context, context.demo_model()) as service:
        service.wait_until_running()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            long = pool.submit(service.chat, text)
            short = [pool.submit(service.chat, QUESTIONS[0]) for _ in range(2)]
            answer = long.result()
            if any("12" not in future.result() for future in short):
                raise Failed(f"beside a long prompt: {[future.result() for future in short]}")
    if not answer:
        raise Failed("no answer")
    return repr(answer[:60])


CASES = [
    ("chat.health", 60, health),
    ("chat.answers", 90, answers),
    ("chat.int8_cache", 60, int8_cache),
    ("chat.side_by_side", 90, side_by_side),
    ("chat.long_prompt", 60, long_prompt),
]
