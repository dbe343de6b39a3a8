"""What the way through gRPC adds to a short prompt on the bundled model.

The bare side runs plain `transformers` in this process; the other side is `client.run` of the SDK on a server of its
own, same prompt, same thread count, logits of the last position. Wall time, twenty calls of each side in turn, as a
caller makes them: one after the other.
"""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM

import patchclamp as pc
from benchmarks.measure import Row, Timings, interleaved
from benchmarks.serving import server
from patchclamp_server.demo import model_dir

PROMPT = "Fact: the capital of the state containing Dallas is"


def run(repeats: int) -> list[Row]:
    """The rows of this benchmark."""
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(model_dir(), attn_implementation="sdpa").eval()
    with server(["--demo"]) as address, pc.connect(address) as client:
        ids = torch.tensor([client.tokenize(PROMPT).ids])
        outside: list[float] = []

        def short_run() -> None:
            began = time.perf_counter()
            engine = client.run(PROMPT, top_k=0).summary.engine_seconds
            outside.append(time.perf_counter() - began - engine)

        sides = {
            "bare": lambda: model(input_ids=ids, use_cache=False).logits[0, -1],
            "run": short_run,
            "run, top 5 and a read": lambda: client.run(PROMPT, top_k=5, read=["blocks.*.resid_post"]),
            "describe": client.describe,
        }
        timings = interleaved(sides, repeats, time.perf_counter, in_a_row=20)
    bare = timings["bare"].median
    added = {name: (timing.median - bare) * 1e3 for name, timing in timings.items()}
    return [
        Row("bare forward of a short prompt, bundled model, p50", f"{bare * 1e3:.2f} ms"),
        Row("`client.run` of it adds, p50", f"{added['run']:.2f} ms", "≤ 3 ms", added["run"] <= 3),
        Row("of it outside the engine, p50", f"{Timings(tuple(outside)).median * 1e3:.2f} ms"),
        Row(
            "`client.run` with top 5 and every `resid_post` adds, p50",
            f"{added['run, top 5 and a read']:.2f} ms",
        ),
        Row("`client.describe`, p50", f"{timings['describe'].median * 1e3:.2f} ms"),
    ]
