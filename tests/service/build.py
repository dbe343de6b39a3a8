"""Short ways to say requests in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import save

from patchclamp.v1 import (
    generation_pb2,
    hook_point_pb2,
    intervention_pb2,
    logits_pb2,
    prompt_pb2,
    read_pb2,
    run_pb2,
    tensor_pb2,
    vector_pb2,
)


def text(prompt: str) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(text=prompt)


def ids(*token_ids: int) -> prompt_pb2.Prompt:
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=token_ids))


def read(
    site: str = "RESID_POST", *, layer: int | None = None, head: int | None = None, **fields: Any
) -> read_pb2.Read:
    point = hook_point_pb2.HookPoint(site=f"SITE_{site}", layer=layer, head=head)
    return read_pb2.Read(hook_point=point, **fields)


def indices(*positions: int, exclude: tuple[int, ...] = ()) -> hook_point_pb2.Positions:
    return hook_point_pb2.Positions(indices=hook_point_pb2.PositionIndices(indices=positions), exclude=exclude)


def span(name: str, exclude: tuple[int, ...] = ()) -> hook_point_pb2.Positions:
    return hook_point_pb2.Positions(span=f"POSITION_SPAN_{name}", exclude=exclude)


def between(start: int | None = None, stop: int | None = None) -> hook_point_pb2.Positions:
    return hook_point_pb2.Positions(range=hook_point_pb2.PositionRange(start=start, stop=stop))


def top_k(k: int, *, by_magnitude: bool = False) -> read_pb2.Reduction:
    return read_pb2.Reduction(top_k=read_pb2.TopKReduction(k=k, by_magnitude=by_magnitude))


def lens(k: int) -> read_pb2.Reduction:
    return read_pb2.Reduction(logit_lens=read_pb2.LogitLensReduction(k=k))


def project(*onto: vector_pb2.VectorSource) -> read_pb2.Reduction:
    return read_pb2.Reduction(project=read_pb2.ProjectReduction(onto=onto))


def vector(values: Any, dtype: str = "FLOAT32", **fields: Any) -> vector_pb2.VectorSource:
    array = np.asarray(values, "<f8" if dtype == "FLOAT64" else "<f4")
    given = {"dtype": f"DTYPE_{dtype}", "shape": array.shape, "inline": array.tobytes()} | fields
    return vector_pb2.VectorSource(tensor=tensor_pb2.Tensor(**given))


def packed(**arrays: Any) -> vector_pb2.VectorSource:
    return vector_pb2.VectorSource(safetensors=save(arrays))


def unembed(token_id: int) -> vector_pb2.VectorSource:
    return vector_pb2.VectorSource(unembed_token=token_id)


def target(
    site: str = "RESID_POST", *, layer: int | None = None, head: int | None = None, **fields: Any
) -> intervention_pb2.Target:
    point = hook_point_pb2.HookPoint(site=f"SITE_{site}", layer=layer, head=head)
    return intervention_pb2.Target(hook_point=point, **fields)


def edit(**fields: Any) -> intervention_pb2.Intervention:
    """An intervention; the fields of its op as a dictionary."""
    return intervention_pb2.Intervention(**fields)


def run(*reads: read_pb2.Read, **fields: Any) -> run_pb2.RunRequest:
    """A request of one run over five tokens."""
    prompt = fields.pop("prompt", ids(1, 2, 3, 4, 5))
    return run_pb2.RunRequest(runs=[run_pb2.RunSpec(prompt=prompt, reads=reads, **fields)])


def logits(**fields: Any) -> run_pb2.RunRequest:
    return run(logits=logits_pb2.LogitsRequest(**fields))


def chat(*messages: tuple[str, str]) -> prompt_pb2.Prompt:
    said = [prompt_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=said))


def generation(new: int = 6, **fields: Any) -> generation_pb2.GenerateRequest:
    """A request to go on with five tokens; `stop` and `sampling` as dictionaries."""
    fields["stop"] = {"max_new_tokens": new} | fields.get("stop", {})
    given: dict[str, Any] = {"prompt": ids(1, 2, 3, 4, 5)} | fields
    return generation_pb2.GenerateRequest(**given)
