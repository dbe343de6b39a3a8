"""Positions: what a caller may write, and what travels."""

from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from client.stand_in import tokenized
from patchclamp._positions import locate, to_message
from patchclamp.v1 import hook_point_pb2, model_pb2, prompt_pb2

TEXT = "Fact: the capital of Texas is the capital"


def at(text: str, **options: int) -> list[int]:
    return locate(pc.at(text, **options), tokenized(prompt_pb2.Prompt(text=TEXT)), "positions")


@pytest.mark.parametrize(
    ("positions", "indices"),
    [(3, [3]), (-1, [-1]), ([2, 0], [2, 0]), ((1,), [1]), (np.array([4, 5]), [4, 5]), (np.int64(7), [7])],
)
def test_numbers(positions: Any, indices: list[int]) -> None:
    message = to_message(positions, "positions")
    assert message is not None
    assert list(message.indices.indices) == indices


@pytest.mark.parametrize(
    ("positions", "start", "stop"),
    [
        (slice(2, 5), 2, 5),
        (slice(None, -1), None, -1),
        (slice(1, None, 1), 1, None),
        (slice(np.int32(0), None), 0, None),
    ],
)
def test_slices(positions: slice, start: int | None, stop: int | None) -> None:
    message = to_message(positions, "positions")
    assert message is not None
    found = message.range
    assert (found.start if found.HasField("start") else None) == start
    assert (found.stop if found.HasField("stop") else None) == stop


@pytest.mark.parametrize(
    ("positions", "span"),
    [
        (pc.ALL, hook_point_pb2.POSITION_SPAN_ALL),
        (pc.LAST, hook_point_pb2.POSITION_SPAN_LAST),
        (pc.PROMPT, hook_point_pb2.POSITION_SPAN_PROMPT),
        (pc.GENERATED, hook_point_pb2.POSITION_SPAN_GENERATED),
        ("last", hook_point_pb2.POSITION_SPAN_LAST),
    ],
)
def test_spans(positions: Any, span: int) -> None:
    message = to_message(positions, "positions")
    assert message is not None
    assert message.span == span


def test_nothing_is_the_servers_default() -> None:
    assert to_message(None, "positions") is None


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([], "selects nothing"),
        ([1, 2, 1], "position 1 is there twice"),
        (slice(0, 6, 2), "step 2"),
        (2**31, "beyond any context"),
        ("Dallas", "pc.at('Dallas')"),
    ],
)
def test_refuses_values(positions: Any, words: str) -> None:
    with pytest.raises(pc.InvalidArgument, match=r"^positions: ") as caught:
        to_message(positions, "positions")
    assert words in str(caught.value)


@pytest.mark.parametrize("positions", [True, 1.5, [0.5], [True], [[1]], np.array([True, False])])
def test_refuses_types(positions: Any) -> None:
    with pytest.raises(TypeError, match="positions is"):
        to_message(positions, "positions")


def test_at_gives_every_token_that_overlaps() -> None:
    assert at("Texas") == [6]
    assert at("l of Tex") == [4, 5, 6]
    assert at(": ") == [2, 3]


def test_at_ignores_tokens_without_text() -> None:
    assert at("Fact") == [1]  # 0 is the BOS


def test_at_wants_to_know_which() -> None:
    with pytest.raises(pc.InvalidArgument, match=r"occurs 2 times.*occurrence=0"):
        at("capital")
    assert at("capital", occurrence=0) == [4]
    assert at("capital", occurrence=1) == at("capital", occurrence=-1) == [9]
    with pytest.raises(pc.InvalidArgument, match="out of range: the text occurs 2 times"):
        at("capital", occurrence=2)
    with pytest.raises(pc.InvalidArgument, match="out of range: the text occurs once"):
        at("Texas", occurrence=1)


def test_at_says_what_does_not_occur() -> None:
    with pytest.raises(pc.InvalidArgument, match=r"positions: 'Paris' does not occur in 'Fact: the"):
        at("Paris")
    with pytest.raises(pc.InvalidArgument, match="nowhere"):
        pc.at("")
    with pytest.raises(TypeError):
        pc.at(3)  # type: ignore[arg-type]


def test_at_needs_a_tokenizer() -> None:
    bare = model_pb2.TokenizedPrompt(tokens=[prompt_pb2.Token(id=11), prompt_pb2.Token(id=12)])
    with pytest.raises(pc.InvalidArgument, match=r"positions: .*without a tokenizer; give positions as numbers"):
        locate(pc.at("Dallas"), bare, "positions")


def test_reprs_are_what_one_types() -> None:
    assert [repr(position) for position in (pc.ALL, pc.LAST, pc.at("x"), pc.at("x", occurrence=-1))] == [
        "pc.ALL",
        "pc.LAST",
        "pc.at('x')",
        "pc.at('x', occurrence=-1)",
    ]
