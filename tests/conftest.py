"""Options and fixtures that the tests of several parts share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="run the tests that take a device on this one only (default: on all at hand)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` runs on each device at hand; on CUDA it carries the marker `gpu`."""
    if "device" not in metafunc.fixturenames:
        return
    import torch  # the tests of the SDK run without it

    asked = metafunc.config.getoption("--device")
    there = ("cpu", "cuda") if torch.cuda.is_available() or asked == "cuda" else ("cpu",)
    marks = {"cuda": [pytest.mark.gpu], "cpu": []}
    devices = [pytest.param(device, marks=marks[device]) for device in there if asked in (None, device)]
    metafunc.parametrize("device", devices)
