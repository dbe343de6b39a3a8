"""Loading a causal language model with `transformers`: from a local directory or a hub id.

Nothing that a checkpoint brings along is executed (`trust_remote_code` is off). `device_map` goes through accelerate.
The revision that Describe reports is the hub's commit, or a digest of the local files: their names and sizes, all of
the configuration, and samples of every tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging

from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.errors import FailedPrecondition

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json", "sentencepiece.bpe.model",
)  # fmt: skip
_SAMPLE_BYTES = 4096

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Which model to load, and how.

    `source` is a directory or a hub id. `dtype` is auto (the checkpoint's own), float32, bfloat16 or float16. `device`
    is auto (CUDA if there, else CPU) or a torch device. `device_map` (such as `auto` or `balanced`) spreads the model
    over devices and overrides `device`. `offline` forbids any look-up on the hub.
    """

    source: str
    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    offline: bool = False


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model with its tokenizer (None when the checkpoint has none) and revision."""

    model: PreTrainedModel
    tokenizer: Tokenizer | None
    revision: str


def load_checkpoint(source: ModelSource, progress: Callable[[str, float], None]) -> Checkpoint:
    """Loads weights and tokenizer. Raises FailedPrecondition that says what could not be loaded and why.

    `progress` is told each stage in words, with the share done, 0 to 1.
    """
    device = resolve_device(source.device)
    place = _place(source.source)
    options: dict[str, Any] = {
        "revision": source.revision or "main",
        "local_files_only": source.offline,
        "trust_remote_code": False,
    }
    # Loading tells its own progress; a server's log is no place for bars.
    logging.disable_progress_bar()
    progress(f"reading the configuration of {source.source}", 0.05)
    try:
        config = AutoConfig.from_pretrained(place, **options)
        progress("loading weights", 0.1)
        model, report = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            output_loading_info=True,
            dtype="auto" if source.dtype == "auto" else DTYPES[source.dtype],
            # SDPA knows no soft caps; the engine's own attention function takes over once the adapter is built.
            attn_implementation="eager",
            **({"device_map": source.device_map} if source.device_map else {}),
            **options,
        )
    except Exception as fault:  # transformers, safetensors and torch each raise their own
        raise FailedPrecondition(f"cannot load the model {source.source!r}: {fault}") from fault
    if report["missing_keys"]:
        # They would be random numbers.
        missing = ", ".join(sorted(report["missing_keys"]))
        raise FailedPrecondition(f"the checkpoint {source.source!r} lacks weights of its own model: {missing}")
    if not source.device_map:
        progress(f"moving weights to {device}", 0.6)
        model = model.to(device)
    model.eval().requires_grad_(False)
    progress("loading the tokenizer", 0.65)
    return Checkpoint(model, _load_tokenizer(place, options), _revision(place, options))


def resolve_device(name: str) -> torch.device:
    """The device of a name; `auto` is CUDA if there, else CPU. Raises FailedPrecondition for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise FailedPrecondition(f"the device {name!r} is not available: {fault}") from fault
    return device


def _place(source: str) -> str:
    """The directory or hub id. Raises FailedPrecondition for a directory that is not there."""
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if source.startswith(("/", ".", "~")):
        raise FailedPrecondition(f"cannot load the model {source!r}: there is no such directory")
    return source


def _load_tokenizer(place: str, options: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer beside the weights. A directory without one can still be run on token ids; one that is there and
    cannot be loaded is a fault."""
    folder = Path(place)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as fault:  # transformers and tokenizers each raise their own
        raise FailedPrecondition(f"cannot load the tokenizer of {place!r}: {fault}") from fault
    # Where there are no files, some classes make up a tokenizer of special tokens only: it would drop every text.
    empty = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    return None if empty else Tokenizer(tokenizer)


def _revision(place: str, options: dict[str, Any]) -> str:
    folder = Path(place)
    if not folder.is_dir():
        # The cache of the hub keeps a commit's files in a folder of that name.
        return Path(str(cached_file(place, "config.json", **options))).parent.name
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            for piece in _samples(path) if path.suffix == ".safetensors" else [path.read_bytes()]:
                digest.update(piece)
    return digest.hexdigest()[:12]


def _samples(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and the beginning, middle and end of every tensor: reading all of a large
    checkpoint would take longer than loading it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        yield header
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                for start in (first, (first + last) // 2, max(first, last - _SAMPLE_BYTES)):
                    file.seek(8 + size + start)
                    yield file.read(min(_SAMPLE_BYTES, last - start))
