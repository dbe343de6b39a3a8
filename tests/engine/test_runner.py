"""The runner does what was asked and no more, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.models import LENGTHS, counted, every_family, hooks_on, look, resident, same_for_all
from families import Family, family_named, prompt_ids
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.runner import Batch, Forward
from patchclamp_server.hookpoints import HookPoint, Site

IDS = prompt_ids(family_named("gpt2"))[0]


def blocks_run(model: Resident, *points: str) -> int:
    """How many blocks a forward ends that reads these hook points and asks for no logits."""
    runner = model.runner
    with counted(*(block.module for block in runner.adapter.layout.blocks)) as calls:
        reads = frozenset(map(HookPoint.parse, points))
        runner.run(Forward(Batch.of([IDS], runner.input_device), reads=reads, capture=lambda *_: None))
    return len(calls)


@pytest.mark.parametrize(
    ("points", "blocks"),
    [
        (["embed"], 0),
        (["pos_embed", "embed"], 0),
        (["blocks.0.resid_pre"], 1),
        (["blocks.0.resid_post", "embed"], 1),
        (["blocks.0.mlp.out"], 1),
        (["blocks.1.resid_pre"], 2),
        (["blocks.0.attn.pattern", "blocks.1.attn.pattern"], 2),
        (["ln_final"], 2),
        (["ln_final.scale"], 2),
    ],
)
def test_a_forward_stops_where_nothing_later_is_needed(points: list[str], blocks: int) -> None:
    assert blocks_run(resident(family_named("gpt2")), *points) == blocks


def test_a_forward_that_stops_early_gives_no_logits() -> None:
    model = resident(family_named("gpt2"))
    batch = Batch.of([IDS], model.runner.input_device)
    reads = frozenset({HookPoint(Site.RESID_POST, 0)})
    logits = model.runner.run(Forward(batch, reads=reads, capture=lambda *_: None))
    assert tuple(logits.shape) == (0, model.facts.dims.d_vocab)


def test_a_forward_that_is_asked_for_logits_runs_to_the_end() -> None:
    model = resident(family_named("gpt2"))
    with counted(*(block.module for block in model.runner.adapter.layout.blocks)) as calls:
        look(model, [IDS], reads=[HookPoint(Site.EMBED)])
    assert len(calls) == 2


@every_family
def test_only_the_logits_asked_for_are_computed(family: Family, device: str) -> None:
    """In the order asked for, also for pairs that are not sorted."""
    model = resident(family, device)
    pairs = [(1, 6), (0, 0), (2, 4)]
    with counted(model.runner.adapter.unembed.head) as calls:
        logits = model.runner.run(Forward(Batch.of(LENGTHS, model.runner.input_device), logit_rows=pairs))
    assert [tuple(call.shape) for call in calls] == [(1, 3, model.facts.dims.d_model)]
    every = look(model, LENGTHS, reads=()).logits
    for found, (row, position) in zip(logits, pairs, strict=True):
        # One product of three rows or of twenty-two: the same sums, blocked in another way.
        torch.testing.assert_close(found, every[row][position], rtol=0, atol=2e-5)


@every_family
def test_no_hook_is_left_after_success(family: Family, device: str) -> None:
    model = resident(family, device)
    before = hooks_on(model.runner)
    points = list(model.runner.adapter.write_taps)
    look(model, LENGTHS, edits={point: lambda value: value for point in points})
    assert hooks_on(model.runner) == before == 0
    assert not model.runner._streams
    assert model.runner.adapter.probes.current_layer is None


class Surprise(Exception):
    """Raised inside a forward."""


def raising(_: torch.Tensor) -> torch.Tensor:
    raise Surprise


@every_family
@pytest.mark.parametrize(
    "site", [Site.RESID_PRE, Site.LN1_SCALE, Site.ATTN_PATTERN, Site.ATTN_SCORES, Site.RESID_MID, Site.MLP_IN]
)
def test_an_edit_that_raises_leaves_no_hook_and_the_next_run_is_right(family: Family, site: Site) -> None:
    model = resident(family)
    point = HookPoint(site, 1)
    if point not in model.runner.adapter.write_taps:
        return
    expected = look(model, [IDS])
    with pytest.raises(Surprise):
        look(model, [IDS], edits={point: raising})
    assert_as_before(model, expected.logits[0])


@every_family
@pytest.mark.parametrize("at", [1, 2])
def test_an_abort_between_blocks_leaves_no_hook_and_the_next_run_is_right(family: Family, at: int) -> None:
    model = resident(family)
    expected = look(model, [IDS])
    with pytest.raises(Surprise):
        everything_with_check(model, raising_at(at))
    assert_as_before(model, expected.logits[0])


def raising_at(call: int) -> Callable[[], None]:
    """Raises on its nth call."""
    calls = iter(range(1, call + 1))

    def check() -> None:
        if next(calls) == call:
            raise Surprise

    return check


def everything_with_check(model: Resident, check: Callable[[], None]) -> None:
    """A forward with every site hooked."""
    adapter = model.runner.adapter
    edits = {point: (lambda value: value) for point in adapter.write_taps}
    batch = Batch.of([IDS], model.runner.input_device)
    model.runner.run(Forward(batch, frozenset(adapter.read_taps), lambda *_: None, edits, [(0, 0)], check))


def assert_as_before(model: Resident, logits: torch.Tensor) -> None:
    assert hooks_on(model.runner) == 0
    assert not model.runner._streams
    assert model.runner.adapter.probes.current_layer is None
    assert torch.equal(look(model, [IDS]).logits[0], logits)


def test_check_is_called_once_before_every_block() -> None:
    model = resident(family_named("gpt2"))
    checks: list[int] = []
    with counted(*(block.module for block in model.runner.adapter.layout.blocks)) as calls:
        everything_with_check(model, lambda: checks.append(len(calls)))
    assert checks == [0, 1]


def test_an_edit_reaches_every_position_of_a_batch_of_different_lengths(device: str) -> None:
    model = resident(family_named("gpt2"), device)
    point = HookPoint(Site.RESID_POST, 1)
    edited = look(model, LENGTHS, edits={point: lambda value: value * 0})
    for logits in edited.logits:
        assert torch.equal(logits, edited.logits[0][:1].expand_as(logits))


def test_the_residents_of_one_process_do_not_see_each_other() -> None:
    """The registry of attention functions belongs to the process, the handlers to one model."""
    first, second = resident(family_named("llama")), resident(family_named("mistral"))
    expected = look(first, [IDS]).logits[0]
    point = HookPoint(Site.ATTN_PATTERN, 0)

    def other(value: torch.Tensor) -> torch.Tensor:
        assert torch.equal(look(first, [IDS]).logits[0], expected)
        return value

    look(second, [IDS], edits={point: other})


def test_a_batch_pads_on_the_right() -> None:
    batch = Batch.of([(1, 2, 3), (4,)], torch.device("cpu"))
    assert batch.lengths == (3, 1)
    assert batch.input_ids[0].tolist() == [1, 2, 3]
    assert batch.input_ids[1, 0] == 4


def test_a_value_may_be_put_into_a_site_without_reading_it() -> None:
    model = resident(family_named("gpt2"))
    new = torch.ones(1, len(IDS), 32)
    seen = look(model, [IDS], reads=[], edits={HookPoint(Site.EMBED): same_for_all(new)})
    assert not torch.equal(seen.logits[0], look(model, [IDS], reads=[]).logits[0])
