"""Run requests as runs for the worker: complete, valid, within the limits, or an error that names all that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from patchclamp.v1 import generation_pb2, logits_pb2, model_pb2, numerics_pb2, run_pb2
from patchclamp_server.adapters.tokenizer import Tokens
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import Loaded, LogitsSpec, ReadSpec, RunSpec
from patchclamp_server.errors import NotServed, TooLarge
from patchclamp_server.hookpoints import Site
from patchclamp_server.interventions.expansion import expanded, hook_points
from patchclamp_server.interventions.ops import Intervention
from patchclamp_server.interventions.sources import required_sources
from patchclamp_server.service.interventions import InterventionParser
from patchclamp_server.service.prompts import PromptParser
from patchclamp_server.service.reads import ReadParser
from patchclamp_server.service.selection import LAST_ROW, Extent, Selection, parse_positions
from patchclamp_server.service.sources import held_bytes
from patchclamp_server.service.tensors import RESULT_DTYPES
from patchclamp_server.service.violations import Violations

MOST_LOGPROB_TOKENS = 4096
# The most probable tokens come one by one, with their text, inside the result: this many stay below 4 MiB.
MOST_TOP_TOKENS = 65_536
# Likewise positions that are not consecutive, three bytes each, in every layer anew.
MOST_LISTED_POSITIONS = 262_144
_TOP_TOKEN_BYTES = 24
ATTENTION = (Site.ATTN_SCORES, Site.ATTN_PATTERN)


@dataclass(frozen=True, eq=False)
class ParsedRequest:
    """The runs of a request, with the tokens of each prompt, and the bytes of all that they return."""

    runs: tuple[RunSpec, ...]
    tokens: tuple[Tokens, ...]
    solo: bool
    result_bytes: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(run.token_ids) for run in self.runs)


def parse_run_request(request: run_pb2.RunRequest, loaded: Loaded, config: ServerConfig) -> ParsedRequest:
    """The runs to submit. Raises InvalidArgument, TooLarge, NotServed or FailedPrecondition."""
    found = Violations()
    _check_count(len(request.runs), "runs", config, found)
    solo = parse_numerics(request.numerics, found)
    parser = RunParser(loaded, config, found)
    runs = [parser.parse(wire, f"runs[{index}]") for index, wire in enumerate(request.runs)]
    edits = parser.parse_edits(request.runs, runs)
    found.raise_any()
    specs = parser.edited([spec for spec in runs if spec is not None], edits)
    parser.raise_excess()
    return ParsedRequest(specs, tuple(parser.tokens), solo, parser.result_bytes)


def parse_tokenize_request(request: model_pb2.TokenizeRequest, loaded: Loaded, config: ServerConfig) -> list[Tokens]:
    """The tokens of every prompt. Raises like `parse_run_request`."""
    found = Violations()
    _check_count(len(request.prompts), "prompts", config, found)
    meter, parser = TokenMeter(config.max_tokens), PromptParser(loaded, config.max_prompt_characters, found)
    prompts = (parser.parse(wire, f"prompts[{i}]") for i, wire in enumerate(request.prompts))
    valid = [meter.take(tokens) for tokens in prompts if tokens is not None]
    found.raise_any()
    return valid


def _check_count(count: int, what: str, config: ServerConfig, found: Violations) -> None:
    if count > config.max_runs:
        raise TooLarge(f"{what} of one request", limit=config.max_runs, demand=count)
    if not count:
        found.add(what, "at least one is needed")


def parse_numerics(wire: int, found: Violations) -> bool:
    """Whether batches of one are asked for."""
    if wire == numerics_pb2.NUMERICS_DETERMINISTIC:
        raise NotServed("numerics.deterministic")
    if wire not in numerics_pb2.Numerics.values():
        found.add("numerics", f"{wire} is not a level: DEFAULT or SOLO")
    return wire == numerics_pb2.NUMERICS_SOLO


class TokenMeter:
    """Adds up the tokens of one request as they become known: the rest of a request too large is not read."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def take(self, tokens: Tokens) -> Tokens:
        self._taken += len(tokens.ids)
        if self._taken > self._most:
            raise TooLarge("prompt tokens of one request", limit=self._most, demand=self._taken)
        return tokens


class RunParser:
    """Turns the runs of one request into specs; notes what is wrong, and adds up what they cost."""

    def __init__(self, loaded: Loaded, config: ServerConfig, found: Violations) -> None:
        self.tokens: list[Tokens] = []
        self.result_bytes = 0
        self._meter = TokenMeter(config.max_tokens)
        self._loaded = loaded
        self._config = config
        self._found = found
        self._excess: TooLarge | None = None
        self._prompts = PromptParser(loaded, config.max_prompt_characters, found)
        self._reads = ReadParser(loaded.facts, found)

    def raise_excess(self) -> None:
        """Raises TooLarge for the first limit that the request exceeds: asked only once all its fields are valid,
        because an invalid one can make any demand."""
        self._cap("bytes of reads and logits", self._config.max_result_bytes, self.result_bytes)
        if self._excess is not None:
            raise self._excess

    def parse(self, wire: run_pb2.RunSpec, path: str) -> RunSpec | None:
        """One run; None when its prompt is invalid."""
        refuse_unserved(wire)
        most = self._config.max_interventions
        if len(wire.interventions) > most:
            raise TooLarge("interventions of one run", limit=most, demand=len(wire.interventions))
        tokens = self._prompts.parse(wire.prompt, f"{path}.prompt")
        if tokens is not None:
            self.tokens.append(self._meter.take(tokens))
        length = None if tokens is None else len(tokens.ids)
        reads = self._parse_reads(wire, path, length)
        logits = self._parse_logits(wire, f"{path}.logits", length) if wire.HasField("logits") else None
        if wire.baseline and not (wire.HasField("logits") and wire.interventions):
            text = "it gives the run's logits without its interventions: ask for logits, and give an intervention"
            self._found.add(f"{path}.baseline", text)
        if tokens is None:
            return None
        self.result_bytes += 4 * (len(tokens.ids) - 1) if wire.loss else 0
        return RunSpec(tokens.ids, reads, logits, wire.loss, baseline=wire.baseline)

    def parse_edits(
        self, wires: Sequence[run_pb2.RunSpec], runs: Sequence[RunSpec | None]
    ) -> list[tuple[Intervention, ...]]:
        """The interventions of every run, for use only if nothing was noted. They may take from any run, so all of
        these come first."""
        extents = [None if run is None else Extent(len(run.token_ids)) for run in runs]
        parser = InterventionParser(self._loaded.facts, extents, self._found)
        edits = [parser.parse(wire.interventions, f"runs[{run}].interventions", run) for run, wire in enumerate(wires)]
        parser.refuse_cycles()
        return edits

    def edited(self, runs: Sequence[RunSpec], edits: Sequence[tuple[Intervention, ...]]) -> tuple[RunSpec, ...]:
        """The runs with their interventions, and what these cost."""
        sites = self._loaded.facts.site_info
        taken = [required_sources(edit, sites) for edit in edits]
        lengths = [len(run.token_ids) for run in runs]
        held = held_bytes(frozenset().union(*taken), lengths, self._loaded.facts)
        self._cap("bytes of values that runs take from one another", self._config.max_result_bytes, held)
        for edit, length in zip(edits, lengths, strict=True):
            written = (point for one in edit for op in expanded(one.op, sites) for point in hook_points(op))
            if any(point.site in ATTENTION for point in written):
                self._cap_attention(length)
        return tuple(
            replace(run, interventions=edit, sources=sources)
            for run, edit, sources in zip(runs, edits, taken, strict=True)
        )

    def _parse_reads(self, wire: run_pb2.RunSpec, path: str, length: int | None) -> tuple[ReadSpec, ...]:
        if len(wire.reads) > self._config.max_reads:
            raise TooLarge("reads of one run", limit=self._config.max_reads, demand=len(wire.reads))
        extent = None if length is None else Extent(length)
        reads = (self._reads.parse(read, f"{path}.reads[{i}]", extent) for i, read in enumerate(wire.reads))
        valid = [read for read in reads if read is not None]
        self.result_bytes += sum(read.result_bytes for read in valid)
        listed = sum(read.listed_positions for read in valid)
        self._cap("listed positions of one run's reads", MOST_LISTED_POSITIONS, listed)
        if length is not None and any(read.spec.site in ATTENTION for read in valid):
            self._cap_attention(length)
        return tuple(read.spec for read in valid)

    def _cap_attention(self, length: int) -> None:
        """Scores and patterns are computed whole, side by side, in float32, however little of them is read."""
        demand = 2 * 4 * self._loaded.facts.dims.n_heads * length**2
        self._cap("bytes of attention scores of one run", self._config.max_result_bytes, demand)

    def _cap(self, what: str, limit: int, demand: int) -> None:
        if demand > limit and self._excess is None:
            self._excess = TooLarge(what, limit=limit, demand=demand)

    def _parse_logits(self, run: run_pb2.RunSpec, path: str, length: int | None) -> LogitsSpec | None:
        wire, copies = run.logits, 2 if run.baseline else 1
        dtype = RESULT_DTYPES.get(wire.dtype)
        if dtype is None:
            self._found.add(f"{path}.dtype", "must be float32, bfloat16 or float16")
        self._check_tokens(wire, path)
        selection = LAST_ROW if not wire.HasField("positions") else self._rows(wire, f"{path}.positions", length)
        if selection is None or dtype is None:
            return None
        rows = copies * selection.rows
        self._cap("most probable tokens of one run", MOST_TOP_TOKENS, rows * wire.top_k)
        row_bytes = self._loaded.facts.dims.d_vocab * dtype.itemsize if wire.values else 0
        row_bytes += wire.top_k * _TOP_TOKEN_BYTES + 4 * len(wire.logprob_tokens)
        self.result_bytes += rows * row_bytes
        return LogitsSpec(selection.positions, wire.values, dtype, wire.top_k, tuple(wire.logprob_tokens))

    def _rows(self, wire: logits_pb2.LogitsRequest, path: str, length: int | None) -> Selection | None:
        return None if length is None else parse_positions(wire.positions, path, Extent(length), self._found)

    def _check_tokens(self, wire: logits_pb2.LogitsRequest, path: str) -> None:
        d_vocab = self._loaded.facts.dims.d_vocab
        if not (wire.values or wire.top_k or wire.logprob_tokens):
            self._found.add(path, "asks for nothing: set values, top_k or logprob_tokens")
        if wire.top_k > d_vocab:
            self._found.add(f"{path}.top_k", f"{wire.top_k} is not 0 .. {d_vocab}, the vocabulary")
        if len(wire.logprob_tokens) > MOST_LOGPROB_TOKENS:
            text = f"at most {MOST_LOGPROB_TOKENS} tokens, there are {len(wire.logprob_tokens)}"
            self._found.add(f"{path}.logprob_tokens", text)
            return
        for index, token_id in enumerate(wire.logprob_tokens):
            if token_id >= d_vocab:
                text = f"token {token_id} is not in the vocabulary: 0 .. {d_vocab - 1}"
                self._found.add(f"{path}.logprob_tokens[{index}]", text)


def refuse_unserved(wire: run_pb2.RunSpec | generation_pb2.GenerateRequest) -> None:
    """Parts of the contract that this version does not serve are never ignored."""
    if wire.keep:
        raise NotServed("keep")
    if wire.profile not in ("", "none"):
        raise NotServed("profile")
