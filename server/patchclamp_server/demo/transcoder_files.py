"""Transcoders on disk, in the layout that circuit-tracer reads: a ``config.yaml`` and safetensors.

Per layer: ``layer_0.safetensors``, ..., each with ``W_enc`` and ``W_dec`` [feature, d_model], ``b_enc``, ``b_dec`` and
``activation_function.threshold``. Cross-layer: ``W_enc_0.safetensors`` with ``W_enc_0``, ``b_enc_0``, ``b_dec_0`` and
``threshold_0``, and ``W_dec_0.safetensors`` with ``W_dec_0`` [feature, target, d_model]. Like the model's, the tensors
are rounded to bfloat16.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchclamp_server.demo.transcoders import TranscoderSet, TranscoderShape

_PER_LAYER, _CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"
_MODEL_NAME = "patchclamp-demo"


def save_transcoders(transcoders: TranscoderSet, directory: Path) -> None:
    """Write a set whose scales are folded in."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_kind": _CROSS_LAYER if transcoders.shape.cross_layer else _PER_LAYER,
        "model_name": _MODEL_NAME,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": f"{_MODEL_NAME}/{directory.name}",
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for file, tensors in _files(transcoders):
        rounded = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_file(rounded, directory / file)


def _files(transcoders: TranscoderSet) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for layer, decoder in enumerate(transcoders.W_dec):
        encoder = {
            "W_enc": transcoders.W_enc[layer],
            "b_enc": transcoders.b_enc[layer],
            "b_dec": transcoders.b_dec[layer],
        }
        threshold = transcoders.threshold[layer]
        if transcoders.shape.cross_layer:
            named = {f"{name}_{layer}": tensor for name, tensor in (*encoder.items(), ("threshold", threshold))}
            yield f"W_enc_{layer}.safetensors", named
            yield f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder}
        else:
            own = {"W_dec": decoder[:, 0], "activation_function.threshold": threshold}
            yield f"layer_{layer}.safetensors", encoder | own


@torch.no_grad()
def load_transcoders(directory: Path) -> TranscoderSet:
    """Read a set that ``save_transcoders`` wrote, as float32."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    cross_layer = config["model_kind"] == _CROSS_LAYER
    layers = [*(_cross_layers if cross_layer else _per_layers)(directory)]
    n_features, d_model = layers[0]["W_enc"].shape
    transcoders = TranscoderSet(TranscoderShape(len(layers), n_features, d_model, cross_layer)).requires_grad_(False)
    for layer, tensors in enumerate(layers):
        transcoders.W_enc[layer] = tensors["W_enc"]
        transcoders.b_enc[layer] = tensors["b_enc"]
        transcoders.b_dec[layer] = tensors["b_dec"]
        transcoders.threshold[layer] = tensors["threshold"]
        transcoders.W_dec[layer].copy_(tensors["W_dec"])
    return transcoders


def _per_layers(directory: Path) -> Iterator[dict[str, Tensor]]:
    for layer in range(len([*directory.glob("layer_*.safetensors")])):
        tensors = load_file(directory / f"layer_{layer}.safetensors")
        yield tensors | {"W_dec": tensors["W_dec"][:, None], "threshold": tensors["activation_function.threshold"]}


def _cross_layers(directory: Path) -> Iterator[dict[str, Tensor]]:
    for layer in range(len([*directory.glob("W_enc_*.safetensors")])):
        tensors = load_file(directory / f"W_enc_{layer}.safetensors")
        tensors |= load_file(directory / f"W_dec_{layer}.safetensors")
        yield {name.removesuffix(f"_{layer}"): tensor for name, tensor in tensors.items()}
