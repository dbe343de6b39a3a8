"""The shipped weights do what their evaluation says. The figures come from the file, so weights can be replaced."""

import json
from typing import Any

import pytest
import torch

from patchclamp_server.demo import model_dir
from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.evaluate import load, measure

REPORT: dict[str, Any] = json.loads((model_dir() / "evaluation.json").read_text())
RECORDED = {(entry["task"], entry["what"]): entry for entry in REPORT["figures"]}
MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], Figure]:
    torch.set_num_threads(1)
    return {(figure.task, figure.what): figure for figure in measure(load(model_dir()), REPORT["words"])}


def test_every_recorded_figure_is_still_measured(measured: dict[tuple[str, str], Figure]) -> None:
    assert measured.keys() == RECORDED.keys()


@pytest.mark.parametrize("key", RECORDED, ids="/".join)
def test_figures_are_as_recorded(measured: dict[tuple[str, str], Figure], key: tuple[str, str]) -> None:
    figure, recorded = measured[key], RECORDED[key]
    # Another processor may round a borderline item the other way.
    assert figure.value == pytest.approx(recorded["value"], abs=0.03)
    assert figure.gate == recorded["gate"]


@pytest.mark.parametrize("key", [key for key, entry in RECORDED.items() if entry["met"]], ids="/".join)
def test_gates_that_the_card_calls_met_are_met(measured: dict[tuple[str, str], Figure], key: tuple[str, str]) -> None:
    assert measured[key].met


def test_the_card_agrees_with_the_evaluation() -> None:
    card = (model_dir() / "MODEL_CARD.md").read_text()
    for entry in REPORT["figures"]:
        row = next(line for line in card.splitlines() if f"| {entry['what']} |" in line)
        assert f"| {entry['value']:.3f} |" in row
        assert ("**missed**" in row) == (entry["met"] is False)


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in model_dir().iterdir()) < MAX_BYTES
