"""Architectures beyond those with golden arrays: solved and proved from a tiny random model, or refused out loud.

No table in the adapters names any of them. What is proved at load is listed in `engine/proof.py`; a wrong solution of a
block's algebra cannot pass it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from patchclamp_server.adapters.load import Checkpoint
from patchclamp_server.engine.loading import Resident, make_resident
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.hookpoints import Site

SIZES: dict[str, object] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2_SIZES: dict[str, object] = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MULTIPLIERS = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}

PROVED: dict[str, dict[str, object]] = {
    "apertus": GROUPED,
    "arcee": GROUPED,
    "biogpt": SIZES,
    "bitnet": GROUPED,
    "codegen": GPT2_SIZES | {"rotary_dim": 4, "n_inner": 48},
    "cohere": GROUPED,
    "cohere2": GROUPED,
    "diffllama": GROUPED,
    "ernie4_5": GROUPED,
    "exaone4": GROUPED,
    "gemma": WIDE_HEADS,
    "glm": WIDE_HEADS,
    "glm4": WIDE_HEADS,
    "gpt_bigcode": GPT2_SIZES,
    "gpt_neo": SIZES
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_oss": WIDE_HEADS | EXPERTS,
    "granite": GROUPED | MULTIPLIERS,
    "granitemoe": GROUPED | EXPERTS,
    "helium": WIDE_HEADS,
    "hunyuan_v1_dense": WIDE_HEADS,
    "llama4_text": WIDE_HEADS | EXPERTS,
    "ministral": WIDE_HEADS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo3": GROUPED,
    "olmoe": GROUPED | EXPERTS,
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": SIZES,
    "phimoe": GROUPED | EXPERTS,
    "qwen2_moe": GROUPED | EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "seed_oss": WIDE_HEADS,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "xglm": {
        "vocab_size": 96, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": 64,
    },
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "mamba": (SIZES | {"state_size": 4}, "no stack of 2 blocks with attention"),
    "gemma4_text": (WIDE_HEADS, "the residual writes of block 0 .* could not be solved"),
    "minimax": (WIDE_HEADS | EXPERTS, "the residual writes of block 0 .* could not be solved"),
}


@pytest.mark.parametrize("model_type", PROVED)
def test_an_architecture_that_no_table_names_is_solved_and_proved(model_type: str) -> None:
    resident = _load(_build(model_type, PROVED[model_type]))
    always = {Site.RESID_PRE, Site.RESID_POST, Site.ATTN_OUT, Site.MLP_OUT, Site.ATTN_PATTERN, Site.ATTN_Z, Site.LOGITS}
    assert always <= resident.facts.site_info.keys()


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_architecture_that_does_not_fit_is_refused_with_the_reason(model_type: str) -> None:
    settings, reason = REFUSED[model_type]
    model = _build(model_type, settings)
    with pytest.raises(FailedPrecondition, match=reason):
        _load(model)


def test_a_mixture_with_plain_layers_states_both_widths() -> None:
    settings = WIDE_HEADS | EXPERTS | {"moe_intermediate_size": 24, "mlp_only_layers": [0], "decoder_sparse_step": 1}
    sites = _load(_build("qwen3_moe", settings)).facts.site_info
    assert (sites[Site.MLP_POST].layers, sites[Site.MLP_POST].axis("d_mlp")) == ((0,), 48)
    assert (sites[Site.EXPERT_POST].layers, sites[Site.EXPERT_POST].axis("d_mlp")) == ((1,), 24)


def test_a_multiplier_on_the_writes_is_found_and_part_of_them() -> None:
    model = _build("granite", PROVED["granite"])
    adapter = _load(model).runner.adapter
    assert adapter.unembed.factor == pytest.approx(0.5, rel=1e-5)  # one over logits_scaling


def _build(model_type: str, settings: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data.add_(0.1 * noise) if parameter.ndim == 1 else parameter.data.copy_(0.25 * noise)
    return model.requires_grad_(False)


def _load(model: PreTrainedModel) -> Resident:
    return make_resident(Checkpoint(model, None, "random"), "tiny", lambda _: None)
