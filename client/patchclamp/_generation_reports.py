"""What the command `generate` prints: text as it comes, and plain values that JSON has."""

from __future__ import annotations

import unicodedata
from typing import Any, TextIO

import numpy as np

from patchclamp._generation import GeneratedToken, Generation, Sample
from patchclamp._reports import numbers, plain_reads, plain_receipt, show_receipts, with_reads
from patchclamp._results import TopToken
from patchclamp._terminal import Terminal

_LINES = "\n\t"


class StreamedText:
    """Writes generated text as it comes: the first sample's at once, that of the others when all have ended.

    Text goes to `out`. So do receipts and how it ended where `out` is a terminal; else receipts go to `log`, and `out`
    has the text alone.
    """

    def __init__(self, out: TextIO, log: TextIO, samples: int) -> None:
        self._out = out
        self._terminal = Terminal.of(out)
        self._log = self._terminal if out.isatty() else Terminal.of(log)
        self._many = samples > 1
        self._line_open = False
        self._headed = False

    def take(self, token: GeneratedToken) -> None:
        """One token."""
        if token.sample == 0:
            self._head(0)
            self._write(token.text)

    def leave(self) -> None:
        """Ends the line that it is in, where the text goes no further."""
        if self._line_open:
            self._write("\n")

    def finish(self, generation: Generation) -> None:
        """The end, or an interruption: what `take` did not write."""
        for number, sample in enumerate(generation.samples):
            self._head(number)
            if number:
                self._write(sample.text)
            self.leave()
            show_receipts(sample.receipts, self._log)
            if self._out.isatty() and sample.error is None:
                self._log.say(self._log.dim(_ending(sample, generation.seed)))

    def _head(self, number: int) -> None:
        """A line above each of several samples."""
        if self._many and not (number == 0 and self._headed):
            self._headed = True
            self._terminal.say(f"{self._terminal.bold(f'sample {number}')}")

    def _write(self, text: str) -> None:
        if text:
            self._out.write(_harmless(text) if self._out.isatty() else text)
            self._out.flush()
            self._line_open = not text.endswith("\n")


def _ending(sample: Sample, seed: int) -> str:
    """How a sample ended."""
    count = f"{len(sample.tokens)} token{'' if len(sample.tokens) == 1 else 's'}"
    return f"{count}, {sample.finish_reason or 'interrupted'}, seed {seed}"


def _harmless(text: str) -> str:
    """Text that cannot steer a terminal: control characters are shown escaped."""
    return "".join(
        character
        if character in _LINES or unicodedata.category(character) != "Cc"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def generation_arrays(generation: Generation) -> dict[str, Any]:
    """Everything numeric in a generation, by name; of several samples, with `sample0.` and so on before it."""
    arrays: dict[str, Any] = {"prompt_tokens": np.array(generation.prompt_tokens.ids, np.int64)}
    for number, sample in enumerate(generation.samples):
        own = {"tokens": np.array(sample.tokens, np.int64), "logprobs": np.asarray(sample.logprobs)}
        lead = f"sample{number}." if len(generation.samples) > 1 else ""
        arrays |= {f"{lead}{name}": values for name, values in with_reads(own, sample.reads).items()}
    return arrays


def plain_generation(generation: Generation) -> dict[str, Any]:
    """A generation as plain values."""
    prompt = generation.prompt_tokens
    return {
        "prompt": {"ids": prompt.ids, "strings": prompt.strings},
        "seed": generation.seed,
        "samples": [_plain_sample(sample) for sample in generation.samples],
        "summary": vars(generation.summary) if generation.summary else None,
    }


def plain_token(token: GeneratedToken) -> dict[str, Any]:
    """A token as plain values."""
    names = ("index", "sample", "id", "text", "string", "start", "end")
    plain: dict[str, Any] = {name: getattr(token, name) for name in names}
    plain["logprob"] = numbers(token.logprob)
    if token.top:
        plain["top"] = [_plain_top(top) for top in token.top]
    return plain


def _plain_sample(sample: Sample) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "text": sample.text,
        "tokens": sample.tokens,
        "strings": sample.strings,
        "logprobs": numbers(sample.logprobs),
        "finish_reason": sample.finish_reason,
        "reads": plain_reads(sample.reads),
        "receipts": [plain_receipt(receipt) for receipt in sample.receipts],
    }
    if sample.top:
        plain["top"] = [[_plain_top(top) for top in row] for row in sample.top]
    if sample.error is not None:
        plain["error"] = {
            "code": sample.error.code.name,
            "reason": sample.error.reason,
            "message": str(sample.error),
            "metadata": sample.error.metadata,
        }
    return plain


def _plain_top(top: TopToken) -> dict[str, Any]:
    return {**vars(top), "logprob": numbers(top.logprob), "logit": numbers(top.logit)}
