"""A model that the adapter would misread is refused at load, in words, before anything is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel

from engine.models import SAME_LENGTH, close, hooks_on, look, make, plain_logits, resident
from families import FAMILIES, Family, build, family_named, prompt_ids
from patchclamp_server.engine.proof import prove
from patchclamp_server.engine.runner import record
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.hookpoints import HookPoint, Site


def refusal(model: PreTrainedModel) -> str:
    """Why a model is refused."""
    with pytest.raises(FailedPrecondition) as caught:
        make(model)
    return caught.value.message


def blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


def replace_forward(module: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Makes a module give `change(input, output)` for its (first) tensor."""
    forward = module.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (change(given, output[0]), *output[1:])
        return change(given, output)

    module.forward = changed


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "falcon", "bloom", "mixtral"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_with_one_more_write_to_the_stream_is_refused(name: str, layer: int) -> None:
    model = build(family_named(name))
    replace_forward(blocks(model)[layer], lambda given, output: output + 0.1 * torch.tanh(given))
    assert f"the residual writes of block {layer}" in refusal(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2"])
def test_a_block_that_scales_its_skip_path_is_refused(name: str) -> None:
    model = build(family_named(name))
    replace_forward(blocks(model)[1], lambda given, output: output + 0.05 * given)
    assert "the residual writes of block 1" in refusal(model)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_to_later_tokens_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_masked(**arguments: Any) -> torch.Tensor:
        batch, length = arguments["inputs_embeds"].shape[:2]
        return torch.zeros(batch, 1, length, length)

    model = build(family_named(name))
    for maker in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(f"{type(model).__module__}.{maker}", nothing_masked, raising=False)
    assert "attends to later tokens" in refusal(model)


def test_attention_to_later_tokens_is_refused_outside_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_masked(**arguments: Any) -> torch.Tensor:
        batch, length = arguments["inputs_embeds"].shape[:2]
        return torch.zeros(batch, 1, length, length)

    monkeypatch.setattr("transformers.models.gptj.modeling_gptj.create_causal_mask", nothing_masked)
    assert "attends to later tokens" in refusal(build(family_named("gptj")))


def test_a_model_without_attention_is_refused() -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=56, state_size=4)
    assert "no stack of 2 blocks with attention" in refusal(AutoModelForCausalLM.from_config(config))


def test_a_stack_of_another_length_than_configured_is_refused() -> None:
    model = build(family_named("llama"))
    model.config.num_hidden_layers = 3
    assert "no stack of 3 blocks" in refusal(model)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = build(family_named("llama"))
    next(blocks(model)[1].parameters()).data.fill_(float("nan"))
    assert "block 1 gives numbers that are not finite" in refusal(model)


def test_logits_that_are_something_else_than_unembedded_rows_are_refused() -> None:
    model = build(family_named("llama"))
    forward = model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    model.forward = squared
    assert "the logits are neither a multiple nor a softcap" in refusal(model)


def test_an_embedding_that_is_more_than_tokens_and_positions_is_refused() -> None:
    model = build(family_named("llama"))
    blocks(model)[0].register_forward_pre_hook(lambda _, args: (args[0] + 0.1 * torch.tanh(args[0]), *args[1:]))
    assert "what enters block 0 is not the token embeddings" in refusal(model)


PROOF_IDS = torch.tensor([SAME_LENGTH[0]])


def disproof(spoil: Callable[[Any], None]) -> str:
    """Why the proof fails for an adapter that was right until it was spoilt."""
    model = make(build(family_named("llama")))
    plain = record(model.runner.adapter.model, PROOF_IDS).logits
    prove(model.runner, PROOF_IDS, plain)
    spoil(model.runner.adapter)
    with pytest.raises(FailedPrecondition) as caught:
        prove(model.runner, PROOF_IDS, plain)
    assert hooks_on(model.runner) == 0
    return caught.value.message


def swap(adapter: Any, one: Site, other: Site, layer: int) -> None:
    """Lets one site of a layer read and write where another does."""
    point = HookPoint(one, layer)
    for table in (adapter.read_taps, adapter.write_taps):
        table[point] = table[HookPoint(other, layer)]


def test_the_proof_notices_a_write_taken_for_another() -> None:
    assert "never passed these hook points: blocks.1.attn.out" in disproof(
        lambda adapter: swap(adapter, Site.ATTN_OUT, Site.MLP_OUT, 1)
    )


def test_the_proof_notices_a_wrong_shape() -> None:
    def spoil(adapter: Any) -> None:
        point = HookPoint(Site.ATTN_Z, 0)
        tap = adapter.read_taps[point]
        object.__setattr__(tap, "read", lambda visit: visit.value)

    assert "blocks.0.attn.z has shape (7, 32) where (7, 4, 8) was expected" in disproof(spoil)


def test_the_proof_notices_an_edit_without_effect() -> None:
    def spoil(adapter: Any) -> None:
        tap = adapter.write_taps[HookPoint(Site.MLP_POST, 1)]
        object.__setattr__(tap, "write", lambda visit, new: visit.replaced(visit.value))

    assert "does not reach the logits: blocks.1.mlp.post" in disproof(spoil)


def test_the_proof_notices_logits_that_hooks_change() -> None:
    def spoil(adapter: Any) -> None:
        adapter.model.lm_head.weight.data.mul_(1.001)

    assert "logits with every site hooked against the un-hooked model" in disproof(spoil)


def test_the_proof_notices_a_stream_that_does_not_add_up() -> None:
    def spoil(adapter: Any) -> None:
        tap = adapter.read_taps[HookPoint(Site.MLP_OUT, 0)]
        object.__setattr__(tap, "read", lambda visit: visit.value * 1.01)

    assert "blocks.0: the sum of writes against resid_post" in disproof(spoil)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_proved_in_half_precision(family: Family, dtype: torch.dtype, device: str) -> None:
    ids = prompt_ids(family)[0]
    model = resident(family, device, dtype)
    half = build(family).to(device, dtype)
    expected = plain_logits(half, ids)
    # Each product is rounded to 2^-8 or 2^-11, through two blocks.
    share = {torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    seen = look(model, [ids])
    close(seen.logits[0], expected, share * float(expected.abs().max()))
    for layer in range(model.facts.dims.n_layers):
        scores, pattern = (seen.values[HookPoint(site, layer)] for site in (Site.ATTN_SCORES, Site.ATTN_PATTERN))
        assert torch.equal(scores.isneginf(), pattern == 0), "masked with the lowest number of some element type"
    assert model.facts.dtype == dtype
    assert model.facts.sites == resident(family, device).facts.sites
    assert model.facts.absent == resident(family, device).facts.absent
