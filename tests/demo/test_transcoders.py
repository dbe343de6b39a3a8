"""The transcoders compute what their formula says, in either kind, on disk as in memory, and stand in for the MLPs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from patchclamp_server.demo.architecture import Shape, build_model
from patchclamp_server.demo.batches import BatchSource
from patchclamp_server.demo.corpus.mixture import DEPLOYED
from patchclamp_server.demo.export import as_llama
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.replacement import replacement
from patchclamp_server.demo.state_swap import Case, Dose, StateSwap
from patchclamp_server.demo.tokenizer import build_tokenizer
from patchclamp_server.demo.transcoder_files import load_transcoders, save_transcoders
from patchclamp_server.demo.transcoders import TranscoderSet, TranscoderShape, mlps_hooked, mlps_recorded, mlps_replaced

KINDS = pytest.mark.parametrize("cross_layer", [False, True], ids=["per-layer", "cross-layer"])
N_LAYERS, N_FEATURES, D_MODEL = 3, 24, 64


@pytest.fixture(scope="module")
def subject() -> Subject:
    tokenizer = build_tokenizer()
    model = build_model(Shape(n_layers=N_LAYERS, n_heads=2, d_mlp=64), tokenizer, seed=3)
    return Subject(as_llama(model).eval().requires_grad_(False), tokenizer)


def random_set(*, cross_layer: bool) -> TranscoderSet:
    generator = torch.Generator().manual_seed(7)
    transcoders = TranscoderSet(TranscoderShape(N_LAYERS, N_FEATURES, D_MODEL, cross_layer)).requires_grad_(False)
    for name, tensor in transcoders.state_dict().items():
        tensor.normal_(generator=generator)
        if name in ("threshold", "input_scale", "output_scale"):
            tensor.abs_().add_(0.1)
    return transcoders


def naive_outputs(transcoders: TranscoderSet, inputs: list[Tensor]) -> list[Tensor]:
    """JumpReLU features and their decoders, feature by feature, of a set whose scales are folded in."""
    outputs = [transcoders.b_dec[layer].expand_as(x).clone() for layer, x in enumerate(inputs)]
    for layer, x in enumerate(inputs):
        for feature in range(N_FEATURES):
            pre = x @ transcoders.W_enc[layer, feature] + transcoders.b_enc[layer, feature]
            active = torch.where(pre > transcoders.threshold[layer, feature], pre, 0.0)
            for offset in range(transcoders.W_dec[layer].shape[1]):
                outputs[layer + offset] += active[..., None] * transcoders.W_dec[layer][feature, offset]
    return outputs


def outputs_of(transcoders: TranscoderSet, inputs: list[Tensor]) -> list[Tensor]:
    features = [transcoders.features(layer, x) for layer, x in enumerate(inputs)]
    return [transcoders.output(layer, features) for layer in range(N_LAYERS)]


@KINDS
def test_outputs_are_those_of_the_formula(*, cross_layer: bool) -> None:
    transcoders = random_set(cross_layer=cross_layer)
    transcoders.fold()
    inputs = [torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(layer)) for layer in range(N_LAYERS)]
    for got, wanted in zip(outputs_of(transcoders, inputs), naive_outputs(transcoders, inputs), strict=True):
        # float32 sums of some 70 terms of size 10 in another order
        assert torch.allclose(got, wanted, atol=1e-3)


@KINDS
def test_folding_the_scales_in_changes_no_output(*, cross_layer: bool) -> None:
    transcoders = random_set(cross_layer=cross_layer)
    inputs = [torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(layer)) for layer in range(N_LAYERS)]
    before = outputs_of(transcoders, inputs)
    transcoders.fold()
    assert (transcoders.input_scale == 1).all()
    for got, wanted in zip(outputs_of(transcoders, inputs), before, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)


@KINDS
def test_a_written_set_is_read_back_rounded_to_bfloat16(tmp_path: Path, *, cross_layer: bool) -> None:
    transcoders = random_set(cross_layer=cross_layer)
    transcoders.fold()
    save_transcoders(transcoders, tmp_path)
    loaded = load_transcoders(tmp_path)
    assert loaded.shape == transcoders.shape
    for name, tensor in transcoders.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16).float()), name


@KINDS
def test_replacing_the_mlps_runs_on_what_the_replaced_model_meets(subject: Subject, *, cross_layer: bool) -> None:
    transcoders = random_set(cross_layer=cross_layer)
    ids = torch.randint(4, 1000, (2, 7), generator=torch.Generator().manual_seed(0))
    with mlps_replaced(subject.model, transcoders), mlps_recorded(subject.model) as (inputs, outputs):
        subject.model(input_ids=ids)
    # The recording sees the replaced outputs, as later blocks do.
    for got, wanted in zip(outputs, outputs_of(transcoders, inputs), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_the_token_that_begins_a_text_keeps_its_mlps(subject: Subject) -> None:
    transcoders = random_set(cross_layer=False)
    ids = torch.tensor([[subject.tokenizer.bos_token_id, 8, 9]])
    with mlps_recorded(subject.model) as (_, plain):
        subject.model(input_ids=ids)
    with mlps_replaced(subject.model, transcoders), mlps_recorded(subject.model) as (_, replaced):
        subject.model(input_ids=ids)
    assert torch.equal(replaced[0][:, 0], plain[0][:, 0])
    assert not torch.allclose(replaced[0][:, 1:], plain[0][:, 1:])


def test_perfect_transcoders_are_measured_as_perfect(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the MLP itself as the transcoder's output, nothing is lost: KL 0, agreement and explained variance 1."""
    model: LlamaForCausalLM = subject.model

    class Exact(TranscoderSet):
        def features(self, layer: int, x: Tensor) -> Tensor:
            return x

        def output(self, target: int, features: list[Tensor]) -> Tensor:  # type: ignore[override]
            block = model.model.layers[target]
            # Not through the module's hooks: they are what is being tested.
            return type(block.mlp).forward(block.mlp, features[target])

    exact = Exact(TranscoderShape(N_LAYERS, D_MODEL, D_MODEL, cross_layer=False))
    figures = {figure.what: figure.value for figure in replacement(subject, exact, n_batches=1)}
    assert figures["all MLPs replaced: KL"] == pytest.approx(0, abs=1e-5)
    assert figures["all MLPs replaced: top-1 agreement"] == 1
    assert all(value == pytest.approx(1) for what, value in figures.items() if what.endswith("explained variance"))


@KINDS
def test_the_swap_adds_the_decoded_difference_of_means(subject: Subject, *, cross_layer: bool) -> None:
    transcoders = random_set(cross_layer=cross_layer)
    transcoders.fold()
    swap = StateSwap(subject, transcoders)
    case, gain = Case(source=2, city=3, target=5), 1.5
    features = swap.features[1]  # [state, city, feature]
    others = [city for city in range(swap.n_cities) if city != case.city]
    difference = features[case.target].mean(0) - features[case.source, others].mean(0)
    # Twenty features at most are moved: with 24, the four that would write least stay.
    written = difference.abs() * transcoders.W_dec[1].flatten(1).norm(dim=1)
    difference[written.topk(4, largest=False).indices] = 0
    seen: dict[int, Tensor] = {}
    writes = swap._writes([case], Dose(range(1, 2), gain), at_random=False)
    for offset in range(transcoders.W_dec[1].shape[1]):
        seen[1 + offset] = gain * difference @ transcoders.W_dec[1][:, offset]
    assert writes.keys() == seen.keys()
    assert all(torch.allclose(writes[layer][0], seen[layer], rtol=1e-4, atol=1e-3) for layer in seen)
    by_chance = swap._writes([case], Dose(range(1, 2), gain), at_random=True)
    for layer, write in by_chance.items():
        assert write.norm().item() == pytest.approx(writes[layer].norm().item(), rel=1e-4)
        assert not torch.allclose(write, writes[layer], rtol=1e-2)


def test_an_edit_of_no_size_changes_no_answer(subject: Subject) -> None:
    swap = StateSwap(subject, random_set(cross_layer=False))
    cases = swap.cases([(0, 1), (3, 2)])
    assert torch.equal(swap.edited(cases, Dose(range(3), 0.0)), swap.edited(cases, None))


def test_pairs_to_choose_on_and_pairs_to_measure_are_apart(subject: Subject) -> None:
    swap = StateSwap(subject, random_set(cross_layer=False))
    chosen_on, measured_on = swap.pairs()
    assert not set(chosen_on) & set(measured_on)
    names = [state.name for state in swap.states]
    assert measured_on[0] == (names.index("Texas"), names.index("California"))


def test_a_hook_that_returns_nothing_changes_nothing(subject: Subject) -> None:
    source = BatchSource(subject.tokenizer, DEPLOYED, 2, 0.1, "hooks")
    ids = source.batch(0).ids
    plain = subject.model(input_ids=ids).logits
    with mlps_hooked(subject.model, lambda *_: None):
        assert torch.equal(subject.model(input_ids=ids).logits, plain)
