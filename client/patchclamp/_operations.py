"""The kinds of interventions, one class for each arm of `patchclamp.v1.Intervention`. `_edits` makes them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from patchclamp import _positions
from patchclamp._handles import Handle
from patchclamp._interventions import Edit, Known, SiteEdit
from patchclamp._positions import At, Positions, Span
from patchclamp._vectors import FeatureRow, Source, Values
from patchclamp.errors import invalid_field
from patchclamp.v1 import intervention_pb2 as pb
from patchclamp.v1 import model_pb2

Unit: TypeAlias = Literal["absolute", "direction", "norm_fraction"]
# A token: its position, a text that is looked up, or pc.LAST.
Place: TypeAlias = "int | At | Span"

UNITS: dict[str, pb.StrengthUnit] = {
    "absolute": pb.STRENGTH_UNIT_ABSOLUTE,
    "direction": pb.STRENGTH_UNIT_DIRECTION,
    "norm_fraction": pb.STRENGTH_UNIT_NORM_FRACTION,
}


@dataclass(frozen=True, repr=False)
class Add(SiteEdit):
    """See `pc.add`."""

    arm: ClassVar[str] = "add"
    message = pb.AddEdit
    vector: Source
    _: KW_ONLY
    strength: float = 1.0
    unit: Unit = "absolute"
    cap: float | None = None
    keep_norm: bool = False

    def details(self, known: Known) -> dict[str, Any]:
        return {
            "vector": known.vector(self.vector),
            "strength": self.strength,
            "unit": UNITS[self.unit],
            "cap": self.cap,
            "keep_norm": self.keep_norm,
        }


@dataclass(frozen=True, repr=False)
class Ablate(SiteEdit):
    """See `pc.ablate`."""

    arm: ClassVar[str] = "ablate"
    message = pb.AblateEdit
    directions: Source

    def details(self, known: Known) -> dict[str, Any]:
        return {"directions": known.vector(self.directions)}


@dataclass(frozen=True, repr=False)
class AblateEverywhere(Edit):
    """See `pc.ablate_everywhere`."""

    arm: ClassVar[str] = "ablate_everywhere"
    directions: Source

    @property
    def where(self) -> str:
        return "every write"

    def ops(self, known: Known) -> list[Any]:
        return [pb.AblateEverywhereEdit(directions=known.vector(self.directions))]


@dataclass(frozen=True, repr=False)
class SetCoordinate(SiteEdit):
    """See `pc.set_coordinate`."""

    arm: ClassVar[str] = "set_coordinate"
    message = pb.SetCoordinateEdit
    direction: Source
    value: float

    def details(self, known: Known) -> dict[str, Any]:
        return {"direction": known.vector(self.direction), "value": self.value}


@dataclass(frozen=True, repr=False)
class Clamp(SiteEdit):
    """See `pc.clamp`."""

    arm: ClassVar[str] = "clamp"
    message = pb.ClampEdit
    direction: Source
    _: KW_ONLY
    min: float | None = None
    max: float | None = None

    def details(self, known: Known) -> dict[str, Any]:
        return {"direction": known.vector(self.direction), "min": self.min, "max": self.max}


@dataclass(frozen=True, repr=False)
class Scale(SiteEdit):
    """See `pc.scale`."""

    arm: ClassVar[str] = "scale"
    message = pb.ScaleEdit
    direction: Source
    factor: float

    def details(self, known: Known) -> dict[str, Any]:
        return {"direction": known.vector(self.direction), "factor": self.factor}


@dataclass(frozen=True, repr=False)
class Zero(SiteEdit):
    """See `pc.zero`."""

    arm: ClassVar[str] = "zero"
    message = pb.ZeroEdit


@dataclass(frozen=True, repr=False)
class Mean(SiteEdit):
    """See `pc.mean`."""

    arm: ClassVar[str] = "mean"
    message = pb.MeanEdit
    _: KW_ONLY
    mean: Source | None = None

    def details(self, known: Known) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": known.vector(self.mean)}


@dataclass(frozen=True, repr=False)
class Resample(SiteEdit):
    """See `pc.resample`."""

    arm: ClassVar[str] = "resample"
    message = pb.ResampleEdit
    _: KW_ONLY
    sources: tuple[int, ...]
    seed: int = 0

    def details(self, known: Known) -> dict[str, Any]:
        return {"source_runs": self.sources, "seed": self.seed}


@dataclass(frozen=True, repr=False)
class Patch(SiteEdit):
    """See `pc.patch`."""

    arm: ClassVar[str] = "patch"
    message = pb.PatchEdit
    _: KW_ONLY
    source: int | str | Handle | Values
    source_positions: Positions | None = None

    @property
    def looked_up_run(self) -> int | None:
        return self.source if isinstance(self.source, int) and isinstance(self.source_positions, At) else None

    def details(self, known: Known) -> dict[str, Any]:
        prompt = known.prompts.get(self.source) if known.prompts and isinstance(self.source, int) else None
        rows = _positions.to_message(self.source_positions, f"{known.field}.source_positions", prompt)
        match self.source:
            case int(run):
                return {"source_run": run, "source_positions": rows}
            case Values() as given:
                return {"tensor": given.to_message(), "source_positions": rows}
            case Handle(name) | str(name):
                return {"handle": name, "source_positions": rows}


@dataclass(frozen=True, repr=False)
class Knockout(Edit):
    """See `pc.knockout`."""

    arm: ClassVar[str] = "knockout"
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    edges: tuple[tuple[Place, Place], ...]

    @property
    def where(self) -> str:
        return ", ".join(f"blocks.{layer}.attn.scores" for layer in self.layers)

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def needs_prompt(self) -> bool:
        return super().needs_prompt or any(isinstance(place, At) for edge in self.edges for place in edge)

    def ops(self, known: Known) -> list[Any]:
        edges = [
            pb.AttentionEdge(query=query, key=key)
            for number, edge in enumerate(self.edges)
            for query, key in _pairs(*edge, f"{known.field}.edges[{number}]", known.prompt)
        ]
        return [pb.KnockoutEdit(layer=layer, heads=self.heads, edges=edges) for layer in self.layers]


@dataclass(frozen=True, repr=False)
class Feature(Edit):
    """See `pc.feature`. Exactly one of `set`, `scale`, `ablate` and `clamp` is there."""

    arm: ClassVar[str] = "feature"
    layer: int
    feature: int
    _: KW_ONLY
    set: float | None = None
    scale: float | None = None
    ablate: bool = False
    clamp: tuple[float | None, float | None] | None = None
    transcoder: str = ""

    @property
    def where(self) -> str:
        return f"blocks.{self.layer}.features[{self.feature}]"

    def ops(self, known: Known) -> list[Any]:
        row = FeatureRow("decoder", self.layer, self.feature, self.transcoder).to_message()
        if self.ablate:
            return [pb.FeatureEdit(feature=row, ablate=True)]
        bounds = None if self.clamp is None else pb.Bounds(min=self.clamp[0], max=self.clamp[1])
        return [pb.FeatureEdit(feature=row, set=self.set, scale=self.scale, clamp=bounds)]


@dataclass(frozen=True, repr=False)
class Freeze(Edit):
    """See `pc.freeze`."""

    arm: ClassVar[str] = "freeze"
    source: int
    _: KW_ONLY
    attention: bool = True
    norms: bool = True
    mlps: bool = False

    @property
    def where(self) -> str:
        held = [name for name in ("attention", "norms", "mlps") if getattr(self, name)]
        return f"{', '.join(held)} of run {self.source}"

    def ops(self, known: Known) -> list[Any]:
        return [
            pb.FreezeEdit(source_run=self.source, attention=self.attention, norms=self.norms, mlps=self.mlps),
        ]


def _pairs(query: Place, key: Place, field: str, prompt: model_pb2.TokenizedPrompt | None) -> list[tuple[int, int]]:
    """The edges that one pair stands for. A text of several tokens stands for each of them; of the pairs that makes,
    those where the key comes after the query are no edges."""
    queries, keys = (_places(place, field, prompt) for place in (query, key))
    if len(queries) == len(keys) == 1:
        return [(queries[0], keys[0])]
    length = 0 if prompt is None else len(prompt.tokens)
    found = [(q, k) for q in queries for k in keys if _absolute(k, length) <= _absolute(q, length)]
    if not found:
        raise invalid_field(field, f"{key!r} comes after {query!r}, which attends to nothing there")
    return found


def _places(place: Place, field: str, prompt: model_pb2.TokenizedPrompt | None) -> list[int]:
    if isinstance(place, At):
        if prompt is None:
            raise ValueError(f"{place} is looked up in a prompt")
        return _positions.locate(place, prompt, field)
    return [place if isinstance(place, int) else -1]


def _absolute(position: int, length: int) -> int:
    return position + length if position < 0 else position
