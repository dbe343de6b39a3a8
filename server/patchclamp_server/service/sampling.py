"""How tokens are chosen and when a sample ends, as a request asks for it."""

from __future__ import annotations

import math
import secrets

from patchclamp.v1 import generation_pb2
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import Loaded, StopRules
from patchclamp_server.engine.sampling import SamplingRules
from patchclamp_server.service.violations import Violations

MOST_STOP_TEXTS = 16
MOST_STOP_CHARACTERS = 256
_MOST_TEMPERATURE = 100.0


def parse_sampling(
    request: generation_pb2.GenerateRequest, loaded: Loaded, config: ServerConfig, found: Violations
) -> tuple[SamplingRules, ...]:
    """The rules of every sample, for use only if nothing was noted."""
    wire, path = request.sampling, "sampling"
    d_vocab = loaded.facts.dims.d_vocab
    top_p = wire.top_p if wire.HasField("top_p") else 1.0
    penalty = wire.repetition_penalty if wire.HasField("repetition_penalty") else 1.0
    samples = wire.samples or 1
    if not 0 <= wire.temperature <= _MOST_TEMPERATURE:
        found.add(f"{path}.temperature", f"must be 0 .. {_MOST_TEMPERATURE:g}, not {wire.temperature}")
    if wire.top_k > d_vocab:
        found.add(f"{path}.top_k", f"{wire.top_k} is not 0 .. {d_vocab}, the vocabulary")
    if not 0 < top_p <= 1:
        found.add(f"{path}.top_p", f"must be greater than 0 and at most 1, not {top_p}")
    if not (math.isfinite(penalty) and penalty > 0):
        found.add(f"{path}.repetition_penalty", f"must be finite and greater than 0, not {penalty}")
    if samples > config.max_samples:
        found.add(f"{path}.samples", f"{samples} is not 1 .. {config.max_samples}, which this server allows")
        samples = 1
    seed = _seed(request, found)
    return tuple(SamplingRules(wire.temperature, wire.top_k, top_p, penalty, seed, sample) for sample in range(samples))


def _seed(request: generation_pb2.GenerateRequest, found: Violations) -> int:
    """The seed given, else a new one: never 0, so that a seed left out of a resumption is told from one given."""
    wire = request.sampling
    given = wire.seed if wire.HasField("seed") else None
    if not request.HasField("resume"):
        return 1 + secrets.randbelow(2**63 - 1) if given is None else given
    if not request.resume.seed and given != 0:
        found.add("resume.seed", "the seed that the broken stream reported is needed")
    elif given is not None and given != request.resume.seed:
        found.add("resume.seed", f"{request.resume.seed} is not the seed of this request, {given}")
    return request.resume.seed


def parse_stop(wire: generation_pb2.StopRules, loaded: Loaded, config: ServerConfig, found: Violations) -> StopRules:
    """When samples end, for use only if nothing was noted."""
    path, most = "stop", config.max_new_tokens
    if not 1 <= wire.max_new_tokens <= most:
        text = f"{wire.max_new_tokens} is not 1 .. {most}, which this server allows"
        found.add(f"{path}.max_new_tokens", text)
    _check_texts(wire, f"{path}.texts", loaded, found)
    d_vocab = loaded.facts.dims.d_vocab
    for index, token_id in enumerate(wire.token_ids):
        if token_id >= d_vocab:
            text = f"token {token_id} is not in the vocabulary: 0 .. {d_vocab - 1}"
            found.add(f"{path}.token_ids[{index}]", text)
    ends = frozenset[int]() if wire.ignore_eos else _end_ids(loaded)
    return StopRules(wire.max_new_tokens, ends.union(wire.token_ids), tuple(wire.texts))


def _end_ids(loaded: Loaded) -> frozenset[int]:
    """The tokens that end a text, by the model's settings and by its tokenizer."""
    return loaded.facts.end_ids | (loaded.tokenizer.end_ids if loaded.tokenizer is not None else frozenset())


def _check_texts(wire: generation_pb2.StopRules, path: str, loaded: Loaded, found: Violations) -> None:
    if wire.texts and loaded.tokenizer is None:
        found.add(path, "this model came without a tokenizer: stop at token ids")
    if len(wire.texts) > MOST_STOP_TEXTS:
        found.add(path, f"at most {MOST_STOP_TEXTS} texts, there are {len(wire.texts)}")
        return
    for index, text in enumerate(wire.texts):
        if not 1 <= len(text) <= MOST_STOP_CHARACTERS:
            found.add(f"{path}[{index}]", f"must have 1 .. {MOST_STOP_CHARACTERS} characters, it has {len(text)}")
