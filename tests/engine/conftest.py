"""One thread and exact float32 for every test of the engine."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

# A machine with a GPU may lack what only the property-based tests need.
collect_ignore = [] if find_spec("hypothesis") else ["test_positions.py", "test_scheduling_properties.py"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The models are too small to share out, and sums are added up in the same order every time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def exact_products() -> None:
    """TF32 keeps ten bits of each factor: the tolerances here are for float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
