from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Site(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SITE_UNSPECIFIED: _ClassVar[Site]
    SITE_EMBED: _ClassVar[Site]
    SITE_POS_EMBED: _ClassVar[Site]
    SITE_RESID_PRE: _ClassVar[Site]
    SITE_LN1_SCALE: _ClassVar[Site]
    SITE_LN1_NORMALIZED: _ClassVar[Site]
    SITE_ATTN_IN: _ClassVar[Site]
    SITE_ATTN_Q_INPUT: _ClassVar[Site]
    SITE_ATTN_K_INPUT: _ClassVar[Site]
    SITE_ATTN_V_INPUT: _ClassVar[Site]
    SITE_ATTN_Q: _ClassVar[Site]
    SITE_ATTN_K: _ClassVar[Site]
    SITE_ATTN_V: _ClassVar[Site]
    SITE_ATTN_ROT_Q: _ClassVar[Site]
    SITE_ATTN_ROT_K: _ClassVar[Site]
    SITE_ATTN_SCORES: _ClassVar[Site]
    SITE_ATTN_PATTERN: _ClassVar[Site]
    SITE_ATTN_GATE: _ClassVar[Site]
    SITE_ATTN_Z: _ClassVar[Site]
    SITE_ATTN_RESULT: _ClassVar[Site]
    SITE_ATTN_OUT_RAW: _ClassVar[Site]
    SITE_ATTN_OUT: _ClassVar[Site]
    SITE_RESID_MID: _ClassVar[Site]
    SITE_LN1_POST_SCALE: _ClassVar[Site]
    SITE_LN2_SCALE: _ClassVar[Site]
    SITE_LN2_NORMALIZED: _ClassVar[Site]
    SITE_LN2_POST_SCALE: _ClassVar[Site]
    SITE_ATTN_Q_NORM_SCALE: _ClassVar[Site]
    SITE_ATTN_K_NORM_SCALE: _ClassVar[Site]
    SITE_MLP_IN: _ClassVar[Site]
    SITE_MLP_PRE: _ClassVar[Site]
    SITE_MLP_PRE_LINEAR: _ClassVar[Site]
    SITE_MLP_POST: _ClassVar[Site]
    SITE_MLP_OUT_RAW: _ClassVar[Site]
    SITE_MLP_OUT: _ClassVar[Site]
    SITE_RESID_POST: _ClassVar[Site]
    SITE_FEATURES_PRE: _ClassVar[Site]
    SITE_FEATURES: _ClassVar[Site]
    SITE_ROUTER_LOGITS: _ClassVar[Site]
    SITE_ROUTER_WEIGHTS: _ClassVar[Site]
    SITE_EXPERT_POST: _ClassVar[Site]
    SITE_LN_FINAL_SCALE: _ClassVar[Site]
    SITE_LN_FINAL: _ClassVar[Site]
    SITE_LOGITS: _ClassVar[Site]

class PositionSpan(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POSITION_SPAN_UNSPECIFIED: _ClassVar[PositionSpan]
    POSITION_SPAN_ALL: _ClassVar[PositionSpan]
    POSITION_SPAN_PROMPT: _ClassVar[PositionSpan]
    POSITION_SPAN_GENERATED: _ClassVar[PositionSpan]
    POSITION_SPAN_LAST: _ClassVar[PositionSpan]
SITE_UNSPECIFIED: Site
SITE_EMBED: Site
SITE_POS_EMBED: Site
SITE_RESID_PRE: Site
SITE_LN1_SCALE: Site
SITE_LN1_NORMALIZED: Site
SITE_ATTN_IN: Site
SITE_ATTN_Q_INPUT: Site
SITE_ATTN_K_INPUT: Site
SITE_ATTN_V_INPUT: Site
SITE_ATTN_Q: Site
SITE_ATTN_K: Site
SITE_ATTN_V: Site
SITE_ATTN_ROT_Q: Site
SITE_ATTN_ROT_K: Site
SITE_ATTN_SCORES: Site
SITE_ATTN_PATTERN: Site
SITE_ATTN_GATE: Site
SITE_ATTN_Z: Site
SITE_ATTN_RESULT: Site
SITE_ATTN_OUT_RAW: Site
SITE_ATTN_OUT: Site
SITE_RESID_MID: Site
SITE_LN1_POST_SCALE: Site
SITE_LN2_SCALE: Site
SITE_LN2_NORMALIZED: Site
SITE_LN2_POST_SCALE: Site
SITE_ATTN_Q_NORM_SCALE: Site
SITE_ATTN_K_NORM_SCALE: Site
SITE_MLP_IN: Site
SITE_MLP_PRE: Site
SITE_MLP_PRE_LINEAR: Site
SITE_MLP_POST: Site
SITE_MLP_OUT_RAW: Site
SITE_MLP_OUT: Site
SITE_RESID_POST: Site
SITE_FEATURES_PRE: Site
SITE_FEATURES: Site
SITE_ROUTER_LOGITS: Site
SITE_ROUTER_WEIGHTS: Site
SITE_EXPERT_POST: Site
SITE_LN_FINAL_SCALE: Site
SITE_LN_FINAL: Site
SITE_LOGITS: Site
POSITION_SPAN_UNSPECIFIED: PositionSpan
POSITION_SPAN_ALL: PositionSpan
POSITION_SPAN_PROMPT: PositionSpan
POSITION_SPAN_GENERATED: PositionSpan
POSITION_SPAN_LAST: PositionSpan

class HookPoint(_message.Message):
    __slots__ = ("site", "layer", "head")
    SITE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    site: Site
    layer: int
    head: int
    def __init__(self, site: _Optional[_Union[Site, str]] = ..., layer: _Optional[int] = ..., head: _Optional[int] = ...) -> None: ...

class PositionIndices(_message.Message):
    __slots__ = ("indices",)
    INDICES_FIELD_NUMBER: _ClassVar[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indices: _Optional[_Iterable[int]] = ...) -> None: ...

class PositionRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("span", "indices", "range", "exclude")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    span: PositionSpan
    indices: PositionIndices
    range: PositionRange
    exclude: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, span: _Optional[_Union[PositionSpan, str]] = ..., indices: _Optional[_Union[PositionIndices, _Mapping]] = ..., range: _Optional[_Union[PositionRange, _Mapping]] = ..., exclude: _Optional[_Iterable[int]] = ...) -> None: ...
