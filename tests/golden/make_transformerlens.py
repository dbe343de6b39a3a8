"""Write what TransformerLens reads at its hook points in the tiny models, one npz per family.

Run by hand, in an environment that has transformer-lens (the server's has not); README.md beside this file says how,
and what each of TransformerLens's hook points holds. Per family:

1. the plain `transformers` model gives `hf_logits`;
2. the very same model in a `TransformerBridge`, no weights folded or centred, runs on the first prompt: bare, and
   once with each flag that opens further hook points;
3. every run must give the plain model's logits, and the arrays go under patchclamp's names, without the batch axis:
   the last layer of each kind (sliding, full) in full, of the others an outline.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformer_lens.model_bridge.sources._bridge_builder import (  # type: ignore[import-not-found]
    build_bridge_from_module,
)

from families import FAMILIES, Family, build, prompt_ids

Arrays = dict[str, NDArray[np.float32]]

COMMAND = "PYTHONPATH=tests python tests/golden/make_transformerlens.py --out tests/golden"
LOGIT_TOLERANCE = 1e-5
# All that is kept of a layer when a later one is of the same kind: enough to tell the two apart.
OUTLINE = ("resid_pre", "attn.pattern", "attn.out", "resid_mid", "mlp.out", "resid_post")

MODEL_SITES = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "ln_final.scale": "ln_final.hook_scale",
    "ln_final": "ln_final.hook_out",
}
BLOCK_SITES = {
    "resid_pre": "hook_resid_pre",
    "ln1.scale": "ln1.hook_scale",
    "ln1.normalized": "ln1.hook_normalized",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.q_norm.scale": "attn.q_norm.hook_scale",
    "attn.k_norm.scale": "attn.k_norm.hook_scale",
    "attn.rot_q": "attn.hook_rot_q",
    "attn.rot_k": "attn.hook_rot_k",
    "attn.scores": "attn.hook_attn_scores",
    "attn.pattern": "attn.hook_pattern",
    "attn.z": "attn.hook_z",
    "attn.out": "hook_attn_out",
    "ln1_post.scale": "ln1_post.hook_scale",
    "resid_mid": "hook_resid_mid",
    "ln2.scale": "ln2.hook_scale",
    "ln2.normalized": "ln2.hook_normalized",
    "mlp.pre": "mlp.hook_pre",
    "mlp.pre_linear": "mlp.hook_pre_linear",
    "mlp.post": "mlp.hook_post",
    "mlp.out": "hook_mlp_out",
    "ln2_post.scale": "ln2_post.hook_scale",
    "resid_post": "hook_resid_post",
}
# TransformerLens keeps these as [head, pos, 1] where the norm is per head.
HEADS_FIRST = ("attn.q_norm.scale", "attn.k_norm.scale")
# Only where a post-norm follows: elsewhere they are attn.out and mlp.out again, and in BLOOM they hold the stream.
POST_NORM_SITES = {"attn.out_raw": "attn.hook_out", "mlp.out_raw": "mlp.hook_out"}
ROUTER_SITES = {"router.logits": "mlp.gate.hook_out", "router.weights": "mlp.hook_expert_weights"}
# Opened by flags, one at a time: the last two exclude each other.
FLAGGED_SITES = {
    "use_attn_result": {"attn.result": "attn.hook_result"},
    "use_hook_mlp_in": {"mlp.in": "hook_mlp_in"},
    "use_split_qkv_input": {
        "attn.q_input": "hook_q_input",
        "attn.k_input": "hook_k_input",
        "attn.v_input": "hook_v_input",
    },
    "use_attn_in": {"attn.in": "hook_attn_in"},
}

# What TransformerLens reads there is something else: README.md has the evidence.
_FORKS = ("attn.in", "attn.q_input", "attn.k_input", "attn.v_input")
WRONG: dict[str, tuple[str, ...]] = {
    "gptj": ("attn.scores",),
    "bloom": _FORKS,
    "mixtral": ("mlp.pre", "mlp.post"),
    "qwen3_moe": ("mlp.pre", "mlp.post"),
}


def main() -> None:
    """Write every family's arrays, the versions they came from and what TransformerLens refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the npz files and versions.json")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    refused: dict[str, str] = {}
    for family in FAMILIES:
        try:
            arrays = golden(family, refused)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            refused[family.name] = _first_sentence(error)
            arrays = {"hf_logits": _array(_hf_logits(family))}
        np.savez_compressed(out / f"{family.name}.npz", **arrays)  # type: ignore[arg-type]
        print(f"{family.name:20} {len(arrays):4} arrays")
    (out / "versions.json").write_text(json.dumps({**_versions(), "refused": refused}, indent=2) + "\n")


def golden(family: Family, refused: dict[str, str]) -> Arrays:
    """All arrays of one family; a flag that TransformerLens refuses is noted and its sites are left out."""
    hf_logits = _hf_logits(family)
    cache = _run(family, (), hf_logits)
    arrays = _pick(cache, MODEL_SITES, prefix="")
    for layer, in_full in enumerate(_layers(family)):
        sites = _block_sites(cache, layer)
        outline = {site: hook for site, hook in sites.items() if site in OUTLINE}
        arrays |= _pick(cache, sites if in_full else outline, prefix=f"blocks.{layer}.")
    for flag, sites in FLAGGED_SITES.items():
        try:
            flagged = _run(family, (flag,), hf_logits)
        except NotImplementedError as error:
            refused[f"{family.name}: {flag}"] = _first_sentence(error)
            continue
        for layer, in_full in enumerate(_layers(family)):
            arrays |= _pick(flagged, sites if in_full else {}, prefix=f"blocks.{layer}.")
    wrong = tuple(f".{site}" for site in WRONG.get(family.name, ()))
    kept = {name: array for name, array in arrays.items() if not name.endswith(wrong)}
    return kept | {"logits": _array(cache["logits"]), "hf_logits": _array(hf_logits)}


def _layers(family: Family) -> list[bool]:
    """For each layer, whether it is kept in full: whether it is the last of its kind."""
    config = build(family).config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind not in kinds[layer + 1 :] for layer, kind in enumerate(kinds)]


def _hf_logits(family: Family) -> torch.Tensor:
    with torch.inference_mode():
        return build(family)(_prompt(family)).logits


def _run(family: Family, flags: tuple[str, ...], hf_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """One bridged forward with these flags set: its cache, and its logits under `logits`."""
    model: Any = build(family)
    # A fresh model each time: the bridge replaces sub-modules of the one it is given.
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    for flag in flags:
        getattr(bridge, f"set_{flag}")(True)
    with torch.inference_mode():
        logits, cache = bridge.run_with_cache(_prompt(family))
    drift = float((logits - hf_logits).abs().max())
    assert drift < LOGIT_TOLERANCE, f"{family.name} {flags}: the bridge's logits are {drift:.1e} off the model's"
    return dict(cache.items()) | {"logits": logits}


def _prompt(family: Family) -> torch.Tensor:
    return torch.tensor([prompt_ids(family)[0]])


def _block_sites(cache: Mapping[str, torch.Tensor], layer: int) -> dict[str, str]:
    """The sites that need no flag, with those that only some blocks have."""
    has_post_norm = f"blocks.{layer}.ln1_post.hook_out" in cache
    has_router = f"blocks.{layer}.mlp.hook_expert_weights" in cache
    return BLOCK_SITES | (POST_NORM_SITES if has_post_norm else {}) | (ROUTER_SITES if has_router else {})


def _pick(cache: Mapping[str, torch.Tensor], sites: Mapping[str, str], prefix: str) -> Arrays:
    """The arrays of the sites which this model has, under patchclamp's names."""
    present = {site: hook for site, hook in sites.items() if prefix + hook in cache}
    return {
        prefix + site: _array(cache[prefix + hook], heads_first=site in HEADS_FIRST) for site, hook in present.items()
    }


def _array(tensor: torch.Tensor, heads_first: bool = False) -> NDArray[np.float32]:
    """Without the batch axis (routers have none), and position before head."""
    # A router's [pos, expert] is the only matrix; everything else starts with the batch of one.
    unbatched = tensor if tensor.ndim == 2 else tensor[0]
    if heads_first and unbatched.ndim == 3:
        unbatched = unbatched.transpose(0, 1)
    return np.ascontiguousarray(unbatched.numpy(), dtype=np.float32)


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0]


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "transformer-lens", "numpy")
    return {"command": COMMAND, "python": platform.python_version()} | {name: version(name) for name in packages}


if __name__ == "__main__":
    main()
