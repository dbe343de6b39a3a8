"""Slots: the keys and values of runs that generate, one slot each.

A token's keys and values lie at its absolute position in its run's slot, so a write can be repeated and a forward that
was abandoned leaves nothing that counts. Attention never looks past a row's own position, but what lies there must be
finite, as zero times NaN is NaN: a slot is cleared when it is left. Rows are padded on the right; padding writes to a
place of its own behind the others. The slots in use are the first ones, so that decoding sees them as a view; when a
run leaves, the last one moves into its slot.

Room grows by doubling. Layers may lie on several devices and differ in their shapes; each makes its room when its first
keys come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from patchclamp_server.engine.runner import Forward


@dataclass(frozen=True, eq=False)
class _Step:
    """Where the tokens of the running forward go: slots [batch], places [batch, pos], and the mask for full attention.

    `first` is the first slot when they follow each other.
    """

    slots: torch.Tensor
    places: torch.Tensor
    length: int
    mask: torch.Tensor
    first: int | None


class Slots:
    """Room for the keys and values of some runs. `windows` are the layers whose attention slides."""

    def __init__(self, windows: Mapping[int, int], device: torch.device) -> None:
        self._windows = dict(windows)
        self._device = device
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._capacity, self._length = 1, 1
        self._step: _Step | None = None
        self._masks: dict[int, torch.Tensor] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes for held in self._all())

    def begin(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Announces a forward: row i goes on in `slots[i]` at position `starts[i]` with `counts[i]` tokens.

        Gives the absolute positions [batch, pos]; those of padding are the row's last.
        """
        longest = max(counts)
        length = max(start + count for start, count in zip(starts, counts, strict=True))
        self._make_room(max(slots) + 1, length)
        first = torch.tensor(starts, device=self._device)[:, None]
        offsets = torch.arange(longest, device=self._device)
        real = offsets < torch.tensor(counts, device=self._device)[:, None]
        last = first + torch.tensor(counts, device=self._device)[:, None] - 1
        positions = torch.minimum(first + offsets, last)  # [batch, pos]
        keys = torch.arange(length, device=self._device)
        self._step = _Step(
            torch.tensor(slots, device=self._device),
            torch.where(real, positions, self._length),
            length,
            keys <= positions[:, None, :, None],  # [batch, 1, pos, key]
            slots[0] if list(slots) == list(range(slots[0], slots[0] + len(slots))) else None,
        )
        self._masks = {
            window: self._step.mask & (keys > positions[:, None, :, None] - window)
            for window in set(self._windows.values())
        }
        return positions

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens of the running forward's rows, and where attention may look; see `Memory`."""
        step = self._step
        assert step is not None, "a forward is announced before it runs"
        window = self._windows.get(layer)
        mask = step.mask if window is None else self._masks[window]
        keys = self._extended(self._keys, layer, key, step)
        return keys, self._extended(self._values, layer, value, step), mask.to(key.device)

    def used_by(self, forward: Forward, positions: torch.Tensor) -> Forward:
        """The announced forward, with what it goes on from."""
        return replace(forward, memory=self, positions=positions)

    def move(self, source: int, target: int) -> None:
        """Gives the run in one slot another, and clears the one that it leaves."""
        for held in self._all():
            if max(source, target) < held.shape[0]:
                held[target] = held[source]
        self.forget(source)

    def forget(self, slot: int) -> None:
        """Clears a slot: its run may have left values there that are not finite."""
        for held in self._all():
            if slot < held.shape[0]:
                held[slot] = 0

    def _all(self) -> tuple[torch.Tensor, ...]:
        return (*self._keys.values(), *self._values.values())

    def clear(self) -> None:
        """Lets go of all room."""
        self._keys.clear()
        self._values.clear()
        self._capacity, self._length = 1, 1

    def _extended(self, store: dict[int, torch.Tensor], layer: int, new: torch.Tensor, step: _Step) -> torch.Tensor:
        held = store.get(layer)
        if held is None:
            held = store[layer] = self._room(new)
        slots, places = step.slots.to(held.device), step.places.to(held.device)
        held[slots[:, None], :, places] = new.transpose(1, 2)  # [batch, pos, kv_head, d_head]
        if step.first is None:
            return held.index_select(0, slots)[:, :, : step.length]
        return held[step.first : step.first + len(slots), :, : step.length]

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        """[slot, kv_head, pos + 1, d_head]; the last place is for padding."""
        return like.new_zeros(self._capacity, like.shape[1], self._length + 1, like.shape[3])

    def _make_room(self, slots: int, length: int) -> None:
        """Grows everything or, where memory runs out on the way, nothing."""
        if slots <= self._capacity and length <= self._length:
            return
        capacity = max(self._capacity, 1 << (slots - 1).bit_length())
        longest = max(self._length, 1 << (length - 1).bit_length())
        keys, values = (
            {layer: self._grown(held, capacity, longest) for layer, held in store.items()}
            for store in (self._keys, self._values)
        )
        self._keys, self._values, self._capacity, self._length = keys, values, capacity, longest

    def _grown(self, held: torch.Tensor, capacity: int, longest: int) -> torch.Tensor:
        grown = held.new_zeros(capacity, held.shape[1], longest + 1, held.shape[3])
        grown[: held.shape[0], :, : self._length] = held[:, :, : self._length]
        return grown


class OwnCaches:
    """The same for a model whose attention is out of reach: a cache of its own kind for each slot, one row a forward.

    Such a cache grows with every forward, also with one that is not finished: a run whose forward failed cannot go on.
    """

    def __init__(self, make: Callable[[], Any], device: torch.device) -> None:
        self._make = make
        self._device = device
        self._caches: dict[int, Any] = {}
        self._slot = 0

    def begin(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Announces a forward of one row, as `Slots.begin` does."""
        (self._slot,), (start,), (count,) = slots, starts, counts
        return torch.arange(start, start + count, device=self._device)[None]

    def used_by(self, forward: Forward, positions: torch.Tensor) -> Forward:
        """The announced forward, with what it goes on from."""
        return replace(forward, own_cache=self._caches.setdefault(self._slot, self._make()))

    def move(self, source: int, target: int) -> None:
        """Gives the run in one slot another."""
        self._caches[target] = self._caches.pop(source)

    def forget(self, slot: int) -> None:
        """Lets go of what a slot holds."""
        self._caches.pop(slot, None)

    def clear(self) -> None:
        """Lets go of everything."""
        self._caches.clear()
