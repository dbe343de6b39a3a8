"""Names under which the parts of a block are found: the only table about architectures.

Where a block writes to the residual stream, which norm does what, multipliers and the parallel layout are not listed
anywhere: `algebra` solves them from one recorded forward. What stands here are the places to look for the attention and
MLP modules and their projections, and how fused projections lay out their outputs.
"""

from __future__ import annotations

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
INNER_ATTENTION = ("attention", "self")
MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")

QUERY = ("q_proj", "query", "wq")
KEY = ("k_proj", "key", "wk")
VALUE = ("v_proj", "value", "wv")
ATTENTION_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")
QUERY_NORM = ("q_norm", "q_layernorm", "query_layernorm")
KEY_NORM = ("k_norm", "k_layernorm", "key_layernorm")

# Fused projections: all queries, then all keys, then all values ...
FUSED_CONTIGUOUS = ("c_attn", "qkv_proj", "Wqkv")
# ... or, for each key/value head, its queries, its key and its value.
FUSED_GROUPED = ("query_key_value",)

GATE = ("gate_proj", "w1")
UP = ("up_proj", "w3", "c_fc", "dense_h_to_4h", "fc_in", "fc1")
FUSED_GATE_UP = ("gate_up_proj",)
DOWN = ("down_proj", "w2", "c_proj", "dense_4h_to_h", "fc_out", "fc2")

ROUTER = ("gate", "router")
EXPERTS = ("experts",)

POSITION_EMBEDDING = ("wpe", "embed_positions", "position_embeddings")
