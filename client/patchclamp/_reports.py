"""What the commands print of results: for people as text, for programs as plain values that JSON has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from patchclamp._handles import Handle
from patchclamp._model_info import ModelInfo, SiteInfo
from patchclamp._receipts import Receipt
from patchclamp._results import Activation, Activations, Baseline, Run, Tokens, quoted
from patchclamp._terminal import Terminal

_READS_SHOWN = 40


def show_info(info: ModelInfo, terminal: Terminal) -> None:
    """The model, its hook points, and what the server can do."""
    devices = ", ".join(info.devices)
    terminal.say(f"{terminal.bold(info.name)}  {info.architecture}, {info.parameters:,} parameters")
    terminal.say(f"{info.dtype} on {devices}, {info.layout} blocks, revision {info.revision}")
    terminal.say(f"server {info.server_version}")
    terminal.say(f"\n{terminal.bold('sizes')}")
    terminal.table([[name, f"{size:,}"] for name, size in vars(info.dims).items() if size], right=[1])
    terminal.say(f"\n{terminal.bold('hook points')}")
    rows = [
        [_full_name(site), _layers(site.layers, info.dims.n_layers), site.shape, "" if site.writable else "read only"]
        for site in info.sites.values()
    ]
    terminal.table(rows, ["name", "layers", "shape", ""])
    if info.absent_sites:
        terminal.say(f"\n{terminal.bold('absent')}")
        terminal.table(
            [
                [absent.name, f"{absent.reason}{f' (layers {_span(absent.layers)})' if absent.layers else ''}"]
                for absent in info.absent_sites
            ]
        )
    for transcoder in info.transcoders:
        terminal.say(f"\n{terminal.bold('transcoders')} {transcoder.name}: {sum(transcoder.n_features):,} features")
    terminal.say(f"\n{terminal.bold('served')}")
    terminal.items([name for name, capability in info.capabilities.items() if capability])
    terminal.say(f"\n{terminal.bold('limits of one request')}")
    limits = [[name, f"{value:,}" if value else "none"] for name, value in vars(info.limits).items()]
    terminal.table(limits, right=[1])


def show_tokens(tokens: Tokens, terminal: Terminal) -> None:
    """One token a line."""
    rows = [
        [str(position), str(token.id), quoted(token.text, token.id), f"{token.start}:{token.end}"]
        for position, token in enumerate(tokens)
    ]
    terminal.table(rows, ["pos", "id", "token", "characters"], right=[0, 1])


def show_run(run: Run, asked: Sequence[int | str], terminal: Terminal) -> None:
    """Tokens, next tokens, receipts and reads. `asked` are the tokens whose log-probabilities were asked for."""
    terminal.say(terminal.bold("1 token" if len(run.tokens) == 1 else f"{len(run.tokens)} tokens"))
    strings = list(map(quoted, run.tokens.strings, run.tokens.ids))
    terminal.items(strings)
    _show_logits(run, strings, asked, terminal)
    if run.baseline is not None:
        _show_logits(run.baseline, strings, asked, terminal, " without interventions")
    if run.loss is not None:
        terminal.say(f"\n{terminal.bold('loss')} {run.loss.mean() if run.loss.size else 0:z.4f} nats per token")
    show_receipts(run.receipts, terminal)
    if run.handles:
        terminal.say(f"\n{terminal.bold('kept on the server')}")
        for handle in run.handles.in_order:
            terminal.say(f"  {handle.hook_point}  {handle.dtype} {list(handle.shape)}\n    {handle.name}")
    if run.reads:
        terminal.say(f"\n{terminal.bold('reads')}")
        rows = [
            [read.hook_point, read.reduce or "", str(list(read.shape)), _preview(read)]
            for read in run.reads.in_order[:_READS_SHOWN]
        ]
        terminal.table(rows, ["name", "reduced", "shape", "values"])
        more = len(run.reads.in_order) - _READS_SHOWN
        if more > 0:
            terminal.say(f"  and {more} more; --json or --save has them all")


def show_receipts(receipts: Sequence[Receipt], terminal: Terminal) -> None:
    """What each intervention did."""
    if not receipts:
        return
    terminal.say(f"\n{terminal.bold('receipts')} {terminal.dim('rows, and norm(change) / norm(row)')}")
    rows = [
        [
            *(f"{rows:,}" for rows in (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed)),
            *(f"{delta:z.3g}" for delta in (receipt.mean_delta, receipt.max_delta)),
            f"{receipt.clipped:,}",
            _intervention(receipt),
        ]
        for receipt in receipts
    ]
    header = ["selected", "fired", "changed", "mean", "max", "clipped", "intervention"]
    terminal.table(rows, header, right=range(6))


def _show_logits(
    logits: Run | Baseline, strings: Sequence[str], asked: Sequence[int | str], terminal: Terminal, whose: str = ""
) -> None:
    """The most probable next tokens of each row, and the log-probabilities asked for."""
    for position, row in zip(logits.logit_positions, logits.top_rows, strict=False):
        after = f"after {strings[position]}, position {position}"
        terminal.say(f"\n{terminal.bold(f'next token{whose}')} {terminal.dim(after)}")
        terminal.table(
            [[quoted(top.text, top.id), f"{top.probability:.4f}", terminal.bar(top.probability, 30)] for top in row]
        )
    if logits.logprobs is not None:
        terminal.say(f"\n{terminal.bold(f'log-probabilities{whose}')}")
        rows = [
            [str(position), *(f"{value:z.4f}" for value in row)]
            for position, row in zip(logits.logit_positions, logits.logprobs, strict=True)
        ]
        terminal.table(rows, ["pos", *map(repr, asked)], right=range(len(asked) + 1))


def _intervention(receipt: Receipt) -> str:
    """What a receipt is of."""
    name = receipt.profile
    if receipt.intervention is not None:
        name = f"{receipt.intervention.kind} {receipt.intervention.where}"
    return f"{name} (no effect)" if receipt.no_effect else name


def _preview(read: Activation) -> str:
    """The first values."""
    values = np.asarray(read).reshape(-1)
    shown = " ".join(f"{value:z.3g}" for value in values[:3])
    return f"{shown} .." if values.size > 3 else shown


def _full_name(site: SiteInfo) -> str:
    return f"blocks.*.{site.name}" if site.layers else site.name


def _layers(layers: tuple[int, ...], n_layers: int) -> str:
    if not layers:
        return ""
    return "all" if len(layers) == n_layers else _span(layers)


def _span(layers: tuple[int, ...]) -> str:
    """`0-3` for four layers in a row."""
    in_a_row = layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"{layers[0]}-{layers[-1]}" if in_a_row else ",".join(map(str, layers))


def arrays(run: Run) -> dict[str, Any]:
    """Everything numeric in a run, by name; what was read at one place in several ways is numbered."""
    arrays: dict[str, Any] = {"tokens": np.array(run.tokens.ids, np.int64)}
    found = {"logits": run.logits, "logprobs": run.logprobs, "loss": run.loss}
    if run.baseline is not None:
        found |= {"baseline.logits": run.baseline.logits, "baseline.logprobs": run.baseline.logprobs}
    for name, values in found.items():
        if values is not None:
            arrays[name] = np.asarray(values)
    return with_reads(arrays, run.reads)


def with_reads(arrays: dict[str, Any], reads: Activations) -> dict[str, Any]:
    """These arrays and those that were read, numbered where one place was read in several ways."""
    own_names = set(arrays)
    times = Counter(read.hook_point for read in reads.in_order)
    so_far: Counter[str] = Counter()
    for read in reads.in_order:
        name = f"{read.hook_point}.read" if read.hook_point in own_names else read.hook_point
        if times[read.hook_point] > 1:
            name = f"{name}.{so_far[read.hook_point]}"
        so_far[read.hook_point] += 1
        arrays[name] = np.asarray(read)
        if read.indices is not None:
            arrays[f"{name}.indices"] = read.indices
    return arrays


def plain_info(info: ModelInfo) -> dict[str, Any]:
    """What `describe` told, as plain values."""
    return {
        **{name: value for name, value in vars(info).items() if isinstance(value, str | int | bool)},
        "devices": info.devices,
        "dims": vars(info.dims),
        "sites": [
            {**vars(site), "axes": [vars(axis) for axis in site.axes], "shape": site.shape}
            for site in info.sites.values()
        ],
        "absent_sites": [vars(absent) for absent in info.absent_sites],
        "transcoders": [vars(transcoder) for transcoder in info.transcoders],
        "limits": vars(info.limits),
        "capabilities": [vars(capability) for capability in info.capabilities.values()],
    }


def plain_run(run: Run, asked: Sequence[int | str]) -> dict[str, Any]:
    """A run as plain values."""
    plain: dict[str, Any] = {
        "tokens": {"ids": run.tokens.ids, "strings": run.tokens.strings},
        **_plain_logits(run, asked),
        "reads": plain_reads(run.reads),
        "receipts": [plain_receipt(receipt) for receipt in run.receipts],
        "handles": [_plain_handle(handle) for handle in run.handles.in_order],
        "summary": vars(run.summary),
    }
    if run.baseline is not None:
        plain["baseline"] = _plain_logits(run.baseline, asked)
    if run.loss is not None:
        plain["loss"] = numbers(run.loss)
    return plain


def _plain_logits(logits: Run | Baseline, asked: Sequence[int | str]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "top": [
            {"position": position, "tokens": [vars(top) for top in row]}
            for position, row in zip(logits.logit_positions, logits.top_rows, strict=False)
        ]
    }
    if logits.logits is not None:
        plain["logits"] = numbers(logits.logits)
    if logits.logprobs is not None:
        plain["logprobs"] = {"tokens": asked, "values": numbers(logits.logprobs)}
    return plain


def plain_reads(reads: Activations) -> list[dict[str, Any]]:
    """Activations as plain values."""
    return [
        {
            "name": read.hook_point,
            "reduce": read.reduce,
            "positions": read.positions,
            "shape": read.shape,
            "values": numbers(read),
            **({} if read.indices is None else {"indices": read.indices.tolist()}),
        }
        for read in reads.in_order
    ]


def plain_receipt(receipt: Receipt) -> dict[str, Any]:
    """A receipt as plain values."""
    plain = {name: value for name, value in vars(receipt).items() if name != "intervention"}
    if receipt.intervention is not None:
        plain |= {"kind": receipt.intervention.kind, "where": receipt.intervention.where}
    return plain


def _plain_handle(handle: Handle) -> dict[str, Any]:
    times = {name: value.isoformat() for name, value in vars(handle).items() if isinstance(value, datetime)}
    return {**vars(handle), **times}


def numbers(array: Any) -> Any:
    """Nested lists; what JSON has no number for is text, as in protobuf's JSON: "-Infinity", "NaN"."""
    values = np.asarray(array)
    if np.isfinite(values).all():
        return values.tolist()
    names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
    plain = values.astype(object)
    plain[~np.isfinite(values)] = [names[str(value)] for value in values[~np.isfinite(values)].tolist()]
    return plain.tolist()
