"""A model that is only facts, and a worker that answers without one: tests of the front need no engine.

Its activations are ramps: entry i of a flattened result is i (modulo 64, so that every dtype holds it exactly).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from patchclamp_server.adapters.facts import Dims, ModelFacts
from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.engine.messages import (
    Event,
    GenerationEvent,
    GenerationJob,
    Job,
    JobDone,
    JobFailed,
    Loaded,
    LogitsOutput,
    LogitsSpec,
    ReadOutput,
    ReadSpec,
    Report,
    RunFinished,
    RunOutput,
    RunSpec,
)
from patchclamp_server.errors import Cancelled
from patchclamp_server.hookpoints import AbsentSite, HookPoint, Site, SiteInfo
from patchclamp_server.interventions.receipts import Receipt

NAME = "stub"
DIMS = Dims(n_layers=3, n_heads=4, n_kv_heads=2, d_model=16, d_head=4, d_mlp=24, d_vocab=50, n_ctx=32)
LAYERS = (0, 1, 2)
SITES = (
    SiteInfo(Site.EMBED, (), (("pos", 0), ("d_model", 16))),
    SiteInfo(Site.RESID_POST, LAYERS, (("pos", 0), ("d_model", 16))),
    SiteInfo(Site.ATTN_K, LAYERS, (("pos", 0), ("kv_head", 2), ("d_head", 4))),
    SiteInfo(Site.ATTN_Z, LAYERS, (("pos", 0), ("head", 4), ("d_head", 4))),
    SiteInfo(Site.ATTN_SCORES, LAYERS, (("head", 4), ("query", 0), ("key", 0)), "scores are read only"),
    SiteInfo(Site.ATTN_PATTERN, LAYERS, (("head", 4), ("query", 0), ("key", 0)), "patterns are read only"),
    SiteInfo(Site.MLP_POST, (0, 2), (("pos", 0), ("d_mlp", 24))),
    SiteInfo(Site.LN_FINAL, (), (("pos", 0), ("d_model", 16))),
)
ABSENT = (
    AbsentSite(Site.RESID_MID, (), "its blocks are parallel"),
    AbsentSite(Site.MLP_POST, (1,), "layer 1 has no MLP"),
)
WIDE = (("pos", 0), ("d_model", 16))
# The same model where attention is within reach, as it is where scores and patterns are computed one by one.
EDITABLE_SITES = (
    *(replace(info, read_only_reason="") for info in SITES),
    SiteInfo(Site.ATTN_OUT, LAYERS, WIDE),
    SiteInfo(Site.MLP_OUT, LAYERS, WIDE),
    SiteInfo(Site.LN1_SCALE, LAYERS, (("pos", 0), ("one", 1))),
    SiteInfo(Site.ATTN_RESULT, LAYERS, (("pos", 0), ("head", 4), ("d_model", 16)), "results are computed aside"),
)
FACTS = ModelFacts(NAME, "r1", "StubForCausalLM", DIMS, torch.float32, ("cpu",), 1234, True, SITES, ABSENT)
EDITABLE = replace(FACTS, sites=EDITABLE_SITES)
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}go{% endif %}"


def make_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Words `w0` .. `w49` and a few more; everything else is unknown and takes id 0."""
    words = {f"w{i}": i for i in range(46)} | {"user": 46, "go": 47, "assistant": 48, "hello": 49}
    backend = Backend(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = template
    return Tokenizer(fast)


def ramp(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the stub answers for a shape."""
    return (torch.arange(torch.Size(shape).numel()) % 64).to(dtype).reshape(*shape)


class StubWorker:
    """Answers every run with ramps. `hold` keeps jobs unanswered until `release`; `fail` says what goes wrong."""

    def __init__(self, tokenizer: Tokenizer | None = None, *, loads: bool = True, hold: bool = False) -> None:
        self.tokenizer = tokenizer
        self.jobs: dict[int, Job] = {}
        self.generations: dict[int, GenerationJob] = {}
        self.cancelled: list[int] = []
        self.paused: list[tuple[int, bool]] = []
        self.seen = threading.Event()
        self.stopped = False
        self.scale = 1
        self.answer: Callable[[Job, RunSpec, int], Event] | None = None
        self._emits: dict[int, Callable[[Any], None]] = {}
        self._hold = hold
        self._loads = loads
        self._report: Callable[[Report], None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._emits)

    def start(self, report: Callable[[Report], None]) -> None:
        self._report = report
        if self._loads:
            report(Loaded(FACTS, self.tokenizer))

    def report(self, report: Report) -> None:
        assert self._report is not None
        self._report(report)

    def submit(self, job: Job, emit: Callable[[Event], None]) -> None:
        self.jobs[job.job_id] = job
        self._emits[job.job_id] = emit
        self.seen.set()
        if not self._hold:
            threading.Thread(target=self._answer, args=(job.job_id,)).start()

    def generate(self, job: GenerationJob, emit: Callable[[GenerationEvent], None]) -> None:
        """Takes a generation; the test says what comes of it."""
        self.generations[job.job_id] = job
        self._emits[job.job_id] = emit
        self.seen.set()

    def pause(self, job_id: int, *, paused: bool) -> None:
        self.paused.append((job_id, paused))

    def tell(self, job_id: int, *events: GenerationEvent) -> None:
        """What comes of a generation."""
        for event in events:
            self._emits[job_id](event)
            if isinstance(event, JobDone | JobFailed):
                del self._emits[job_id]

    def cancel(self, job_id: int) -> None:
        self.cancelled.append(job_id)
        emit = self._emits.pop(job_id, None)
        if emit is not None:
            emit(JobFailed(job_id, Cancelled("cancelled by the caller")))

    def stop(self, timeout: float) -> None:
        self.stopped = True

    def release(self) -> None:
        """Answers what was held back."""
        for job_id in list(self._emits):
            self._answer(job_id)

    def answer_first_run(self, job_id: int) -> None:
        """Answers one run of a job that is held back; the job goes on."""
        self._emits[job_id](RunFinished(job_id, 0, self.output(self.jobs[job_id].runs[0])))

    def _answer(self, job_id: int) -> None:
        job, emit = self.jobs[job_id], self._emits.pop(job_id)
        for index, run in enumerate(job.runs):
            if self.answer is not None:
                emit(self.answer(job, run, index))
            else:
                emit(RunFinished(job_id, index, self.output(run)))
        emit(JobDone(job_id, 0.25, 0.5, "stub-1"))

    def output(self, run: RunSpec) -> RunOutput:
        length = len(run.token_ids)
        return RunOutput(
            tuple(output for index, read in enumerate(run.reads) for output in self._read(read, index, length)),
            None if run.logits is None else _logits(run.logits, length),
            ramp((length - 1,)) if run.loss else None,
            tuple(Receipt(index, 5, 4, 3, 0.5, 0.75, 2) for index in range(len(run.interventions))),
            _logits(run.logits, length) if run.logits is not None and run.baseline else None,
        )

    def _read(self, read: ReadSpec, index: int, length: int) -> list[ReadOutput]:
        positions = read.positions.resolve(length)
        known = {"pos": len(positions), "query": len(positions), "key": length}
        shape = [known.get(name, size) for name, size in FACTS.site_info[read.site].axes]
        shape[-1] *= self.scale
        values = ramp(shape, read.dtype)
        return [ReadOutput(index, HookPoint(read.site, layer), values, None, positions) for layer in read.layers]


def _logits(spec: LogitsSpec, length: int) -> LogitsOutput:
    positions = spec.positions.resolve(length)
    rows, k = len(positions), spec.top_k
    return LogitsOutput(
        positions,
        ramp((rows, DIMS.d_vocab), spec.dtype) if spec.values else None,
        torch.arange(k).expand(rows, k) if k else None,
        -ramp((rows, k)) if k else None,
        ramp((rows, k)) if k else None,
        -ramp((rows, len(spec.logprob_tokens))) if spec.logprob_tokens else None,
    )
