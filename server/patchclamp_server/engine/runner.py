"""The runner: one forward of the unmodified model with hooks on the sites in use, and nowhere else.

It is the only place that registers module hooks. Hooks are installed for a batch as a whole and removed after it: idle
hooks on every site would cost more than a small forward does. Each hooked call makes a Visit; the programs of that
module run on it in the order of the data flow, first the edit of a hook point, then its capture.

Rows are padded on the right and the model gets no mask: attention is causal, so no token sees the padding behind it,
and positions count from zero in every row. Only the logits asked for are computed: the rows are gathered before the
unembedding. A forward that needs nothing beyond some layer stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchclamp_server.adapters.adapter import Adapter
from patchclamp_server.adapters.probes import Memory
from patchclamp_server.adapters.recording import Call, Recording, first_argument, first_tensor
from patchclamp_server.adapters.taps import Moment, Tap, Visit
from patchclamp_server.hookpoints import HookPoint, Site

Edit = Callable[[torch.Tensor], torch.Tensor]
Capture = Callable[[HookPoint, torch.Tensor], None]


class _Finished(Exception):
    """Everything asked for has been captured; the rest of the forward is not needed."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward: token ids [batch, pos], padded on the right with any token."""

    input_ids: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> Batch:
        """A batch of token rows of any lengths."""
        longest = max(map(len, rows))
        padded = [list(row) + [row[-1]] * (longest - len(row)) for row in rows]
        return cls(torch.tensor(padded, device=device), tuple(map(len, rows)))


@dataclass(frozen=True, eq=False)
class Program:
    """What happens at one hook point of one forward: its edit, its capture, or both."""

    tap: Tap
    edit: Edit | None
    capture: Capture | None

    def run(self, visit: Visit) -> None:
        value = self.tap.read(visit)
        if self.edit is not None:
            assert self.tap.write is not None
            new = self.edit(value)
            changed = self.tap.write(visit, new)
            if self.tap.moment is Moment.AFTER:
                visit.output = changed
            else:
                visit.given = changed
            # Not read again: a norm's input still has the old divisor, z the old results.
            value = new.to(value.dtype)
        if self.capture is not None:
            self.capture(self.tap.hook_point, value)


@dataclass(frozen=True, eq=False)
class Forward:
    """What one forward is asked for.

    `reads` are handed to `capture`; `edits` map a site's `[batch, *axes]` to its new value. `logit_rows` are (row,
    position) pairs. `check` is called before every block and may raise to abort. With a `memory` the rows go on where
    earlier forwards ended: `positions` [batch, pos] are where in their runs the tokens are. `own_cache` is the model's
    own kind of memory, for batches of one.
    """

    batch: Batch
    reads: frozenset[HookPoint] = frozenset()
    capture: Capture | None = None
    edits: Mapping[HookPoint, Edit] | None = None
    logit_rows: Sequence[tuple[int, int]] = ()
    check: Callable[[], None] | None = None
    memory: Memory | None = None
    positions: torch.Tensor | None = None
    own_cache: Any = None


class Runner:
    """Runs one model. Not thread-safe: the worker owns it."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.input_device = _device(adapter.layout.embed)
        self._streams: dict[nn.Module, torch.Tensor] = {}

    @torch.no_grad()
    def run(self, forward: Forward) -> torch.Tensor:
        """Runs the model and gives the logits of the rows asked for, [rows, d_vocab]."""
        programs = self._programs(forward)
        with ExitStack() as stack:
            stack.callback(self._streams.clear)
            for group in programs:
                stack.enter_context(self._installed(group, forward))
            stack.enter_context(self._remembered(programs))
            stack.enter_context(self._frame(forward))
            stack.enter_context(self.adapter.probes.active())
            stack.enter_context(self._remembering(forward.memory))
            try:
                output = self.adapter.model(input_ids=forward.batch.input_ids, **_memory_arguments(forward))
            except _Finished:
                return torch.empty(0, self.adapter.dims.d_vocab)
        logits: torch.Tensor = output.logits[0]  # [rows, d_vocab]
        return logits

    def _programs(self, forward: Forward) -> list[list[Program]]:
        """Programs grouped by module and moment, in the order of the data flow."""
        edits = forward.edits or {}
        found: list[Program] = []
        for point in forward.reads | edits.keys():
            if point.site is Site.LOGITS:
                continue
            read, write = self.adapter.read_taps.get(point), self.adapter.write_taps.get(point)
            edit = edits.get(point)
            capture = forward.capture if point in forward.reads else None
            if edit is not None and write is not read:
                assert write is not None
                found.append(Program(write, edit, None))
                edit = None
            if read is not None and (edit or capture):
                found.append(Program(read, edit, capture))
        groups: dict[tuple[int, Moment, Any], list[Program]] = {}
        for program in sorted(found, key=lambda p: (p.tap.rank, p.tap.hook_point)):
            tap = program.tap
            groups.setdefault((id(tap.module), tap.moment, tap.stage), []).append(program)
        return list(groups.values())

    @contextmanager
    def _installed(self, group: list[Program], forward: Forward) -> Iterator[None]:
        """The hook of one module and moment, for the time of a forward."""
        tap, batch = group[0].tap, len(forward.batch.lengths)
        with ExitStack() as stack:
            if tap.moment is Moment.PROBE:
                stack.enter_context(self._probed(group, batch))
            elif tap.moment is Moment.BEFORE:
                handle = tap.module.register_forward_pre_hook(_before_hook(group, batch), with_kwargs=True)
                stack.callback(handle.remove)
            else:
                hook = _after_hook(group, batch, self._streams)
                stack.callback(tap.module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def _remembered(self, programs: list[list[Program]]) -> Iterator[None]:
        """Keeps the inputs of the blocks whose taps need them. Installed last: as the edits there leave them."""
        blocks = {program.tap.stream_of for group in programs for program in group} - {None}
        with ExitStack() as stack:
            for block in blocks:
                assert block is not None
                stack.callback(block.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
            yield

    @contextmanager
    def _probed(self, group: list[Program], batch: int) -> Iterator[None]:
        tap, probes = group[0].tap, self.adapter.probes
        assert tap.stage is not None and tap.hook_point.layer is not None
        layer = tap.hook_point.layer

        def handle(value: torch.Tensor) -> torch.Tensor:
            visit = Visit(batch, value)
            for program in group:
                program.run(visit)
            return visit.given

        with ExitStack() as stack:
            probes.handlers[layer, tap.stage] = handle
            stack.callback(probes.handlers.pop, (layer, tap.stage))
            if probes.catches_softmax:
                attention = self.adapter.layout.blocks[layer].attention.module
                stack.callback(attention.register_forward_pre_hook(self._entering(layer)).remove)
                stack.callback(attention.register_forward_hook(self._leaving, always_call=True).remove)
            yield

    @contextmanager
    def _remembering(self, memory: Memory | None) -> Iterator[None]:
        self.adapter.probes.memory = memory
        try:
            yield
        finally:
            self.adapter.probes.memory = None

    @contextmanager
    def _frame(self, forward: Forward) -> Iterator[None]:
        """Hooks that every forward has: the check before each block, the early stop, the gathered logits."""
        blocks, stop = self.adapter.layout.blocks, self._last_layer(forward)
        with ExitStack() as stack:
            for layer, block in enumerate(blocks):
                if forward.check is not None:
                    stack.callback(block.module.register_forward_pre_hook(_checking(forward.check)).remove)
                if layer == stop + 1:
                    stack.callback(block.module.register_forward_pre_hook(_finish).remove)
            head = self.adapter.unembed.head
            stack.callback(head.register_forward_pre_hook(_gathering(forward.logit_rows)).remove)
            yield

    def _last_layer(self, forward: Forward) -> int:
        """The last layer that has to run; all of them when anything after the blocks is needed."""
        everything = len(self.adapter.layout.blocks)
        # Edits run even where nothing is read behind them: their receipts tell what they did.
        points = forward.reads | (forward.edits or {}).keys()
        if forward.logit_rows or not points:
            return everything
        late = (Site.LN_FINAL, Site.LN_FINAL_SCALE, Site.LOGITS)
        if any(point.site in late for point in points):
            return everything
        return max(point.layer if point.layer is not None else -1 for point in points)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = first_argument(args, kwargs)
        assert stream is not None
        self._streams[module] = stream

    def _entering(self, layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.adapter.probes.current_layer = layer

        return hook

    def _leaving(self, *_: Any) -> None:
        self.adapter.probes.current_layer = None


@torch.no_grad()
def record(model: nn.Module, input_ids: torch.Tensor) -> Recording:
    """One forward, with a copy of what every module took in and gave out."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, value = first_argument(args, kwargs), first_tensor(output)
        parts = len(output) if isinstance(output, tuple) else 1
        calls.append(Call(module, _copy(given), _copy(value), parts))

    with ExitStack() as stack:
        for module in model.modules():
            if module is not model:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        output = model(input_ids=input_ids, use_cache=False)
    return Recording(tuple(calls), output.logits.clone())


def _device(module: nn.Module) -> torch.device:
    """Where a module takes its input; offloaded weights are brought to their input by accelerate."""
    weight = next(module.parameters())
    return torch.device("cpu") if weight.is_meta else weight.device


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.clone() if tensor is not None and tensor.is_floating_point() else None


def _before_hook(group: list[Program], batch: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = first_argument(args, kwargs)
        assert given is not None
        visit = Visit(batch, given)
        for program in group:
            program.run(visit)
        return None if visit.given is given else _with_first(args, kwargs, visit.given)

    return hook


def _after_hook(group: list[Program], batch: int, streams: dict[nn.Module, torch.Tensor]) -> Callable[..., Any]:
    block = next((program.tap.stream_of for program in group if program.tap.stream_of is not None), None)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = first_argument(args, kwargs)
        assert given is not None
        visit = Visit(batch, given, output, streams[block] if block is not None else None)
        for program in group:
            program.run(visit)
        return None if visit.output is output else visit.output

    return hook


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the first tensor replaced."""
    if args:
        return (new, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return args, kwargs | {name: new}


def _memory_arguments(forward: Forward) -> dict[str, Any]:
    if forward.own_cache is not None:
        return {"past_key_values": forward.own_cache, "use_cache": True}
    places = {} if forward.positions is None else {"position_ids": forward.positions}
    return {"use_cache": False, **places}


def _checking(check: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: check()


def _finish(*_: Any) -> None:
    raise _Finished


def _gathering(rows: Sequence[tuple[int, int]]) -> Callable[..., Any]:
    """Replaces the unembedding's input [batch, pos, d_model] by the rows asked for, [1, rows, d_model]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        batch = torch.tensor([row for row, _ in rows], dtype=torch.long, device=hidden.device)
        positions = torch.tensor([position for _, position in rows], dtype=torch.long, device=hidden.device)
        return (hidden[batch, positions][None], *args[1:])

    return hook
