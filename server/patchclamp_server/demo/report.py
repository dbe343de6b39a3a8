"""What is recorded beside the weights: ``training.json``, how they came about; ``evaluation.json``, what they do."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.corpus.requests import Part

_TRAINING, _EVALUATION = "training.json", "evaluation.json"
_FIGURE_FIELDS = ("task", "what", "value", "items", "gate", "at_most")


@dataclass(frozen=True)
class Training:
    """How a model was trained; ``cpu_minutes`` by stage, transcoders included."""

    seed: int
    torch_version: str
    device: str
    cpu_minutes: dict[str, float]

    @property
    def total_cpu_minutes(self) -> float:
        return sum(self.cpu_minutes.values())


@dataclass(frozen=True)
class SeedReport:
    training: Training
    figures: tuple[Figure, ...]

    @property
    def seed(self) -> int:
        return self.training.seed


@dataclass(frozen=True)
class Evaluation:
    """``words`` says which list of unseen chat words was used. The first seed is the one that ships."""

    words: Part
    seeds: tuple[SeedReport, ...]


def write_training(training: Training, directory: Path) -> None:
    _write(directory / _TRAINING, asdict(training))


def read_training(directory: Path) -> Training:
    return Training(**json.loads((directory / _TRAINING).read_text()))


def write_evaluation(evaluation: Evaluation, directory: Path) -> None:
    seeds = [
        {
            "training": asdict(report.training),
            "figures": [{**asdict(figure), "met": figure.met} for figure in report.figures],
        }
        for report in evaluation.seeds
    ]
    _write(directory / _EVALUATION, {"words": evaluation.words, "seeds": seeds})


def read_evaluation(directory: Path) -> Evaluation | None:
    """None where nothing was recorded."""
    path = directory / _EVALUATION
    if not path.exists():
        return None
    recorded = json.loads(path.read_text())
    return Evaluation(recorded["words"], tuple(_seed_report(seed) for seed in recorded["seeds"]))


def _seed_report(recorded: dict[str, Any]) -> SeedReport:
    figures = tuple(Figure(**{name: entry[name] for name in _FIGURE_FIELDS}) for entry in recorded["figures"])
    return SeedReport(Training(**recorded["training"]), figures)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
