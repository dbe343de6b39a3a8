from patchclamp.v1 import error_pb2 as _error_pb2
from patchclamp.v1 import handle_pb2 as _handle_pb2
from patchclamp.v1 import hook_point_pb2 as _hook_point_pb2
from patchclamp.v1 import intervention_pb2 as _intervention_pb2
from patchclamp.v1 import prompt_pb2 as _prompt_pb2
from patchclamp.v1 import read_pb2 as _read_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Numerics(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NUMERICS_UNSPECIFIED: _ClassVar[Numerics]
    NUMERICS_DEFAULT: _ClassVar[Numerics]
    NUMERICS_DETERMINISTIC: _ClassVar[Numerics]
    NUMERICS_SOLO: _ClassVar[Numerics]
NUMERICS_UNSPECIFIED: Numerics
NUMERICS_DEFAULT: Numerics
NUMERICS_DETERMINISTIC: Numerics
NUMERICS_SOLO: Numerics

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

class RunSpec(_message.Message):
    __slots__ = ("prompt", "reads", "interventions", "logits", "loss", "keep", "baseline", "profile")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    prompt: _prompt_pb2.Prompt
    reads: _containers.RepeatedCompositeFieldContainer[_read_pb2.Read]
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    logits: LogitsRequest
    loss: bool
    keep: _containers.RepeatedCompositeFieldContainer[_handle_pb2.Keep]
    baseline: bool
    profile: str
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., reads: _Optional[_Iterable[_Union[_read_pb2.Read, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., logits: _Optional[_Union[LogitsRequest, _Mapping]] = ..., loss: bool = ..., keep: _Optional[_Iterable[_Union[_handle_pb2.Keep, _Mapping]]] = ..., baseline: bool = ..., profile: _Optional[str] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("model", "runs", "numerics")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    model: str
    runs: _containers.RepeatedCompositeFieldContainer[RunSpec]
    numerics: Numerics
    def __init__(self, model: _Optional[str] = ..., runs: _Optional[_Iterable[_Union[RunSpec, _Mapping]]] = ..., numerics: _Optional[_Union[Numerics, str]] = ...) -> None: ...

class RunFailure(_message.Message):
    __slots__ = ("code", "reason", "message", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: _error_pb2.ErrorReason
    message: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[_Union[_error_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

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

class RunResult(_message.Message):
    __slots__ = ("run_index", "failure", "tokens", "reads", "logits", "loss", "receipts", "handles", "baseline_logits", "text")
    RUN_INDEX_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    BASELINE_LOGITS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    run_index: int
    failure: RunFailure
    tokens: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Token]
    reads: _containers.RepeatedCompositeFieldContainer[_read_pb2.ReadResult]
    logits: LogitsResult
    loss: _tensor_pb2.Tensor
    receipts: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Receipt]
    handles: _containers.RepeatedCompositeFieldContainer[_handle_pb2.Handle]
    baseline_logits: LogitsResult
    text: str
    def __init__(self, run_index: _Optional[int] = ..., failure: _Optional[_Union[RunFailure, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[_prompt_pb2.Token, _Mapping]]] = ..., reads: _Optional[_Iterable[_Union[_read_pb2.ReadResult, _Mapping]]] = ..., logits: _Optional[_Union[LogitsResult, _Mapping]] = ..., loss: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., receipts: _Optional[_Iterable[_Union[_intervention_pb2.Receipt, _Mapping]]] = ..., handles: _Optional[_Iterable[_Union[_handle_pb2.Handle, _Mapping]]] = ..., baseline_logits: _Optional[_Union[LogitsResult, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

class RunSummary(_message.Message):
    __slots__ = ("prompt_tokens", "queue_seconds", "engine_seconds", "fingerprint")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    queue_seconds: float
    engine_seconds: float
    fingerprint: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., engine_seconds: _Optional[float] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class RunResponse(_message.Message):
    __slots__ = ("result", "chunk", "summary")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    result: RunResult
    chunk: _tensor_pb2.TensorChunk
    summary: RunSummary
    def __init__(self, result: _Optional[_Union[RunResult, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., summary: _Optional[_Union[RunSummary, _Mapping]] = ...) -> None: ...
