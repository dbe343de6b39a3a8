"""What the commands print of results: for people as text, for programs as plain values that JSON has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchclamp._model_info import ModelInfo, SiteInfo
from patchclamp._results import Activation, Run, Tokens, quoted
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
    """Tokens, next tokens and reads. `asked` are the tokens whose log-probabilities were asked for."""
    terminal.say(terminal.bold("1 token" if len(run.tokens) == 1 else f"{len(run.tokens)} tokens"))
    strings = list(map(quoted, run.tokens.strings, run.tokens.ids))
    terminal.items(strings)
    for position, row in zip(run.logit_positions, run.top_rows, strict=False):
        after = f"after {strings[position]}, position {position}"
        terminal.say(f"\n{terminal.bold('next token')} {terminal.dim(after)}")
        terminal.table(
            [[quoted(top.text, top.id), f"{top.probability:.4f}", terminal.bar(top.probability, 30)] for top in row]
        )
    if run.logprobs is not None:
        terminal.say(f"\n{terminal.bold('log-probabilities')}")
        rows = [
            [str(position), *(f"{value:z.4f}" for value in row)]
            for position, row in zip(run.logit_positions, run.logprobs, strict=True)
        ]
        terminal.table(rows, ["pos", *map(repr, asked)], right=range(len(asked) + 1))
    if run.loss is not None:
        terminal.say(f"\n{terminal.bold('loss')} {run.loss.mean() if run.loss.size else 0:z.4f} nats per token")
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
    for name, values in (("logits", run.logits), ("logprobs", run.logprobs), ("loss", run.loss)):
        if values is not None:
            arrays[name] = np.asarray(values)
    own_names = set(arrays)
    times = Counter(read.hook_point for read in run.reads.in_order)
    so_far: Counter[str] = Counter()
    for read in run.reads.in_order:
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
        "top": [
            {"position": position, "tokens": [vars(top) for top in row]}
            for position, row in zip(run.logit_positions, run.top_rows, strict=False)
        ],
        "reads": [
            {
                "name": read.hook_point,
                "reduce": read.reduce,
                "positions": read.positions,
                "shape": read.shape,
                "values": numbers(read),
                **({} if read.indices is None else {"indices": read.indices.tolist()}),
            }
            for read in run.reads.in_order
        ],
        "summary": vars(run.summary),
    }
    if run.logits is not None:
        plain["logits"] = numbers(run.logits)
    if run.logprobs is not None:
        plain["logprobs"] = {"tokens": asked, "values": numbers(run.logprobs)}
    if run.loss is not None:
        plain["loss"] = numbers(run.loss)
    return plain


def numbers(array: Any) -> Any:
    """Nested lists; what JSON has no number for is text, as in protobuf's JSON: "-Infinity", "NaN"."""
    values = np.asarray(array)
    if np.isfinite(values).all():
        return values.tolist()
    names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
    plain = values.astype(object)
    plain[~np.isfinite(values)] = [names[str(value)] for value in values[~np.isfinite(values)].tolist()]
    return plain.tolist()
