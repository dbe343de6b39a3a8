"""What reading costs: forwards of a GPT-2-small-sized random model with hooks, against plain `transformers`.

12 layers, d_model 768, 8 prompts of 64 tokens, float32, one thread. Both sides compute the logits of every position;
`reads` are taken by the engine as a request's would be, up to the results on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import Row, interleaved
from patchclamp_server.adapters.load import Checkpoint
from patchclamp_server.engine.execution import execute
from patchclamp_server.engine.loading import Resident, make_resident
from patchclamp_server.engine.messages import LogitsSpec, ReadSpec, RunSpec
from patchclamp_server.hookpoints import Site, SiteInfo
from patchclamp_server.positions import ALL

BATCH, LENGTH = 8, 64


def run(repeats: int) -> list[Row]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    # A configuration each: the engine sets its attention function on that of its model.
    plain = GPT2LMHeadModel._from_config(_config(), attn_implementation="sdpa").eval()
    hooked = GPT2LMHeadModel._from_config(_config(), attn_implementation="eager").eval()
    hooked.load_state_dict(plain.state_dict())
    resident = make_resident(Checkpoint(hooked.requires_grad_(False), None, "random"), "gpt2-small", lambda _: None)
    ids = torch.randint(_config().vocab_size, (BATCH, LENGTH))
    everything = tuple(_read(info) for info in resident.facts.sites if info.site is not Site.LOGITS)
    resid_post = (_read(resident.facts.site_info[Site.RESID_POST]),)
    timings = interleaved(
        {
            "plain": lambda: plain(input_ids=ids, use_cache=False).logits,
            "nothing": _side(resident, ids, ()),
            "resid_post": _side(resident, ids, resid_post),
            "everything": _side(resident, ids, everything),
            "last logits": _side(resident, ids, resid_post, every_logit=False),
        },
        repeats,
    )
    base = timings["plain"].fastest
    arrays = sum(len(read.layers) for read in everything)
    ratio = {name: timing.fastest / base for name, timing in timings.items()}
    return [
        Row("plain `transformers` forward, all logits", f"{base:.2f} CPU s"),
        Row("the engine, nothing read", f"{ratio['nothing']:.3f} × plain"),
        Row(
            "the engine, every `resid_post`",
            f"{ratio['resid_post']:.3f} × plain",
            "≤ 1.05",
            ratio["resid_post"] <= 1.05,
        ),
        Row(
            f"the engine, everything ({arrays} arrays)",
            f"{ratio['everything']:.3f} × plain",
            "≤ 1.3",
            ratio["everything"] <= 1.3,
        ),
        Row("the engine, every `resid_post`, logits of the last position only", f"{ratio['last logits']:.3f} × plain"),
    ]


def _config() -> GPT2Config:
    return GPT2Config(bos_token_id=None, eos_token_id=None)


def _side(
    resident: Resident, ids: torch.Tensor, reads: tuple[ReadSpec, ...], *, every_logit: bool = True
) -> Callable[[], object]:
    logits = LogitsSpec(positions=ALL, values=True) if every_logit else LogitsSpec(values=True)
    runs = [RunSpec(tuple(row), reads, logits) for row in ids.tolist()]
    return lambda: execute(resident.runner, runs)


def _read(info: SiteInfo) -> ReadSpec:
    return ReadSpec(info.site, info.layers or (None,))
