"""Write what circuit-tracer makes of the shipped transcoders: ``circuit_tracer.npz``.

Run by hand, in an environment that has circuit-tracer and torch, after the weights were replaced:

    python tests/demo/golden/make_circuit_tracer.py server/patchclamp_server/demo/model/transcoders

Its own loaders read the files; the arrays are its features and outputs for inputs drawn with a fixed seed.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt  # type: ignore[import-not-found]
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set  # type: ignore[import-not-found]

HERE = Path(__file__).parent
SEED, N_POSITIONS, SCALE = 17, 5, 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("transcoders", type=Path)
    directory = parser.parse_args().transcoders
    files = sorted((directory / "per_layer").glob("layer_*.safetensors"))
    per_layer = load_transcoder_set(
        {layer: str(file) for layer, file in enumerate(files)},
        scan="demo",
        feature_input_hook="mlp.hook_in",
        feature_output_hook="mlp.hook_out",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    cross_layer = load_clt(
        str(directory / "cross_layer"), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False
    )
    x = (
        torch.randn(len(files), N_POSITIONS, per_layer[0].d_model, generator=torch.Generator().manual_seed(SEED))
        * SCALE
    )
    arrays = {}
    with torch.no_grad():
        for name, transcoders in (("per_layer", per_layer), ("cross_layer", cross_layer)):
            features = transcoders.encode(x)  # [layer, pos, feature]
            arrays[f"{name}_active"] = (features > 0).sum(-1).numpy()
            given = (features, x) if name == "per_layer" else (features.to_sparse(),)
            arrays[f"{name}_output"] = transcoders.decode(*given).numpy()  # [layer, pos, d_model]
    np.savez_compressed(HERE / "circuit_tracer.npz", input=x.numpy(), **arrays)
    versions = {name: version(name) for name in ("circuit-tracer", "torch", "safetensors")}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
