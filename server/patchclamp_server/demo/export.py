"""Write a model directory: weights rounded to bfloat16, which load as float32, and the tokenizer.

The model is trained as a Qwen2 and written as the same function under another name: a Llama whose attention has biases,
that of the output projection being zero. `AutoTokenizer` gives every directory of a Qwen2 the byte-level tokenizer of
that family, whatever tokenizer lies there; of a Llama it takes the one that is there.
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

_READABLE_BY_ALL = 0o644
_SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write both to ``directory``; ``model`` itself is left as it was.

    The configuration keeps the model's own dtype, float32: half the bytes on disk, but float32 arithmetic for whoever
    loads the directory without further ado.
    """
    llama = as_llama(model)
    rounded = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in llama.state_dict().items()}
    llama.save_pretrained(directory, state_dict=rounded)
    (directory / "model.safetensors").chmod(_READABLE_BY_ALL)
    tokenizer.save_pretrained(directory)


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama."""
    settings = {name: getattr(model.config, name) for name in _SHARED_SETTINGS}
    llama = LlamaForCausalLM(LlamaConfig(**settings, attention_bias=True, dtype="float32"))
    added = {name: torch.zeros_like(bias) for name, bias in llama.state_dict().items() if name.endswith("o_proj.bias")}
    llama.load_state_dict(model.state_dict() | added)
    return llama
