"""Decoding: the samples of all callers, brought on together, one forward at a time.

Samples wait until there is room, then take a slot. A forward is either a step, in which every sample that has seen all
but its newest token gets the next one, or a chunk, in which prompts come in: bounded in tokens, so that no prompt holds
up the others' tokens for long. Steps and chunks take turns, and so do the callers whose prompts come in.

A forward that fails is repeated row by row: slots are written by position, so nothing is left of it, and the faulty
sample fails alone.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from patchclamp_server.engine.editing import Editing
from patchclamp_server.engine.faults import Abandoned, NotFinite, make_room, raise_if_fatal
from patchclamp_server.engine.reading import Captures, ReadPlan, Request
from patchclamp_server.engine.runner import Batch, Forward, Runner
from patchclamp_server.engine.sample import Owner, Sample
from patchclamp_server.engine.sampling import choose
from patchclamp_server.engine.slots import OwnCaches, Slots
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.plan import Plan
from patchclamp_server.interventions.receipts import Receipt

_LOGITS = HookPoint(Site.LOGITS)
_ADMISSION_SECONDS = 0.05
_LARGEST_SHARE = 0.75


@dataclass(frozen=True)
class DecodingLimits:
    """Samples that decode together, tokens of one chunk of prompts, bytes of keys and values."""

    max_samples: int = 64
    chunk_tokens: int = 512
    max_bytes: int = 4 << 30


@dataclass(frozen=True, eq=False)
class Chosen:
    """The token that a sample got: with its log-probability, and the most probable ones."""

    sample: Sample
    token_id: int
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Failed:
    """A sample that cannot go on."""

    sample: Sample
    fault: Exception


Outcome = Chosen | Failed


class Decoder:
    """All samples in generation. Not thread-safe: it belongs to the worker.

    Without `shared` the model cannot use slots: every sample has a cache of the model's own kind, and its own forwards.
    """

    def __init__(self, runner: Runner, limits: DecodingLimits, *, shared: bool = True) -> None:
        self._runner = runner
        self._limits = limits
        device = runner.input_device
        self._slots: Slots | OwnCaches = Slots(runner.adapter.probes.windows, device)
        if not shared:
            self._slots = OwnCaches(runner.adapter.own_cache, device)
        self._shared = shared
        self._waiting: dict[Owner, deque[Sample]] = {}
        self._resident: list[Sample] = []
        # When each owner was last brought on, in forwards.
        self._served: dict[Owner, int] = {}
        self._forwards = 0
        self._plan: Plan | None = None
        self._stepped = False
        self._last_rows: tuple[tuple[int, ...], torch.Tensor] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is something to do: a paused sample gets no tokens."""
        return any(not owner.paused for owner in self._waiting) or any(not one.owner.paused for one in self._resident)

    def add(self, sample: Sample) -> None:
        """Takes a sample in; it waits for a slot."""
        self._waiting.setdefault(sample.owner, deque()).append(sample)

    def drop(self, owner: Owner) -> None:
        """Ends all samples of a job."""
        self._waiting.pop(owner, None)
        for sample in [sample for sample in self._resident if sample.owner is owner]:
            self.leave(sample)

    def leave(self, sample: Sample) -> None:
        """Frees what a sample held; the last resident moves into its slot."""
        if sample not in self._resident:
            return
        self._release(sample)
        last = self._resident.pop()
        self._slots.forget(sample.slot)
        if last is not sample:
            # One that has seen nothing yet has no more than the number of its slot.
            if last.seen:
                self._slots.move(last.slot, sample.slot)
            else:
                self._slots.forget(last.slot)
            last.slot = sample.slot
            self._resident[sample.slot] = last
        if all(one.owner is not sample.owner for one in self._resident):
            self._served.pop(sample.owner, None)
        if not self._resident:
            self._slots.clear()
            self._plan = None

    def receipts(self, sample: Sample) -> tuple[Receipt, ...]:
        """What the edits of a resident sample did so far."""
        if self._plan is None or sample.row < 0:
            return ()
        return self._plan.receipts(sample.row, sample.seen)

    def captures(self) -> Captures:
        """What reduces the reads of one token."""
        unembed = self._runner.adapter.unembed
        return Captures(ReadPlan({}), unembed.logits, unembed.row)

    def advance(self, check: Callable[[], None]) -> list[Outcome]:
        """One forward. `check` is called before every block and may raise to abort it."""
        failed = self._admit()
        ready = sorted((sample for sample in self._resident if not sample.owner.paused), key=self._turn)
        steps = [sample for sample in ready if sample.decoding]
        prompts = [sample for sample in ready if not sample.decoding]
        # In turns, where there are both.
        self._stepped = bool(steps) and not (prompts and self._stepped)
        together = self._together(steps if self._stepped else prompts)
        rows = [(sample, 1) for sample in together] if self._stepped else self._chunk(together)
        self._forwards += 1
        self._served.update((sample.owner, self._forwards) for sample, _ in rows)
        return failed + (self._forward(rows, check) if rows else [])

    def _turn(self, sample: Sample) -> int:
        return self._served.get(sample.owner, 0)

    def _together(self, ready: Sequence[Sample]) -> list[Sample]:
        """Those that may share a forward with the first."""
        if ready and (ready[0].owner.solo or not self._shared):
            return [ready[0]]
        return [sample for sample in ready if not sample.owner.solo]

    # Room.

    def _admit(self) -> list[Outcome]:
        """Takes in samples that wait, of the owner with the fewest residents first; those that cannot be are told.

        Not for long, while others wait for tokens: laying many edits into the tables takes its time.
        """
        failed: list[Outcome] = []
        began = time.monotonic()
        while time.monotonic() - began < _ADMISSION_SECONDS:
            owner = self._next_owner()
            if owner is None or not self._fits(self._waiting[owner][0]):
                break
            sample = self._waiting[owner].popleft()
            if not self._waiting[owner]:
                del self._waiting[owner]
            sample.slot = len(self._resident)
            self._resident.append(sample)
            try:
                self._seat(sample)
            except Exception as fault:
                raise_if_fatal(fault)
                make_room(fault)
                failed.append(Failed(sample, fault))
        return failed

    def _next_owner(self) -> Owner | None:
        """Whose sample comes in next. One owner never has all slots, so that another's first need not wait for it."""
        held = Counter(id(sample.owner) for sample in self._resident)
        if not self._waiting or len(self._resident) >= self._limits.max_samples:
            return None
        owner = min(self._waiting, key=lambda one: held[id(one)])
        return owner if held[id(owner)] < max(1, int(_LARGEST_SHARE * self._limits.max_samples)) else None

    def _fits(self, sample: Sample) -> bool:
        """Whether the slots stay within their bytes. The first sample always fits: the front has checked it."""
        longest = max(one.edits.edits.max_length for one in (sample, *self._resident))
        slots = 1 << len(self._resident).bit_length()
        needed = slots * (1 << (longest - 1).bit_length()) * self._runner.adapter.bytes_per_token
        return not self._resident or needed <= self._limits.max_bytes

    def _seat(self, sample: Sample) -> None:
        """Gives a sample's edits a row of the tables; these are made anew where they are too short."""
        if not sample.spec.interventions:
            return
        needed = sample.edits.edits.max_length
        if self._plan is None or needed > self._plan.max_length:
            self._rebuild(needed)
        assert self._plan is not None
        taken = {one.row for one in self._resident}
        row = next(row for row in range(self._limits.max_samples) if row not in taken)
        self._plan.place(row, sample.edits)
        sample.row = row

    def _rebuild(self, length: int) -> None:
        """Tables for longer samples, with everything that those in use hold."""
        longer = Plan(
            self._runner.adapter.site_info,
            # One more, that nobody sits in: for the samples without edits.
            rows=self._limits.max_samples + 1,
            max_length=1 << (length - 1).bit_length(),
            device=self._runner.input_device,
            dtype=self._runner.adapter.probes.dtype,
        )
        for sample in self._resident:
            if self._plan is not None and sample.row >= 0:
                longer.adopt(sample.row, self._plan, sample.row)
        self._plan = longer

    def _release(self, sample: Sample) -> None:
        if self._plan is not None and sample.row >= 0:
            self._plan.release(sample.row)
            sample.row = -1

    # Forwards.

    def _chunk(self, prompts: Sequence[Sample]) -> list[tuple[Sample, int]]:
        """Samples whose prompts come in next, and with how many tokens."""
        rows: list[tuple[Sample, int]] = []
        budget = self._limits.chunk_tokens
        for sample in prompts:
            count = sample.unseen if sample.edits.needs_whole_prompt else min(sample.unseen, budget)
            longest = max(count, *(taken for _, taken in rows)) if rows else count
            if rows and longest * (len(rows) + 1) > budget:
                continue
            rows.append((sample, count))
        return rows

    def _forward(self, rows: Sequence[tuple[Sample, int]], check: Callable[[], None]) -> list[Outcome]:
        try:
            return self._run(rows, check)
        except Abandoned:
            self._forget()
            raise
        except Exception as fault:
            self._forget()
            raise_if_fatal(fault)
            make_room(fault)
            if len(rows) == 1:
                return [Failed(rows[0][0], fault)]
            return [outcome for row in rows for outcome in self._forward([row], check)]

    def _forget(self) -> None:
        """After a forward that did not come to its end. What it wrote into slots will be written again."""
        if self._plan is not None:
            self._plan.abandon()

    def _run(self, rows: Sequence[tuple[Sample, int]], check: Callable[[], None]) -> list[Outcome]:
        samples = [sample for sample, _ in rows]
        starts, counts = [sample.seen for sample in samples], [count for _, count in rows]
        batch = Batch.of([sample.next_tokens(count) for sample, count in rows], self._runner.input_device)
        positions = self._slots.begin([sample.slot for sample in samples], starts, counts)
        watch = _Watch(samples, starts, counts, self._step_plan(samples, positions, counts))
        forward = Forward(
            batch,
            reads=watch.hook_points,
            capture=watch.take,
            edits=watch.editing.edits,
            logit_rows=watch.logit_rows,
            check=check,
        )
        logits = self._runner.run(self._slots.used_by(forward, positions))
        outcomes: list[Outcome] = []
        if watch.finished:
            outcomes += _chosen([samples[row] for row in watch.finished], watch.last_logits(logits))
        watch.settle(logits)
        # From here on what was gathered counts, and no row is repeated.
        for sample, count in rows:
            sample.seen += count
        return outcomes

    def _step_plan(self, samples: Sequence[Sample], positions: torch.Tensor, counts: Sequence[int]) -> Plan | None:
        """The tables, at the rows and positions of a forward; None where none of its samples is edited."""
        if self._plan is None or all(sample.row < 0 for sample in samples):
            return None
        device = positions.device
        real = torch.arange(positions.shape[1], device=device) < torch.tensor(counts, device=device)[:, None]
        rows = self._rows(tuple(sample.row for sample in samples), device)
        self._plan.step(torch.where(real & (rows[:, None] < self._limits.max_samples), positions, -1), rows)
        return self._plan

    def _rows(self, rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The rows of the tables, [batch]; the same tensor as before for the same rows, which tells the plan so."""
        if self._last_rows is None or self._last_rows[0] != rows:
            seats = [row if row >= 0 else self._limits.max_samples for row in rows]
            self._last_rows = rows, torch.tensor(seats, device=device)
        return self._last_rows[1]


class _Watch:
    """What one forward shows: to the reads of its samples, and to the conditions of their edits."""

    def __init__(
        self, samples: Sequence[Sample], starts: Sequence[int], counts: Sequence[int], plan: Plan | None
    ) -> None:
        self.editing = Editing(plan)
        self._samples, self._starts = samples, starts
        self._requests: dict[HookPoint, list[Request]] = {}
        for row, (sample, start, count) in enumerate(zip(samples, starts, counts, strict=True)):
            for point, request in sample.requests(row, start, count):
                self._requests.setdefault(point, []).append(request)
        self.hook_points = frozenset(self._requests) | self.editing.conditions
        # Rows whose samples have then seen all their tokens.
        self.finished = [row for row, count in enumerate(counts) if samples[row].unseen == count]
        self._ends = [(row, counts[row] - 1) for row in self.finished]
        pairs = {(request.row, place) for request in self._requests.get(_LOGITS, ()) for place in request.positions}
        # A forward has to compute at least one row of logits to run to its end.
        self.logit_rows = sorted(pairs.union(self._ends)) or [(0, 0)]
        self._index = {pair: place for place, pair in enumerate(self.logit_rows)}
        self._gathered: list[tuple[Request, torch.Tensor]] = []

    def take(self, point: HookPoint, value: torch.Tensor) -> None:
        self.editing.observe(point, value)
        for request in self._requests.get(point, ()):
            # A copy: later layers may write in place.
            self._gathered.append((request, request.select(value).clone()))

    def settle(self, logits: torch.Tensor) -> None:
        """Hands over what the reads took; logits [rows, d_vocab]."""
        for request in self._requests.get(_LOGITS, ()):
            pairs = [(request.row, place) for place in request.positions]
            self._gathered.append((request, self._rows(logits, pairs)))
        for request, rows in self._gathered:
            self._samples[request.row].gather(request, self._starts[request.row], rows)
        self._gathered = []

    def last_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits behind the newest token of each finished row, [rows, d_vocab]."""
        return self._rows(logits, self._ends)

    def _rows(self, logits: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        index = torch.tensor([self._index[pair] for pair in pairs], device=logits.device)
        return logits.index_select(0, index)


def _chosen(samples: Sequence[Sample], logits: torch.Tensor) -> Iterator[Outcome]:
    """The next token of each sample, unless its logits say nothing: an edit can make them overflow."""
    fine = (logits.isfinite() | (logits == float("-inf"))).all(-1) & logits.isfinite().any(-1)
    for sample, good in zip(samples, fine.tolist(), strict=True):
        if not good:
            yield Failed(sample, NotFinite("the logits of the next token"))
    if bool(fine.any()):
        kept = [sample for sample, good in zip(samples, fine.tolist(), strict=True) if good]
        yield from _sampled(kept, logits[fine])


def _sampled(samples: Sequence[Sample], logits: torch.Tensor) -> Iterator[Chosen]:
    """The next token of each sample."""
    tokens = choose(logits, [sample.choice for sample in samples])
    logprobs = logits.float().log_softmax(-1)
    most = max(sample.spec.top_logprobs for sample in samples)
    top = logprobs.topk(most, dim=-1)
    rows = zip(
        samples,
        tokens.tolist(),
        logprobs.gather(1, tokens[:, None])[:, 0].tolist(),
        top.indices.tolist(),
        top.values.tolist(),
        strict=True,
    )
    for sample, token_id, logprob, ids, values in rows:
        k = sample.spec.top_logprobs
        yield Chosen(sample, token_id, logprob, tuple(ids[:k]), tuple(values[:k]))
