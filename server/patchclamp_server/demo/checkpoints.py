"""Checkpoints of a training stage: one file each, replaced as a whole."""

from pathlib import Path
from typing import Any

import torch


def restore(path: Path, device: torch.device) -> dict[str, Any] | None:
    """What was last saved, with the random state put back; None where nothing was."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    torch.set_rng_state(state["rng"].cpu())
    return state


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` and the random state to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state | {"rng": torch.get_rng_state()}, partial)
    # A rename is atomic: an interruption leaves the old checkpoint or the new one, never half of one.
    partial.replace(path)
