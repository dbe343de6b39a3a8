"""What a read gives, against the definition of its reduction on the whole activation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.models import LENGTHS, counted, every_family, look, plain_logits, plain_model, resident
from families import Family, family_named, prompt_ids
from patchclamp_server.engine.execution import execute
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.messages import (
    LastRow,
    LogitLens,
    LogitsSpec,
    Mean,
    Moments,
    Norm,
    Project,
    ReadOutput,
    ReadSpec,
    Reduction,
    RunSpec,
    TopK,
)
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import UnembedRow
from patchclamp_server.positions import ALL, LAST, Positions, Range, Span

LLAMA = family_named("llama")
IDS = prompt_ids(LLAMA)[0]
# One sum of some dozens of float32 numbers below ten, in another order.
ROUNDING = 1e-5
# A batch of one here and there: the same run through products of other sizes.
BATCHED = 2e-5

SELECTIONS = {
    "all": ALL,
    "last": LAST,
    "some": Positions((5, 0, -1)),
    "range": Positions(Range(1, -2)),
    "but": Positions(Span.ALL, exclude=(0, -1)),
}
every_selection = pytest.mark.parametrize("positions", SELECTIONS.values(), ids=SELECTIONS)


def read(
    site: Site,
    reduction: Reduction | None = None,
    positions: Positions = ALL,
    heads: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    model: Resident | None = None,
) -> ReadOutput:
    """One read of the last layer (or outside the blocks) of one run."""
    layer = 1 if site.in_block else None
    spec = ReadSpec(site, (layer,), positions, heads, reduction, dtype)
    (output,) = execute((model or resident(LLAMA)).runner, [RunSpec(IDS, (spec,))])[0].reads
    return output


def whole(site: Site, model: Resident | None = None) -> torch.Tensor:
    """The whole activation of the same place."""
    layer = 1 if site.in_block else None
    point = HookPoint(site, layer)
    return look(model or resident(LLAMA), [IDS], reads=[point]).values[point][0]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = ROUNDING) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@every_selection
@pytest.mark.parametrize("site", [Site.RESID_POST, Site.ATTN_Z, Site.MLP_POST, Site.LN_FINAL, Site.EMBED])
def test_a_read_gives_the_selected_rows_in_their_order(site: Site, positions: Positions) -> None:
    found = read(site, positions=positions)
    rows = list(positions.resolve(len(IDS)))
    assert found.positions == tuple(rows)
    assert found.hook_point.site is site
    assert torch.equal(found.values, whole(site)[rows])


@every_selection
@pytest.mark.parametrize("site", [Site.ATTN_PATTERN, Site.ATTN_SCORES])
def test_positions_of_a_pattern_are_its_queries(site: Site, positions: Positions) -> None:
    rows = list(positions.resolve(len(IDS)))
    assert torch.equal(read(site, positions=positions).values, whole(site)[:, rows])


@pytest.mark.parametrize("heads", [(0,), (3, 1), (2, 2)])
@pytest.mark.parametrize("site", [Site.ATTN_Z, Site.ATTN_PATTERN, Site.ATTN_RESULT])
def test_heads_are_selected_in_their_order(site: Site, heads: tuple[int, ...]) -> None:
    expected = whole(site).index_select(site.axes.index("head"), torch.tensor(heads))
    assert torch.equal(read(site, heads=heads).values, expected)


def test_heads_of_keys_are_key_value_heads() -> None:
    assert torch.equal(read(Site.ATTN_K, heads=(1,)).values, whole(Site.ATTN_K)[:, 1:])


def test_heads_and_queries_are_selected_together() -> None:
    found = read(Site.ATTN_PATTERN, positions=Positions((4, 2)), heads=(3, 0)).values
    assert torch.equal(found, whole(Site.ATTN_PATTERN)[[3, 0]][:, [4, 2]])


@every_selection
@pytest.mark.parametrize("site", [Site.RESID_POST, Site.ATTN_Z, Site.ATTN_PATTERN])
def test_last_keeps_the_last_selected_position(site: Site, positions: Positions) -> None:
    row = positions.resolve(len(IDS))[-1]
    assert torch.equal(read(site, LastRow(), positions).values, whole(site).select(site.position_axis, row))


@every_selection
@pytest.mark.parametrize("site", [Site.RESID_POST, Site.ATTN_Z, Site.ATTN_PATTERN])
def test_mean_is_over_the_selected_positions(site: Site, positions: Positions) -> None:
    rows = np.take(whole(site).double().numpy(), positions.resolve(len(IDS)), axis=site.position_axis)
    expected = torch.from_numpy(np.mean(rows, axis=site.position_axis)).float()
    close(read(site, Mean(), positions).values, expected)


@every_selection
def test_moments_are_mean_and_population_variance(positions: Positions) -> None:
    rows = whole(Site.MLP_POST).double().numpy()[list(positions.resolve(len(IDS)))]
    expected = torch.from_numpy(np.stack([rows.mean(0), rows.var(0)])).float()
    close(read(Site.MLP_POST, Moments(), positions).values, expected)


@every_selection
def test_norm_is_euclidean_over_the_last_axis(positions: Positions) -> None:
    rows = whole(Site.ATTN_Z).double().numpy()[list(positions.resolve(len(IDS)))]
    expected = torch.from_numpy(np.sqrt((rows**2).sum(-1))).float()
    close(read(Site.ATTN_Z, Norm(), positions).values, expected)


@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("site", [Site.RESID_POST, Site.MLP_POST, Site.ATTN_Z])
def test_top_k_gives_the_largest_entries_signed_with_their_places(site: Site, by_magnitude: bool) -> None:
    found = read(site, TopK(3, by_magnitude))
    entries = whole(site).numpy()
    order = np.argsort(-np.abs(entries) if by_magnitude else -entries, axis=-1, kind="stable")[..., :3]
    assert found.indices is not None
    assert found.indices.dtype == torch.int32
    assert np.array_equal(found.indices.numpy(), order)
    assert np.array_equal(found.values.numpy(), np.take_along_axis(entries, order, axis=-1))


def test_a_projection_is_the_dot_product_with_each_vector_in_order() -> None:
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    unembed = plain_model(LLAMA).get_output_embeddings().weight.detach()
    found = read(Site.RESID_POST, Project((vectors[:2], UnembedRow(17), vectors[2:])))
    onto = torch.stack([vectors[0], vectors[1], unembed[17], vectors[2]])
    expected = np.einsum("pd,nd->pn", whole(Site.RESID_POST).double().numpy(), onto.double().numpy())
    close(found.values, torch.from_numpy(expected).float(), 5e-5)  # a product's sum over 32 entries, up to 40


@every_family
def test_a_logit_lens_on_the_last_block_gives_the_models_own_predictions(family: Family) -> None:
    """With final norm, unembedding, its multiplier and Gemma-2's soft cap."""
    found = read(Site.RESID_POST, LogitLens(4), model=resident(family))
    logprobs = plain_logits(plain_model(family), IDS).log_softmax(-1)
    expected = logprobs.topk(4)
    assert found.indices is not None
    close(found.values, expected.values, BATCHED)
    # Compared by their log-probabilities: two tokens may be as probable as each other.
    close(logprobs.gather(-1, found.indices.long()), expected.values, BATCHED)


def test_a_logit_lens_works_on_every_head() -> None:
    found = read(Site.ATTN_RESULT, LogitLens(2), positions=LAST)
    assert found.indices is not None
    assert tuple(found.values.shape) == tuple(found.indices.shape) == (1, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_cast_to_the_dtype_asked_for_and_indices_are_not(dtype: torch.dtype) -> None:
    found = read(Site.RESID_POST, TopK(3), dtype=dtype)
    assert found.values.dtype == dtype
    assert found.indices is not None
    assert found.indices.dtype == torch.int32
    assert torch.equal(found.values, read(Site.RESID_POST, TopK(3)).values.to(dtype))


def test_means_are_taken_in_float32_before_the_cast() -> None:
    expected = whole(Site.RESID_POST).mean(0).to(torch.bfloat16)
    assert torch.equal(read(Site.RESID_POST, Mean(), dtype=torch.bfloat16).values, expected)


def test_results_are_on_the_host_contiguous_and_own_their_memory(device: str) -> None:
    found = read(Site.ATTN_Z, positions=LAST, heads=(1,), model=resident(LLAMA, device)).values
    assert found.device.type == "cpu"
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.numel() * 4


def test_reads_come_in_the_order_of_the_request_with_layers_ascending() -> None:
    reads = (
        ReadSpec(Site.RESID_POST, (1, 0)),
        ReadSpec(Site.EMBED, (None,)),
        ReadSpec(Site.RESID_POST, (0,), reduction=Mean()),
        ReadSpec(Site.LOGITS, (None,), LAST),
    )
    outputs = execute(resident(LLAMA).runner, [RunSpec(IDS, reads)])[0].reads
    assert [(output.read_index, str(output.hook_point)) for output in outputs] == [
        (0, "blocks.0.resid_post"),
        (0, "blocks.1.resid_post"),
        (1, "embed"),
        (2, "blocks.0.resid_post"),
        (3, "logits"),
    ]


def test_a_read_of_the_logits_is_a_read_like_any_other() -> None:
    logits = plain_logits(plain_model(LLAMA), IDS)
    close(read(Site.LOGITS).values, logits, BATCHED)
    close(read(Site.LOGITS, positions=Positions((4, 1))).values, logits[[4, 1]], BATCHED)
    close(read(Site.LOGITS, Mean()).values, logits.mean(0), BATCHED)
    found = read(Site.LOGITS, TopK(2))
    close(found.values, logits.topk(2).values, BATCHED)


def test_runs_of_a_batch_get_their_own_reads_and_logits() -> None:
    """Of different lengths, with different sites, positions and reductions; each as if it were alone."""
    runs = [
        RunSpec(LENGTHS[0], (ReadSpec(Site.RESID_POST, (0, 1)),), LogitsSpec(ALL), loss=True),
        RunSpec(LENGTHS[1], (ReadSpec(Site.ATTN_PATTERN, (1,), LAST, (0, 2)),)),
        RunSpec(LENGTHS[2], (ReadSpec(Site.ATTN_SCORES, (0,)),), LogitsSpec(Positions((3, 0)), values=False, top_k=3)),
        RunSpec(LENGTHS[3], (ReadSpec(Site.RESID_POST, (1,), LAST, reduction=LogitLens(2)),), loss=True),
        RunSpec(
            LENGTHS[4], (ReadSpec(Site.LOGITS, (None,), Positions((2,))),), LogitsSpec(LAST, logprob_tokens=(5, 1))
        ),
    ]
    runner = resident(LLAMA).runner
    together = execute(runner, runs)
    for run, found in zip(runs, together, strict=True):
        (alone,) = execute(runner, [run])
        assert len(found.reads) == len(alone.reads)
        for one, other in zip(found.reads, alone.reads, strict=True):
            assert (one.read_index, one.hook_point, one.positions) == (
                other.read_index, other.hook_point, other.positions,
            )  # fmt: skip
            close(one.values, other.values, BATCHED)
        assert (found.logits is None) == (alone.logits is None) == (run.logits is None)
        if found.logits is not None and alone.logits is not None:
            assert found.logits.positions == alone.logits.positions
            for name in ("values", "top_logprobs", "top_logits", "logprobs"):
                one, other = getattr(found.logits, name), getattr(alone.logits, name)
                assert (one is None) == (other is None)
                if one is not None:
                    close(one, other, BATCHED)
        assert (found.loss is None) == (alone.loss is None) == (not run.loss)
        if found.loss is not None and alone.loss is not None:
            close(found.loss, alone.loss, BATCHED)


@every_family
def test_logits_are_those_of_the_model(family: Family) -> None:
    spec = LogitsSpec(Positions((6, 2)), top_k=3, logprob_tokens=(40, 0))
    found = execute(resident(family).runner, [RunSpec(IDS, (), spec)])[0].logits
    logits = plain_logits(plain_model(family), IDS)[[6, 2]]
    logprobs, top = logits.log_softmax(-1), logits.topk(3)
    assert found is not None
    assert found.positions == (6, 2)
    assert found.values is not None and found.top_ids is not None and found.top_logits is not None
    assert found.top_logprobs is not None and found.logprobs is not None
    close(found.values, logits, BATCHED)
    assert found.top_ids.dtype == torch.int32
    close(found.top_logits, top.values, BATCHED)
    close(logits.gather(-1, found.top_ids.long()), top.values, BATCHED)
    close(found.top_logprobs, logprobs.gather(-1, top.indices), BATCHED)
    close(found.logprobs, logprobs[:, [40, 0]], BATCHED)


def test_only_what_is_asked_of_the_logits_is_given() -> None:
    found = execute(resident(LLAMA).runner, [RunSpec(IDS, (), LogitsSpec(dtype=torch.float16))])[0]
    assert found.logits is not None
    assert found.logits.values is not None
    assert found.logits.values.dtype == torch.float16
    assert found.logits.top_ids is found.logits.top_logits is found.logits.top_logprobs is found.logits.logprobs is None
    assert found.loss is None
    assert found.reads == ()


@every_family
def test_loss_is_the_cross_entropy_of_every_next_token(family: Family) -> None:
    loss = execute(resident(family).runner, [RunSpec(IDS, loss=True)])[0].loss
    logprobs = plain_logits(plain_model(family), IDS)[:-1].log_softmax(-1)
    assert loss is not None
    close(loss, -logprobs[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])], BATCHED)


def test_logits_that_several_forms_ask_for_are_computed_once_and_no_others() -> None:
    """Of seven tokens the loss takes six; of the next run's five, three forms take two."""
    loss = RunSpec(IDS, loss=True)
    forms = RunSpec(
        LENGTHS[2],
        (ReadSpec(Site.LOGITS, (None,), Positions((1, 4))), ReadSpec(Site.LOGITS, (None,), LAST, reduction=TopK(2))),
        LogitsSpec(LAST, top_k=3, logprob_tokens=(2,)),
    )
    runner = resident(LLAMA).runner
    with counted(runner.adapter.unembed.head) as calls:
        execute(runner, [loss, forms])
    assert [tuple(call.shape[:2]) for call in calls] == [(1, 6 + 2)]


def test_logits_taken_some_rows_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = resident(LLAMA).runner
    run = RunSpec(IDS, logits=LogitsSpec(Positions(), top_k=3, logprob_tokens=(2, 5)), loss=True)
    whole = execute(runner, [run])[0]
    monkeypatch.setattr("patchclamp_server.engine.execution._ROWS_AT_ONCE", 2)
    parts = execute(runner, [run])[0]
    assert whole.logits is not None and parts.logits is not None
    assert whole.loss is not None and parts.loss is not None
    for name in ("values", "top_ids", "top_logprobs", "top_logits", "logprobs"):
        assert torch.equal(getattr(whole.logits, name), getattr(parts.logits, name)), name
    assert torch.equal(whole.loss, parts.loss)


def test_a_single_token_has_no_loss() -> None:
    loss = execute(resident(LLAMA).runner, [RunSpec((3,), loss=True)])[0].loss
    assert loss is not None
    assert tuple(loss.shape) == (0,)


def test_a_run_that_asks_for_nothing_gives_nothing() -> None:
    (output,) = execute(resident(LLAMA).runner, [RunSpec(IDS)])
    assert (output.reads, output.logits, output.loss) == ((), None, None)
