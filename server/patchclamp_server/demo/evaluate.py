"""Measure demo models: ``python -m patchclamp_server.demo.evaluate [DIR ...] [--final]``.

Prints a table, and writes ``evaluation.json`` and ``MODEL_CARD.md`` beside the weights of the first directory; the
others, trained from other seeds, appear in both beside it. With one directory, what was recorded of the others stays.
Chat is measured on the development words; ``--final`` takes the final words instead, which are for the finished model
alone. Nothing of the service is used: its own measurements can be held against these.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from patchclamp_server.demo import model_dir
from patchclamp_server.demo.behaviours import Figure, all_behaviours
from patchclamp_server.demo.card import model_card
from patchclamp_server.demo.circuits import circuits
from patchclamp_server.demo.corpus.requests import Part
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.refusal_direction import find_direction, one_direction
from patchclamp_server.demo.replacement import replacement
from patchclamp_server.demo.report import Evaluation, SeedReport, read_evaluation, read_training, write_evaluation
from patchclamp_server.demo.state_swap import state_swap
from patchclamp_server.demo.transcoder_files import load_transcoders
from patchclamp_server.demo.transcoder_training import TRANSCODER_STAGES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="patchclamp_server.demo.evaluate", description="Measure demo models.")
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="*", default=[model_dir()])
    parser.add_argument("--final", action="store_true", help="use the final word lists")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    part: Part = "final" if options.final else "development"
    reports = [_report(directory, part) for directory in options.directories]
    first = options.directories[0]
    if len(reports) == 1:
        reports += _recorded_others(first, reports[0].seed, part)
    evaluation = Evaluation(part, tuple(reports))
    write_evaluation(evaluation, first)
    (first / "MODEL_CARD.md").write_text(model_card(load(first), evaluation))


def load(directory: Path) -> Subject:
    model = LlamaForCausalLM.from_pretrained(directory)
    return Subject(model.eval(), PreTrainedTokenizerFast.from_pretrained(directory))


def measure(directory: Path, part: Part) -> Iterator[Figure]:
    subject = load(directory)
    yield from all_behaviours(subject, part)
    yield from one_direction(subject, find_direction(subject), part)
    yield from circuits(subject)
    for stage in TRANSCODER_STAGES:
        transcoders = load_transcoders(directory / "transcoders" / stage.name)
        yield from replacement(subject, transcoders)
        yield from state_swap(subject, transcoders)


def _report(directory: Path, part: Part) -> SeedReport:
    training = read_training(directory)
    print(f"\nseed {training.seed}: {directory}")
    figures = []
    for figure in measure(directory, part):
        print(_line(figure), flush=True)
        figures.append(figure)
    return SeedReport(training, tuple(figures))


def _recorded_others(directory: Path, seed: int, part: Part) -> list[SeedReport]:
    recorded = read_evaluation(directory)
    if recorded is None or recorded.words != part:
        return []
    return [report for report in recorded.seeds if report.seed != seed]


def _line(figure: Figure) -> str:
    gate = "" if figure.gate is None else f"{'<=' if figure.at_most else '>='} {figure.gate:g}"
    verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
    return f"{figure.task:<26} {figure.what:<76} {figure.value:7.3f}  {gate:<8} {verdict:<7} ({figure.items} items)"


if __name__ == "__main__":
    main()
