from patchclamp.v1 import hook_point_pb2 as _hook_point_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from patchclamp.v1 import vector_pb2 as _vector_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StrengthUnit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRENGTH_UNIT_UNSPECIFIED: _ClassVar[StrengthUnit]
    STRENGTH_UNIT_ABSOLUTE: _ClassVar[StrengthUnit]
    STRENGTH_UNIT_DIRECTION: _ClassVar[StrengthUnit]
    STRENGTH_UNIT_NORM_FRACTION: _ClassVar[StrengthUnit]

class Comparison(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPARISON_UNSPECIFIED: _ClassVar[Comparison]
    COMPARISON_GREATER: _ClassVar[Comparison]
    COMPARISON_LESS: _ClassVar[Comparison]
STRENGTH_UNIT_UNSPECIFIED: StrengthUnit
STRENGTH_UNIT_ABSOLUTE: StrengthUnit
STRENGTH_UNIT_DIRECTION: StrengthUnit
STRENGTH_UNIT_NORM_FRACTION: StrengthUnit
COMPARISON_UNSPECIFIED: Comparison
COMPARISON_GREATER: Comparison
COMPARISON_LESS: Comparison

class Target(_message.Message):
    __slots__ = ("hook_point", "heads", "neurons")
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    NEURONS_FIELD_NUMBER: _ClassVar[int]
    hook_point: _hook_point_pb2.HookPoint
    heads: _containers.RepeatedScalarFieldContainer[int]
    neurons: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hook_point: _Optional[_Union[_hook_point_pb2.HookPoint, _Mapping]] = ..., heads: _Optional[_Iterable[int]] = ..., neurons: _Optional[_Iterable[int]] = ...) -> None: ...

class AddEdit(_message.Message):
    __slots__ = ("target", "vector", "strength", "unit", "cap", "keep_norm")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    KEEP_NORM_FIELD_NUMBER: _ClassVar[int]
    target: Target
    vector: _vector_pb2.VectorSource
    strength: float
    unit: StrengthUnit
    cap: float
    keep_norm: bool
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., vector: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ..., strength: _Optional[float] = ..., unit: _Optional[_Union[StrengthUnit, str]] = ..., cap: _Optional[float] = ..., keep_norm: bool = ...) -> None: ...

class AblateEdit(_message.Message):
    __slots__ = ("target", "directions")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DIRECTIONS_FIELD_NUMBER: _ClassVar[int]
    target: Target
    directions: _vector_pb2.VectorSource
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., directions: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ...) -> None: ...

class AblateEverywhereEdit(_message.Message):
    __slots__ = ("directions",)
    DIRECTIONS_FIELD_NUMBER: _ClassVar[int]
    directions: _vector_pb2.VectorSource
    def __init__(self, directions: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ...) -> None: ...

class SetCoordinateEdit(_message.Message):
    __slots__ = ("target", "direction", "value")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    target: Target
    direction: _vector_pb2.VectorSource
    value: float
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., direction: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ..., value: _Optional[float] = ...) -> None: ...

class ClampEdit(_message.Message):
    __slots__ = ("target", "direction", "min", "max")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    target: Target
    direction: _vector_pb2.VectorSource
    min: float
    max: float
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., direction: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ..., min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class ScaleEdit(_message.Message):
    __slots__ = ("target", "direction", "factor")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    target: Target
    direction: _vector_pb2.VectorSource
    factor: float
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., direction: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ..., factor: _Optional[float] = ...) -> None: ...

class Bounds(_message.Message):
    __slots__ = ("min", "max")
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    min: float
    max: float
    def __init__(self, min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class FeatureEdit(_message.Message):
    __slots__ = ("feature", "set", "scale", "ablate", "clamp")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ABLATE_FIELD_NUMBER: _ClassVar[int]
    CLAMP_FIELD_NUMBER: _ClassVar[int]
    feature: _vector_pb2.FeatureRow
    set: float
    scale: float
    ablate: bool
    clamp: Bounds
    def __init__(self, feature: _Optional[_Union[_vector_pb2.FeatureRow, _Mapping]] = ..., set: _Optional[float] = ..., scale: _Optional[float] = ..., ablate: bool = ..., clamp: _Optional[_Union[Bounds, _Mapping]] = ...) -> None: ...

class ZeroEdit(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: Target
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ...) -> None: ...

class MeanEdit(_message.Message):
    __slots__ = ("target", "mean")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    target: Target
    mean: _vector_pb2.VectorSource
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., mean: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ...) -> None: ...

class ResampleEdit(_message.Message):
    __slots__ = ("target", "source_runs", "seed")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RUNS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    target: Target
    source_runs: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., source_runs: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ...) -> None: ...

class AttentionEdge(_message.Message):
    __slots__ = ("query", "key")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    query: int
    key: int
    def __init__(self, query: _Optional[int] = ..., key: _Optional[int] = ...) -> None: ...

class KnockoutEdit(_message.Message):
    __slots__ = ("layer", "heads", "edges")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    heads: _containers.RepeatedScalarFieldContainer[int]
    edges: _containers.RepeatedCompositeFieldContainer[AttentionEdge]
    def __init__(self, layer: _Optional[int] = ..., heads: _Optional[_Iterable[int]] = ..., edges: _Optional[_Iterable[_Union[AttentionEdge, _Mapping]]] = ...) -> None: ...

class PatchEdit(_message.Message):
    __slots__ = ("target", "source_run", "handle", "tensor", "source_positions")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RUN_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    target: Target
    source_run: int
    handle: str
    tensor: _tensor_pb2.Tensor
    source_positions: _hook_point_pb2.Positions
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., source_run: _Optional[int] = ..., handle: _Optional[str] = ..., tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., source_positions: _Optional[_Union[_hook_point_pb2.Positions, _Mapping]] = ...) -> None: ...

class FreezeEdit(_message.Message):
    __slots__ = ("source_run", "attention", "norms", "mlps")
    SOURCE_RUN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    MLPS_FIELD_NUMBER: _ClassVar[int]
    source_run: int
    attention: bool
    norms: bool
    mlps: bool
    def __init__(self, source_run: _Optional[int] = ..., attention: bool = ..., norms: bool = ..., mlps: bool = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("hook_point", "direction", "comparison", "threshold")
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    COMPARISON_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    hook_point: _hook_point_pb2.HookPoint
    direction: _vector_pb2.VectorSource
    comparison: Comparison
    threshold: float
    def __init__(self, hook_point: _Optional[_Union[_hook_point_pb2.HookPoint, _Mapping]] = ..., direction: _Optional[_Union[_vector_pb2.VectorSource, _Mapping]] = ..., comparison: _Optional[_Union[Comparison, str]] = ..., threshold: _Optional[float] = ...) -> None: ...

class Intervention(_message.Message):
    __slots__ = ("add", "ablate", "ablate_everywhere", "set_coordinate", "clamp", "scale", "feature", "zero", "mean", "resample", "knockout", "patch", "freeze", "positions", "when", "allow_never_fired")
    ADD_FIELD_NUMBER: _ClassVar[int]
    ABLATE_FIELD_NUMBER: _ClassVar[int]
    ABLATE_EVERYWHERE_FIELD_NUMBER: _ClassVar[int]
    SET_COORDINATE_FIELD_NUMBER: _ClassVar[int]
    CLAMP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    ZERO_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    RESAMPLE_FIELD_NUMBER: _ClassVar[int]
    KNOCKOUT_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    FREEZE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    WHEN_FIELD_NUMBER: _ClassVar[int]
    ALLOW_NEVER_FIRED_FIELD_NUMBER: _ClassVar[int]
    add: AddEdit
    ablate: AblateEdit
    ablate_everywhere: AblateEverywhereEdit
    set_coordinate: SetCoordinateEdit
    clamp: ClampEdit
    scale: ScaleEdit
    feature: FeatureEdit
    zero: ZeroEdit
    mean: MeanEdit
    resample: ResampleEdit
    knockout: KnockoutEdit
    patch: PatchEdit
    freeze: FreezeEdit
    positions: _hook_point_pb2.Positions
    when: Condition
    allow_never_fired: bool
    def __init__(self, add: _Optional[_Union[AddEdit, _Mapping]] = ..., ablate: _Optional[_Union[AblateEdit, _Mapping]] = ..., ablate_everywhere: _Optional[_Union[AblateEverywhereEdit, _Mapping]] = ..., set_coordinate: _Optional[_Union[SetCoordinateEdit, _Mapping]] = ..., clamp: _Optional[_Union[ClampEdit, _Mapping]] = ..., scale: _Optional[_Union[ScaleEdit, _Mapping]] = ..., feature: _Optional[_Union[FeatureEdit, _Mapping]] = ..., zero: _Optional[_Union[ZeroEdit, _Mapping]] = ..., mean: _Optional[_Union[MeanEdit, _Mapping]] = ..., resample: _Optional[_Union[ResampleEdit, _Mapping]] = ..., knockout: _Optional[_Union[KnockoutEdit, _Mapping]] = ..., patch: _Optional[_Union[PatchEdit, _Mapping]] = ..., freeze: _Optional[_Union[FreezeEdit, _Mapping]] = ..., positions: _Optional[_Union[_hook_point_pb2.Positions, _Mapping]] = ..., when: _Optional[_Union[Condition, _Mapping]] = ..., allow_never_fired: bool = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("intervention_index", "rows_selected", "rows_fired", "rows_changed", "mean_delta", "max_delta", "clipped", "no_effect", "profile")
    INTERVENTION_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROWS_SELECTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIRED_FIELD_NUMBER: _ClassVar[int]
    ROWS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    MEAN_DELTA_FIELD_NUMBER: _ClassVar[int]
    MAX_DELTA_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    NO_EFFECT_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    intervention_index: int
    rows_selected: int
    rows_fired: int
    rows_changed: int
    mean_delta: float
    max_delta: float
    clipped: int
    no_effect: bool
    profile: str
    def __init__(self, intervention_index: _Optional[int] = ..., rows_selected: _Optional[int] = ..., rows_fired: _Optional[int] = ..., rows_changed: _Optional[int] = ..., mean_delta: _Optional[float] = ..., max_delta: _Optional[float] = ..., clipped: _Optional[int] = ..., no_effect: bool = ..., profile: _Optional[str] = ...) -> None: ...
