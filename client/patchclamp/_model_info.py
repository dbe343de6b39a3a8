"""What `describe` tells: the model, its hook points, and what the server can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from html import escape

from patchclamp._hookpoints import parse
from patchclamp._tensors import dtype_name
from patchclamp.errors import InvalidArgument
from patchclamp.v1 import model_pb2 as pb

_LAYOUTS: dict[int, str] = {pb.BLOCK_LAYOUT_SEQUENTIAL: "sequential", pb.BLOCK_LAYOUT_PARALLEL: "parallel"}


@dataclass(frozen=True)
class Dims:
    """Sizes of a model; zero where it has no such thing. `d_mlp` is that of one expert in a mixture of experts."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_experts: int
    n_experts_per_token: int


@dataclass(frozen=True)
class Axis:
    """One axis of an activation. `size` is 0 for `pos`, `query` and `key`, which depend on the prompt."""

    name: str
    size: int


@dataclass(frozen=True)
class SiteInfo:
    """A site that the model has. `layers` is empty outside the blocks; `axes` are those of one run's activation."""

    name: str
    layers: tuple[int, ...]
    axes: tuple[Axis, ...]
    writable: bool
    read_only_reason: str

    @property
    def shape(self) -> str:
        """The shape as text, for instance `[pos, 160]`."""
        return f"[{', '.join(str(axis.size) if axis.size else axis.name for axis in self.axes)}]"

    def hook_points(self) -> tuple[str, ...]:
        """Full names, one per layer that has it: `("blocks.0.resid_post", ..)`."""
        return tuple(f"blocks.{layer}.{self.name}" for layer in self.layers) or (self.name,)


class Sites(Mapping[str, SiteInfo]):
    """The sites that a model has, by name, in the order of the forward pass.

    Iterates over names without `blocks.L.`; each can be read as it is, in every layer at once. Looks up any name that
    `read=` takes: `"blocks.3.resid_post" in info.sites` says whether layer 3 has it.
    """

    def __init__(self, sites: Mapping[str, SiteInfo]) -> None:
        self._sites = dict(sites)

    def __getitem__(self, name: str) -> SiteInfo:
        if name in self._sites:
            return self._sites[name]
        try:
            hook = parse(name)
        except InvalidArgument as fault:
            raise KeyError(str(fault.field_violations[0].description)) from None
        site = self._sites.get(hook.site)
        if site is None or not (hook.layer is None or hook.layer in site.layers):
            raise KeyError(name)
        return site

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"Sites({', '.join(self)})"


@dataclass(frozen=True)
class AbsentSite:
    """A site that the model lacks, in some layers or (`layers` empty) in all, and why."""

    name: str
    layers: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class TranscoderSet:
    """A loaded set of transcoders. `n_features` has one entry per layer."""

    name: str
    n_features: tuple[int, ...]
    cross_layer: bool


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; zero: no limit of its own.

    Runs; prompt tokens, summed; bytes of reads and logits as they travel; bytes of the request message; reads of one
    run; bytes of tensors that one message holds; characters of one prompt given as text; bytes of results that may
    wait at once, of all callers together.
    """

    max_runs: int
    max_tokens: int
    max_result_bytes: int
    max_message_bytes: int
    max_reads: int
    inline_bytes: int
    max_prompt_characters: int
    max_waiting_bytes: int


@dataclass(frozen=True)
class Capability:
    """Something that this server can do, or not: then `reason` says why. True when it is available."""

    name: str
    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True)
class ModelInfo:
    """The model that a server holds.

    `sites` are the hook points that it has, `absent_sites` those it lacks, with reasons. `capabilities` are by name.
    `layout` is `sequential` or `parallel`.
    """

    name: str
    revision: str
    architecture: str
    dtype: str
    devices: tuple[str, ...]
    parameters: int
    layout: str
    has_chat_template: bool
    dims: Dims
    sites: Sites
    absent_sites: tuple[AbsentSite, ...]
    transcoders: tuple[TranscoderSet, ...]
    limits: Limits
    capabilities: Mapping[str, Capability]
    server_version: str

    @classmethod
    def from_message(cls, message: pb.DescribeResponse) -> ModelInfo:
        """What a Describe call answered."""
        model = message.model
        return cls(
            name=model.name,
            revision=model.revision,
            architecture=model.architecture,
            dtype=dtype_name(model.dtype),
            devices=tuple(model.devices),
            parameters=model.parameters,
            layout=_LAYOUTS.get(model.layout, ""),
            has_chat_template=model.has_chat_template,
            dims=_dims(model.dims),
            sites=Sites({site.name: _site(site) for site in message.sites}),
            absent_sites=tuple(AbsentSite(s.name, tuple(s.layers), s.reason) for s in message.absent_sites),
            transcoders=tuple(TranscoderSet(t.name, tuple(t.n_features), t.cross_layer) for t in message.transcoders),
            limits=_limits(message.limits),
            capabilities={c.name: Capability(c.name, c.available, c.reason) for c in message.capabilities},
            server_version=message.server_version,
        )

    def __repr__(self) -> str:
        dims = self.dims
        return (
            f"ModelInfo({self.name!r}, {self.architecture}, n_layers={dims.n_layers}, n_heads={dims.n_heads}, "
            f"d_model={dims.d_model}, d_vocab={dims.d_vocab}, sites={len(self.sites)})"
        )

    def _repr_html_(self) -> str:
        sizes = {name: size for name, size in vars(self.dims).items() if size}
        rows = [
            f"<tr><td><code>{escape(site.name)}</code></td><td>{escape(site.shape)}</td>"
            f"<td>{'read, write' if site.writable else 'read'}</td></tr>"
            for site in self.sites.values()
        ]
        return (
            f"<b>{escape(self.name)}</b> {escape(self.architecture)}, {self.parameters:,} parameters, "
            f"{escape(self.dtype)} on {escape(', '.join(self.devices))}<br>"
            f"{escape(', '.join(f'{name} {size:,}' for name, size in sizes.items()))}"
            f"<table><tr><th>site</th><th>shape</th><th></th></tr>{''.join(rows)}</table>"
        )


def _site(message: pb.SiteInfo) -> SiteInfo:
    return SiteInfo(
        name=message.name,
        layers=tuple(message.layers),
        axes=tuple(Axis(axis.name, axis.size) for axis in message.axes),
        writable=message.writable,
        read_only_reason=message.read_only_reason,
    )


def _dims(message: pb.Dims) -> Dims:
    return Dims(**{field.name: getattr(message, field.name) for field in fields(Dims)})


def _limits(message: pb.Limits) -> Limits:
    return Limits(**{field.name: getattr(message, field.name) for field in fields(Limits)})
