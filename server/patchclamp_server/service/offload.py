"""Where conversions run: small ones at once, large ones in a thread, so that no caller waits for another's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

# About a millisecond of parsing; the way to a thread and back takes a tenth of that.
SMALL = 8192

P = ParamSpec("P")
R = TypeVar("R")


async def beside_the_loop(size: int, convert: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The converted value; `size` is how much there is to convert, in bytes of message or thereabouts."""
    if size <= SMALL:
        return convert(*args, **kwargs)
    return await asyncio.to_thread(convert, *args, **kwargs)
