from patchclamp.v1 import hook_point_pb2 as _hook_point_pb2
from patchclamp.v1 import prompt_pb2 as _prompt_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlockLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_LAYOUT_UNSPECIFIED: _ClassVar[BlockLayout]
    BLOCK_LAYOUT_SEQUENTIAL: _ClassVar[BlockLayout]
    BLOCK_LAYOUT_PARALLEL: _ClassVar[BlockLayout]
BLOCK_LAYOUT_UNSPECIFIED: BlockLayout
BLOCK_LAYOUT_SEQUENTIAL: BlockLayout
BLOCK_LAYOUT_PARALLEL: BlockLayout

class DescribeRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Dims(_message.Message):
    __slots__ = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "n_experts", "n_experts_per_token")
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    N_HEADS_FIELD_NUMBER: _ClassVar[int]
    N_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    D_HEAD_FIELD_NUMBER: _ClassVar[int]
    D_MLP_FIELD_NUMBER: _ClassVar[int]
    D_VOCAB_FIELD_NUMBER: _ClassVar[int]
    N_CTX_FIELD_NUMBER: _ClassVar[int]
    N_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    N_EXPERTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, n_layers: _Optional[int] = ..., n_heads: _Optional[int] = ..., n_kv_heads: _Optional[int] = ..., d_model: _Optional[int] = ..., d_head: _Optional[int] = ..., d_mlp: _Optional[int] = ..., d_vocab: _Optional[int] = ..., n_ctx: _Optional[int] = ..., n_experts: _Optional[int] = ..., n_experts_per_token: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "revision", "architecture", "dims", "dtype", "devices", "parameters", "layout", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    architecture: str
    dims: Dims
    dtype: _tensor_pb2.Dtype
    devices: _containers.RepeatedScalarFieldContainer[str]
    parameters: int
    layout: BlockLayout
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., architecture: _Optional[str] = ..., dims: _Optional[_Union[Dims, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., devices: _Optional[_Iterable[str]] = ..., parameters: _Optional[int] = ..., layout: _Optional[_Union[BlockLayout, str]] = ..., has_chat_template: bool = ...) -> None: ...

class Axis(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("site", "name", "layers", "axes", "writable", "read_only_reason")
    SITE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_REASON_FIELD_NUMBER: _ClassVar[int]
    site: _hook_point_pb2.Site
    name: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    axes: _containers.RepeatedCompositeFieldContainer[Axis]
    writable: bool
    read_only_reason: str
    def __init__(self, site: _Optional[_Union[_hook_point_pb2.Site, str]] = ..., name: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., axes: _Optional[_Iterable[_Union[Axis, _Mapping]]] = ..., writable: bool = ..., read_only_reason: _Optional[str] = ...) -> None: ...

class AbsentSite(_message.Message):
    __slots__ = ("site", "name", "layers", "reason")
    SITE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    site: _hook_point_pb2.Site
    name: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    reason: str
    def __init__(self, site: _Optional[_Union[_hook_point_pb2.Site, str]] = ..., name: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., reason: _Optional[str] = ...) -> None: ...

class TranscoderSet(_message.Message):
    __slots__ = ("name", "n_features", "cross_layer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    N_FEATURES_FIELD_NUMBER: _ClassVar[int]
    CROSS_LAYER_FIELD_NUMBER: _ClassVar[int]
    name: str
    n_features: _containers.RepeatedScalarFieldContainer[int]
    cross_layer: bool
    def __init__(self, name: _Optional[str] = ..., n_features: _Optional[_Iterable[int]] = ..., cross_layer: bool = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_runs", "max_tokens", "max_result_bytes", "max_message_bytes", "max_reads", "inline_bytes", "max_prompt_characters", "max_waiting_bytes")
    MAX_RUNS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_READS_FIELD_NUMBER: _ClassVar[int]
    INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_runs: int
    max_tokens: int
    max_result_bytes: int
    max_message_bytes: int
    max_reads: int
    inline_bytes: int
    max_prompt_characters: int
    max_waiting_bytes: int
    def __init__(self, max_runs: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_result_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_reads: _Optional[int] = ..., inline_bytes: _Optional[int] = ..., max_prompt_characters: _Optional[int] = ..., max_waiting_bytes: _Optional[int] = ...) -> None: ...

class Capability(_message.Message):
    __slots__ = ("name", "available", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    available: bool
    reason: str
    def __init__(self, name: _Optional[str] = ..., available: bool = ..., reason: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model", "sites", "absent_sites", "transcoders", "limits", "capabilities", "server_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_SITES_FIELD_NUMBER: _ClassVar[int]
    TRANSCODERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: Model
    sites: _containers.RepeatedCompositeFieldContainer[SiteInfo]
    absent_sites: _containers.RepeatedCompositeFieldContainer[AbsentSite]
    transcoders: _containers.RepeatedCompositeFieldContainer[TranscoderSet]
    limits: Limits
    capabilities: _containers.RepeatedCompositeFieldContainer[Capability]
    server_version: str
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., sites: _Optional[_Iterable[_Union[SiteInfo, _Mapping]]] = ..., absent_sites: _Optional[_Iterable[_Union[AbsentSite, _Mapping]]] = ..., transcoders: _Optional[_Iterable[_Union[TranscoderSet, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., capabilities: _Optional[_Iterable[_Union[Capability, _Mapping]]] = ..., server_version: _Optional[str] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "prompts")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Prompt]
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_prompt_pb2.Prompt, _Mapping]]] = ...) -> None: ...

class TokenizedPrompt(_message.Message):
    __slots__ = ("tokens", "text")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Token]
    text: str
    def __init__(self, tokens: _Optional[_Iterable[_Union[_prompt_pb2.Token, _Mapping]]] = ..., text: _Optional[str] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("prompts",)
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[TokenizedPrompt]
    def __init__(self, prompts: _Optional[_Iterable[_Union[TokenizedPrompt, _Mapping]]] = ...) -> None: ...
