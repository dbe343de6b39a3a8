"""Swap the state inside a two-hop fact: Texas out, California in, and the capital of the state containing Dallas
becomes Sacramento. After Lindsey et al. 2025 ("On the Biology of a Large Language Model").

For states A and B and a city of A, the edit adds to what the transcoders write at the prompt's last token
``gain * (mean features of B's cities - mean features of A's other cities)``, restricted at each layer to the few
features in which the two differ most, by the norm of what they write. The city that is asked for takes no part in the
means. Layers and gain are chosen on some pairs of states and measured on others. The control moves as many features,
drawn at random among those that any city activates, by the same amounts in another order, and writes the same norm.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.corpus.places import PLACES
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.transcoders import TranscoderSet, mlps_hooked, mlps_recorded

_SEED = 5
_N_FEATURES = 20
_GAINS = (1.0, 1.5, 2.0, 3.0)
_SPANS = (2, 3)
_N_PAIRS = 60
_SHOWN = ("Texas", "California")


@dataclass(frozen=True)
class Dose:
    """Which layers' features are moved, and how many times their difference."""

    layers: range
    gain: float


@dataclass(frozen=True)
class Case:
    """One edited prompt: a city of state ``source``, to be answered as if it lay in state ``target``; all indices."""

    source: int
    city: int
    target: int


class StateSwap:
    """The prompts of all states' cities, as many for each, and the features at their last token."""

    def __init__(self, subject: Subject, transcoders: TranscoderSet) -> None:
        self._subject = subject
        self._transcoders = transcoders
        self.states = [place for place in PLACES if place.kind == "state"]
        self.n_cities = min(len(state.cities) for state in self.states)
        self._capitals = torch.tensor([subject.token(state.value("capital")) for state in self.states])

    @cached_property
    def features(self) -> Tensor:
        """[layer, state, city, feature], at the last token."""
        with torch.no_grad(), mlps_recorded(self._subject.model) as (inputs, _):
            cities = [(state, city) for state in range(len(self.states)) for city in range(self.n_cities)]
            self._subject.next_log_probs([self._prompt(*city) for city in cities])
            active = torch.stack([self._transcoders.features(layer, x[:, -1]) for layer, x in enumerate(inputs)])
        return active.unflatten(1, (len(self.states), self.n_cities))

    def pairs(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Ordered pairs of states: some to choose the dose on, and others to measure it on."""
        everything = [(a, b) for a in range(len(self.states)) for b in range(len(self.states)) if a != b]
        drawn = random.Random(_SEED).sample(everything, 2 * _N_PAIRS)
        names = [state.name for state in self.states]
        shown = (names.index(_SHOWN[0]), names.index(_SHOWN[1]))
        chosen_on = [pair for pair in drawn[:_N_PAIRS] if pair != shown]
        return chosen_on, [shown, *(pair for pair in drawn[_N_PAIRS:] if pair != shown)]

    def cases(self, pairs: Sequence[tuple[int, int]]) -> list[Case]:
        return [Case(a, city, b) for a, b in pairs for city in range(self.n_cities)]

    def doses(self) -> list[Dose]:
        """Weakest first."""
        n_layers = len(self.features)
        spans = [range(first, first + span) for span in _SPANS for first in range(n_layers - span + 1)]
        return [Dose(layers, gain) for gain in _GAINS for layers in spans]

    def best_dose(self, pairs: Sequence[tuple[int, int]]) -> Dose:
        cases = self.cases(pairs)
        shares = {dose: self.answered_as_target(cases, self.edited(cases, dose)) for dose in self.doses()}
        return max(shares, key=lambda dose: shares[dose])

    @torch.no_grad()
    def edited(self, cases: Sequence[Case], dose: Dose | None, *, at_random: bool = False) -> Tensor:
        """Log-probabilities after the edited prompts, [case, vocab]; without a dose, of the prompts as they are."""
        prompts = [self._prompt(case.source, case.city) for case in cases]
        if dose is None:
            return self._subject.next_log_probs(prompts)
        writes = self._writes(cases, dose, at_random=at_random)

        def add(layer: int, _: Tensor, output: Tensor) -> Tensor | None:
            if layer not in writes:
                return None
            output = output.clone()
            output[:, -1] += writes[layer]
            return output

        with mlps_hooked(self._subject.model, add):
            return self._subject.next_log_probs(prompts)

    def _writes(self, cases: Sequence[Case], dose: Dose, *, at_random: bool) -> dict[int, Tensor]:
        """What the edit adds to each MLP's output, [case, d_model]."""
        writes: dict[int, Tensor] = {}
        for layer in dose.layers:
            change = self._largest(layer, self._differences(layer, cases)) * dose.gain
            decoded = self._decoded(layer, change)
            if at_random:
                decoded = self._of_equal_norm(decoded, self._decoded(layer, self._shuffled(layer, change)))
            for target, write in decoded.items():
                writes[target] = writes[target] + write if target in writes else write
        return writes

    def _differences(self, layer: int, cases: Sequence[Case]) -> Tensor:
        """[case, feature]."""
        active = self.features[layer]  # [state, city, feature]
        sources = torch.tensor([case.source for case in cases])
        cities = torch.tensor([case.city for case in cases])
        others = (active[sources].sum(1) - active[sources, cities]) / (self.n_cities - 1)
        return active[[case.target for case in cases]].mean(1) - others

    def _largest(self, layer: int, differences: Tensor) -> Tensor:
        written = differences.abs() * self._transcoders.W_dec[layer].flatten(1).norm(dim=1)
        kept = written.topk(min(_N_FEATURES, written.shape[-1]), -1).indices
        return torch.zeros_like(differences).scatter(1, kept, differences.gather(1, kept))

    def _decoded(self, layer: int, change: Tensor) -> dict[int, Tensor]:
        targets = range(layer, layer + self._transcoders.shape.n_targets(layer))
        return {target: self._transcoders.write(layer, target, change) for target in targets}

    def _shuffled(self, layer: int, change: Tensor) -> Tensor:
        """The same amounts for random features: [case, feature]."""
        generator = torch.Generator().manual_seed(_SEED + layer)
        alive = self.features[layer].flatten(0, 1).any(0).nonzero()[:, 0]
        shuffled = torch.zeros_like(change)
        for row, amounts in zip(shuffled, change, strict=True):
            nonzero = amounts[amounts != 0]
            nonzero = nonzero[torch.randperm(len(nonzero), generator=generator)]
            drawn = alive[torch.randperm(len(alive), generator=generator)[: len(nonzero)]]
            row[drawn] = nonzero[: len(drawn)]
        return shuffled

    def _of_equal_norm(self, wanted: dict[int, Tensor], got: dict[int, Tensor]) -> dict[int, Tensor]:
        """``got``, each row with the norm that it has in ``wanted``."""
        return {
            target: torch.nn.functional.normalize(write, dim=-1) * wanted[target].norm(dim=-1, keepdim=True)
            for target, write in got.items()
        }

    def answered_as_target(self, cases: Sequence[Case], log_probs: Tensor) -> float:
        """Share of cases that are answered with the capital of the target state."""
        return self._share(log_probs, [case.target for case in cases])

    def answered_as_source(self, cases: Sequence[Case], log_probs: Tensor) -> float:
        return self._share(log_probs, [case.source for case in cases])

    def _share(self, log_probs: Tensor, states: list[int]) -> float:
        return (log_probs.argmax(-1) == self._capitals[states]).float().mean().item()

    def probability(self, log_probs: Tensor, state: int) -> float:
        return log_probs[0, self._capitals[state]].exp().item()

    def _prompt(self, state: int, city: int) -> str:
        return f"Fact: the capital of the state containing {self.states[state].cities[city]} is"


def _ratio(wanted: Tensor, got: Tensor) -> Tensor:
    """Row by row, [case, 1]."""
    ratio: Tensor = wanted.norm(dim=-1, keepdim=True) / got.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return ratio


def state_swap(subject: Subject, transcoders: TranscoderSet) -> Iterator[Figure]:
    """The dose that was chosen, what it does to other pairs of states, and what the control does."""
    swap = StateSwap(subject, transcoders)
    chosen_on, measured_on = swap.pairs()
    dose = swap.best_dose(chosen_on)
    cases = swap.cases(measured_on)
    plain, edited = swap.edited(cases, None), swap.edited(cases, dose)
    control = swap.edited(cases, dose, at_random=True)
    task, n = f"state swap, {transcoders.shape.kind}", len(cases)
    yield Figure(task, "unedited: own capital", swap.answered_as_source(cases, plain), n)
    yield Figure(task, "edited: other state's capital", swap.answered_as_target(cases, edited), n, 0.80)
    yield Figure(task, "edited: own capital", swap.answered_as_source(cases, edited), n)
    by_chance = swap.answered_as_target(cases, control)
    yield Figure(task, "random features: other state's capital", by_chance, n, 0.02, at_most=True)
    yield Figure(task, "random features: own capital", swap.answered_as_source(cases, control), n)
    dallas = [case for case in cases[: swap.n_cities] if swap.states[case.source].cities[case.city] == "Dallas"]
    sacramento = swap.probability(swap.edited(dallas, dose), dallas[0].target)
    yield Figure(task, "edited, Texas to California: p(Sacramento) for Dallas", sacramento, 1)
    yield Figure(task, "features moved in each block", _N_FEATURES, 1)
    yield Figure(task, "first block moved", dose.layers.start, 1)
    yield Figure(task, "last block moved", dose.layers.stop - 1, 1)
    yield Figure(task, "gain", dose.gain, 1)
