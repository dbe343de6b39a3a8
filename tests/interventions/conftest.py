"""One thread for every test of interventions."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

# A machine with a GPU may lack what only the property-based tests need.
collect_ignore = [] if find_spec("hypothesis") else ["test_bank.py", "test_combinations.py"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The models are too small to share out, and sums are added up in the same order every time."""
    torch.set_num_threads(1)
