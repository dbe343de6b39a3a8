"""What only a CUDA device shows. The other tests of the engine run there too, each with its `device`."""

from __future__ import annotations

import pytest
import torch

from engine.models import close, every_family, look, plain_logits, plain_model, resident
from families import Family, family_named, prompt_ids
from patchclamp_server.adapters.load import ModelSource, resolve_device
from patchclamp_server.engine.execution import execute
from patchclamp_server.engine.loading import load_resident
from patchclamp_server.engine.messages import LogitsSpec, Mean, ReadSpec, RunSpec, TopK
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.hookpoints import HookPoint, Site

pytestmark = pytest.mark.gpu


@every_family
def test_weights_and_captures_are_on_the_device(family: Family) -> None:
    model, ids = resident(family, "cuda"), prompt_ids(family)[0]
    assert model.facts.devices == ("cuda:0",)
    assert model.runner.input_device.type == "cuda"
    seen = look(model, [ids])
    assert {value.device.type for value in seen.values.values()} == {"cuda"}
    assert seen.logits[0].device.type == "cuda"


@every_family
def test_the_gpu_gives_the_logits_of_the_cpu(family: Family) -> None:
    ids = prompt_ids(family)[0]
    # Float32 without TF32: other kernels, so sums in another order and other exponentials.
    close(look(resident(family, "cuda"), [ids]).logits[0], plain_logits(plain_model(family), ids), 1e-4)


def test_reductions_happen_on_the_device_and_results_come_to_the_host() -> None:
    family = family_named("llama")
    ids = prompt_ids(family)[0]
    run = RunSpec(ids, (ReadSpec(Site.RESID_POST, (0, 1), reduction=Mean()),
                        ReadSpec(Site.MLP_POST, (1,), reduction=TopK(3))), LogitsSpec(top_k=2), loss=True)  # fmt: skip
    (on_gpu,), (on_cpu,) = (execute(resident(family, device).runner, [run]) for device in ("cuda", "cpu"))
    for one, other in zip(on_gpu.reads, on_cpu.reads, strict=True):
        assert one.values.device.type == "cpu"
        close(one.values, other.values, 1e-4)
    assert on_gpu.loss is not None and on_cpu.loss is not None
    close(on_gpu.loss, on_cpu.loss, 1e-4)


def test_a_checkpoint_is_loaded_onto_the_device(tmp_path_factory: pytest.TempPathFactory) -> None:
    family, path = family_named("gpt2"), tmp_path_factory.mktemp("gpt2")
    plain_model(family).save_pretrained(path)
    for options in ({"device": "cuda"}, {"device": "auto"}, {"device_map": "auto"}):
        model = load_resident(ModelSource(str(path), "tiny", offline=True, **options), lambda _: None)
        assert model.facts.devices == ("cuda:0",)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="is not available"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


def test_an_edit_on_the_device_changes_its_row_only() -> None:
    family = family_named("llama")
    model, rows = resident(family, "cuda"), [prompt_ids(family)[0]] * 2
    point = HookPoint(Site.RESID_POST, 0)

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[1] = value[1] * 2 + 1
        return value

    idle, edited = look(model, rows, edits={point: lambda value: value}), look(model, rows, edits={point: edit})
    assert torch.equal(idle.logits[0], edited.logits[0])
    assert not torch.equal(idle.logits[1], edited.logits[1])
