"""How well the transcoders stand in for the MLPs: alone, and all at once.

The texts are drawn as in deployment, with a seed that no training uses. Counted are the tokens that training predicts:
not padding, not the token that begins a text, not the first half of an induction row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from patchclamp_server.demo import behaviours
from patchclamp_server.demo.batches import Batch, BatchSource
from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.corpus.mixture import DEPLOYED
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.transcoders import TranscoderSet, mlps_hooked, mlps_recorded, mlps_replaced

_SEED = "evaluation"
_INDUCTION_SHARE = 0.12
_ROWS = 24
_KEPT_TASKS = (
    behaviours.two_hop,
    behaviours.indirect_object,
    behaviours.repeated_sequences,
    behaviours.later_years,
    behaviours.opposites,
)


def replacement(subject: Subject, transcoders: TranscoderSet, n_batches: int = 6) -> Iterator[Figure]:
    """Quality of every transcoder, then of the model with all of them, then what it still can do."""
    task = f"transcoders, {transcoders.shape.kind}"
    source = BatchSource(subject.tokenizer, DEPLOYED, _ROWS, _INDUCTION_SHARE, _SEED)
    batches = [source.batch(step) for step in range(n_batches)]
    yield from _alone(task, subject, transcoders, batches)
    yield from _together(task, subject, transcoders, batches)
    with mlps_replaced(subject.model, transcoders):
        for measure in _KEPT_TASKS:
            # The first figure of each is the one that has a gate.
            figure = next(measure(subject))
            yield Figure(task, f"with all MLPs replaced: {figure.task}, {figure.what}", figure.value, figure.items)


@dataclass(frozen=True)
class _Alone:
    """Each transcoder on the inputs of the real MLP, over ``n_tokens``: sums [layer], and which features ever fired."""

    n_tokens: int
    error: Tensor
    variance: Tensor
    active: Tensor
    fired: Tensor  # [layer, feature]

    @classmethod
    def of(cls, subject: Subject, transcoders: TranscoderSet, batch: Batch) -> "_Alone":
        unexplained = [subject.tokenizer.pad_token_id, subject.tokenizer.bos_token_id]
        here = ~torch.isin(batch.ids, torch.tensor(unexplained))
        with mlps_recorded(subject.model) as (inputs, recorded):
            _log_probs(subject, batch)
        features = [transcoders.features(layer, x[here]) for layer, x in enumerate(inputs)]
        outputs = [y[here] for y in recorded]
        errors = [transcoders.output(layer, features) - y for layer, y in enumerate(outputs)]
        firing = torch.stack(features) > 0  # [layer, token, feature]
        return cls(
            n_tokens=int(here.sum()),
            error=torch.stack([error.pow(2).sum() for error in errors]),
            variance=torch.stack([(y - y.mean(0)).pow(2).sum() for y in outputs]),
            active=firing.sum((1, 2)),
            fired=firing.any(1),
        )

    def __add__(self, other: "_Alone") -> "_Alone":
        return _Alone(
            self.n_tokens + other.n_tokens,
            self.error + other.error,
            self.variance + other.variance,
            self.active + other.active,
            self.fired | other.fired,
        )


@torch.no_grad()
def _alone(task: str, subject: Subject, transcoders: TranscoderSet, batches: list[Batch]) -> Iterator[Figure]:
    sums = reduce(add, (_Alone.of(subject, transcoders, batch) for batch in batches))
    for layer in range(transcoders.shape.n_layers):
        explained = 1 - (sums.error[layer] / sums.variance[layer]).item()
        yield Figure(task, f"block {layer}: explained variance", explained, sums.n_tokens)
        active = sums.active[layer].item() / sums.n_tokens
        yield Figure(task, f"block {layer}: active features per token", active, sums.n_tokens)
        silent = int((~sums.fired[layer]).sum())
        yield Figure(task, f"block {layer}: features that never fired", silent, transcoders.shape.n_features)


def _compared(truth: Tensor, changed: Tensor, batch: Batch, begins_text: Tensor) -> Tensor:
    """Sums of KL(truth || changed), of equal top tokens, and the number of tokens: [all or before answers, 3]."""
    divergence = (truth.exp() * (truth - changed)).sum(-1)[:, :-1]  # [row, pos - 1]
    agreement = (truth.argmax(-1) == changed.argmax(-1))[:, :-1]
    weights = batch.weights[:, 1:]
    masks = ((weights > 0) & ~begins_text[:, :-1], weights == 1)
    return torch.stack([
        torch.stack([(divergence * mask).sum(), (agreement & mask).sum(), mask.sum()]) for mask in masks
    ])  # fmt: skip


@torch.no_grad()
def _together(task: str, subject: Subject, transcoders: TranscoderSet, batches: list[Batch]) -> Iterator[Figure]:
    replaced, zeroed = torch.zeros(2, 3), torch.zeros(2, 3)
    for batch in batches:
        begins_text = batch.ids == subject.tokenizer.bos_token_id
        truth = _log_probs(subject, batch)
        with mlps_replaced(subject.model, transcoders):
            replaced += _compared(truth, _log_probs(subject, batch), batch, begins_text)
        with mlps_hooked(subject.model, lambda _, __, y: torch.zeros_like(y)):
            zeroed += _compared(truth, _log_probs(subject, batch), batch, begins_text)
    (kl, agreeing, n_all), (answer_kl, answers_agreeing, n_answers) = replaced.tolist()
    yield Figure(task, "all MLPs replaced: KL", kl / n_all, int(n_all), 0.02, at_most=True)
    yield Figure(task, "all MLPs replaced: top-1 agreement", agreeing / n_all, int(n_all), 0.95)
    yield Figure(task, "all MLPs replaced: KL before answers", answer_kl / n_answers, int(n_answers))
    what = "all MLPs replaced: top-1 agreement before answers"
    yield Figure(task, what, answers_agreeing / n_answers, int(n_answers))
    control = zeroed[0, 1].item() / n_all
    yield Figure(task, "all MLPs zeroed (control): top-1 agreement", control, int(n_all))


def _log_probs(subject: Subject, batch: Batch) -> Tensor:
    """[row, pos, vocab]."""
    output = subject.model(input_ids=batch.ids, attention_mask=batch.bias.float(), use_cache=False)
    log_probs: Tensor = output.logits.log_softmax(-1)
    return log_probs
