"""Positions against a naive definition: write the sequence down and walk over it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchclamp_server.positions import ALL, LAST, Positions, Range, Span

lengths = st.integers(1, 12)
generated_counts = st.integers(0, 6)
positions = st.integers(-14, 20)
selectors = st.one_of(
    st.sampled_from(Span),
    st.lists(positions, max_size=5).map(tuple),
    st.builds(Range, st.none() | positions, st.none() | positions),
)
selections = st.builds(Positions, selectors, st.lists(positions, max_size=3).map(tuple))


def naive(selection: Positions, prompt_length: int, generated: int) -> list[int] | None:
    """The positions one by one; None where one of them does not exist."""
    sequence = list(range(prompt_length + generated))
    # Every name that a position goes by: from the start, and in the prompt also from its end.
    names = {position: position for position in sequence}
    names |= {position - prompt_length: position for position in sequence if position < prompt_length}
    ends = {**names, len(sequence): len(sequence)}
    if any(position not in names for position in selection.exclude):
        return None
    match selection.selector:
        case Span.ALL:
            chosen = sequence
        case Span.PROMPT:
            chosen = [position for position in sequence if position < prompt_length]
        case Span.GENERATED:
            chosen = [position for position in sequence if position >= prompt_length]
        case Span.LAST:
            chosen = [prompt_length - 1]
        case Range(start, stop):
            start, stop = 0 if start is None else start, len(sequence) if stop is None else stop
            if start not in ends or stop not in ends:
                return None
            chosen = [position for position in sequence if ends[start] <= position < ends[stop]]
        case indices:
            if any(position not in names for position in indices):
                return None
            chosen = [names[position] for position in indices]
    return [position for position in chosen if position not in {names[excluded] for excluded in selection.exclude}]


@given(selections, lengths, generated_counts)
def test_a_selection_resolves_to_what_counting_gives(selection: Positions, prompt_length: int, generated: int) -> None:
    expected = naive(selection, prompt_length, generated)
    if expected is None:
        with pytest.raises(IndexError):
            selection.resolve(prompt_length, generated)
    else:
        assert list(selection.resolve(prompt_length, generated)) == expected


@given(lengths, generated_counts)
def test_prompt_and_generated_share_all_between_them(prompt_length: int, generated: int) -> None:
    prompt, rest = (Positions(span).resolve(prompt_length, generated) for span in (Span.PROMPT, Span.GENERATED))
    assert prompt + rest == ALL.resolve(prompt_length, generated)


@given(lengths, generated_counts)
def test_negatives_count_from_the_prompts_end_however_much_is_generated(length: int, generated: int) -> None:
    assert Positions((-1,)).resolve(length, generated) == (length - 1,)
    assert LAST.resolve(length, generated) == (length - 1,)


def test_explicit_positions_keep_their_order_and_repeats() -> None:
    assert Positions((3, 0, -1, 3)).resolve(5) == (3, 0, 4, 3)


def test_the_error_names_the_first_position_outside() -> None:
    with pytest.raises(IndexError, match="position 7 is outside a run of 5 tokens"):
        Positions((1, 7, 9)).resolve(5)
