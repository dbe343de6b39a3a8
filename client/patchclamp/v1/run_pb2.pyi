from patchclamp.v1 import failure_pb2 as _failure_pb2
from patchclamp.v1 import generation_pb2 as _generation_pb2
from patchclamp.v1 import handle_pb2 as _handle_pb2
from patchclamp.v1 import intervention_pb2 as _intervention_pb2
from patchclamp.v1 import logits_pb2 as _logits_pb2
from patchclamp.v1 import numerics_pb2 as _numerics_pb2
from patchclamp.v1 import prompt_pb2 as _prompt_pb2
from patchclamp.v1 import read_pb2 as _read_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    logits: _logits_pb2.LogitsRequest
    loss: bool
    keep: _containers.RepeatedCompositeFieldContainer[_handle_pb2.Keep]
    baseline: bool
    profile: str
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., reads: _Optional[_Iterable[_Union[_read_pb2.Read, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., logits: _Optional[_Union[_logits_pb2.LogitsRequest, _Mapping]] = ..., loss: bool = ..., keep: _Optional[_Iterable[_Union[_handle_pb2.Keep, _Mapping]]] = ..., baseline: bool = ..., profile: _Optional[str] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("model", "runs", "numerics")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    model: str
    runs: _containers.RepeatedCompositeFieldContainer[RunSpec]
    numerics: _numerics_pb2.Numerics
    def __init__(self, model: _Optional[str] = ..., runs: _Optional[_Iterable[_Union[RunSpec, _Mapping]]] = ..., numerics: _Optional[_Union[_numerics_pb2.Numerics, str]] = ...) -> None: ...

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
    failure: _failure_pb2.RunFailure
    tokens: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Token]
    reads: _containers.RepeatedCompositeFieldContainer[_read_pb2.ReadResult]
    logits: _logits_pb2.LogitsResult
    loss: _tensor_pb2.Tensor
    receipts: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Receipt]
    handles: _containers.RepeatedCompositeFieldContainer[_handle_pb2.Handle]
    baseline_logits: _logits_pb2.LogitsResult
    text: str
    def __init__(self, run_index: _Optional[int] = ..., failure: _Optional[_Union[_failure_pb2.RunFailure, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[_prompt_pb2.Token, _Mapping]]] = ..., reads: _Optional[_Iterable[_Union[_read_pb2.ReadResult, _Mapping]]] = ..., logits: _Optional[_Union[_logits_pb2.LogitsResult, _Mapping]] = ..., loss: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., receipts: _Optional[_Iterable[_Union[_intervention_pb2.Receipt, _Mapping]]] = ..., handles: _Optional[_Iterable[_Union[_handle_pb2.Handle, _Mapping]]] = ..., baseline_logits: _Optional[_Union[_logits_pb2.LogitsResult, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

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
