"""The model: a plain Qwen2 (a Llama with q, k and v biases), and how it is initialised.

One choice deserves a word: the q and k biases of every layer start at a constant per head, from 2.2 for the first head
to 0 for the last. Under rotary embeddings a constant query meeting a constant key gives a score that falls with
distance, so this is a graded recency prior, the rotary counterpart of ALiBi's slopes (Press et al. 2022). It is the
same in every layer, trainable, and points at no task; in experiments induction did not form without it within a short
training.
"""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from patchclamp_server.demo.tokenizer import CONTEXT_LENGTH

_EMBEDDING_STD = 0.7
_UNEMBEDDING_STD = 0.04
_HIDDEN_GAIN = 0.6
_STRONGEST_RECENCY = 2.2


@dataclass(frozen=True)
class Shape:
    n_layers: int = 6
    n_heads: int = 6
    d_head: int = 32
    d_mlp: int = 512

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_head


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        initializer_range=_HIDDEN_GAIN / math.sqrt(shape.d_model),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    # On CPUs the backward pass of the fused attention alone would take a third of a step.
    model.set_attn_implementation("eager")
    _initialise(model, shape)
    return model


@torch.no_grad()
def _initialise(model: Qwen2ForCausalLM, shape: Shape) -> None:
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=_EMBEDDING_STD)
    # Tied at the start only: a word then begins by predicting itself a little, which copying can build on.
    model.lm_head.weight.copy_(embedding * (_UNEMBEDDING_STD / _EMBEDDING_STD))
    recency = torch.linspace(_STRONGEST_RECENCY, 0, shape.n_heads).repeat_interleave(shape.d_head)  # [n_heads * d_head]
    residual_scale = 1 / math.sqrt(2 * shape.n_layers)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(residual_scale)
        layer.mlp.down_proj.weight.mul_(residual_scale)
        layer.self_attn.q_proj.bias.copy_(recency)
        layer.self_attn.k_proj.bias.copy_(recency)
