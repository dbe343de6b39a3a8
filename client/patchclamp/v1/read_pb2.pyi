from patchclamp.v1 import hook_point_pb2 as _hook_point_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from patchclamp.v1 import vector_pb2 as _vector_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LastReduction(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MeanReduction(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NormReduction(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MomentsReduction(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TopKReduction(_message.Message):
    __slots__ = ("k", "by_magnitude")
    K_FIELD_NUMBER: _ClassVar[int]
    BY_MAGNITUDE_FIELD_NUMBER: _ClassVar[int]
    k: int
    by_magnitude: bool
    def __init__(self, k: _Optional[int] = ..., by_magnitude: bool = ...) -> None: ...

class ProjectReduction(_message.Message):
    __slots__ = ("onto",)
    ONTO_FIELD_NUMBER: _ClassVar[int]
    onto: _containers.RepeatedCompositeFieldContainer[_vector_pb2.VectorSource]
    def __init__(self, onto: _Optional[_Iterable[_Union[_vector_pb2.VectorSource, _Mapping]]] = ...) -> None: ...

class LogitLensReduction(_message.Message):
    __slots__ = ("k",)
    K_FIELD_NUMBER: _ClassVar[int]
    k: int
    def __init__(self, k: _Optional[int] = ...) -> None: ...

class Reduction(_message.Message):
    __slots__ = ("last", "mean", "norm", "moments", "top_k", "project", "logit_lens")
    LAST_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    MOMENTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    LOGIT_LENS_FIELD_NUMBER: _ClassVar[int]
    last: LastReduction
    mean: MeanReduction
    norm: NormReduction
    moments: MomentsReduction
    top_k: TopKReduction
    project: ProjectReduction
    logit_lens: LogitLensReduction
    def __init__(self, last: _Optional[_Union[LastReduction, _Mapping]] = ..., mean: _Optional[_Union[MeanReduction, _Mapping]] = ..., norm: _Optional[_Union[NormReduction, _Mapping]] = ..., moments: _Optional[_Union[MomentsReduction, _Mapping]] = ..., top_k: _Optional[_Union[TopKReduction, _Mapping]] = ..., project: _Optional[_Union[ProjectReduction, _Mapping]] = ..., logit_lens: _Optional[_Union[LogitLensReduction, _Mapping]] = ...) -> None: ...

class Read(_message.Message):
    __slots__ = ("hook_point", "positions", "heads", "reduction", "dtype")
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    hook_point: _hook_point_pb2.HookPoint
    positions: _hook_point_pb2.Positions
    heads: _containers.RepeatedScalarFieldContainer[int]
    reduction: Reduction
    dtype: _tensor_pb2.Dtype
    def __init__(self, hook_point: _Optional[_Union[_hook_point_pb2.HookPoint, _Mapping]] = ..., positions: _Optional[_Union[_hook_point_pb2.Positions, _Mapping]] = ..., heads: _Optional[_Iterable[int]] = ..., reduction: _Optional[_Union[Reduction, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ...) -> None: ...

class ReadResult(_message.Message):
    __slots__ = ("read_index", "hook_point", "name", "values", "indices", "positions", "position_range")
    READ_INDEX_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    POSITION_RANGE_FIELD_NUMBER: _ClassVar[int]
    read_index: int
    hook_point: _hook_point_pb2.HookPoint
    name: str
    values: _tensor_pb2.Tensor
    indices: _tensor_pb2.Tensor
    positions: _containers.RepeatedScalarFieldContainer[int]
    position_range: _hook_point_pb2.PositionRange
    def __init__(self, read_index: _Optional[int] = ..., hook_point: _Optional[_Union[_hook_point_pb2.HookPoint, _Mapping]] = ..., name: _Optional[str] = ..., values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., indices: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., positions: _Optional[_Iterable[int]] = ..., position_range: _Optional[_Union[_hook_point_pb2.PositionRange, _Mapping]] = ...) -> None: ...
