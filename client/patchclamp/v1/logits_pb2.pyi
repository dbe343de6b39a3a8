from patchclamp.v1 import hook_point_pb2 as _hook_point_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogitsRequest(_message.Message):
    __slots__ = ("positions", "values", "dtype", "top_k", "logprob_tokens")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_TOKENS_FIELD_NUMBER: _ClassVar[int]
    positions: _hook_point_pb2.Positions
    values: bool
    dtype: _tensor_pb2.Dtype
    top_k: int
    logprob_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, positions: _Optional[_Union[_hook_point_pb2.Positions, _Mapping]] = ..., values: bool = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., top_k: _Optional[int] = ..., logprob_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class LogitsResult(_message.Message):
    __slots__ = ("positions", "values", "top", "logprobs")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    values: _tensor_pb2.Tensor
    top: _containers.RepeatedCompositeFieldContainer[TokenProbability]
    logprobs: _tensor_pb2.Tensor
    def __init__(self, positions: _Optional[_Iterable[int]] = ..., values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenProbability, _Mapping]]] = ..., logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class TokenProbability(_message.Message):
    __slots__ = ("id", "text", "logprob", "logit")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    logprob: float
    logit: float
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., logit: _Optional[float] = ...) -> None: ...
