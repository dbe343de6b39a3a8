"""Going on with a broken stream: what was received of each sample, and which samples had ended already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp.v1 import generation_pb2
from patchclamp_server.engine.continuation import Continuation
from patchclamp_server.engine.messages import Finish, Loaded, StopRules
from patchclamp_server.service.violations import Violations


@dataclass(frozen=True)
class Resumed:
    """The tokens of one sample that its caller has; `finish` when there are no more to come."""

    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None


def parse_resume(
    request: generation_pb2.GenerateRequest,
    prompt: Sequence[int],
    stop: StopRules,
    samples: int,
    loaded: Loaded,
    found: Violations,
) -> tuple[Resumed, ...]:
    """What each sample begins with, for use only if nothing was noted."""
    begun = [Resumed()] * samples
    named: set[int] = set()
    # Without a prompt and a valid number of tokens it is not known where a sample ends.
    known = bool(prompt) and not found.names("stop") and not found.names("sampling.samples")
    for place, wire in enumerate(request.resume.received):
        path = f"resume.received[{place}]"
        if wire.sample_index in named:
            found.add(f"{path}.sample_index", f"no duplicates: sample {wire.sample_index} is there more than once")
        named.add(wire.sample_index)
        if wire.sample_index >= samples and not found.names("sampling.samples"):
            found.add(
                f"{path}.sample_index", f"{wire.sample_index} is not a sample of this request: 0 .. {samples - 1}"
            )
        elif _are_tokens(wire.token_ids, f"{path}.token_ids", loaded, found) and known:
            begun[wire.sample_index] = _begun(wire.token_ids, f"{path}.token_ids", prompt, stop, loaded, found)
    if begun and all(one.finish is not None for one in begun):
        found.add("resume.received", "every sample had ended already: there is nothing to go on with")
    return tuple(begun)


def _are_tokens(token_ids: Sequence[int], path: str, loaded: Loaded, found: Violations) -> bool:
    d_vocab, valid = loaded.facts.dims.d_vocab, True
    for index, token_id in enumerate(token_ids):
        if token_id >= d_vocab:
            found.add(f"{path}[{index}]", f"token {token_id} is not in the vocabulary: 0 .. {d_vocab - 1}")
            valid = False
    return valid


def _begun(
    token_ids: Sequence[int], path: str, prompt: Sequence[int], stop: StopRules, loaded: Loaded, found: Violations
) -> Resumed:
    """A sample with its first tokens. Nothing comes after its end."""
    n_ctx, tokenizer = loaded.facts.dims.n_ctx, loaded.tokenizer
    room = n_ctx - len(prompt) if n_ctx else stop.max_new_tokens
    decode = (lambda ids: "") if tokenizer is None else tokenizer.decode
    sample = Continuation(tuple(prompt), stop, room, decode)
    for index, token_id in enumerate(token_ids):
        if sample.finish is not None:
            found.add(f"{path}[{index}]", f"the sample had ended with the {index} tokens before: {sample.finish}")
            break
        sample.append(token_id)
    return Resumed(tuple(token_ids), sample.finish)
