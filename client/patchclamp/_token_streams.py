"""Generations as they come, over the connections of both clients: what they do besides I/O is in `GenerationState`."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from patchclamp._generation import GeneratedToken, Generation
from patchclamp._generation_requests import GenerationDraft
from patchclamp._generation_stream import GenerationState
from patchclamp._rpc import (
    GENERATE,
    TOKENIZE,
    AsyncConnection,
    AsyncResponses,
    Connection,
    Deadline,
    Responses,
)
from patchclamp.errors import Cancelled, Error
from patchclamp.v1 import generation_pb2 as pb

# Prompts of one list that are in generation at the same time.
AT_ONCE = 16

_CLOSED = "the stream was closed"


class _Progress:
    """How far a stream of tokens has come."""

    def __init__(
        self, draft: GenerationDraft, deadline: Deadline, number: int, request: pb.GenerateRequest | None
    ) -> None:
        self._draft = draft
        self._deadline = deadline
        self._number = number
        self._state = None if request is None else GenerationState(request, draft.edits)
        self._ready: deque[GeneratedToken] = deque()
        self._ended = False
        self._closed = False
        self._fault: Error | None = None
        self._result: Generation | None = None

    @property
    def begun(self) -> bool:
        """Whether the request was made, so that there is a `so_far`."""
        return self._state is not None

    @property
    def result(self) -> Generation:
        """All of it, once the stream has ended. Before that a RuntimeError; where it failed, its error."""
        if self._fault is not None:
            raise self._fault
        if self._result is None:
            raise RuntimeError("the stream has not ended: take its tokens first, or `.so_far`")
        return self._result

    @property
    def so_far(self) -> Generation:
        """What came until now: `finish_reason` is None, and receipts are missing, where a sample goes on."""
        if self._state is None:
            raise RuntimeError("the stream has not begun: take a token first")
        return self._state.result

    def _failed(self, fault: Error) -> Error:
        """The error that ends the stream, in the caller's own names."""
        self._ended = True
        if fault is self._fault:
            return fault
        if self._closed and not isinstance(fault, Cancelled):
            fault = Cancelled(_CLOSED, reason="CANCELLED")
        self._fault = self._draft.explain(fault, self._number)
        return self._fault

    def _finish(self, state: GenerationState) -> None:
        self._ended = True
        try:
            state.finish()
        except Error as fault:
            self._fault = fault
            raise
        self._result = state.result

    def __repr__(self) -> str:
        if self._state is None:
            return f"{type(self).__name__}(not begun)"
        return f"{type(self).__name__}({'ended' if self._ended else 'open'}, {self._state.result!r})"


class GenerationStream(_Progress, Iterator[GeneratedToken]):
    """Tokens of a generation as they come; after the last one, `result` is the whole `Generation`.

    Made by `client.stream`. Leaving it early cancels the call: as a context manager, by `close()`, or when nothing
    refers to it any more, as after a `break` out of `for token in client.stream(..)`. Any thread may close it.

    A connection that breaks under way is taken up again a few times, behind the tokens that came; no token comes twice
    or is lost. Not so where a read is reduced by `"mean"` or `"moments"`, which cannot be gone on with.
    """

    def __init__(
        self,
        connection: Connection,
        draft: GenerationDraft,
        deadline: Deadline,
        *,
        number: int = 0,
        request: pb.GenerateRequest | None = None,
    ) -> None:
        super().__init__(draft, deadline, number, request)
        self._connection = connection
        self._responses: Responses[pb.GenerateResponse] | None = None
        self._leave = threading.Event()

    def __next__(self) -> GeneratedToken:
        while not self._ready:
            if self._ended or self._closed:
                raise StopIteration
            self._receive()
        return self._ready.popleft()

    def close(self) -> None:
        """Cancels the call, unless it has ended. Closing twice does no harm."""
        self._closed = True
        self._leave.set()
        if self._responses is not None:
            self._responses.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_responses", None) is not None and not self._ended:
            self.close()

    def _receive(self) -> None:
        """Waits for one message, or takes a broken stream up again."""
        try:
            responses, state = self._opened()
            try:
                response = next(responses, None)
            except Error as fault:
                self._again(state, fault)
                return
            if response is None:
                self._finish(state)
            else:
                self._ready.extend(state.take(response))
        except Error as fault:
            if self._responses is not None:
                self._responses.close()
            failed = self._failed(fault)
            raise failed from failed.__cause__

    def _opened(self) -> tuple[Responses[pb.GenerateResponse], GenerationState]:
        if self._state is None:
            answers = [self._connection.unary(TOKENIZE, ask, self._deadline) for ask in self._draft.lookups()]
            self._state = GenerationState(self._draft.requests(answers)[0], self._draft.edits)
        if self._responses is None:
            self._responses = self._connection.stream(GENERATE, self._state.request, self._deadline)
            if self._closed:  # meanwhile, by another thread
                self._responses.close()
        return self._responses, self._state

    def _again(self, state: GenerationState, fault: Error) -> None:
        if self._closed:
            raise fault
        pause = state.pause(fault, self._deadline)
        if pause is None:
            self._finish(state)
            return
        self._responses = None
        self._leave.wait(pause)


class AsyncGenerationStream(_Progress, AsyncIterator[GeneratedToken]):
    """Tokens of a generation as they come, for asyncio; after the last one, `result` is the whole `Generation`.

    Made by `client.stream`, which is not awaited: `async for token in client.stream(..)`. Leaving it early cancels the
    call: as an async context manager, by `close()`, or when nothing refers to it any more, as after a `break`.

    A connection that breaks under way is taken up again a few times, behind the tokens that came; no token comes twice
    or is lost. Not so where a read is reduced by `"mean"` or `"moments"`, which cannot be gone on with.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        draft: GenerationDraft,
        deadline: Deadline,
        *,
        number: int = 0,
        request: pb.GenerateRequest | None = None,
    ) -> None:
        super().__init__(draft, deadline, number, request)
        self._connection = connection
        self._responses: AsyncResponses[pb.GenerateResponse] | None = None

    async def __anext__(self) -> GeneratedToken:
        while not self._ready:
            if self._ended or self._closed:
                raise StopAsyncIteration
            await self._receive()
        return self._ready.popleft()

    async def close(self) -> None:
        """Cancels the call, unless it has ended. Closing twice does no harm."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        if getattr(self, "_responses", None) is not None and not self._ended:
            self._leave()

    def _leave(self) -> None:
        self._closed = True
        if self._responses is not None:
            self._responses.cancel()

    async def _receive(self) -> None:
        """Waits for one message, or takes a broken stream up again."""
        try:
            responses, state = await self._opened()
            try:
                response = await anext(responses, None)
            except Error as fault:
                await self._again(state, fault)
                return
            if response is None:
                self._finish(state)
            else:
                self._ready.extend(state.take(response))
        except Error as fault:
            if self._responses is not None:
                self._responses.cancel()
            failed = self._failed(fault)
            raise failed from failed.__cause__
        except asyncio.CancelledError:
            self._tell_if_closed()
            self._leave()
            raise

    async def _opened(self) -> tuple[AsyncResponses[pb.GenerateResponse], GenerationState]:
        if self._state is None:
            answers = [await self._connection.unary(TOKENIZE, ask, self._deadline) for ask in self._draft.lookups()]
            self._state = GenerationState(self._draft.requests(answers)[0], self._draft.edits)
        if self._responses is None:
            self._responses = self._connection.stream(GENERATE, self._state.request, self._deadline)
        return self._responses, self._state

    async def _again(self, state: GenerationState, fault: Error) -> None:
        if self._closed:
            raise fault
        pause = state.pause(fault, self._deadline)
        if pause is None:
            self._finish(state)
            return
        self._responses = None
        await asyncio.sleep(pause)

    def _tell_if_closed(self) -> None:
        """gRPC tells the task that waits for a closed stream by CancelledError, which only a cancelled task should
        see."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise self._failed(Cancelled(_CLOSED, reason="CANCELLED")) from None


def generated(streams: Sequence[GenerationStream]) -> list[Generation]:
    """The results of streams that run at the same time. When all have ended, raises the first failure, which then
    carries all results."""
    if len(streams) == 1:
        return _all_of([_result(streams[0])])
    # Each is read by a thread of its own: the server waits for none that is read too late.
    with ThreadPoolExecutor(min(len(streams), AT_ONCE), "patchclamp-generate") as threads, ExitStack() as leaving:
        for stream in streams:
            leaving.push(stream)
        return _all_of(list(threads.map(_result, streams)))


def _result(stream: GenerationStream) -> Generation | Error:
    with stream:
        try:
            for _ in stream:
                pass
            return stream.result
        except Error as fault:
            return fault


async def generated_async(streams: Sequence[AsyncGenerationStream]) -> list[Generation]:
    """The results of streams that run at the same time. When all have ended, raises the first failure, which then
    carries all results."""
    room = asyncio.Semaphore(AT_ONCE)

    async def result(stream: AsyncGenerationStream) -> Generation | Error:
        async with room, stream:
            try:
                async for _ in stream:
                    pass
                return stream.result
            except Error as fault:
                return fault

    return _all_of(await asyncio.gather(*map(result, streams)))


def _all_of(results: Sequence[Generation | Error]) -> list[Generation]:
    failures = [result for result in results if isinstance(result, Error)]
    if failures:
        failures[0].results = tuple(results) if len(results) > 1 else ()
        raise failures[0] from failures[0].__cause__
    return [result for result in results if isinstance(result, Generation)]
