"""The client. `patchclamp.aio` has the same verbs for asyncio; what does no I/O is shared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from types import TracebackType
from typing import Literal, Self, SupportsFloat, SupportsIndex, overload

from patchclamp import _requests
from patchclamp._config import TLS, Config, resolve
from patchclamp._generation import Generation
from patchclamp._generation_requests import GenerationDraft, Stop
from patchclamp._model_info import ModelInfo
from patchclamp._requests import Draft, Interventions, Logits, Numerics, Prompt, Prompts, Reads, RunSpec, TokensLike
from patchclamp._results import Run, Tokens
from patchclamp._rpc import DESCRIBE, RUN, TOKENIZE, Connection, Deadline
from patchclamp._run_stream import RunStream, tokens_of
from patchclamp._token_streams import GenerationStream, generated
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
        interventions: Interventions | None = None,
        logits: Logits = "last",
        top_k: int | None = None,
        logprobs: TokensLike | None = None,
        loss: bool = False,
        baseline: bool = False,
        keep: Reads | None = None,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> Run: ...
    @overload
    def run(
        self,
        prompt: Prompts,
        *,
        read: Reads | None = None,
        interventions: Interventions | None = None,
        logits: Logits = "last",
        top_k: int | None = None,
        logprobs: TokensLike | None = None,
        loss: bool = False,
        baseline: bool = False,
        keep: Reads | None = None,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> list[Run]: ...
    def run(
        self,
        prompt: Prompt | Prompts,
        *,
        read: Reads | None = None,
        interventions: Interventions | None = None,
        logits: Logits = "last",
        top_k: int | None = None,
        logprobs: TokensLike | None = None,
        loss: bool = False,
        baseline: bool = False,
        keep: Reads | None = None,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> Run | list[Run]:
        """Runs the model over a prompt, or over each prompt of a list in one batch.

        Args:
            prompt: Text, a list of token ids (used as they are), or a list of chat messages. A list of prompts gives a
                list of runs.
            read: Activations to return: names such as `"blocks.*.resid_post"`, or `pc.read(..)` for rows, heads and
                reductions.
            interventions: Edits of the run, in the order of application: `pc.add(..)`, `pc.ablate(..)` and so on. One
                that selects no position fails its run with InterventionNeverFired; `run.receipts` tells what each did.
            logits: Rows of the logits to return: `"last"`, `"all"`, positions, or None for none.
            top_k: How many of the most probable next tokens each of these rows returns. Left out: 5; with `logits=None`
                none, and then the unembedding is not computed at all.
            logprobs: Tokens, by id or text, whose log-probabilities these rows return.
            loss: Return the loss of every token given those before it.
            baseline: Run once more without the interventions, in the same batch, and return those logits too, in
                `run.baseline`.
            keep: Activations to keep on the server, named as in `read`: `run.handles` has the handles, which later
                calls take as vectors or as sources of patches.
            numerics: `"default"`; `"deterministic"`: bitwise independent of what else the server does, where
                `describe().capabilities` has it; `"solo"`: a batch of one.
            timeout: Seconds, instead of the client's.
        """
        specs = _requests.specs_of(
            _requests.listed(prompt),
            read=read,
            interventions=interventions,
            logits=logits,
            top_k=top_k,
            logprobs=logprobs,
            loss=loss,
            baseline=baseline,
            keep=keep,
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
        with `return_exceptions` the errors stand in the list instead. Interventions may refer to other runs of the call
        by their index in `runs`.
        """
        deadline = Deadline(timeout, self._config.timeout)
        draft = Draft(runs, numerics)
        answers = [self._connection.unary(TOKENIZE, request, deadline) for request in draft.lookups()]
        request = draft.request(answers)
        stream = RunStream(request, draft.edits)
        try:
            with closing(self._connection.stream(RUN, request, deadline)) as responses:
                for response in responses:
                    stream.take(response)
        except Error as fault:
            raise draft.explain(fault) from fault.__cause__
        return stream.results() if return_exceptions else stream.runs()

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: SupportsIndex = 64,
        interventions: Interventions | None = None,
        read: Reads | None = None,
        temperature: SupportsFloat = 0.0,
        top_k: SupportsIndex = 0,
        top_p: SupportsFloat = 1.0,
        repetition_penalty: SupportsFloat = 1.0,
        seed: SupportsIndex | None = None,
        samples: SupportsIndex = 1,
        stop: Stop = None,
        ignore_eos: bool = False,
        top_logprobs: SupportsIndex = 0,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        max_new_tokens: SupportsIndex = 64,
        interventions: Interventions | None = None,
        read: Reads | None = None,
        temperature: SupportsFloat = 0.0,
        top_k: SupportsIndex = 0,
        top_p: SupportsFloat = 1.0,
        repetition_penalty: SupportsFloat = 1.0,
        seed: SupportsIndex | None = None,
        samples: SupportsIndex = 1,
        stop: Stop = None,
        ignore_eos: bool = False,
        top_logprobs: SupportsIndex = 0,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        max_new_tokens: SupportsIndex = 64,
        interventions: Interventions | None = None,
        read: Reads | None = None,
        temperature: SupportsFloat = 0.0,
        top_k: SupportsIndex = 0,
        top_p: SupportsFloat = 1.0,
        repetition_penalty: SupportsFloat = 1.0,
        seed: SupportsIndex | None = None,
        samples: SupportsIndex = 1,
        stop: Stop = None,
        ignore_eos: bool = False,
        top_logprobs: SupportsIndex = 0,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> Generation | list[Generation]:
        """Goes on with a prompt, or with each prompt of a list at the same time.

        Args:
            prompt: Text, a list of token ids (used as they are), or a list of chat messages. A list of prompts gives a
                list of generations; when all are in, the first failure is raised, with all results in its `results`.
            max_new_tokens: Most tokens to generate.
            interventions: Edits, in the order of application; `pc.PROMPT` and `pc.GENERATED` tell tokens of the prompt
                from those that follow it. One that selects no position fails with InterventionNeverFired;
                `generation.receipts` tells what each did.
            read: Activations to return, as in `run`: the prompt's rows and those of the generated tokens but the last.
            temperature: 0: greedy, always the most probable token; otherwise logits are divided by it.
            top_k: Choose among the k most probable tokens. 0: among all.
            top_p: Choose among the most probable tokens whose probabilities reach this sum, 0 < p <= 1.
            repetition_penalty: Divides positive and multiplies negative logits of tokens already present.
            seed: What the choice depends on, besides sample and place. Left out: the server's choice, in
                `generation.seed`.
            samples: How many continuations. Of several, those that fail while others go on have their `error` in
                `generation.samples`; where none goes on, it is raised.
            stop: Texts and token ids, mixed, that end a sample besides the model's own end of sequence. A text is not
                part of what is returned.
            ignore_eos: Go on past the model's end of sequence.
            top_logprobs: How many of the most probable tokens each place returns.
            numerics: `"default"`; `"deterministic"`: bitwise independent of what else the server does, where
                `describe().capabilities` has it; `"solo"`: a batch of one.
            timeout: Seconds, instead of the client's.
        """
        deadline = Deadline(timeout, self._config.timeout)
        draft = GenerationDraft(
            prompt,
            max_new_tokens=max_new_tokens,
            interventions=interventions,
            read=read,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            samples=samples,
            stop=stop,
            ignore_eos=ignore_eos,
            top_logprobs=top_logprobs,
            numerics=numerics,
        )
        answers = [self._connection.unary(TOKENIZE, request, deadline) for request in draft.lookups()]
        streams = [
            GenerationStream(self._connection, draft, deadline, number=number, request=request)
            for number, request in enumerate(draft.requests(answers))
        ]
        generations = generated(streams)
        return generations if _requests.is_many(prompt) else generations[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: SupportsIndex = 64,
        interventions: Interventions | None = None,
        read: Reads | None = None,
        temperature: SupportsFloat = 0.0,
        top_k: SupportsIndex = 0,
        top_p: SupportsFloat = 1.0,
        repetition_penalty: SupportsFloat = 1.0,
        seed: SupportsIndex | None = None,
        samples: SupportsIndex = 1,
        stop: Stop = None,
        ignore_eos: bool = False,
        top_logprobs: SupportsIndex = 0,
        numerics: Numerics = "default",
        timeout: float | None = None,
    ) -> GenerationStream:
        """Tokens of a generation as they come; after the last one, the stream's `result` is the whole generation.

        Takes one prompt, and otherwise what `generate` does. The tokens of several samples come mixed: `token.sample`
        tells them apart. Leaving the stream early cancels the call: use it as a context manager, close it, or `break`
        out of the loop that made it.

        A connection that breaks is taken up again a few times behind the tokens that came, within the timeout;
        otherwise its error is raised: FailedPrecondition where a handle that the request used is gone. The server holds
        some hundred tokens for a slow reader; one that falls further behind ends with Overloaded.
        """
        draft = GenerationDraft(
            _requests.one_prompt(prompt),
            max_new_tokens=max_new_tokens,
            interventions=interventions,
            read=read,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            samples=samples,
            stop=stop,
            ignore_eos=ignore_eos,
            top_logprobs=top_logprobs,
            numerics=numerics,
        )
        return GenerationStream(self._connection, draft, Deadline(timeout, self._config.timeout))

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
