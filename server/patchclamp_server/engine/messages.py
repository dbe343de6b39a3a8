"""Messages between the front and the worker: plain, frozen values, so that the worker may be a thread or a process.

The front submits a Job and may cancel it; the worker answers with events. Input is complete and valid when it gets
here: names are resolved, hook points exist, positions and heads are inside their ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.engine.sampling import SamplingRules
from patchclamp_server.errors import Error
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import Intervention, UnembedRow
from patchclamp_server.interventions.receipts import Receipt
from patchclamp_server.positions import LAST, Positions


@dataclass(frozen=True)
class LastRow:
    """Keeps the last selected position; drops the position axis."""


@dataclass(frozen=True)
class Mean:
    """Mean over the selected positions, in float32; drops the position axis."""


@dataclass(frozen=True)
class Norm:
    """Euclidean norm over the last axis, which is dropped."""


@dataclass(frozen=True)
class Moments:
    """Mean and population variance over the selected positions, stacked on a new first axis. [2, ..]"""


@dataclass(frozen=True)
class TopK:
    """The k largest entries along the last axis, by value or by magnitude."""

    k: int
    by_magnitude: bool = False


@dataclass(frozen=True, eq=False)
class Project:
    """Dot products with vectors, in the order of the result's last axis: float32 `[n, width]` stacks, or rows that
    only the worker holds."""

    onto: tuple[torch.Tensor | UnembedRow, ...]


@dataclass(frozen=True)
class LogitLens:
    """The k most probable tokens that a row of the residual stream predicts through final norm and unembedding."""

    k: int


Reduction = LastRow | Mean | Norm | Moments | TopK | Project | LogitLens


@dataclass(frozen=True, eq=False)
class ReadSpec:
    """One activation to return, in one or several layers.

    `layers` is (None,) for a site outside the blocks. `heads` is None for all. `dtype` is the element type of the
    result; indices are always int32.
    """

    site: Site
    layers: tuple[int | None, ...]
    positions: Positions = Positions()
    heads: tuple[int, ...] | None = None
    reduction: Reduction | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class LogitsSpec:
    """Which rows of the logits are computed, and what is returned of them."""

    positions: Positions = LAST
    values: bool = True
    dtype: torch.dtype = torch.float32
    top_k: int = 0
    logprob_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One run: its tokens, what it returns, and the edits that it carries, in order.

    `loss` asks for the loss of every token given those before it. `sources` are the values of other runs of the job,
    by run and hook point, that the edits take from; no run waits for itself, directly or through others. `baseline`
    asks for the logits that the run has without its edits, too.
    """

    token_ids: tuple[int, ...]
    reads: tuple[ReadSpec, ...] = ()
    logits: LogitsSpec | None = None
    loss: bool = False
    interventions: tuple[Intervention, ...] = ()
    sources: frozenset[tuple[int, HookPoint]] = frozenset()
    baseline: bool = False


@dataclass(frozen=True)
class StopRules:
    """When a sample ends: after so many tokens, or with a token or text of these, which is not part of its text."""

    max_new_tokens: int
    token_ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class GenerationSpec:
    """A prompt that is gone on with, by samples that each choose their own way.

    The edits and reads count positions over prompt and generated tokens. `received` are tokens that the caller has from
    a stream that broke, for each sample: they are taken as generated, and what follows goes on behind them.
    """

    prompt: tuple[int, ...]
    sampling: tuple[SamplingRules, ...]
    stop: StopRules
    interventions: tuple[Intervention, ...] = ()
    reads: tuple[ReadSpec, ...] = ()
    top_logprobs: int = 0
    received: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class GenerationJob:
    """A request to generate. `deadline` is on time.monotonic's clock. `solo` asks for batches of one."""

    job_id: int
    spec: GenerationSpec
    deadline: float | None = None
    solo: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """A request: runs that may share batches with those of other jobs.

    `deadline` is on time.monotonic's clock. `solo` asks for batches of one at exact lengths.
    """

    job_id: int
    runs: tuple[RunSpec, ...]
    deadline: float | None = None
    solo: bool = False


@dataclass(frozen=True, eq=False)
class ReadOutput:
    """What one read gave in one layer, on the host, in the dtype asked for. Values that are one row repeated may be an
    expanded view of it."""

    read_index: int
    hook_point: HookPoint
    values: torch.Tensor
    indices: torch.Tensor | None
    positions: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LogitsOutput:
    """Logits of the rows at `positions`: [rows, d_vocab] values; top-k ids, log-probabilities and logits [rows, k];
    log-probabilities [rows, n] of the tokens asked for. None where not asked for."""

    positions: tuple[int, ...]
    values: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_logits: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RunOutput:
    """What one run gave: reads in request order, layers ascending; `loss` is float32 [pos - 1]; a receipt for each
    intervention."""

    reads: tuple[ReadOutput, ...] = ()
    logits: LogitsOutput | None = None
    loss: torch.Tensor | None = None
    receipts: tuple[Receipt, ...] = ()
    baseline: LogitsOutput | None = None


@dataclass(frozen=True, eq=False)
class RunFinished:
    """One run of a job is done."""

    job_id: int
    run_index: int
    output: RunOutput


@dataclass(frozen=True, eq=False)
class RunFailed:
    """One run failed; the others of its job go on."""

    job_id: int
    run_index: int
    error: Error


class Finish(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"


@dataclass(frozen=True, eq=False)
class TokenGenerated:
    """One more token of a sample. `text` is what became certain with it. Log-probabilities are those of the model,
    before sampling changed the distribution; `top_ids` and `top_logprobs` are the most probable tokens, [k]."""

    job_id: int
    sample: int
    index: int
    token_id: int
    text: str
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    reads: tuple[ReadOutput, ...] = ()


@dataclass(frozen=True, eq=False)
class SampleEnded:
    """A sample is done; `text` is what was still held back. Receipts are over prompt and generated tokens."""

    job_id: int
    sample: int
    finish: Finish
    text: str
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, eq=False)
class SampleFailed:
    """One sample failed; the others of its job go on."""

    job_id: int
    sample: int
    error: Error


@dataclass(frozen=True)
class JobDone:
    """Every run of a job was answered. Seconds on the wall clock."""

    job_id: int
    queue_seconds: float
    engine_seconds: float
    fingerprint: str


@dataclass(frozen=True, eq=False)
class JobFailed:
    """The job as a whole ended early: cancelled, past its deadline, or the engine failed."""

    job_id: int
    error: Error


Event = RunFinished | RunFailed | JobDone | JobFailed
"""What is said of a job of runs."""

GenerationEvent = TokenGenerated | SampleEnded | SampleFailed | JobDone | JobFailed
"""What is said of a generation."""


@dataclass(frozen=True)
class Progress:
    """How far loading has come: a stage in words, and its share done (0 .. 1)."""

    stage: str
    share: float


@dataclass(frozen=True, eq=False)
class Loaded:
    """The model is resident and its adapter proved: what requests are checked against."""

    facts: ModelFacts
    tokenizer: Tokenizer | None


@dataclass(frozen=True, eq=False)
class EngineFailed:
    """Loading failed, or the worker cannot go on; nothing more will run."""

    error: BaseException


Report = Progress | Loaded | EngineFailed
