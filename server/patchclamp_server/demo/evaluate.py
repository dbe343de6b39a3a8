"""Measure a demo model: ``python -m patchclamp_server.demo.evaluate [DIR] [--final]``.

Prints a table and writes ``evaluation.json`` and ``MODEL_CARD.md`` beside the weights. Chat is measured on the
development words; ``--final`` takes the final words instead, which are for the finished model alone.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from patchclamp_server.demo import model_dir
from patchclamp_server.demo.behaviours import Figure, all_behaviours
from patchclamp_server.demo.card import model_card
from patchclamp_server.demo.corpus.requests import Part
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.refusal_direction import find_direction, one_direction


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="patchclamp_server.demo.evaluate", description="Measure a demo model.")
    parser.add_argument("directory", type=Path, nargs="?", default=model_dir())
    parser.add_argument("--final", action="store_true", help="use the final word lists")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    part: Part = "final" if options.final else "development"
    subject = load(options.directory)
    figures = []
    for figure in measure(subject, part):
        print(_line(figure), flush=True)
        figures.append(figure)
    write(options.directory, subject, part, figures)


def load(directory: Path) -> Subject:
    model = LlamaForCausalLM.from_pretrained(directory)
    return Subject(model.eval(), PreTrainedTokenizerFast.from_pretrained(directory))


def measure(subject: Subject, part: Part) -> Iterator[Figure]:
    yield from all_behaviours(subject, part)
    yield from one_direction(subject, find_direction(subject), part)


def write(directory: Path, subject: Subject, part: Part, figures: list[Figure]) -> None:
    report = {"words": part, "figures": [{**asdict(figure), "met": figure.met} for figure in figures]}
    (directory / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    (directory / "MODEL_CARD.md").write_text(model_card(subject, part, figures))


def _line(figure: Figure) -> str:
    gate = "" if figure.gate is None else f"{'<=' if figure.at_most else '>='} {figure.gate:g}"
    verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
    return f"{figure.task:<18} {figure.what:<56} {figure.value:7.3f}  {gate:<8} {verdict:<7} ({figure.items} items)"


if __name__ == "__main__":
    main()
