"""Read a model's next-token distributions and greedy replies, for batches of prompts.

Prompts are padded on the left, so that every prompt ends at the last position of its row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchEncoding, LlamaForCausalLM, PreTrainedTokenizerFast

_REPLY_LIMIT = 24


@dataclass(frozen=True)
class Subject:
    """A model under examination, with its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @torch.no_grad()
    def next_log_probs(self, prompts: Sequence[str]) -> Tensor:
        """[prompt, vocab], at each prompt's last token."""
        logits: Tensor = self.model(**self._batch(prompts), use_cache=False).logits[:, -1]
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def block_inputs(self, prompts: Sequence[str]) -> Tensor:
        """The residual stream before every block, prompts ending together: [layer, prompt, pos, d_model]."""
        output = self.model(**self._batch(prompts), use_cache=False, output_hidden_states=True)
        return torch.stack(output.hidden_states[:-1])

    @torch.no_grad()
    def greedy_replies(self, prompts: Sequence[str]) -> list[str]:
        """The text after each prompt, up to the end-of-reply token."""
        batch = self._batch(prompts)
        ids = self.model.generate(**batch, max_new_tokens=_REPLY_LIMIT, do_sample=False)
        replies = ids[:, batch["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(replies, skip_special_tokens=True))

    def token(self, word: str) -> int:
        """The id of the first token of ``word`` where it follows a space."""
        return int(self.tokenizer(word, add_special_tokens=False)["input_ids"][0])

    def _batch(self, prompts: Sequence[str]) -> BatchEncoding:
        return self.tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
