"""Loading a checkpoint from a directory: what is loaded, what is refused, and that nothing in it is executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.models import close, look, make, plain_logits, plain_model, resident
from families import FAMILIES, Family, build, family_named, prompt_ids
from patchclamp_server.adapters.load import Checkpoint, ModelSource, load_checkpoint, resolve_device
from patchclamp_server.engine.loading import load_resident
from patchclamp_server.errors import FailedPrecondition

GPT2 = family_named("gpt2")
WEIGHTS = "model.safetensors"
SOME_WEIGHT = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """The directory of a family's checkpoint, as `save_pretrained` writes it, without a tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family: Family) -> Path:
        path = root / family.name
        if not path.exists():
            build(family).save_pretrained(path)
        return path

    return directory


@pytest.fixture
def copy(saved: Callable[[Family], Path], tmp_path: Path) -> Path:
    """A checkpoint of GPT-2 to be spoilt."""
    return Path(copytree(saved(GPT2), tmp_path / "copy"))


def load(path: Path, **options: str | None) -> Checkpoint:
    source = ModelSource(str(path), "tiny", offline=True, **({"device": "cpu"} | options))  # type: ignore[arg-type]
    return load_checkpoint(source, lambda stage, share: None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_saved_checkpoint_is_loaded_solved_and_gives_the_same_logits(
    family: Family, saved: Callable[[Family], Path]
) -> None:
    source = ModelSource(str(saved(family)), family.name, device="cpu", offline=True)
    model = load_resident(source, lambda _: None)
    ids = prompt_ids(family)[0]
    assert torch.equal(look(model, [ids]).logits[0], look(resident(family), [ids]).logits[0])
    assert model.facts.sites == resident(family).facts.sites


def test_progress_goes_from_nothing_to_ready(saved: Callable[[Family], Path]) -> None:
    shares: list[tuple[str, float]] = []
    source = ModelSource(str(saved(GPT2)), "tiny", device="cpu", offline=True)
    load_resident(source, lambda progress: shares.append((progress.stage, progress.share)))
    assert [share for _, share in shares] == sorted(share for _, share in shares)
    assert shares[-1] == ("ready", 1.0)


def test_facts_tell_what_was_loaded(saved: Callable[[Family], Path]) -> None:
    facts = load_resident(ModelSource(str(saved(GPT2)), "tiny", device="cpu", offline=True), lambda _: None).facts
    dims = facts.dims
    assert (facts.name, facts.architecture, facts.dtype, facts.devices) == (
        "tiny", "GPT2LMHeadModel", torch.float32, ("cpu",),
    )  # fmt: skip
    assert (dims.n_layers, dims.n_heads, dims.n_kv_heads, dims.d_head, dims.d_model) == (2, 4, 4, 8, 32)
    assert (dims.d_mlp, dims.d_vocab, dims.n_ctx, dims.n_experts) == (48, 56, 64, 0)
    assert facts.n_parameters == sum(parameter.numel() for parameter in plain_model(GPT2).parameters())


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_accelerate_places_the_model_and_the_logits_stay(saved: Callable[[Family], Path], device_map: str) -> None:
    checkpoint = load(saved(GPT2), device_map=device_map)
    ids = prompt_ids(GPT2)[0]
    found = look(make(checkpoint.model), [ids]).logits[0]
    # On a machine with a GPU, `auto` computes there.
    close(found, plain_logits(plain_model(GPT2), ids), 2e-5 if found.device.type == "cpu" else 1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16),
                                             ("float16", torch.float16), ("auto", torch.float32)])  # fmt: skip
def test_the_dtype_is_the_one_asked_for(saved: Callable[[Family], Path], name: str, dtype: torch.dtype) -> None:
    model = load(saved(GPT2), dtype=name).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    build(GPT2).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, dtype="auto").model.dtype == torch.bfloat16


def test_the_revision_is_a_digest_of_the_files(copy: Path) -> None:
    first = load(copy).revision
    assert load(copy).revision == first
    assert len(first) == 12
    weights = load_file(copy / WEIGHTS)
    save_file({**weights, SOME_WEIGHT: weights[SOME_WEIGHT] + 1}, copy / WEIGHTS, metadata={"format": "pt"})
    assert load(copy).revision != first


def test_the_revision_does_not_depend_on_where_the_files_are(copy: Path, saved: Callable[[Family], Path]) -> None:
    assert load(copy).revision == load(saved(GPT2)).revision


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_checkpoint_without_tokenizer_is_loaded_without(family: Family, saved: Callable[[Family], Path]) -> None:
    """For some families `transformers` would make one up that knows no words."""
    assert load(saved(family)).tokenizer is None


def test_a_tokenizer_beside_the_weights_is_loaded(copy: Path) -> None:
    backend = Backend(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(copy)
    tokenizer = load(copy).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("two three").ids == (1, 2)


def refused(path: Path, **options: str | None) -> str:
    """Why a checkpoint is refused."""
    with pytest.raises(FailedPrecondition) as caught:
        load(path, **options)
    return caught.value.message


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere")


def test_an_unknown_hub_id_is_refused_offline() -> None:
    assert "nobody/nothing" in refused(Path("nobody/nothing"))


@pytest.mark.parametrize("name", ["warp", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(copy: Path, name: str) -> None:
    assert f"{name!r} is not available" in refused(copy, device=name)


def test_auto_is_a_device_that_is_there() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_dtype_is_refused(copy: Path) -> None:
    assert "int4" in refused(copy, dtype="int4")


def test_an_unknown_device_map_is_refused(copy: Path) -> None:
    assert "device_map" in refused(copy, device_map="nonsense")


def test_a_checkpoint_without_weights_is_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    assert WEIGHTS in refused(copy)


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(copy: Path) -> None:
    """`transformers` would fill it with random numbers and go on."""
    weights = load_file(copy / WEIGHTS)
    del weights[SOME_WEIGHT]
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert SOME_WEIGHT in refused(copy)


def test_a_weight_of_another_shape_is_refused(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    weights[SOME_WEIGHT] = weights[SOME_WEIGHT][:, :5].contiguous()
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert "cannot load the model" in refused(copy)


def test_a_file_that_was_cut_short_is_refused(copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "cannot load the model" in refused(copy)


def test_a_broken_configuration_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "cannot load the model" in refused(copy)


def with_code(path: Path, model_type: str) -> Path:
    """A checkpoint that brings code along for everything; executing it leaves the file that is returned."""
    mark = path / "executed"
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {
            "AutoConfig": "modeling.Config",
            "AutoModelForCausalLM": "modeling.Model",
            "AutoTokenizer": ["modeling.Tokenizer", None],
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    return mark


def test_a_checkpoint_that_needs_its_own_code_is_refused_and_not_executed(copy: Path) -> None:
    mark = with_code(copy, "strange")
    assert "custom code" in refused(copy)
    assert not mark.exists()


def test_code_beside_a_known_architecture_is_not_executed(copy: Path) -> None:
    mark = with_code(copy, "gpt2")
    assert type(load(copy).model).__module__.startswith("transformers.")
    assert not mark.exists()


def test_a_pickle_that_executes_code_is_refused(copy: Path) -> None:
    """Weights in the older format are pickles; only tensors are read from them."""
    mark = copy / "executed"
    (copy / WEIGHTS).unlink()
    torch.save({"weight": Opener(str(mark))}, copy / "pytorch_model.bin")
    assert "cannot load the model" in refused(copy)
    assert not mark.exists()


class Opener:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_tokenizer_that_cannot_be_loaded_is_a_fault_and_not_left_out(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{broken")
    assert "cannot load the tokenizer" in refused(copy)


def test_a_path_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    assert "there is no such directory" in refused(tmp_path / "nowhere")


def test_a_home_directory_is_expanded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load(Path("~") / copy.name).revision == load(copy).revision


def test_a_hub_id_is_loaded_from_the_cache_at_the_revision_asked_for(copy: Path, tmp_path: Path) -> None:
    """As the hub's client lays its cache out; in a process of its own, which learns where that is when it starts."""
    commits = {"main": "a" * 40, "older": "b" * 40}
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for ref, commit in commits.items():
        (repository / "refs" / ref).write_text(commit)
        copytree(copy, repository / "snapshots" / commit)
    code = (
        "from patchclamp_server.adapters.load import ModelSource, load_checkpoint\n"
        "for revision in (None, 'older'):\n"
        "    source = ModelSource('someone/tiny', 'tiny', revision=revision, device='cpu', offline=True)\n"
        "    print(load_checkpoint(source, lambda *_: None).revision)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [commits["main"], commits["older"]], done.stderr


def test_a_block_whose_mlp_writes_nothing_is_refused_in_words(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    for name in weights:
        if "mlp.c_proj" in name:
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FailedPrecondition, match="could not be solved"):
        load_resident(ModelSource(str(copy), "zero", device="cpu"), lambda _: None)
