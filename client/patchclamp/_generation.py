"""What generation returns: tokens as they come, and everything of them at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from patchclamp._arriving import WITHOUT_POSITIONS
from patchclamp._receipts import Receipt
from patchclamp._results import Activation, Activations, FloatArray, Tokens, TopToken, quoted
from patchclamp._tensors import Array
from patchclamp.errors import Error

FinishReason: TypeAlias = Literal["stop", "length", "context", "error"]

_SHOWN = 60
# Sites over [head, query, key]: positions select queries, and the key axis grows with every token.
_OVER_KEYS = (".attn.scores", ".attn.pattern")


@dataclass(frozen=True, eq=False)
class GeneratedToken:
    """One generated token, as it comes.

    `text` is the text that became certain with it: empty while a character or a stop text may be incomplete, so that
    these pieces, one after the other, are the generated text. `id` is the token itself, `string` its own text, `start`
    and `end` the half-open range of characters that it has in the generated text. `index` counts the tokens of its
    sample from 0, `sample` the samples. `logprob` is the natural logarithm of the model's own probability, before
    sampling changed the distribution; `top` has the most probable tokens here, where `top_logprobs` asked for them.
    `reads` are those of the forward that gave it: the whole prompt's rows for token 0, one row for each later token.
    """

    index: int
    sample: int
    id: int
    text: str
    string: str
    start: int
    end: int
    logprob: float
    top: tuple[TopToken, ...] = ()
    reads: Activations = field(default_factory=lambda: Activations([]))

    def __repr__(self) -> str:
        return f"GeneratedToken({quoted(self.string, self.id)}, index={self.index}, sample={self.sample})"


@dataclass(frozen=True, eq=False)
class Sample:
    """One continuation of the prompt. `sample["blocks.3.resid_post"]` are the activations read there.

    `text` is the generated text, without what stopped it; `tokens` are the generated ids, `strings` their own texts,
    `logprobs` float32 [tokens] the natural logarithms of the model's own probabilities, `top` the most probable tokens
    at each place (empty unless asked for). `finish_reason` is `"stop"` (end of sequence, a stop text or a stop id),
    `"length"` (`max_new_tokens`), `"context"` (the model's context is full), `"error"` (then `error` is set), or None
    as long as it goes on.

    `reads` has the rows of all forwards: the prompt's and those of all generated tokens but the last, which no forward
    has seen; prompt + generated - 1 rows where all positions are read, `positions` says which. Attention patterns and
    scores are [head, query, key] over the longest sequence, zero and -inf where a key was not there yet. A reduction
    that drops the position axis gives one value per forward, stacked on a new first axis: [tokens, ..], keys as above.

    `receipts` has one entry per intervention, over prompt and generated tokens. Where the stream broke and was taken up
    again, they are those of the last stream, which makes all rows anew; none where it broke just as the sample ended.
    """

    text: str
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    logprobs: FloatArray
    top: tuple[tuple[TopToken, ...], ...]
    finish_reason: FinishReason | None
    receipts: tuple[Receipt, ...]
    error: Error | None = None
    _parts: tuple[tuple[Activation, ...], ...] = field(default=(), repr=False)

    @cached_property
    def reads(self) -> Activations:
        """The activations of all forwards; put together on first use."""
        return Activations([joined(parts) for parts in self._parts])

    def __getitem__(self, name: str) -> Activation:
        return self.reads[name]

    def __contains__(self, name: object) -> bool:
        return name in self.reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]}…"
        parts = [repr(shown), f"tokens={len(self.tokens)}", f"finish_reason={self.finish_reason!r}"]
        parts += [f"reads={len(self._parts)}"] if self._parts else []
        parts += [f"receipts={len(self.receipts)}"] if self.receipts else []
        parts += [f"error={self.error!r}"] if self.error else []
        return f"Sample({', '.join(parts)})"


@dataclass(frozen=True)
class GenerationSummary:
    """What a generation took: tokens of the prompt and those generated in all samples, seconds until the first token
    and in the engine. Where the stream broke and was taken up again, the numbers are the last stream's.

    `fingerprint` names the engine's configuration: where it differs, two results may differ by rounding.
    """

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    engine_seconds: float
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Generation:
    """A generation. `generation["blocks.3.resid_post"]` are the activations read there.

    `samples` has every sample; with one sample, which is the rule, its attributes are here too: `text`, `tokens` (the
    generated ids), `strings`, `logprobs`, `top`, `finish_reason`, `receipts` and `reads`. Of several samples, those
    that failed while others went on have their `error`.

    `prompt_tokens` are the tokens of the prompt (their `text` is empty where the prompt was not given as text), `seed`
    the one in use, given or chosen by the server: the same request with it gives the same tokens. `summary` tells what
    it took; None as long as it goes on, and where the connection broke behind the end of the last sample.
    """

    prompt_tokens: Tokens
    samples: tuple[Sample, ...]
    seed: int
    summary: GenerationSummary | None

    @property
    def text(self) -> str:
        """The generated text, without what stopped it."""
        return self._only.text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The generated ids."""
        return self._only.tokens

    @property
    def strings(self) -> tuple[str, ...]:
        """The generated tokens' own texts."""
        return self._only.strings

    @property
    def logprobs(self) -> FloatArray:
        """Natural logarithms of the model's own probabilities. float32 [tokens]"""
        return self._only.logprobs

    @property
    def top(self) -> tuple[tuple[TopToken, ...], ...]:
        """The most probable tokens at each place, where `top_logprobs` asked for them."""
        return self._only.top

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended: `"stop"`, `"length"`, `"context"` or `"error"`."""
        return self._only.finish_reason

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """One per intervention, over prompt and generated tokens."""
        return self._only.receipts

    @property
    def reads(self) -> Activations:
        """The activations of all forwards."""
        return self._only.reads

    @property
    def _only(self) -> Sample:
        if len(self.samples) != 1:
            raise AttributeError(f"this generation has {len(self.samples)} samples: take one of `.samples`")
        return self.samples[0]

    def __getitem__(self, name: str) -> Activation:
        return self.reads[name]

    def __contains__(self, name: object) -> bool:
        return name in self.reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __repr__(self) -> str:
        if len(self.samples) != 1:
            return f"Generation({len(self.samples)} samples, seed={self.seed})"
        return f"Generation({repr(self.samples[0]).removeprefix('Sample(').removesuffix(')')}, seed={self.seed})"


def position_axis(activation: Activation) -> int:
    """The axis that positions select."""
    return 1 if activation.hook_point.endswith(_OVER_KEYS) else 0


def behind(activation: Activation, position: int) -> Activation | None:
    """Its rows from a position on; None where there are none. What has no positions stays as it is."""
    if all(place >= position for place in activation.positions):
        return activation
    kept = [row for row, place in enumerate(activation.positions) if place >= position]
    if not kept:
        return None
    axis = position_axis(activation)
    return Activation.of(
        np.take(np.asarray(activation), kept, axis),
        activation.hook_point,
        reduce=activation.reduce,
        positions=[activation.positions[row] for row in kept],
        indices=None if activation.indices is None else np.take(activation.indices, kept, axis),
    )


def joined(parts: Sequence[Activation]) -> Activation:
    """What one read gave in one layer over all forwards: rows one after the other, or one value per forward."""
    first = parts[0]
    indices = [part.indices for part in parts if part.indices is not None]
    axis = None if first.reduce in WITHOUT_POSITIONS else position_axis(first)
    arrays = _of_one_width([np.asarray(part) for part in parts], first)
    values = np.stack(arrays) if axis is None else np.concatenate(arrays, axis)
    return Activation.of(
        values,
        first.hook_point,
        reduce=first.reduce,
        positions=[position for part in parts for position in part.positions],
        indices=None if not indices else np.stack(indices) if axis is None else np.concatenate(indices, axis),
    )


def _of_one_width(parts: list[Array], kind: Activation) -> list[Array]:
    """The parts; those over keys as long as the longest, with nothing where there was no key yet."""
    if kind.reduce not in (None, *WITHOUT_POSITIONS) or not position_axis(kind):
        return parts
    longest = max(part.shape[-1] for part in parts)
    empty = -np.inf if kind.hook_point.endswith(".attn.scores") else 0.0
    return [
        np.pad(part, [*[(0, 0)] * (part.ndim - 1), (0, longest - part.shape[-1])], constant_values=empty)
        for part in parts
    ]
