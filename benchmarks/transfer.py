"""How fast activations arrive, and what that costs other callers.

One caller reads 64 MiB of activations (`embed` of 8,192 tokens, d_model 2,048, float32) again and again while another,
in a process of its own, calls Describe. The model has one small block, and a read of `embed` stops before it, so that
what is measured is the way from the engine's tensor to the caller's array.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchclamp as pc
from benchmarks.measure import Row, Timings
from benchmarks.serving import server

WIDTH, TOKENS = 2048, 8192
BYTES = WIDTH * TOKENS * 4
IDLE_SECONDS = 3.0


def run(repeats: int) -> list[Row]:
    """The rows of this benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder))
        with server(["--model", folder, "--name", "wide"]) as address:
            idle = _describe_beside(address, lambda: time.sleep(IDLE_SECONDS))
            arrivals: list[float] = []
            busy = _describe_beside(address, lambda: arrivals.extend(_transfers(address, repeats)))
    median = Timings(tuple(arrivals)).median
    rate, p99 = BYTES / median / 1e9, busy.quantile(0.99) * 1e3
    return [
        Row("64 MiB of activations arrive at, median", f"{rate:.2f} GB/s", "≥ 0.5 GB/s", rate >= 0.5),
        Row("another caller's Describe meanwhile, p99", f"{p99:.1f} ms", "≤ 25 ms", p99 <= 25),
        Row("the same, median", f"{busy.median * 1e3:.1f} ms"),
        Row("Describe on the idle server, p99", f"{idle.quantile(0.99) * 1e3:.1f} ms"),
    ]


def _save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        max_position_embeddings=TOKENS,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _transfers(address: str, repeats: int) -> list[float]:
    """Seconds of each read of 64 MiB, after one unmeasured."""
    found = []
    with pc.connect(address) as client:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            result = client.run([i % 256 for i in range(TOKENS)], read=["embed"], logits=None, top_k=0, timeout=60)
            found.append(time.perf_counter() - began)
            assert result["embed"].nbytes == BYTES
    return found[1:]


def _describe_beside(address: str, work: Callable[[], object]) -> Timings:
    """Latencies of Describe, called by another process while `work` runs."""
    command = [sys.executable, "-m", "benchmarks.describing", address]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    work()
    out, _ = child.communicate("stop\n", timeout=60)
    return Timings(tuple(float(line) for line in out.split()))
