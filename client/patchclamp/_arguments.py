"""Arguments that several functions take, checked before anything is sent.

What has the wrong Python type is a TypeError; what cannot be meant is InvalidArgument with the argument's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from patchclamp._positions import is_whole_number
from patchclamp.errors import invalid_field

_UINT32 = range(2**32)


def unicode_text(text: str, field: str) -> str:
    """Text that can travel."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise invalid_field(field, f"character {fault.start} is half a surrogate pair, which is no text") from None
    return text


def number(value: Any, field: str) -> float:
    """One finite number."""
    not_one = isinstance(value, bool | np.bool_ | str | bytes) or not hasattr(value, "__float__")
    if not_one or np.ndim(value):
        raise TypeError(f"{field} is a number, not {value!r}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise invalid_field(field, f"{value!r} is not finite")
    return found


def whole_number(value: Any, field: str, *, least: int, most: int = 2**32 - 1) -> int:
    """One whole number within bounds, both included."""
    if not is_whole_number(value):
        raise TypeError(f"{field} is a whole number, not {value!r}")
    found = operator.index(value)
    if not least <= found <= most:
        raise invalid_field(field, f"{found} is not in {least} .. {most}")
    return found


def flag(value: Any, field: str) -> bool:
    """True or False: a number is most likely an argument that slipped."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{field} is True or False, not {value!r}")
    return bool(value)


def index(value: Any, field: str, what: str) -> int:
    """One index of something that counts from 0."""
    if not is_whole_number(value):
        raise TypeError(f"{field} is the index of a {what}, not {value!r}")
    return _in_range(operator.index(value), field, what)


def indices(values: Any, field: str, what: str) -> tuple[int, ...]:
    """Indices of things that count from 0, in the order given: one, several, or none for None."""
    if values is None:
        return ()
    if getattr(values, "dtype", None) == np.bool_:
        raise TypeError(f"{field} is a boolean mask; give the indices themselves, for instance np.flatnonzero(mask)")
    items = [values] if is_whole_number(values) else values
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"{field} is a list of {what} indices, not {values!r}")
    items = list(items)
    if not all(map(is_whole_number, items)):
        raise TypeError(f"{field} is a list of {what} indices, not {values!r}")
    found = tuple(_in_range(operator.index(item), field, what) for item in items)
    if len(set(found)) < len(found):
        raise invalid_field(field, f"a {what} is there twice")
    return found


def _in_range(found: int, field: str, what: str) -> int:
    if found not in _UINT32:
        raise invalid_field(field, f"{found} is no {what}: {what}s count from 0")
    return found
