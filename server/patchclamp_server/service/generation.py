"""Requests to generate as jobs for the worker: complete, valid, within the limits, or an error that names all that is
wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp.v1 import generation_pb2
from patchclamp_server.adapters.tokenizer import Tokens
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import GenerationSpec, Loaded, ReadSpec, StopRules
from patchclamp_server.errors import FailedPrecondition, TooLarge
from patchclamp_server.interventions.expansion import expanded, hook_points
from patchclamp_server.interventions.ops import Intervention
from patchclamp_server.service.interventions import InterventionParser
from patchclamp_server.service.parse import (
    ATTENTION,
    MOST_LISTED_POSITIONS,
    TokenMeter,
    parse_numerics,
    refuse_unserved,
)
from patchclamp_server.service.prompts import PromptParser
from patchclamp_server.service.reads import PricedRead, ReadParser, result_bytes
from patchclamp_server.service.resumption import Resumed, parse_resume
from patchclamp_server.service.sampling import parse_sampling, parse_stop
from patchclamp_server.service.selection import Extent
from patchclamp_server.service.violations import Violations

MOST_TOP_LOGPROBS = 20
# Messages of one sample that may wait for a slow caller.
BACKLOG = 256


@dataclass(frozen=True, eq=False)
class ParsedGeneration:
    """A generation, with the tokens of its prompt.

    `numbers` are the request's numbers of the spec's samples: those that had ended before a stream broke are not
    generated again. `result_bytes` is what waits at most for a slow caller, in `backlog` messages.
    """

    spec: GenerationSpec
    tokens: Tokens
    seed: int
    solo: bool
    resumed: tuple[Resumed, ...]
    numbers: tuple[int, ...]
    result_bytes: int
    backlog: int


def parse_generate_request(
    request: generation_pb2.GenerateRequest, loaded: Loaded, config: ServerConfig
) -> ParsedGeneration:
    """The generation to submit. Raises InvalidArgument, TooLarge, NotServed or FailedPrecondition."""
    refuse_unserved(request)
    _cap_counts(request, config)
    found = Violations()
    solo = parse_numerics(request.numerics, found)
    tokens = PromptParser(loaded, config.max_prompt_characters, found).parse(request.prompt, "prompt")
    if tokens is not None:
        TokenMeter(config.max_tokens).take(tokens)
    rules = parse_sampling(request, loaded, config, found)
    stop = parse_stop(request.stop, loaded, config, found)
    most = request.top_logprobs
    if most > min(MOST_TOP_LOGPROBS, loaded.facts.dims.d_vocab):
        found.add("top_logprobs", f"{most} is not 0 .. {min(MOST_TOP_LOGPROBS, loaded.facts.dims.d_vocab)}")
    extent = None if tokens is None else _extent(tokens, stop, found)
    edits = InterventionParser(loaded.facts, [extent], found, alone=True).parse(
        request.interventions, "interventions", 0
    )
    reader = ReadParser(loaded.facts, found)
    reads = [reader.parse(read, f"reads[{index}]", extent) for index, read in enumerate(request.reads)]
    valid = [read for read in reads if read is not None]
    prompt = () if tokens is None else tokens.ids
    resumed = parse_resume(request, prompt, stop, len(rules), loaded, found)
    found.raise_any()
    assert tokens is not None and extent is not None
    if not extent.generated:
        _refuse_edits_of_nothing(edits, extent.prompt)
    numbers = tuple(number for number, one in enumerate(resumed) if one.finish is None)
    spec = GenerationSpec(
        tokens.ids,
        tuple(rules[number] for number in numbers),
        stop,
        edits,
        tuple(read.spec for read in valid),
        request.top_logprobs,
        tuple(resumed[number].token_ids for number in numbers),
    )
    held = _Price(loaded, config, extent, stop).held_bytes(spec, valid)
    return ParsedGeneration(spec, tokens, rules[0].seed, solo, resumed, numbers, held, BACKLOG * len(numbers))


def _cap_counts(request: generation_pb2.GenerateRequest, config: ServerConfig) -> None:
    if len(request.reads) > config.max_reads:
        raise TooLarge("reads of one generation", limit=config.max_reads, demand=len(request.reads))
    if len(request.interventions) > config.max_interventions:
        count = len(request.interventions)
        raise TooLarge("interventions of one generation", limit=config.max_interventions, demand=count)


def _extent(tokens: Tokens, stop: StopRules, found: Violations) -> Extent | None:
    """Where positions may lie: no forward sees the last token. None while it is not known how many there are."""
    return None if found.names("stop.max_new_tokens") else Extent(len(tokens.ids), stop.max_new_tokens - 1)


def _refuse_edits_of_nothing(edits: Sequence[Intervention], prompt: int) -> None:
    """Raises FailedPrecondition for an edit that would select a row if a second token were generated."""
    for index, edit in enumerate(edits):
        if not edit.allow_never_fired and not edit.positions.resolve(prompt) and edit.positions.resolve(prompt, 1):
            text = "max_new_tokens=1 leaves no generated token for a forward to see"
            raise FailedPrecondition(
                f"interventions[{index}] selects no row: {text}",
                reason="INTERVENTION_NEVER_FIRED",
                metadata={"intervention": str(index)},
            )


@dataclass(frozen=True)
class _Cost:
    """Bytes of one read with the first token and with a later one, and how many later ones have any: what is reduced
    over positions is reduced for each token."""

    first: int
    each: int
    later: int


class _Price:
    """What a generation costs, whose fields are all valid. Raises TooLarge for what never fits."""

    def __init__(self, loaded: Loaded, config: ServerConfig, extent: Extent, stop: StopRules) -> None:
        self._facts = loaded.facts
        self._config = config
        self._extent = extent
        room = self._facts.dims.n_ctx or extent.length + 1
        self._longest = min(extent.prompt + stop.max_new_tokens, room)

    def held_bytes(self, spec: GenerationSpec, reads: list[PricedRead]) -> int:
        """Bytes of reads that wait at most until they are sent."""
        samples = len(spec.sampling)
        self._cap("bytes of keys and values of one generation", self._config.kv_bytes, samples * self._kv_bytes())
        listed = sum(read.listed_positions for read in reads)
        self._cap("listed positions of one generation's reads", MOST_LISTED_POSITIONS, listed)
        if self._computes_attention(spec):
            rows = min(self._config.chunk_tokens, self._extent.prompt)
            demand = 2 * 4 * self._facts.dims.n_heads * rows * self._longest
            self._cap("bytes of attention scores of one forward", self._config.max_result_bytes, demand)
        received = max(map(len, spec.received), default=0)
        costs = [self._read_bytes(read.spec, self._extent.prompt + received) for read in reads]
        first = sum(cost.first for cost in costs)
        everything = first + sum(cost.each * cost.later for cost in costs)
        self._cap("bytes of reads", self._config.max_result_bytes, samples * everything)
        return samples * min(everything, first + BACKLOG * sum(cost.each for cost in costs))

    def _kv_bytes(self) -> int:
        dims = self._facts.dims
        return self._longest * 2 * dims.n_layers * dims.n_kv_heads * dims.d_head * self._facts.dtype.itemsize

    def _computes_attention(self, spec: GenerationSpec) -> bool:
        sites = self._facts.site_info
        written = (point for edit in spec.interventions for op in expanded(edit.op, sites) for point in hook_points(op))
        return any(point.site in ATTENTION for point in written) or any(read.site in ATTENTION for read in spec.reads)

    def _read_bytes(self, read: ReadSpec, seen: int) -> _Cost:
        info, length = self._facts.site_info[read.site], self._extent.length
        positions = read.positions.resolve(self._extent.prompt, self._extent.generated)
        first = sum(position < seen for position in positions)
        each = result_bytes(read, info, 1, length)
        return _Cost(result_bytes(read, info, first, length) if first else 0, each, len(positions) - first)

    def _cap(self, what: str, limit: int, demand: int) -> None:
        if demand > limit:
            raise TooLarge(what, limit=limit, demand=demand)
