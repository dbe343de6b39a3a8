"""The shipped transcoders are what circuit-tracer reads from the same files; `golden/` holds what it made of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from patchclamp_server.demo import transcoder_dirs
from patchclamp_server.demo.transcoder_files import load_transcoders

GOLDEN = Path(__file__).parent / "golden" / "circuit_tracer.npz"


@pytest.mark.parametrize("kind", ["per_layer", "cross_layer"])
def test_features_and_outputs_are_those_of_circuit_tracer(kind: str) -> None:
    transcoders = load_transcoders(transcoder_dirs()[kind])
    with np.load(GOLDEN) as golden:
        inputs, active, outputs = (golden[name] for name in ("input", f"{kind}_active", f"{kind}_output"))
    features = [transcoders.features(layer, torch.from_numpy(x)) for layer, x in enumerate(inputs)]
    assert [(f > 0).sum(-1).tolist() for f in features] == active.tolist()
    assert active.sum() > 0
    for layer, wanted in enumerate(outputs):
        # float32 sums of some hundred terms, in another order
        got = transcoders.output(layer, features).numpy()
        assert np.abs(got - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
