from patchclamp.v1 import failure_pb2 as _failure_pb2
from patchclamp.v1 import handle_pb2 as _handle_pb2
from patchclamp.v1 import intervention_pb2 as _intervention_pb2
from patchclamp.v1 import logits_pb2 as _logits_pb2
from patchclamp.v1 import numerics_pb2 as _numerics_pb2
from patchclamp.v1 import prompt_pb2 as _prompt_pb2
from patchclamp.v1 import read_pb2 as _read_pb2
from patchclamp.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CONTEXT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CONTEXT: FinishReason
FINISH_REASON_ERROR: FinishReason

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "samples")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    samples: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class StopRules(_message.Message):
    __slots__ = ("max_new_tokens", "texts", "token_ids", "ignore_eos")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    texts: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    def __init__(self, max_new_tokens: _Optional[int] = ..., texts: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ...) -> None: ...

class ReceivedSample(_message.Message):
    __slots__ = ("sample_index", "token_ids")
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    sample_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sample_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("received", "seed")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    received: _containers.RepeatedCompositeFieldContainer[ReceivedSample]
    seed: int
    def __init__(self, received: _Optional[_Iterable[_Union[ReceivedSample, _Mapping]]] = ..., seed: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompt", "interventions", "reads", "sampling", "stop", "top_logprobs", "keep", "numerics", "profile", "resume")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: _prompt_pb2.Prompt
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    reads: _containers.RepeatedCompositeFieldContainer[_read_pb2.Read]
    sampling: Sampling
    stop: StopRules
    top_logprobs: int
    keep: _containers.RepeatedCompositeFieldContainer[_handle_pb2.Keep]
    numerics: _numerics_pb2.Numerics
    profile: str
    resume: Resume
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., reads: _Optional[_Iterable[_Union[_read_pb2.Read, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stop: _Optional[_Union[StopRules, _Mapping]] = ..., top_logprobs: _Optional[int] = ..., keep: _Optional[_Iterable[_Union[_handle_pb2.Keep, _Mapping]]] = ..., numerics: _Optional[_Union[_numerics_pb2.Numerics, str]] = ..., profile: _Optional[str] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class GenerationStart(_message.Message):
    __slots__ = ("prompt", "seed")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    prompt: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Token]
    seed: int
    def __init__(self, prompt: _Optional[_Iterable[_Union[_prompt_pb2.Token, _Mapping]]] = ..., seed: _Optional[int] = ...) -> None: ...

class GeneratedToken(_message.Message):
    __slots__ = ("sample_index", "token_index", "token", "text", "logprob", "top", "reads")
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    sample_index: int
    token_index: int
    token: _prompt_pb2.Token
    text: str
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[_logits_pb2.TokenProbability]
    reads: _containers.RepeatedCompositeFieldContainer[_read_pb2.ReadResult]
    def __init__(self, sample_index: _Optional[int] = ..., token_index: _Optional[int] = ..., token: _Optional[_Union[_prompt_pb2.Token, _Mapping]] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[_logits_pb2.TokenProbability, _Mapping]]] = ..., reads: _Optional[_Iterable[_Union[_read_pb2.ReadResult, _Mapping]]] = ...) -> None: ...

class SampleEnd(_message.Message):
    __slots__ = ("sample_index", "finish_reason", "failure", "receipts")
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    sample_index: int
    finish_reason: FinishReason
    failure: _failure_pb2.RunFailure
    receipts: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Receipt]
    def __init__(self, sample_index: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., failure: _Optional[_Union[_failure_pb2.RunFailure, _Mapping]] = ..., receipts: _Optional[_Iterable[_Union[_intervention_pb2.Receipt, _Mapping]]] = ...) -> None: ...

class GenerationSummary(_message.Message):
    __slots__ = ("prompt_tokens", "generated_tokens", "first_token_seconds", "engine_seconds", "handles", "fingerprint")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    engine_seconds: float
    handles: _containers.RepeatedCompositeFieldContainer[_handle_pb2.Handle]
    fingerprint: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., first_token_seconds: _Optional[float] = ..., engine_seconds: _Optional[float] = ..., handles: _Optional[_Iterable[_Union[_handle_pb2.Handle, _Mapping]]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("start", "token", "sample_end", "chunk", "summary")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_END_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    start: GenerationStart
    token: GeneratedToken
    sample_end: SampleEnd
    chunk: _tensor_pb2.TensorChunk
    summary: GenerationSummary
    def __init__(self, start: _Optional[_Union[GenerationStart, _Mapping]] = ..., token: _Optional[_Union[GeneratedToken, _Mapping]] = ..., sample_end: _Optional[_Union[SampleEnd, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., summary: _Optional[_Union[GenerationSummary, _Mapping]] = ...) -> None: ...
