"""The shipped weights do what their evaluation says. The figures come from the file, so weights can be replaced."""

import pytest
import torch

from patchclamp_server.demo import model_dir
from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.card import model_card
from patchclamp_server.demo.evaluate import load, measure
from patchclamp_server.demo.report import Evaluation, read_evaluation, read_training

MAX_BYTES = 20_000_000
MAX_CPU_MINUTES = 40
Key = tuple[str, str]


def recorded_evaluation() -> Evaluation:
    evaluation = read_evaluation(model_dir())
    assert evaluation is not None
    return evaluation


EVALUATION = recorded_evaluation()
RECORDED: dict[Key, Figure] = {(figure.task, figure.what): figure for figure in EVALUATION.seeds[0].figures}
GATES_MET = [key for key, figure in RECORDED.items() if figure.met]


@pytest.fixture(scope="module")
def measured() -> dict[Key, Figure]:
    torch.set_num_threads(1)
    return {(figure.task, figure.what): figure for figure in measure(model_dir(), EVALUATION.words)}


def test_every_recorded_figure_is_still_measured(measured: dict[Key, Figure]) -> None:
    assert measured.keys() == RECORDED.keys()


@pytest.mark.parametrize("key", RECORDED, ids="/".join)
def test_figures_are_as_recorded(measured: dict[Key, Figure], key: Key) -> None:
    figure, recorded = measured[key], RECORDED[key]
    # Another processor may round a borderline item the other way.
    assert figure.value == pytest.approx(recorded.value, abs=0.03, rel=0.03)
    assert (figure.gate, figure.at_most) == (recorded.gate, recorded.at_most)


@pytest.mark.parametrize("key", GATES_MET, ids="/".join)
def test_gates_that_the_card_calls_met_are_met(measured: dict[Key, Figure], key: Key) -> None:
    assert measured[key].met


def test_the_card_is_what_the_evaluation_writes() -> None:
    assert (model_dir() / "MODEL_CARD.md").read_text() == model_card(load(model_dir()), EVALUATION)


def test_three_seeds_stand_side_by_side() -> None:
    assert len({report.seed for report in EVALUATION.seeds}) == 3
    assert EVALUATION.seeds[0].training == read_training(model_dir())


def test_no_seed_took_longer_than_forty_minutes() -> None:
    assert all(report.training.total_cpu_minutes <= MAX_CPU_MINUTES for report in EVALUATION.seeds)


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in model_dir().rglob("*") if path.is_file()) < MAX_BYTES
