"""The bank: vectors of one width, shared by content. Slot 0 is exactly zero, always.

Rows of a batch route into it by slot. Slots are counted: who no longer uses one releases it, and it is filled anew.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch.nn import functional


class Bank:
    """Vectors [slots, width] on a device. It grows by doubling; until it does, its tensor stays in place."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, slots: int = 8) -> None:
        self.vectors = torch.zeros(slots, width, dtype=dtype, device=device)
        self._slot_of: dict[bytes, int] = {}
        self._content: dict[int, bytes] = {}
        self._users: Counter[int] = Counter()
        self._free = list(range(slots - 1, 0, -1))

    def __len__(self) -> int:
        """Slots in use beside slot 0."""
        return len(self._users)

    def acquire(self, vectors: torch.Tensor) -> list[int]:
        """The slots of vectors [n, width or less]; narrower ones end in zeros. Zero vectors are slot 0."""
        rows = vectors.to(self.vectors.dtype)
        # Captured values stay on their device; to compare them they would have to come to the host.
        contents = _contents(rows) if rows.is_cpu else [None] * len(rows)
        slots, new = [], {}
        for index, content in enumerate(contents):
            slot = 0 if content == b"" else self._slot_of.get(content) if content is not None else None
            if slot is None:
                slot = self._take(content)
                new[slot] = index
            if slot:
                self._users[slot] += 1
            slots.append(slot)
        if new:
            where = torch.tensor(list(new), device=self.vectors.device)
            chosen = rows[list(new.values())].to(self.vectors.device)
            self.vectors[where] = functional.pad(chosen, (0, self.vectors.shape[1] - chosen.shape[1]))
        return slots

    def release(self, slots: list[int]) -> None:
        """Gives slots back, once for each time that they were acquired."""
        for slot in slots:
            if slot == 0:
                continue
            self._users[slot] -= 1
            if not self._users[slot]:
                del self._users[slot]
                self._slot_of.pop(self._content.pop(slot, b""), None)
                self._free.append(slot)

    def _take(self, content: bytes | None) -> int:
        """A free slot, known by its content from now on."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        if content is not None:
            self._slot_of[content], self._content[slot] = slot, content
        return slot

    def _grow(self) -> None:
        slots = self.vectors.shape[0]
        self.vectors = torch.cat([self.vectors, torch.zeros_like(self.vectors)])
        self._free = list(range(2 * slots - 1, slots - 1, -1))


def _contents(rows: torch.Tensor) -> list[bytes]:
    """A digest of each row's bytes; nothing for zero rows."""
    some = rows.any(-1).tolist()
    data = rows.contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(data[i].data).digest() if some[i] else b"" for i in range(len(rows))]
