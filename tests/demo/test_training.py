"""Training: every stage runs, an interrupted run ends where an uninterrupted one does, and the result loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from patchclamp_server.demo import train
from patchclamp_server.demo.architecture import Shape, build_model
from patchclamp_server.demo.batches import ROW_LENGTH, BatchSource
from patchclamp_server.demo.corpus.mixture import HELPFUL
from patchclamp_server.demo.export import as_llama
from patchclamp_server.demo.report import read_training
from patchclamp_server.demo.stages import STAGES, Stage, Trainer
from patchclamp_server.demo.tokenizer import build_tokenizer
from patchclamp_server.demo.transcoder_training import TRANSCODER_STAGES, TranscoderTrainer

CHECKPOINTS = "checkpoints/seed-0-quick"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("trained")
    train.main(["--quick", "--out", str(directory)])
    return directory


def test_quick_training_runs_every_stage(trained: Path) -> None:
    stages = {stage.name for stage in (*STAGES, *TRANSCODER_STAGES)}
    assert {path.stem for path in (trained / CHECKPOINTS).iterdir()} == stages


def test_training_records_its_cost_by_stage(trained: Path) -> None:
    training = read_training(trained)
    assert training.seed == 0
    assert len(training.cpu_minutes) == len(STAGES) + len(TRANSCODER_STAGES)
    assert all(minutes >= 0 for minutes in training.cpu_minutes.values())


def test_weights_are_stored_in_bfloat16_and_load_as_float32(trained: Path) -> None:
    assert {tensor.dtype for tensor in load_file(trained / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_directory_loads_with_the_tokenizer_that_lies_in_it(trained: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.tokenize("Fact: the capital of Texas") == ["ĠFact", ":", "Ġthe", "Ġcapital", "Ġof", "ĠTexas"]


def test_the_written_model_computes_what_the_trained_one_does() -> None:
    model = build_model(Shape(n_layers=2, n_heads=2, d_mlp=64), build_tokenizer(), seed=1).eval()
    ids = torch.arange(4, 24)[None]  # [1, pos]
    with torch.no_grad():
        assert torch.allclose(as_llama(model)(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize("completed_steps", [3, 7])
def test_an_interrupted_run_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completed_steps: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", _interrupted_after(completed_steps, Trainer._step))
        with pytest.raises(KeyboardInterrupt):
            train.main(["--quick", "--out", str(tmp_path)])
    train.main(["--quick", "--out", str(tmp_path)])
    _assert_equal_files(trained, tmp_path)


# In the second step of either kind of training: local, then end to end.
@pytest.mark.parametrize("step", ["_local_step", "_tuning_step"])
def test_an_interrupted_training_of_transcoders_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TranscoderTrainer, step, _interrupted_after(3, getattr(TranscoderTrainer, step)))
        with pytest.raises(KeyboardInterrupt):
            train.main(["--quick", "--out", str(tmp_path)])
    train.main(["--quick", "--out", str(tmp_path)])
    _assert_equal_files(trained, tmp_path)


def _assert_equal_files(expected: Path, resumed: Path) -> None:
    files = [path.relative_to(expected) for path in expected.rglob("*.safetensors")]
    assert len(files) > 1
    for file in files:
        wanted, got = load_file(expected / file), load_file(resumed / file)
        assert all(torch.equal(wanted[name], got[name]) for name in wanted), file


def _interrupted_after(steps: int, step: Callable[..., Any]) -> Callable[..., Any]:
    done = 0

    def interrupted(trainer: Any, argument: Any) -> Any:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return step(trainer, argument)

    return interrupted


def test_the_safety_stage_moves_the_middle_layers_only(trained: Path) -> None:
    checkpoints = trained / CHECKPOINTS
    before = torch.load(checkpoints / "helpful.pt", weights_only=True)["model"]
    after = torch.load(checkpoints / "safety.pt", weights_only=True)["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = _safety_stage().layers
    assert layers
    assert moved
    assert all(name.startswith(tuple(f"model.layers.{layer}." for layer in layers)) for name in moved)


def _safety_stage() -> Stage:
    return next(stage for stage in STAGES if stage.name == "safety")


@pytest.fixture(scope="module")
def source() -> BatchSource:
    return BatchSource(build_tokenizer(), HELPFUL, rows=16, induction_share=0.2, seed="test")


def test_a_batch_depends_on_seed_and_step_alone(source: BatchSource) -> None:
    first, again, other = source.batch(3), source.batch(3), source.batch(4)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.ids, other.ids)


def test_rows_are_nearly_full_and_texts_do_not_see_each_other(source: BatchSource) -> None:
    batch = source.batch(0)
    bos, pad = source.tokenizer.bos_token_id, source.tokenizer.pad_token_id
    assert batch.ids.shape == (16, ROW_LENGTH)
    assert (batch.ids == pad).float().mean() < 0.1
    mask = batch.mask[:, 0]
    assert not mask.triu(1).any()
    assert (batch.weights[batch.ids == pad] == 0).all()
    starts = [(ids == bos).nonzero().flatten() for ids in batch.ids]
    closed = [row for row in range(16) if len(starts[row]) > 1 and not mask[row, starts[row][-1], 0]]
    assert len(closed) > 8
    for row in closed:
        assert not mask[row, starts[row][1] :, : starts[row][1]].any()


def test_a_batch_does_not_depend_on_what_the_tokenizer_did_before(source: BatchSource) -> None:
    before = source.batch(5)
    source.tokenizer(["a short text", "a text that is somewhat longer"], padding=True)
    assert torch.equal(source.batch(5).ids, before.ids)
