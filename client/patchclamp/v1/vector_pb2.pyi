from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VectorSource(_message.Message):
    __slots__ = ("tensor", "safetensors", "direction", "handle", "decoder", "encoder", "unembed_token")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SAFETENSORS_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    UNEMBED_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tensor: _tensor_pb2.Tensor
    safetensors: bytes
    direction: str
    handle: str
    decoder: FeatureRow
    encoder: FeatureRow
    unembed_token: int
    def __init__(self, tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., safetensors: _Optional[bytes] = ..., direction: _Optional[str] = ..., handle: _Optional[str] = ..., decoder: _Optional[_Union[FeatureRow, _Mapping]] = ..., encoder: _Optional[_Union[FeatureRow, _Mapping]] = ..., unembed_token: _Optional[int] = ...) -> None: ...

class FeatureRow(_message.Message):
    __slots__ = ("transcoder", "layer", "feature")
    TRANSCODER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    transcoder: str
    layer: int
    feature: int
    def __init__(self, transcoder: _Optional[str] = ..., layer: _Optional[int] = ..., feature: _Optional[int] = ...) -> None: ...
