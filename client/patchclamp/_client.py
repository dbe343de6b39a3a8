"""The client. `patchclamp.aio` has the same verbs for asyncio; what does no I/O is shared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from types import TracebackType
from typing import Literal, Self, overload

from patchclamp import _requests
from patchclamp._config import TLS, Config, resolve
from patchclamp._model_info import ModelInfo
from patchclamp._requests import Draft, Logits, Numerics, Prompt, Prompts, Reads, RunSpec, TokensLike
from patchclamp._results import Run, Tokens
from patchclamp._rpc import DESCRIBE, RUN, TOKENIZE, Connection, Deadline
from patchclamp._run_stream import RunStream, tokens_of
from patchclamp.errors import Error
from patchclamp.v1 import model_pb2


def connect(
    target: str | None = None, *, token: str | None = None, tls: TLS = None, timeout: float | None = None
) -> Client:
    """A client of the server at `target`. Connects on first use.

    Args:
        target: `"localhost:50051"`, `"unix:/path"` or `"dns:///name:port"` (all replicas behind the name, in turns).
            Left out: PATCHCLAMP_TARGET, else `localhost:50051`.
        token: Bearer token. Left out: PATCHCLAMP_TOKEN, else none.
        tls: True for TLS with the system's certificate authorities, a file of authorities, or the result of
            `grpc.ssl_channel_credentials`. Left out: plain text.
        timeout: Seconds that a verb may take, unless the call says otherwise; it travels as the call's deadline.
            Left out: PATCHCLAMP_TIMEOUT, else 120. `math.inf` for none.
    """
    return Client(resolve(target, token, tls, timeout))


class Client:
    """Talks to one patchclamp server. Made by `patchclamp.connect`; a context manager.

    Opens its connection on first use. Threads may share it. Processes may not: make one after a fork.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._connection = Connection(config)

    def describe(self, *, timeout: float | None = None) -> ModelInfo:
        """The model that the server holds: sizes, hook points, limits, and what the server can do."""
        deadline = Deadline(timeout, self._config.timeout)
        return ModelInfo.from_message(self._connection.unary(DESCRIBE, model_pb2.DescribeRequest(), deadline))

    @overload
    def tokenize(self, prompt: Prompt, *, special_tokens: bool = True, timeout: float | None = None) -> Tokens: ...
    @overload
    def tokenize(
        self, prompt: Prompts, *, special_tokens: bool = True, timeout: float | None = None
    ) -> list[Tokens]: ...
    def tokenize(
        self, prompt: Prompt | Prompts, *, special_tokens: bool = True, timeout: float | None = None
    ) -> Tokens | list[Tokens]:
        """Tokens of a prompt, or of each prompt of a list, as a run would see them.

        A prompt is text, a list of token ids or a list of chat messages. `special_tokens=False` adds none, such as a
        leading BOS, to text.
        """
        request = _requests.tokenize_request(_requests.listed(prompt), special_tokens=special_tokens)
        response = self._connection.unary(TOKENIZE, request, Deadline(timeout, self._config.timeout))
        tokens = tokens_of(response, request)
        return tokens if _requests.is_many(prompt) else tokens[0]

    @overload
    def run(
        self,
        prompt: Prompt,
        *,
        read: Reads | None = None,
        logits: Logits = "last",
        top_k: int | None = None,
        logprobs: TokensLike | None = None,
        loss: bool = False,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> Run: ...
    @overload
    def run(
        self,
        prompt: Prompts,
        *,
        read: Reads | None = None,
        logits: Logits = "last",
        top_k: int | None = None,
        logprobs: TokensLike | None = None,
        loss: bool = False,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> list[Run]: ...
    def run(
        self,
        prompt: Prompt | Prompts,
        *,
        read: Reads | None = None,
        logits: Logits = "last",
        top_k: int | None = None,
        logprobs: TokensLike | None = None,
        loss: bool = False,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> Run | list[Run]:
        """Runs the model over a prompt, or over each prompt of a list in one batch.

        Args:
            prompt: Text, a list of token ids (used as they are), or a list of chat messages. A list of prompts gives a
                list of runs.
            read: Activations to return: names such as `"blocks.*.resid_post"`, or `pc.read(..)` for rows, heads and
                reductions.
            logits: Rows of the logits to return: `"last"`, `"all"`, positions, or None for none.
            top_k: How many of the most probable next tokens each of these rows returns. Left out: 5; with `logits=None`
                none, and then the unembedding is not computed at all.
            logprobs: Tokens, by id or text, whose log-probabilities these rows return.
            loss: Return the loss of every token given those before it.
            numerics: `"default"`; `"deterministic"`: bitwise independent of what else the server does, where
                `describe().capabilities` has it; `"solo"`: a batch of one.
            timeout: Seconds, instead of the client's.
        """
        specs = _requests.specs_of(
            _requests.listed(prompt), read=read, logits=logits, top_k=top_k, logprobs=logprobs, loss=loss
        )
        runs = self.run_many(specs, numerics=numerics, timeout=timeout)
        return runs if _requests.is_many(prompt) else runs[0]

    @overload
    def run_many(
        self,
        runs: Sequence[RunSpec],
        *,
        numerics: Numerics = "default",
        return_exceptions: Literal[False] = False,
        timeout: float | None = None,
    ) -> list[Run]: ...
    @overload
    def run_many(
        self,
        runs: Sequence[RunSpec],
        *,
        numerics: Numerics = "default",
        return_exceptions: bool,
        timeout: float | None = None,
    ) -> list[Run | Error]: ...
    def run_many(
        self,
        runs: Sequence[RunSpec],
        *,
        numerics: Numerics = "default",
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> list[Run] | list[Run | Error]:
        """Runs of different kinds in one call and one batch.

        An invalid run refuses the whole request before anything runs, with `return_exceptions` too. A run that fails
        in the engine does so alone: when all are in, the first failure is raised, with all results in its `results`;
        with `return_exceptions` the errors stand in the list instead.
        """
        deadline = Deadline(timeout, self._config.timeout)
        draft = Draft(runs, numerics)
        answers = [self._connection.unary(TOKENIZE, request, deadline) for request in draft.lookups()]
        request = draft.request(answers)
        stream = RunStream(request)
        with closing(self._connection.stream(RUN, request, deadline)) as responses:
            for response in responses:
                stream.take(response)
        return stream.results() if return_exceptions else stream.runs()

    def close(self) -> None:
        """Closes the connection. Closing twice does no harm; a closed client stays closed."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._config.target!r})"
