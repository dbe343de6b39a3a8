"""What edits cost while generating: steps of 16 rows through a random model of GPT-2-small's size, and whole
generations of 16 callers against `transformers`.

A Llama with 12 layers, d_model 768, 8,192 tokens (GPT-2's unembedding would hide the edits behind it), float32, one
thread, process CPU time. Rows have 32 prompt tokens.

- A step: 16 samples that all decode, again and again; the sides take turns, so their caches grow alike. Edited: four
  different edits in every layer of every row (add, ablate, clamp, scale), each row with vectors of its own. Idle: the
  sites are hooked and get their values back.
- Callers: 16 generations of 24 tokens, each with four edits of its own in some layer, handed to the worker at once;
  the same one after the other; and one `generate` of `transformers` over the 16 prompts, unedited. gRPC is not in it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Row, interleaved
from patchclamp_server.adapters.load import Checkpoint
from patchclamp_server.engine.continuation import Continuation
from patchclamp_server.engine.decoding import Chosen, Decoder, DecodingLimits
from patchclamp_server.engine.loading import Resident, make_resident
from patchclamp_server.engine.messages import (
    GenerationEvent,
    GenerationJob,
    GenerationSpec,
    JobDone,
    JobFailed,
    Loaded,
    StopRules,
)
from patchclamp_server.engine.runner import Batch, Forward
from patchclamp_server.engine.sample import Sample
from patchclamp_server.engine.sampling import SamplingRules
from patchclamp_server.engine.slots import Slots
from patchclamp_server.engine.worker import Worker
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.compiling import compile_row
from patchclamp_server.interventions.ops import Ablate, Add, Clamp, Intervention, RowEdits, Scale, Target

ROWS, PROMPT, NEW = 16, 32, 24
N_LAYERS, D_MODEL, D_VOCAB = 12, 768, 8192
_IDLE_SITES = (Site.RESID_POST, Site.ATTN_OUT, Site.MLP_OUT)


def run(repeats: int) -> list[Row]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    plain = _model("sdpa")
    hooked = _model("eager")
    hooked.load_state_dict(plain.state_dict())
    resident = make_resident(Checkpoint(hooked, None, "random"), "llama-768", lambda _: None)
    prompts = torch.randint(D_VOCAB, (ROWS, PROMPT)).tolist()
    return [*_steps(resident, prompts, repeats * 8), *_callers(resident, plain, prompts, repeats)]


def _model(attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=2048,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=12,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval().requires_grad_(False)


def _steps(resident: Resident, prompts: list[list[int]], repeats: int) -> list[Row]:
    everywhere = [_edits(row, range(N_LAYERS)) for row in range(ROWS)]
    timings = interleaved(
        {
            "plain": _stepping(resident, prompts, [()] * ROWS),
            "edited": _stepping(resident, prompts, everywhere),
            "idle": _idling(resident, prompts),
            "bare": _idling(resident, prompts, ()),
        },
        repeats,
    )
    edited = timings["edited"].fastest / timings["plain"].fastest
    idle = timings["idle"].fastest / timings["bare"].fastest
    return [
        Row(f"decode step of {ROWS} rows, no edits", f"{1000 * timings['plain'].fastest:.1f} CPU ms"),
        Row("four edits in every layer of every row", f"{edited:.3f} × no edits", "≤ 1.10", edited <= 1.10),
        Row("idle hooks on stream, attention and MLP writes", f"{idle:.3f} × none", "≤ 1.02", idle <= 1.02),
    ]


def _edits(row: int, layers: range) -> tuple[Intervention, ...]:
    """Four different edits in each of these layers, with vectors of the row's own."""
    generator = torch.Generator().manual_seed(row)

    def vector() -> torch.Tensor:
        return torch.randn(D_MODEL, generator=generator)

    return tuple(
        Intervention(op)
        for layer in layers
        for target in [Target((HookPoint(Site.RESID_POST, layer),))]
        for op in (
            Add(target, vector(), 0.01),
            Ablate(target, vector()),
            Clamp(target, vector(), low=-1.0, high=1.0),
            Scale(target, vector(), 0.9),
        )
    )


class _Owner:
    solo = False
    paused = False


def _stepping(
    resident: Resident, prompts: list[list[int]], edits: list[tuple[Intervention, ...]]
) -> Callable[[], object]:
    """A step of samples that have seen their prompts."""
    decoder = Decoder(resident.runner, DecodingLimits(max_samples=ROWS, chunk_tokens=ROWS * PROMPT))
    sites = resident.facts.site_info
    samples = []
    for number, (prompt, some) in enumerate(zip(prompts, edits, strict=True)):
        spec = GenerationSpec(tuple(prompt), (SamplingRules(),) * ROWS, StopRules(1000), some)
        compiled = compile_row(RowEdits(some, PROMPT, PROMPT + 1000), sites)
        samples.append(
            Sample(_Owner(), number, spec, compiled, Continuation(spec.prompt, spec.stop, 1000, lambda ids: ""))
        )
        decoder.add(samples[-1])

    def step() -> None:
        for outcome in decoder.advance(lambda: None):
            assert isinstance(outcome, Chosen)
            outcome.sample.continuation.append(outcome.token_id)

    while not all(sample.decoding for sample in samples):
        step()
    return step


def _idling(
    resident: Resident, prompts: list[list[int]], sites: tuple[Site, ...] = _IDLE_SITES
) -> Callable[[], object]:
    """A step whose hooks hand back what they get."""
    slots, length = Slots({}, resident.runner.input_device), PROMPT
    edits = {HookPoint(site, layer): _same for site in sites for layer in range(N_LAYERS)}
    last = [(row, 0) for row in range(ROWS)]

    def forward(tokens: list[list[int]], start: int) -> torch.Tensor:
        counts = [len(row) for row in tokens]
        positions = slots.begin(range(ROWS), [start] * ROWS, counts)
        batch = Batch.of(tokens, resident.runner.input_device)
        return resident.runner.run(slots.used_by(Forward(batch, edits=edits, logit_rows=last), positions))

    forward(prompts, 0)

    def step() -> None:
        nonlocal length
        forward([[1]] * ROWS, length)
        length += 1

    return step


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _callers(resident: Resident, plain: LlamaForCausalLM, prompts: list[list[int]], repeats: int) -> list[Row]:
    worker = Worker(lambda _: resident, decoding=DecodingLimits(chunk_tokens=ROWS * PROMPT))
    ready = threading.Event()
    worker.start(lambda report: ready.set() if isinstance(report, Loaded) else None)
    ready.wait(60)
    ids = torch.tensor(prompts)
    layers = [range(row % N_LAYERS, row % N_LAYERS + 1) for row in range(ROWS)]
    specs = [
        GenerationSpec(tuple(prompt), (SamplingRules(),), StopRules(NEW), _edits(row, layers[row]))
        for row, prompt in enumerate(prompts)
    ]

    def generate() -> None:
        plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)

    sides = {
        "transformers": generate,
        "together": lambda: _finish(worker, specs),
        "in a row": lambda: [_finish(worker, [spec]) for spec in specs],
    }
    timings = interleaved(sides, max(2, repeats // 2))
    worker.stop(30)
    base = timings["transformers"].fastest
    together, in_a_row = timings["together"].fastest, timings["in a row"].fastest
    return [
        Row(f"`transformers` generate, batch {ROWS}, {NEW} tokens", f"{base:.2f} CPU s"),
        Row(
            f"{ROWS} callers at once, edits of their own",
            f"{together / base:.3f} × transformers",
            "≤ 1.25",
            together / base <= 1.25,
        ),
        Row(
            "the same callers at once",
            f"{together / in_a_row:.3f} × one after the other",
            "≤ 0.35",
            together / in_a_row <= 0.35,
        ),
    ]


def _finish(worker: Worker, specs: list[GenerationSpec]) -> int:
    """Hands over generations and waits for them; how many there were."""
    ended = threading.Semaphore(0)

    def emit(event: GenerationEvent) -> None:
        if isinstance(event, JobFailed):
            raise event.error
        if isinstance(event, JobDone):
            ended.release()

    for spec in specs:
        worker.generate(GenerationJob(next(_job_ids), spec), emit)
    return sum(ended.acquire(timeout=600) for _ in specs)


_job_ids = itertools.count()
