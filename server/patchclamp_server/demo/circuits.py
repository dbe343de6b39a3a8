"""The known circuits of small language models, measured on the bundled one: which heads and positions do the work.

- Induction (Olsson et al. 2022, "In-context Learning and Induction Heads"): heads are ranked by their attention on
  random sequences that repeat, and the strongest are zeroed.
- Indirect objects (Wang et al. 2022, "Interpretability in the Wild"): heads are ranked by the size of their direct
  effect on logit(IO) - logit(S) at the prompt's end, with the final norm's scale as it was, and the strongest are
  replaced there by their mean over the prompts. Size, because the effect of a head that copies the first name, whoever
  that is, has either sign and a mean near zero.
- Two hops (after "On the Biology of a Large Language Model", Lindsey et al. 2025): interchange interventions (Geiger et
  al. 2021) move one position's residual stream between runs for cities of different states, layer by layer; MLP outputs
  are replaced by their mean.

Heads are chosen by one random draw and measured on another. Every ablation comes with a control: random other heads, of
the same layers as far as these have any left, or another position. Heads are written as L2H5: layer 2, head 5, from 0.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.corpus import facts, indirect_objects, induction
from patchclamp_server.demo.corpus.document import Example
from patchclamp_server.demo.corpus.names import NAMES
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.surgery import (
    Head,
    attention_patterns,
    heads_replaced,
    last_inputs,
    mlps_set,
    outputs_of,
    residual_replaced,
)
from patchclamp_server.demo.tokenizer import SPECIAL_TOKENS

_DEVELOPMENT_SEED = 31
_TEST_SEED = 32
_CONTROL_DRAWS = 5
_INDUCTION, _INDIRECT_OBJECTS, _TWO_HOPS = "induction heads", "indirect-object heads", "two-hop path"

# Positions from the end of "Fact: the capital of the state containing Dallas is".
_IS, _CITY, _OF = -1, -2, -6


def circuits(subject: Subject) -> Iterator[Figure]:
    for measure in (induction_heads, indirect_object_heads, two_hop_path):
        yield from measure(subject)


# Induction


@torch.no_grad()
def induction_heads(subject: Subject, count: int = 32, period: int = 20) -> Iterator[Figure]:
    """Heads that read the previous token, and heads that find by it what followed the earlier occurrence."""
    seen, fresh = (_repeated(subject, count, period, seed) for seed in (_DEVELOPMENT_SEED, _TEST_SEED))
    named, measured = attention_patterns(subject.model, seen), attention_patterns(subject.model, fresh)
    previous, copying = ranked(previous_token_scores(named)), ranked(induction_scores(named, period))
    to_previous, to_next = previous_token_scores(measured), induction_scores(measured, period)
    what = f"attention of {previous[0]} to the previous token"
    yield Figure(_INDUCTION, what, to_previous[previous[0]].item(), count)
    for head in copying[:3]:
        what = f"attention of {head} to the token that followed the earlier occurrence"
        yield Figure(_INDUCTION, what, to_next[head].item(), count)

    def accuracy() -> float:
        return copying_accuracy(subject.model, fresh, period)

    yield from _zeroed(subject.model, "induction", copying, 3, accuracy, count)
    yield from _zeroed(subject.model, "previous-token", previous, 1, accuracy, count)


def _repeated(subject: Subject, count: int, period: int, seed: int) -> Tensor:
    """[row, 1 + 2 * period]: a start token and a random sequence, twice."""
    rng = random.Random(seed)
    words = range(len(SPECIAL_TOKENS), len(subject.tokenizer))
    return torch.tensor(
        [[subject.tokenizer.bos_token_id, *induction.test_row(rng, words, period)] for _ in range(count)]
    )


def previous_token_scores(attention: Tensor) -> Tensor:
    """[layer, head], of [layer, row, head, query, key]."""
    return attention.diagonal(-1, -2, -1).mean((1, 3))


def induction_scores(attention: Tensor, period: int) -> Tensor:
    """[layer, head], of [layer, row, head, 1 + 2 * period, 1 + 2 * period]: each second half's attention."""
    # The token after the earlier occurrence is period - 1 back. The diagonal holds the queries from period - 1 on; the
    # second half starts at period + 1.
    return attention.diagonal(1 - period, -2, -1)[..., 2:].mean((1, 3))


def copying_accuracy(model: LlamaForCausalLM, ids: Tensor, period: int) -> float:
    predicted = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    return (predicted[:, period + 1 : -1] == ids[:, period + 2 :]).float().mean().item()


def _zeroed(
    model: LlamaForCausalLM, kind: str, strongest: Sequence[Head], count: int, accuracy: Callable[[], float], items: int
) -> Iterator[Figure]:
    """Accuracy without the ``count`` strongest heads, and without as many as halve it, where that is another number."""
    zero = torch.zeros(model.config.head_dim)

    def without(heads: Sequence[Head]) -> float:
        with heads_replaced(model, dict.fromkeys(heads, zero)):
            return accuracy()

    # Half of all heads leave as many for the control.
    most = len(strongest) // 2
    halving = next((n for n in range(1, most) if without(strongest[:n]) < 0.5), most)
    for n in sorted({count, halving}):
        heads = strongest[:n]
        named = f"the strongest {kind} head" if n == 1 else f"the {n} strongest {kind} heads"
        yield Figure(_INDUCTION, f"accuracy with {named} zeroed", without(heads), items)
        control = _mean([without(others) for others in control_heads(model, heads)])
        what = f"accuracy with {n} random zeroed instead of {named}"
        yield Figure(_INDUCTION, what, control, items)


# Indirect objects


@dataclass(frozen=True)
class Prompts:
    """Indirect-object prompts that end together, and who is in them."""

    text: list[str]
    ids: Tensor  # [prompt, pos], padded on the left
    indirect_object: Tensor  # [prompt], a token id each
    subject: Tensor

    @classmethod
    def draw(cls, subject: Subject, count: int, seed: int) -> "Prompts":
        examples = list(indirect_objects.examples(count, seed))
        text = [example.prompt for example in examples]
        ids = _padded(subject, text)["input_ids"]
        names = {subject.token(name) for name in NAMES}
        # A third person, where there is one, is named once.
        twice = [next(token for token in row if token in names and row.count(token) == 2) for row in ids.tolist()]
        answers = [subject.token(example.answer) for example in examples]
        return cls(text, ids, torch.tensor(answers), torch.tensor(twice))

    def roles(self) -> dict[str, Tensor]:
        """Who stands where: [prompt, pos], true at one position of each prompt."""
        indirect_object = self.ids == self.indirect_object[:, None]
        subject = self.ids == self.subject[:, None]
        second_mention = subject & (subject.cumsum(1) == 2)
        names = indirect_object | (subject & ~second_mention)
        first = names & (names.cumsum(1) == 1)
        end = torch.zeros_like(names)
        end[:, -1] = True
        return {
            "IO": indirect_object,
            "S1": subject & ~second_mention,
            "S2": second_mention,
            "the first name": first,
            "the second name": names & ~first,
            "the word after S2": second_mention.roll(1, 1),
            "the end itself": end,
        }


@dataclass(frozen=True)
class DirectEffects:
    """What each part of the model writes at the last position, along one direction for each prompt."""

    heads: Tensor  # [prompt, layer, head]
    mlps: Tensor  # [prompt, layer]
    embedding: Tensor  # [prompt]
    attention_biases: Tensor  # [prompt]: of all output projections

    def total(self) -> Tensor:
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.embedding + self.attention_biases


@torch.no_grad()
def indirect_object_heads(subject: Subject, count: int = 200) -> Iterator[Figure]:
    """The heads that write the answer at the end, and which of the names they read."""
    task = _INDIRECT_OBJECTS
    seen, fresh = (Prompts.draw(subject, count, seed) for seed in (_DEVELOPMENT_SEED, _TEST_SEED))
    unembedding = subject.model.lm_head.weight
    difference = unembedding[seen.indirect_object] - unembedding[seen.subject]
    strongest = ranked(direct_effects(subject, seen.text, difference).heads.abs().mean(0))[:3]

    average = unembedding[[subject.token(name) for name in NAMES]].mean(0)
    to_io = direct_effects(subject, fresh.text, unembedding[fresh.indirect_object] - average)
    to_s = direct_effects(subject, fresh.text, unembedding[fresh.subject] - average)
    named, measured = _attention_from_the_end(subject, seen), _attention_from_the_end(subject, fresh)
    for head in strongest:
        most = _most_read(seen, named[:, head.layer, head.number])
        read = _attention_to(fresh, measured[:, head.layer, head.number])
        for role in dict.fromkeys((most, "IO", "S1", "S2")):
            yield Figure(task, f"attention of {head} from the end to {role}", read[role], count)
        for name, effects in (("IO", to_io), ("S", to_s)):
            what = f"{head} at the end writes into logit({name}), less the average name's"
            yield Figure(task, what, effects.heads[:, head.layer, head.number].mean().item(), count)
    by_heads, by_mlps = (to_io.heads - to_s.heads).sum((1, 2)), (to_io.mlps - to_s.mlps).sum(1)
    yield Figure(task, "all heads at the end write into logit(IO) - logit(S)", by_heads.mean().item(), count)
    yield Figure(task, "all MLPs at the end write into logit(IO) - logit(S)", by_mlps.mean().item(), count)

    means = _mean_head_outputs(subject, fresh)

    def answered(answer: Tensor, heads: Sequence[Head]) -> float:
        with heads_replaced(subject.model, {head: means[head] for head in heads}, slice(-1, None)):
            predicted = subject.next_log_probs(fresh.text).argmax(-1)
        return (predicted == answer).float().mean().item()

    at_mean = f"{', '.join(map(str, strongest))} at their mean at the end"
    yield Figure(task, f"answers IO with {at_mean}", answered(fresh.indirect_object, strongest), count)
    yield Figure(task, f"answers S with {at_mean}", answered(fresh.subject, strongest), count)
    others = control_heads(subject.model, strongest)
    control = _mean([answered(fresh.indirect_object, heads) for heads in others])
    yield Figure(task, "answers IO with 3 random other heads at their mean at the end", control, count)


def direct_effects(subject: Subject, prompts: Sequence[str], unembedding: Tensor) -> DirectEffects:
    """Split each prompt's last logit along its row of ``unembedding`` [prompt, d_model] by where it was written."""
    model = subject.model
    layers = model.model.layers
    with ExitStack() as hooks:
        inputs = [hooks.enter_context(last_inputs(layer.self_attn.o_proj)) for layer in layers]
        mlps = [hooks.enter_context(outputs_of(layer.mlp)) for layer in layers]
        embedded = hooks.enter_context(outputs_of(model.model.embed_tokens))
        final = hooks.enter_context(last_inputs(model.model.norm))
        model(**_padded(subject, prompts), use_cache=False)
    scale = torch.rsqrt(final[0].pow(2).mean(-1, keepdim=True) + model.model.norm.variance_epsilon)
    direction = unembedding * model.model.norm.weight * scale  # [prompt, d_model]
    heads, biases = [], torch.zeros(len(direction))
    for layer, (values,) in zip(layers, inputs, strict=True):
        projection = layer.self_attn.o_proj
        pulled_back = direction @ projection.weight  # [prompt, head * head_dim]
        heads.append((values * pulled_back).unflatten(1, (-1, model.config.head_dim)).sum(-1))
        if projection.bias is not None:
            biases = biases + direction @ projection.bias
    by_mlps = [(output[:, -1] * direction).sum(-1) for (output,) in mlps]
    by_embedding = (embedded[0][:, -1] * direction).sum(-1)
    return DirectEffects(torch.stack(heads, 1), torch.stack(by_mlps, 1), by_embedding, biases)


def _attention_from_the_end(subject: Subject, prompts: Prompts) -> Tensor:
    """[prompt, layer, head, pos]."""
    patterns = attention_patterns(subject.model, **_padded(subject, prompts.text))
    return patterns[:, :, :, -1].transpose(0, 1)


def _attention_to(prompts: Prompts, attention: Tensor) -> dict[str, float]:
    """The mean of one head's ``attention`` [prompt, pos] to each role."""
    roles = prompts.roles()
    roles["anything else"] = ~torch.stack(list(roles.values())).any(0)
    return {role: (attention * here).sum(1).mean().item() for role, here in roles.items()}


def _most_read(prompts: Prompts, attention: Tensor) -> str:
    """The role that one head's ``attention`` [prompt, pos] goes to most, or that most goes to none."""
    read = _attention_to(prompts, attention)
    return max(read, key=lambda role: read[role])


def _mean_head_outputs(subject: Subject, prompts: Prompts) -> Tensor:
    """What each head writes at the last position, on average over the prompts: [layer, head, head_dim]."""
    with ExitStack() as hooks:
        inputs = [hooks.enter_context(last_inputs(layer.self_attn.o_proj)) for layer in subject.model.model.layers]
        subject.next_log_probs(prompts.text)
    means = torch.stack([values.mean(0) for (values,) in inputs])
    return means.unflatten(1, (-1, subject.model.config.head_dim))


# Two hops


@torch.no_grad()
def two_hop_path(subject: Subject, count: int = 100) -> Iterator[Figure]:
    """Where the state is on its way from the city to the answer, and which MLPs it takes."""
    yield from _interchanges(subject, count)
    for relation in ("capital", "neighbor"):
        yield from _mlps_at_their_mean(subject, relation)


class Exchange(NamedTuple):
    """A question, and one whose residual stream is put into it."""

    base: Example
    donor: Example


def _interchanges(subject: Subject, count: int) -> Iterator[Figure]:
    moved, kept = exchanges(count, _TEST_SEED)
    moved_inputs, kept_inputs = (subject.block_inputs([pair.donor.prompt for pair in pairs]) for pairs in (moved, kept))
    lowest = {}
    for position, where in ((_CITY, "the city"), (_IS, '"is"')):
        shares = []
        # At block 0 nothing but the word itself is there to exchange.
        for layer in range(1, len(moved_inputs)):
            share = donor_share(subject, moved, layer, position, moved_inputs[layer, :, position])
            what = f"answers the other state's capital, residual stream exchanged at {where} before block {layer}"
            yield Figure(_TWO_HOPS, what, share, count)
            shares.append(donor_share(subject, kept, layer, position, kept_inputs[layer, :, position]))
        lowest[where] = min(shares)
    for where, share in lowest.items():
        what = f"keeps its answer, exchanged at {where} with a city of the same state (control), lowest of these blocks"
        yield Figure(_TWO_HOPS, what, share, count)


def exchanges(count: int, seed: int) -> tuple[list[Exchange], list[Exchange]]:
    """The same random questions for a state's capital, with donors from other states and from their own."""
    rng = random.Random(seed)
    questions = _questions("capital", "state")
    moved, kept = [], []
    for base in rng.sample(questions, count):
        moved.append(Exchange(base, rng.choice([other for other in questions if other.answer != base.answer])))
        own = [other for other in questions if other.answer == base.answer and other != base]
        kept.append(Exchange(base, rng.choice(own)))
    return moved, kept


def donor_share(subject: Subject, pairs: Sequence[Exchange], layer: int, position: int, donated: Tensor) -> float:
    """Share of pairs whose base is answered as its donor should be; ``donated`` is [pair, d_model]."""
    with residual_replaced(subject.model, layer, position, donated):
        predicted = subject.next_log_probs([pair.base.prompt for pair in pairs]).argmax(-1)
    answers = torch.tensor([subject.token(pair.donor.answer) for pair in pairs])
    return (predicted == answers).float().mean().item()


def _mlps_at_their_mean(subject: Subject, relation: str) -> Iterator[Figure]:
    every = range(len(subject.model.model.layers))
    kinds = [_MeanMlps(subject, relation, kind) for kind in ("state", "country")]

    def accuracy(layers: Sequence[int], position: int) -> float:
        return _mean([right for kind in kinds for right in kind.right_at_mean(layers, position)])

    items = sum(len(kind.held_out) for kind in kinds)
    whose = f"accuracy for the {relation}, held-out cities, "
    for position, where in ((_CITY, "the city"), (_IS, '"is"'), (_OF, '"of" before the city (control)')):
        yield Figure(_TWO_HOPS, f"{whose}every MLP at its mean at {where}", accuracy(every, position), items)
    # The layer goes unnamed: at a tie, rounding would choose it.
    lowest = min(accuracy([layer], _IS) for layer in every)
    yield Figure(_TWO_HOPS, f'{whose}the one MLP that costs most at its mean at "is"', lowest, items)


class _MeanMlps:
    """One relation's question about every city of the states, or of the countries: they differ in one more word."""

    def __init__(self, subject: Subject, relation: str, kind: str) -> None:
        self._subject = subject
        questions = _questions(relation, kind)
        self.held_out = [example for example in questions if example.held_out]
        with ExitStack() as hooks:
            outputs = [hooks.enter_context(outputs_of(layer.mlp)) for layer in subject.model.model.layers]
            subject.next_log_probs([example.prompt for example in questions])
        self._means = torch.stack([output.mean(0) for (output,) in outputs])  # [layer, pos, d_model]

    def right_at_mean(self, layers: Sequence[int], position: int) -> list[float]:
        """For each held-out city, whether the answer is right with these MLPs at their mean over all cities."""
        with mlps_set(self._subject.model, {layer: self._means[layer, position] for layer in layers}, position):
            predicted = self._subject.next_log_probs([example.prompt for example in self.held_out]).argmax(-1)
        answers = torch.tensor([self._subject.token(example.answer) for example in self.held_out])
        return (predicted == answers).float().tolist()


def _questions(relation: str, kind: str) -> list[Example]:
    opening = f"Fact: the {relation} of the {kind} containing "
    return [example for example in facts.two_hop_examples() if example.prompt.startswith(opening)]


# What the circuits share


def ranked(scores: Tensor) -> list[Head]:
    """Every head, by descending score [layer, head]; equal ones in order."""
    heads = [Head(layer, number) for layer in range(scores.shape[0]) for number in range(scores.shape[1])]
    return sorted(heads, key=lambda head: -scores[head].item())


def control_heads(model: LlamaForCausalLM, heads: Sequence[Head]) -> list[list[Head]]:
    """Random draws of as many other heads, each of the same layer as its counterpart while that has one left."""
    everything = ranked(torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads))
    draws = set()
    for seed in range(_CONTROL_DRAWS):
        free = [head for head in everything if head not in heads]
        random.Random(seed).shuffle(free)
        chosen = []
        for head in heads:
            match = next((other for other in free if other.layer == head.layer), free[0])
            free.remove(match)
            chosen.append(match)
        draws.add(tuple(sorted(chosen)))
    return [list(draw) for draw in sorted(draws)]


def _padded(subject: Subject, prompts: Sequence[str]) -> Any:
    return subject.tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
