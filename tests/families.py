"""One tiny, seeded checkpoint per model family, built from its configuration alone: nothing is downloaded.

`FAMILIES` lists them, `build(family)` makes the plain `transformers` model (float32, eval mode, eager attention) and
`prompt_ids(family)` gives two prompts. The sizes differ from one another wherever a family permits (d_model 32,
d_head 8, 4 heads, 2 key/value heads, d_mlp 48, vocabulary 56, context 64), so that a transposed or mis-split array
cannot pass for the right one. The prompts are longer than the sliding windows and the soft caps are small, so that
both change the logits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# A token repeats in the first prompt, so that attention to an earlier copy is seen.
PROMPTS: tuple[tuple[int, ...], tuple[int, ...]] = ((5, 17, 3, 40, 11, 17, 29), (9, 33, 21, 4, 48))

# No special tokens: their default ids lie outside these vocabularies, and a chance stop would shorten generations.
_SPECIAL: dict[str, object] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Every family reads its norm's epsilon under one of these names and ignores the others. It is large enough that a norm
# which forgets it, or adds it outside the root, is found.
_EPSILON: dict[str, object] = {"layer_norm_epsilon": 0.01, "layer_norm_eps": 0.01, "rms_norm_eps": 0.01}
_COMMON: dict[str, object] = {"vocab_size": 56, **_SPECIAL, **_EPSILON}
_GPT2_SIZES: dict[str, object] = {
    **_COMMON, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48,
}  # fmt: skip
_SIZES: dict[str, object] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, object] = {**_SIZES, "num_key_value_heads": 2}
_GEMMA: dict[str, object] = {
    **_GROUPED,
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_FALCON: dict[str, object] = {
    **_COMMON,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bias": True,
}


@dataclass(frozen=True)
class Family:
    """A model family: its name in tests, its `transformers` model type and the settings of the tiny configuration."""

    name: str
    model_type: str
    settings: Mapping[str, object] = field(hash=False)
    norm_centre: float = 1.0  # the norm weight that scales by one: Gemma multiplies by (1 + weight)


FAMILIES: tuple[Family, ...] = (
    Family("gpt2", "gpt2", _GPT2_SIZES),
    Family("llama", "llama", _GROUPED),
    Family("mistral", "mistral", {**_GROUPED, "sliding_window": 4}),
    Family("qwen2", "qwen2", _GROUPED),
    Family("qwen3", "qwen3", {**_GROUPED, "head_dim": 12}),
    Family("gemma2", "gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, 0.0),
    Family("gemma3", "gemma3_text", _GEMMA, 0.0),
    Family("gpt_neox", "gpt_neox", _SIZES),
    Family("gpt_neox_sequential", "gpt_neox", {**_SIZES, "use_parallel_residual": False}),
    Family("phi", "phi", _SIZES),
    Family("phi3", "phi3", _GROUPED),
    Family("olmo2", "olmo2", _GROUPED),
    Family("gptj", "gptj", {**_GPT2_SIZES, "rotary_dim": 4}),
    Family("bloom", "bloom", {**_COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Family("falcon", "falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    Family("falcon_grouped", "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("mixtral", "mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "qwen3_moe", "qwen3_moe",
        {**_GROUPED, "head_dim": 12, "moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2},
    ),
)  # fmt: skip


def family_named(name: str) -> Family:
    """The family with this name; an unknown one raises KeyError."""
    return {family.name: family for family in FAMILIES}[name]


def prompt_ids(family: Family) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two fixed prompts of seven and five tokens, within the family's vocabulary."""
    vocabulary = family.settings["vocab_size"]
    assert isinstance(vocabulary, int) and all(token < vocabulary for prompt in PROMPTS for token in prompt)
    return PROMPTS


def build(family: Family) -> PreTrainedModel:
    """The family's tiny model, the same weights every time. Eager attention: SDPA knows no soft caps."""
    config = AutoConfig.for_model(family.model_type, **dict(family.settings))
    make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.float32, attn_implementation="eager")
    _randomise(model, family)
    model.eval()
    return model


def _randomise(model: PreTrainedModel, family: Family) -> None:
    """Fill every parameter from a seed of its own, so that no other parameter's presence or order matters."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{family.name}/{name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        mean, spread = _distribution(name, parameter, id(parameter) in embeddings, family)
        parameter.data.copy_(mean + spread * noise)


def _distribution(name: str, parameter: nn.Parameter, is_embedding: bool, family: Family) -> tuple[float, float]:
    """Mean and spread that keep activations, scores and logits near one and make every weight count."""
    if parameter.ndim == 1:
        return (0.0 if name.endswith("bias") else family.norm_centre, 0.25)
    # A tied embedding is the unembedding too, and Gemma multiplies it by sqrt(d_model): 0.4 suits every use.
    return (0.0, 0.4) if is_embedding else (0.0, 1.3 / math.sqrt(32))
